"""Pictures of docs/techniques/reuse.md, drawn from what `bench.reuse` kept.

python -m bench.reuse_plots [--parts]
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.common import RESULTS

PICTURES = Path(__file__).parent.parent / "docs" / "techniques"
COLOURS = {
    "shared": "#228833",
    "held": "#4477aa",
    "refresh": "#66ccee",
    "lenient1": "#ccbb44",
    "lenient": "#cc3311",
}
NAMES = {
    "shared": "off = fresh = re-draft",
    "held": "held",
    "refresh": "held, 25 % redrawn",
    "lenient1": "lenient, l = 1",
    "lenient": "lenient, l = e^0.5",
}

Detail = dict[str, dict[str, list[dict[str, Any]]]]


def load(parts: bool) -> tuple[Detail, dict[str, Any]]:
    """(policy -> arm -> runs, learning rate -> epochs of steps), of a finished benchmark or (parts)
    of one under way."""
    if not parts:
        detail = json.loads((RESULTS / "reuse.json").read_text())["detail"]
        return detail["policies"], detail["rates"]
    runs: Detail = defaultdict(lambda: defaultdict(list))
    rates = {}
    for path in sorted((RESULTS / "reuse.parts").glob("*.json")):
        policy, arm, _ = path.stem.split("_")
        run = json.loads(path.read_text())["value"]
        if policy.startswith("rate "):
            rates[policy[5:]] = [epoch["steps"] for epoch in run["epochs"]]
        else:
            runs[policy][arm].append(run)
    return runs, rates


def steps_mean(runs: Sequence[dict[str, Any]], epoch: int, key: str) -> float:
    """Mean over seeds and steps of an epoch."""
    values = [step[key] for run in runs for step in run["epochs"][epoch]["steps"]]
    known = [value for value in values if value is not None]
    return fmean(known) if known else float("nan")


def rewards(detail: Detail) -> Figure:
    """For each policy: reward of the rollouts trained on (dashed) and of fresh samples (solid)."""
    policies = [name for name in detail if "lenient" in detail[name]]
    figure = Figure(figsize=(5.2 * len(policies), 4), layout="constrained")
    for axis, policy in zip(
        figure.subplots(1, len(policies), squeeze=False)[0], policies, strict=True
    ):
        for arm, runs in detail[policy].items():
            epochs = range(len(runs[0]["epochs"]))
            for key, style in (("reward_fresh", "-"), ("reward_trained_on", "--")):
                values = [steps_mean(runs, epoch, key) for epoch in epochs]
                label = NAMES[arm] if style == "-" else None
                axis.plot([e + 1 for e in epochs], values, style, color=COLOURS[arm], label=label)
        axis.set(
            xlabel="epoch", ylabel="reward", title=f"{policy}: fresh (solid), trained on (dashed)"
        )
        axis.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def follow(detail: Detail, rates: dict[str, Any]) -> Figure:
    """Share of new tokens on the tree of old rollouts: by window, age, learning rate, length."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    windows, ages, learning, lengths = figure.subplots(2, 2).flat
    for rate, epochs in sorted(rates.items(), key=lambda item: float(item[0])):
        values = [fmean(step["on_last"] for step in steps) for steps in epochs[1:]]
        learning.plot(range(2, len(epochs) + 1), values, "o-", label=rate)
    names = {"on_own": "own rollout alone", "on_last": "last epoch", "on_last2": "last two",
             "on_last4": "last four"}  # fmt: skip
    styles = {"careful": "-", "demo": "--", "again": "-.", "wordy": ":"}
    colours = dict(zip(names, ("#888888", "#228833", "#4477aa", "#aa3377"), strict=True))
    for policy, style in styles.items():
        if policy not in detail:
            continue
        runs = detail[policy]["shared"]
        count = len(runs[0]["epochs"])
        for key, name in names.items():
            values = [steps_mean(runs, epoch, key) for epoch in range(1, count)]
            label = name if policy == "careful" else None
            windows.plot(range(2, count + 1), values, style, color=colours[key], label=label)
        by_age = [("on_last", 1), *((f"on_age{k}", k) for k in range(2, 6))]
        points = [(age, steps_mean(runs, count - 1, key)) for key, age in by_age if age < count]
        ages.plot(*zip(*points, strict=True), "o" + style, color="#228833", label=policy)
        x, y = (
            [steps_mean(runs, epoch, key) for epoch in range(1, count)]
            for key in ("length", "on_last")
        )
        nats = fmean(steps_mean(runs, epoch, "entropy") for epoch in range(1, count))
        lengths.plot(x, y, "o" + style, label=f"{policy}, {nats:.2f} nats a token")
    for axis, x, title in (
        (windows, "epoch", "tree of which rollouts (lines: policies as on the right)"),
        (ages, "age of the tree (epochs)", "8 rollouts of one epoch, last epoch of the run"),
        (learning, "epoch", "learning rate (careful, last epoch's tree)"),
        (lengths, "mean reply length (tokens), a point an epoch", "length, last epoch's tree"),
    ):
        axis.set(xlabel=x, ylabel="share of tokens on the tree", title=title, ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    lengths.set_xlim(0, None)
    return figure


def costs(detail: Detail) -> Figure:
    """How many times faster than plain decoding each epoch was collected, at 32 and 64 slots."""
    rows = -(-len(detail) // 3)
    figure = Figure(figsize=(13, 3.6 * rows), layout="constrained")
    for place, (policy, arms) in enumerate(detail.items()):
        axis = figure.add_subplot(rows, 3, place + 1)
        runs = arms["shared"]
        epochs = range(len(runs[0]["epochs"]))
        for arm, colour in (("fresh", "#228833"), ("redraft", "#4477aa")):
            for slots, style in ((32, "-"), (64, "--")):
                points = []
                for epoch in epochs:
                    sums = [run["epochs"][epoch]["variants"] for run in runs]
                    if all(f"{arm}/{slots}" in s for s in sums):
                        ratio = fmean(
                            s[f"off/{slots}"]["seconds"] / s[f"{arm}/{slots}"]["seconds"]
                            for s in sums
                        )
                        points.append((epoch + 1, ratio))
                label = f"{arm}, {slots} slots" if axis is figure.axes[0] else None
                axis.plot(*zip(*points, strict=True), style, color=colour, label=label)
        axis.axhline(1, color="#888888", linewidth=0.8)
        title = "careful, two threads" if policy == "threads" else policy
        axis.set(xlabel="epoch", ylabel="rollout phase, times faster", title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of docs/techniques/reuse.md")
    parser.add_argument("--parts", action="store_true", help="of a benchmark that is under way")
    detail, rates = load(parser.parse_args().parts)
    figures = {"rewards": rewards(detail), "follow": follow(detail, rates), "costs": costs(detail)}
    for name, figure in figures.items():
        FigureCanvasAgg(figure)
        for axis in figure.axes:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        path = PICTURES / f"reuse_{name}.png"
        figure.savefig(path, dpi=100)
        print(path)


if __name__ == "__main__":
    main()
