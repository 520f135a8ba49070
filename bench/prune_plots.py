"""The pictures of `bench.prune`."""

from pathlib import Path
from statistics import fmean
from typing import Any

COLOURS = {
    "none16": "#222222", "none8": "#999999", "random": "#ccbb44", "pods": "#228833",
    "paper": "#cc6677", "corrected": "#4477aa", "twice8": "#ee8866",
}  # fmt: skip


def draw(detail: dict[str, Any], path: Path | None = None) -> Path:
    """Held-out reward over steps and over seconds of training steps, means over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = detail["train"]
    figure = Figure(figsize=(11, 3.6 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(found), 2, squeeze=False)
    for row, (setting, arms) in zip(axes, found.items(), strict=True):
        for arm, runs in arms.items():
            at = [step for step, _ in runs[0]["held_out"]]
            reward = [fmean(r["held_out"][i][1] for r in runs) for i in range(len(at))]
            seconds = [fmean(_seconds(r, step) for r in runs) for step in at]
            for axis, x in zip(row, (at, seconds), strict=True):
                axis.plot(x, reward, "o-", color=COLOURS[arm], label=arm, markersize=3)
        for axis, label in zip(row, ("step", "seconds of training steps"), strict=True):
            axis.set(xlabel=label, ylabel="held-out reward", title=setting)
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
    path = path or Path(__file__).parent.parent / "docs" / "techniques" / "prune_rewards.png"
    figure.savefig(path, dpi=110)
    return path


def _seconds(run: dict[str, Any], step: int) -> float:
    """Of the first so many steps."""
    names = ("seconds_rollout", "seconds_score", "seconds_train")
    return sum(one[name] for one in run["steps"][:step] for name in names)
