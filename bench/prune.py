"""Pruning 16 rollouts of a group to 8 while they run, against its honest rivals.

    none16, none8   16 and 8 rollouts of each prompt, nothing pruned
    twice8          8 rollouts of each of twice as many prompts (`scarce`)
    random          8 of 16 at random, stopped at the same tokens
    pods            all 16 end, the 8 whose rewards differ most are trained on
    paper           pruned by the signal, survivors trained on as if they were all (ARRoL)
    corrected       the same survivors, all started ones in the baseline, inverse-chance weights

Training: every arm takes the same steps from the demo policy, on chain sums of 5-9 terms, flat and
on prefix trees, of 8-10 terms (`long`), from a policy that is right one time in ten (`rare`), and
from one that is right one time in fifteen, mostly by luck, with one prompt a step (`scarce`).
The arms of a seed run by turns, a step each. Reward per second is the held-out gain per second of
training steps (evaluations left out), after equal steps; "equal seconds" compares two arms when the
faster of them has ended.

Frozen policies (the demo policy at the start and after 12 steps, and the rare one): what signals
know at 8 to 32 tokens, what rules choose, and how the gradient of what is kept lies to that of all
16 of the same batch and of the others, by draws of whole groups that are thinned out afterwards.
Intervals are Student's t over seeds.

    python -m bench.prune [--quick] [--fresh] [--part train|frozen]
"""

import tempfile
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import numpy as np
from transformers.utils import logging

from bench.common import Parts, arguments, interval, table
from bench.prune_frozen import AT, measure_frozen, show_frozen
from bench.prune_plots import draw
from bench.prune_policy import CAREFUL, rare_policy
from bench.turns import side_by_side, yield_turn
from reroll import loop
from reroll.config import load_config

SEEDS = (0, 1, 2)
OTHER_SEEDS = {"long": SEEDS[:2], "scarce": range(6)}
"""with one prompt a step, seeds differ more"""
PRUNED = {"prune.on": "true", "prune.when": "tokens", "prune.at": "[8]", "prune.audit": "0.05"}
PAPER = PRUNED | {"prune.mode": "paper"}
ARMS: dict[str, dict[str, str]] = {
    "none16": {},
    "none8": {"rollout.samples": "8"},
    "twice8": {"rollout.samples": "8", "rollout.prompts": "2"},
    "random": {
        "prune.on": "true", "prune.mode": "paper", "prune.signal": "random",
        "prune.when": "tokens", "prune.at": "[8]",
    },
    "pods": {"prune.on": "true", "prune.mode": "paper", "prune.rule": "pods"},
    "paper": PAPER,
    "corrected": PRUNED,
}  # fmt: skip
FEW = ("none16", "none8", "corrected")
SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "flat": (tuple(a for a in ARMS if a != "twice8"), {"train.trees": "false"}),
    "rare": (("none16", "none8", "paper", "corrected"), {"train.trees": "false"}),
    "tree": (FEW, {"train.steps": "10"}),
    "long": (
        FEW,
        {
            "train.steps": "12", "train.trees": "false", "rollout.max_tokens": "256",
            "task.params": "{min_terms = 8, max_terms = 10, min_digits = 2, max_digits = 2}",
        },
    ),
    "scarce": (
        ("none16", "none8", "twice8", "corrected"),
        {
            "train.steps": "96", "train.trees": "false", "rollout.prompts": "1",
            "eval.every": "16",
        },
    ),
}  # fmt: skip
FULL = {
    "rollout.prompts": "32", "rollout.samples": "16", "train.steps": "16", "eval.every": "8",
    "eval.greedy": "false", "eval.samples": "8", "log.display": "off", "log.timeline": "0",
    "log.samples": "0", "task.train_size": "640", "checkpoint.every": "100",
}  # fmt: skip
QUICK = {
    "rollout.prompts": "4", "train.steps": "3", "task.eval_size": "8", "eval.samples": "2",
    "eval.every": "0", "train.warmup": "0",
}  # fmt: skip
QUICK_ARMS = ("none16", "none8", "corrected")
"""an arm costs seven seconds of loading; the keys of the other settings are null"""
WARM = 3
"""steps left out of the means: pruning begins after two, and the first ones warm the machine up"""
TIMES = ("rollout", "score", "train", "head")
COUNTS = ("tokens_decode", "tokens_trained", "live_groups", "length", "reward", "pruned")
KEYS = (
    "step_speedup", "step_speedup_ci", "generation_speedup", "tokens_decoded_ratio", "head_share",
    "reward_per_second_vs_n16", "reward_per_second_vs_n8", "held_out_vs_n16", "held_out_vs_n16_ci",
    "step_speedup_n8", "held_out_vs_n8_equal_seconds", "held_out_vs_n8_equal_seconds_ci",
)  # fmt: skip
"""of the last line, of each setting"""
SCARCE = (
    "held_out_vs_n16_equal_seconds", "held_out_vs_n16_equal_seconds_ci",
    "held_out_vs_twice8_equal_seconds", "held_out_vs_twice8_equal_seconds_ci",
)  # fmt: skip
DEMO = Path(str(resources.files("reroll"))) / "assets" / "demo.toml"


def run(setting: str, arm: str, seed: int, quick: bool) -> dict[str, Any]:
    """Train one arm, a step at a turn."""
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        settings = FULL | SETTINGS[setting][1] | (QUICK if quick else {}) | ARMS[arm]
        settings |= {"run.out": f"{folder}/run", "run.seed": str(seed)}
        settings |= {"model.path": rare_policy(setting)} if setting in CAREFUL else {}
        step = loop._Run._step

        def in_turn(self: loop._Run, number: int) -> None:
            yield_turn(number)
            step(self, number)

        with patch.object(loop._Run, "_step", in_turn):
            records = loop.train(load_config(DEMO, settings)).records()
    steps = [r for r in records if r["kind"] == "train"]
    extra = ("within_auc", "calibration_error", "pruning", "variance_all", "variance_pruned")
    return {
        "steps": [
            {f"seconds_{x}": r.get(f"seconds_{x}", 0.0) for x in (*TIMES, "sync")}
            | {x: r[x] for x in COUNTS if x in r}
            | {x: r[x] for x in extra if x in r}
            for r in steps
        ],
        "held_out": [[r["step"], r["reward"]] for r in records if r["kind"] == "eval"],
    }


def figures(run: dict[str, Any]) -> dict[str, float]:
    """Means over the steps of one run."""
    steps = run["steps"][WARM:] or run["steps"][-1:]
    found = {f"seconds_{x}": fmean(r[f"seconds_{x}"] for r in steps) for x in TIMES}
    found |= {x: fmean(r[x] for r in steps) for x in COUNTS if x in steps[0]}
    # the head's seconds are in the rollouts'
    found["seconds_step"] = sum(found[f"seconds_{x}"] for x in ("rollout", "score", "train"))
    (_, before), *_, (_, after) = run["held_out"]
    found |= {"before": before, "after": after, "gain": after - before}
    found["gain_per_second"] = (after - before) / found["seconds_step"]
    return found


def against(one: list[dict[str, float]], other: list[dict[str, float]], key: str) -> list[float]:
    """Ratios of a figure, seed by seed."""
    return [b[key] / a[key] if a[key] else 0.0 for a, b in zip(one, other, strict=True)]


def ratio_of_means(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """Gain per second of `one` over that of `other`: a seed's own gain may be near 0."""
    mine, theirs = (fmean(f["gain_per_second"] for f in each) for each in (one, other))
    return mine / theirs if theirs else 0.0


def at_equal_seconds(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[float]:
    """Held-out reward of `other` less that of `one`, seed by seed, when the faster has ended."""
    differences = []
    for runs in zip(one, other, strict=True):
        found = [figures(run) for run in runs]
        curves = [
            [(step * f["seconds_step"], reward) for step, reward in run["held_out"]]
            for run, f in zip(runs, found, strict=True)
        ]
        end = min(curve[-1][0] for curve in curves)
        mine, theirs = (float(np.interp(end, *zip(*curve, strict=True))) for curve in curves)
        differences.append(theirs - mine)
    return differences


def show(setting: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The table of a setting; its keys of the last line."""
    end, rows = "" if setting == "flat" else f"_{setting}", []
    if not runs:
        names = KEYS + SCARCE if setting == "scarce" else KEYS
        return {_named(key, end): None for key in names}
    found = {arm: [figures(run) for run in seeds] for arm, seeds in runs.items()}
    for arm, seeds in found.items():
        mean = {key: fmean(f[key] for f in seeds) for key in seeds[0]}
        gains = interval([f["gain"] for f in seeds])
        half = f" ± {(gains[1] - gains[0]) / 2:.3f}" if gains else ""
        rows.append(
            (
                arm,
                *(f"{mean[f'seconds_{x}']:.2f}" for x in ("step", *TIMES)),
                f"{fmean(against(seeds, found['none16'], 'seconds_step')):.2f}",
                f"{mean['tokens_decode']:,.0f}",
                f"{mean['tokens_trained']:,.0f}",
                f"{mean['live_groups']:.2f}",
                f"{mean['after']:.3f}",
                f"{mean['gain']:+.3f}{half}",
                f"{ratio_of_means(seeds, found['none16']):.2f}",
                f"{ratio_of_means(seeds, found['none8']):.2f}",
            )
        )
    columns = (
        setting, "s/step", "rollouts", "score", "train", "head", "speed-up", "decoded", "trained",
        "live", "held-out", "gain", "gain/s : n16", ": n8",
    )  # fmt: skip
    table(f"Training, {setting}: means of {len(found['none16'])} seeds", columns, rows, width=150)
    all16, all8, mine = found["none16"], found["none8"], found["corrected"]
    speedups = against(mine, all16, "seconds_step")
    drawn = against(all16, mine, "tokens_decode")
    timed = at_equal_seconds(runs["none8"], runs["corrected"])
    differences = [b["after"] - a["after"] for a, b in zip(all16, mine, strict=True)]
    values = (
        fmean(speedups), interval(speedups),
        fmean(against(mine, all16, "seconds_rollout")), fmean(drawn),
        fmean(f["seconds_head"] / f["seconds_step"] for f in mine),
        ratio_of_means(mine, all16), ratio_of_means(mine, all8),
        fmean(differences), interval(differences),
        fmean(against(all8, all16, "seconds_step")), fmean(timed), interval(timed),
    )  # fmt: skip
    keys: dict[str, Any] = {_named(key, end): v for key, v in zip(KEYS, values, strict=True)}
    if setting == "flat":
        pods = found.get("pods")
        keys["step_speedup_pods"] = pods and fmean(against(pods, all16, "seconds_step"))
    if setting == "scarce":
        rivals = [at_equal_seconds(runs[a], runs["corrected"]) for a in ("none16", "twice8")]
        values = [f(each) for each in rivals for f in (fmean, interval)]
        keys |= {_named(key, end): v for key, v in zip(SCARCE, values, strict=True)}
    return keys


def _named(key: str, end: str) -> str:
    """A key of one setting: its name stands before `_ci`."""
    return f"{key.removesuffix('_ci')}{end}{'_ci' if key.endswith('_ci') else ''}"


def main() -> None:
    args = arguments(__doc__ or "", part="measure this part alone, for later: train or frozen")
    logging.disable_progress_bar()
    parts = Parts("prune", args)
    seeds = SEEDS[:1] if args.quick else SEEDS
    detail: dict[str, Any] = {"frozen": {}, "train": {}}
    summary: dict[str, Any] = {}
    if args.part in ("", "frozen"):
        for seed in seeds:
            for policy in ("start", "trained", "rare")[: 2 if args.quick else 3]:
                measured = parts.measure(
                    f"frozen/{policy}/{seed}",
                    lambda p=policy, s=seed: measure_frozen(p, s, args.quick),
                )
                detail["frozen"].setdefault(policy, []).append(measured)
        for policy in ("start", "trained", "rare"):
            summary |= show_frozen(policy, detail["frozen"].get(policy, []))
    if args.part in ("", "train"):
        for setting, (arms, _) in SETTINGS.items():
            arms = QUICK_ARMS if args.quick else arms
            skipped = args.quick and setting != "flat"
            for seed in () if skipped else OTHER_SEEDS.get(setting, seeds):
                runs = parts.measure(
                    f"{setting}/{seed}",
                    lambda n=setting, a=arms, s=seed: side_by_side(
                        run, [(n, arm, s, args.quick) for arm in a]
                    ),
                )
                for arm, one in zip(arms, runs, strict=True):
                    detail["train"].setdefault(setting, {}).setdefault(arm, []).append(one)
            summary |= show(setting, detail["train"].get(setting, {}))
    if args.part:
        return
    if not args.quick:
        draw(detail)
    parts.finish("prune", {"at": AT, **summary}, seeds, detail)


if __name__ == "__main__":
    main()
