"""Pictures of a run: `curves.png` from metrics.jsonl, `timeline.png` from timeline.jsonl."""

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


def plot_run(run: RunDir) -> Path | None:
    """Draw reward, length, entropy and live groups over the steps; None if there is nothing yet.

    A run that prunes by a signal has panels of how well that tells rollouts apart, one that reuses
    rollouts of that. Where it is audited, the reward of what it trained on stands beside that of
    fresh samples, under its own name: it is not the policy's.
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
    figure = Figure(figsize=(10, 3.25 * len(panels) / 2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels) // 2, 2).flatten()
    trained_on = "rollouts trained on (reused)" if _biased(run) else "training rollouts"
    for axis, (key, label) in zip(axes, panels, strict=True):
        name = trained_on if key == "reward" else None
        at, values = zip(*((r["step"], r[key]) for r in steps if key in r), strict=True)
        axis.plot(at, values, color="#4477aa", label=name)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    if audits:
        at, fresh = [r["step"] for r in audits], [r["reward_fresh"] for r in audits]
        axes[0].plot(at, fresh, "s-", color="#228833", label="fresh samples (audit)")
    for axis, (key, _) in zip(axes, panels, strict=True):
        if key == "within_auc":
            axis.axhline(0.5, color="#999999", linestyle=":", label="chance")
            axis.legend(loc="best", frameon=False)
    _held_out(axes[0], [r for r in records if r["kind"] == "eval"])
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
