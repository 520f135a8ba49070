"""The command `reroll collect`: traces of hard problems, and whether starting from them can pay."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from reroll.collection import gather, probe
from reroll.config import Config
from reroll.errors import UserError
from reroll.imports import import_run, import_texts
from reroll.prefixes import cuts_of, trace_path
from reroll.rollout.traces import TraceStore
from reroll.setup import prepare

PASSES = 3.0
"""forwards that training on a token costs"""
PAYS = 2.0
"""what a live group must cost less from which a verdict is for prefixes"""


def collect_first(config: Config) -> None:
    """Traces for a run that has none yet; goes on where a kill has interrupted this."""
    path = trace_path(config)
    if path.exists():
        with TraceStore(path) as store:
            if "finished" in store.meta():
                return
    collect_traces(config, probes=0, quiet=config.log.display == "off")


def collect_traces(
    config: Config, probes: int = 32, texts: str = "", run: str = "", quiet: bool = False
) -> dict[str, Any]:
    """Collect what the configuration asks for; print and return what came of it.

    probes: hard problems of which fresh groups are sampled then, with a prefix and without. texts,
    run: a JSONL file of solutions, or a run, whose traces are taken in instead of sampling.
    """
    console, path = Console(highlight=False, quiet=quiet), trace_path(config)
    if not path.parent.is_dir():
        raise UserError(f"prefix.traces = {str(path)!r}: no folder {str(path.parent)!r}")
    with TraceStore(path) as store, prepare(_with(config, False), None, None) as parts:
        if texts or run:
            take = (
                import_texts(config, parts, store, Path(texts))
                if texts
                else import_run(config, parts, store, Path(run))
            )
            console.print(f"Of {take[1]} solutions {take[0]} are successes to the graders")
        else:
            try:
                with _progress(console, config) as say:
                    gather(config, parts, store, say)
            except KeyboardInterrupt:
                console.print("stopped; the same command goes on after the last whole wave")
                raise
        report = _report(config, store)
    if probes and (report["hard"] or report["imported"]):
        with prepare(_with(config, True), None, None) as parts, TraceStore(path) as store:
            assert parts.start is not None
            cuts = cuts_of(config, parts.start, parts.decode)
            report |= probe(config, parts, store, cuts, probes)
            report |= store.ledger()
        judge(report, config.rollout.samples)
    console.print(_table(report))
    if probes:
        console.print(_verdict(report, config), soft_wrap=True)
    console.print(f"Written: {path}", soft_wrap=True)
    return report


def _with(config: Config, on: bool) -> Config:
    """The configuration with prefixes or without, and no drafts."""
    prefix = config.prefix.model_copy(update={"on": on})
    reuse = config.reuse.model_copy(update={"on": False})
    return config.model_copy(update={"prefix": prefix, "reuse": reuse})


@contextmanager
def _progress(console: Console, config: Config) -> Iterator[Callable[[int, int, int], None]]:
    """Shows problems settled: a bar on a terminal, lines elsewhere."""
    mode = config.log.display
    if mode == "auto":
        mode = "rich" if console.is_terminal else "plain"
    if mode != "rich":

        def line(solved: int, settled: int, problems: int) -> None:
            if mode == "plain":
                console.print(f"collect: {solved} of {problems} solved, {problems - settled} open")

        yield line
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("collect", total=None)

        def move(solved: int, settled: int, problems: int) -> None:
            text = f"collect: {solved} of {problems} solved"
            bars.update(task, description=text, completed=settled, total=problems)

        yield move


def _report(config: Config, store: TraceStore) -> dict[str, Any]:
    """What became of the problems, and what it cost."""
    tried, screen = store.tried().values(), config.collect.screen
    solved = [one.solved_at for one in tried if one.solved_at is not None]
    unsolved = [one.attempts for one in tried if one.solved_at is None]
    return {
        "problems": len(tried),
        "easy": sum(at < screen for at in solved),
        "hard": sum(at >= screen for at in solved),
        "imported": sum(trace.source != "collected" for trace in store.traces()),
        "unsolved": sum(n >= config.collect.cap for n in unsolved),
        "open": sum(n < config.collect.cap for n in unsolved),
        "attempts": sum(one.attempts for one in tried),
        **store.ledger(),
    }


def judge(report: dict[str, Any], samples: int) -> None:
    """Add what decides it: `factor`, how many times as much a live group costs without a prefix,
    and `worth`, such groups that sampling would have found for the attempts at the traces.

    samples: rollouts of a group.
    """
    costs = [_cost(name, report, samples) for name in ("original", "prefixed")]
    report["factor"] = costs[0] / costs[1]
    report["worth"] = report["attempts"] * _live("original", report, samples) / samples


def _live(name: str, report: dict[str, Any], samples: int) -> float:
    """Share of groups with unequal rewards.

    Where no probed one was, what attempts at hard problems say: one success among that many; of
    prefixed groups, as if the next one were live.
    """
    if live := report[f"live_{name}"]:
        return live
    if name == "original" and report["attempts"]:
        return 1 - (1 - min(1.0, report["hard"] / report["attempts"])) ** samples
    return 1 / (report["problems_probed"] + 1)


def _cost(name: str, report: dict[str, Any], samples: int) -> float:
    """Token forwards for one live group's rollout: sampled until one is live, then trained on."""
    return report[f"length_{name}"] * (1 / _live(name, report, samples) + PASSES)


def _table(report: dict[str, Any]) -> Table:
    table = Table(title="Collected", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for label, key in (
        ("problems", "problems"),
        ("solved while screening (not hard)", "easy"),
        ("hard and solved: traces", "hard"),
        ("unsolved in collect.cap attempts", "unsolved"),
        ("left open at collect.traces", "open"),
        ("taken in from elsewhere: traces", "imported"),
        ("attempts", "attempts"),
        ("tokens drawn", "tokens"),
    ):
        table.add_row(label, f"{report.get(key, 0):,.0f}")
    table.add_row("FLOPs, counted as the paper does", f"{report.get('flops_paper', 0):.3g}")
    table.add_row("FLOPs, cached tokens free, with attention", f"{report.get('flops', 0):.3g}")
    for name in ("original", "prefixed"):
        if f"live_{name}" in report:
            table.add_row(f"success, {name}", f"{report[f'success_{name}']:.3f}")
            table.add_row(f"groups with unequal rewards, {name}", f"{report[f'live_{name}']:.3f}")
    return table


def _verdict(report: dict[str, Any], config: Config) -> str:
    """Whether prefixes can pay, from the share of live groups; docs/techniques/prefix.md."""
    if "factor" not in report:
        return (
            f"No hard problem was solved: nothing to start from. Of {report['problems']} problems "
            f"{report['easy']} were solved within collect.screen = {config.collect.screen}"
        )
    live, factor = report["live_original"], report["factor"]
    said = (
        f"{live:.0%} of the groups of {config.rollout.samples} without prefix have unequal rewards "
        f"(with one: {report['live_prefixed']:.0%}): a live group costs {factor:.1f} times as much "
        "without."
    )
    if factor < PAYS:
        return f"{said} Prefixes can hardly pay here; train without them"
    if report["attempts"]:
        said += (
            f" Sampling these traces cost as much as sampling {report['worth']:.0f} such groups "
            "does without."
        )
    return (
        f"{said} Prefixes can pay where plain training needs many more of them to get going; "
        "compare with SFT on these traces first"
    )
