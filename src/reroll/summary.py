"""The tables at the end of a run: held-out before and after, tokens and seconds by category."""

from typing import Any

from rich.console import Console
from rich.table import Table

from reroll.audit import gap_warning, pooled_gap
from reroll.config import load_config
from reroll.ledger import CATEGORIES
from reroll.pruning import earnings
from reroll.rundir import RunDir
from reroll.train.checkpoint import checkpoints


def print_summary(run: RunDir, console: Console | None = None) -> dict[str, Any]:
    """Print what a run achieved and where it is; returns the figures."""
    console = console or Console(highlight=False)
    records = run.records()
    evaluations = [r for r in records if r["kind"] == "eval"]
    steps = [r for r in records if r["kind"] == "train"]
    figures: dict[str, Any] = {"steps": len(steps)}
    if evaluations:
        figures |= {"before": evaluations[0], "after": evaluations[-1]}
        console.print(evaluation_table(evaluations[0], evaluations[-1]))
    if steps:
        console.print(_ledger_table(steps))
        console.print(_replies_table(steps))
    if steps and "reused_tokens" in steps[0]:
        console.print(_reuse_table(steps))
        if warning := gap_warning(steps, load_config(run.config_path).reuse):
            console.print(warning, style="bold red")
    if rows := earnings(steps):
        console.print(_prune_table(steps, rows))
    newest = max(checkpoints(run.checkpoints).items(), default=None)
    console.print("Written:")
    for path in (
        newest[1] if newest else None,
        run.metrics_path,
        run.samples_path,
        run.path / "curves.png",
        run.path / "timeline.png",
    ):
        if path is not None and path.exists():
            console.print(f"  {path}", soft_wrap=True)
    return figures


def evaluation_table(before: dict[str, Any], after: dict[str, Any] | None = None) -> Table:
    """Held-out figures with their 95 % intervals; `after` adds a column and the difference."""
    size = f"{before['problems']:.0f} problems, {before['samples']:.0f} samples each"
    table = Table(title=f"Held-out ({size})", title_justify="left")
    table.add_column("")
    one = "result" if after is None else f"before (step {before['step']})"
    table.add_column(one, justify="right")
    if after is not None:
        table.add_column(f"after (step {after['step']})", justify="right")
        table.add_column("change", justify="right")
    for key in before:
        if f"{key}_low" not in before:
            continue
        cells = [_with_interval(before, key)]
        if after is not None:
            cells += [_with_interval(after, key), f"{after[key] - before[key]:+.3f}"]
        table.add_row(_label(key), *cells)
    cells = [f"{before['length']:.1f}"]
    if after is not None:
        cells += [f"{after['length']:.1f}", f"{after['length'] - before['length']:+.1f}"]
    table.add_row("completion length (tokens)", *cells)
    return table


def _label(key: str) -> str:
    names = {"reward": "reward at temperature", "greedy_reward": "reward, greedy"}
    return names.get(key, key)


def _with_interval(record: dict[str, Any], key: str) -> str:
    return f"{record[key]:.3f} [{record[f'{key}_low']:.3f}, {record[f'{key}_high']:.3f}]"


def _ledger_table(steps: list[dict[str, Any]]) -> Table:
    table = Table(title="Training steps by category", title_justify="left")
    for name in ("", "tokens", "GFLOPs", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    for category in CATEGORIES:
        tokens, flops, seconds = (
            sum(r[f"{kind}_{category}"] for r in steps) for kind in ("tokens", "flops", "seconds")
        )
        name = "grade (beside the engine)" if category == "grade" else category
        shown = [f"{tokens:,.0f}" if tokens else "-", f"{flops / 1e9:,.0f}" if flops else "-"]
        table.add_row(name, *shown, f"{seconds:.1f}")
    return table


def _reuse_table(steps: list[dict[str, Any]]) -> Table:
    """What drafts saved, by fifths of the run, and what the audits found."""
    part = max(1, len(steps) // 5)
    table = Table(title="Reuse of old rollouts", title_justify="left")
    for name in ("", f"first {part} steps", f"last {part} steps"):
        table.add_column(name, justify="right" if name else "left")
    shares = (
        ("tokens taken from drafts", "reused_tokens"),
        ("rollouts reused whole", "full_reuse"),
        ("rollouts written before", "duplicates"),
    )
    for name, key in shares:
        ends = (sum(r[key] for r in rows) / part for rows in (steps[:part], steps[-part:]))
        table.add_row(name, *(f"{share:.2f}" for share in ends))
    if pooled := pooled_gap(steps):
        rewards = (("trained on", "reward_trained_on"), ("fresh samples", "reward_fresh"))
        audits = [r for r in steps if "reward_gap" in r]
        for name, key in rewards:
            cells = (f"step {r['step']}: {r[key]:.3f}" for r in (audits[0], audits[-1]))
            table.add_row(f"reward, {name} (audit)", *cells)
        gap = f"{pooled.gap:+.3f} ± {pooled.half(0.05):.3f}"
        table.add_row(f"mean gap of {len(audits)} audits", "", gap)
    return table


def _prune_table(steps: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Table:
    """What pruning earns against its rivals, tried on the groups that were left whole."""
    groups = sum(r["whole_groups"] for r in steps)
    title = f"Tokens of a group, each way tried on {groups:.0f} whole ones, at this run's costs"
    table = Table(title=title, title_justify="left")
    for name in ("", "drawn", "trained", "seconds", "with signal", "variance"):
        table.add_column(name, justify="right" if name else "left")
    names = {
        "all": "all",
        "fewer": "fewer started",
        "pods": "chosen at the end",
        "pruned": "pruned",
    }
    for row in rows:
        table.add_row(
            names[row["arm"]],
            f"{row['drawn']:,.0f}",
            f"{row['trained']:,.0f}",
            f"{row['seconds']:.3g}",
            f"{row['live']:.2f}",
            f"{row['variance']:.3f}",
        )
    return table


def _replies_table(steps: list[dict[str, Any]]) -> Table:
    """First and last fifth of the training steps."""
    part = max(1, len(steps) // 5)
    table = Table(title="Training rollouts", title_justify="left")
    for name in ("", f"first {part} steps", f"last {part} steps"):
        table.add_column(name, justify="right" if name else "left")
    rows = (("reward", 3), ("length", 1), ("entropy", 3), ("live_groups", 2), ("truncated", 3))
    for key, digits in rows:
        first = sum(r[key] for r in steps[:part]) / part
        last = sum(r[key] for r in steps[-part:]) / part
        table.add_row(key.replace("_", " "), f"{first:.{digits}f}", f"{last:.{digits}f}")
    return table
