"""Pictures of a run: `curves.png` from metrics.jsonl, `timeline.png` from timeline.jsonl."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reroll.config import load_config
from reroll.rundir import RunDir
from reroll.timeline import draw_timeline, one_after_another, read_timeline

_PANELS = (
    ("reward", "mean reward"),
    ("length", "completion length (tokens)"),
    ("entropy", "entropy (nats per token)"),
    ("live_groups", "share of groups with signal"),
)
_REUSE = (
    ("reused_tokens", "share of tokens taken from drafts"),
    ("duplicates", "share of rollouts written before"),
)
"""panels of a run that reuses rollouts"""
_PRUNE = (
    ("within_auc", "area inside whole groups (ROC)"),
    ("calibration_error", "calibration error"),
)
"""panels of a run that prunes by a signal"""
_PARTS = {"prefixed": "#4477aa", "original": "#cc6677", "easy": "#228833"}


def plot_run(run: RunDir) -> Path | None:
    """Draw reward, length, entropy and live groups over the steps; None if there is nothing yet.

    A run that prunes by a signal has panels of how well that tells rollouts apart, one that reuses
    rollouts of that, one that starts from prefixes of its parts and of the ladder. Where it is
    audited, the reward of what it trained on stands beside that of fresh samples, under its own
    name: it is not the policy's.
    """
    records = run.records()
    steps = [r for r in records if r["kind"] == "train"]
    if not steps:
        return None
    # the object interface: no global state, no display needed
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _PANELS
    for more in (_REUSE, _PRUNE):
        panels += more if any(more[0][0] in r for r in steps) else ()
    audits = [r for r in steps if "reward_gap" in r]
    evaluations = [r for r in records if r["kind"] == "eval"]
    rows = len(panels) // 2 + (mixed := any("groups_prefixed" in r for r in steps))
    figure = Figure(figsize=(10, 3.25 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2).flatten()
    trained_on = "rollouts trained on (reused)" if _biased(run) else "training rollouts"
    for axis, (key, label) in zip(axes, panels, strict=False):
        name = trained_on if key == "reward" else None
        at, values = zip(*((r["step"], r[key]) for r in steps if key in r), strict=True)
        axis.plot(at, values, color="#4477aa", label=name)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    if audits:
        at, fresh = [r["step"] for r in audits], [r["reward_fresh"] for r in audits]
        axes[0].plot(at, fresh, "s-", color="#228833", label="fresh samples (audit)")
    for axis, (key, _) in zip(axes, panels, strict=False):
        if key == "within_auc":
            axis.axhline(0.5, color="#999999", linestyle=":", label="chance")
            axis.legend(loc="best", frameon=False)
    _held_out(axes[0], evaluations)
    if mixed:
        _parts(axes[-2], steps)
        _ladder(axes[-1], evaluations)
    axes[0].legend(loc="best", frameon=False)
    for axis in axes:  # last: from then on the view stays as it is
        axis.set_ylim(bottom=0)
    path = run.path / "curves.png"
    figure.savefig(path, dpi=110)
    if run.timeline_path.exists() and (batches := read_timeline(run.timeline_path)):
        draw_timeline(one_after_another(batches), run.path / "timeline.png")
    return path


def _biased(run: RunDir) -> bool:
    """Whether what the run trained on need not be what its policy writes."""
    if not run.config_path.exists():
        return False
    reuse = load_config(run.config_path).reuse
    return reuse.on and reuse.rule != "fresh"


def _held_out(axis: Any, evaluations: Sequence[dict[str, Any]]) -> None:
    if not evaluations:
        return
    at, mean = [r["step"] for r in evaluations], [r["reward"] for r in evaluations]
    # at least 0: where all rewards are equal, the bounds differ from the mean by rounding
    below = [max(0.0, r["reward"] - r["reward_low"]) for r in evaluations]
    above = [max(0.0, r["reward_high"] - r["reward"]) for r in evaluations]
    axis.errorbar(
        at,
        mean,
        yerr=[below, above],
        fmt="o",
        color="#cc6677",
        capsize=3,
        label="held-out, with 95 % interval",
    )


def _parts(axis: Any, steps: Sequence[dict[str, Any]]) -> None:
    """Success of each part of the mix, and how much of a trace is given."""
    for part, colour in _PARTS.items():
        found = [(r["step"], r[f"success_{part}"]) for r in steps if f"success_{part}" in r]
        if found:
            axis.plot(*zip(*found, strict=True), color=colour, label=f"success, {part}")
    given = [(r["step"], r["prefix_share"]) for r in steps if "prefix_share" in r]
    if given:
        axis.plot(*zip(*given, strict=True), ":", color="#777777", label="share of a trace given")
    axis.set(xlabel="step", ylabel="parts of the mix")
    axis.grid(alpha=0.3)
    axis.legend(loc="best", frameon=False)


def rungs_of(evaluation: dict[str, Any]) -> list[float]:
    """Shares of a trace from which an evaluation measured success."""
    return sorted(float(key[7:]) for key in evaluation if re.fullmatch(r"ladder@[\d.]+", key))


def _ladder(axis: Any, evaluations: Sequence[dict[str, Any]]) -> None:
    """Success from each share of a trace, an evaluation a line, later ones darker."""
    climbed = [r for r in evaluations if any(key.startswith("ladder@") for key in r)]
    for index, record in enumerate(climbed):
        rungs = rungs_of(record)
        ends = index in (0, len(climbed) - 1)
        axis.plot(
            rungs,
            [record[f"ladder@{rung:g}"] for rung in rungs],
            "o-",
            markersize=3,
            color="#4477aa",
            alpha=0.25 + 0.75 * (index + 1) / len(climbed),
            label=f"after step {record['step']}" if ends else None,
        )
    axis.set(xlabel="share of its trace that is given", ylabel="success on hard problems")
    axis.grid(alpha=0.3)
    if climbed:
        axis.legend(loc="best", frameon=False)
