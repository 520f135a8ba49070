"""Pictures of `bench.prefix`: reward against FLOPs, and the prefix ladder."""

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reroll.plot import rungs_of

DOCS = Path(__file__).parent.parent / "docs" / "techniques"
COLOURS = {
    "rl8": "#777777", "rl64": "#bbbbbb", "sft_rl": "#ccbb44", "hint": "#aa3377",
    "prefix_only": "#66ccee", "uniform": "#228833", "target": "#4477aa", "along": "#cc3311",
}  # fmt: skip
NAMES = {
    "rl8": "RL, n = 8", "rl64": "RL, n = 64", "sft_rl": "SFT, then RL", "hint": "as a hint",
    "prefix_only": "prefixed alone", "uniform": "PrefixRL, uniform", "target": "PrefixRL, target",
    "along": "PrefixRL, all along",
}  # fmt: skip


Runs = dict[str, list[dict[str, Any]]]
"""of each arm, one a seed"""


def draw(runs: Runs, task: str) -> None:
    """`docs/techniques/prefix_TASK.png`: reward against FLOPs, seeds thin, their mean thick."""
    figure, axes = new_axes()
    for arm, seeds in runs.items():
        curves = [list(zip(*one["curve"], strict=True)) for one in seeds]
        for _, flops, reward in curves:
            axes.plot(flops, reward, color=COLOURS[arm], alpha=0.3, linewidth=0.8)
        begin, end = max(c[1][0] for c in curves), min(c[1][-1] for c in curves)
        at = np.linspace(min(begin, end), end, 60)
        mean = np.mean([np.interp(at, flops, reward) for _, flops, reward in curves], axis=0)
        axes.plot(at, mean, color=COLOURS[arm], label=NAMES[arm])
    axes.set(xlabel="FLOPs, collecting included", ylabel="held-out reward, without prefix")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(DOCS / f"prefix_{task}.png", dpi=110)


def draw_ladder(runs: Runs) -> None:
    """`docs/techniques/prefix_ladder.png`: success by the share of the trace that is given."""
    figure, axes = new_axes()
    rungs = rungs_of(runs["uniform"][0]["ladder"][0])
    keys = [f"ladder@{rung:g}" for rung in rungs]
    begun = [fmean(one["ladder"][0][key] for one in runs["uniform"]) for key in keys]
    axes.plot(rungs, begun, ":", color="black", label="at the start")
    for arm, seeds in runs.items():
        mean = [fmean(one["ladder"][1][key] for one in seeds) for key in keys]
        axes.plot(rungs, mean, color=COLOURS[arm], label=NAMES[arm])
    axes.set(xlabel="share of the trace that is given", ylabel="success on problems with a trace")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(DOCS / "prefix_ladder.png", dpi=110)


def new_axes() -> tuple[Any, Any]:
    """A figure without a display, and its one panel."""
    figure = Figure(figsize=(6.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes
