"""Schedules on the real engine: what each makes of the same slots, and what is learnt meanwhile.

The demo policy on chain sums of 3 to 20 terms, whose replies are 5 to 130 tokens long. Two regimes:

    a   as many rollouts as slots, few enough that a tick is mostly latency: without a schedule the
        long ones finish alone. Every arm trains on the same number of rollouts; stale tokens are
        corrected (truncated importance sampling) wherever there are any
    b   eight times as many rollouts as slots, several epochs: the same tokens, in the order of the
        prompts' last lengths

`sync_4x` collects four batches at once and takes four optimizer steps on them: the cheapest rival,
without any machinery. Goodput is trained completion tokens per second of rollout; held-out reward
is that of the last evaluation, after as many trained rollouts in every arm. Intervals are Student's
t over seeds. `--quick` leaves arms, steps and seeds out and has no intervals.

    python -m bench.schedule [--quick] [--fresh]
"""

import tempfile
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers.utils import logging

from bench.common import Parts, arguments, table
from reroll.config import load_config
from reroll.config.load import load_settings
from reroll.config.simulate import SimulateConfig
from reroll.loop import train
from reroll.simulate import run_arm
from reroll.workload import make_arms, make_cost, make_replies

SEEDS = (0, 1)
T_95 = {2: 12.706, 3: 4.303}
TASK = {
    "task.params": "{min_terms = 3, max_terms = 20, min_digits = 1, max_digits = 2}",
    "rollout.max_tokens": "300",
    "run.threads": "2",
    "log.display": "off",
    "log.timeline": "6",
    "checkpoint.every": "1000",
    "train.learning_rate": "2e-4",
}
STALE = {"correct.mode": "tis"}
ARMS_A: dict[str, dict[str, str]] = {
    "sync": {},
    "sync_4x": {"rollout.prompts": "16", "train.minibatches": "4"},
    "longest_first": {"schedule.kind": "longest_first"},
    "sorted_on_policy": {
        "schedule.kind": "sorted",
        "schedule.mode": "on_policy",
        "schedule.refill": "false",
    },
    "sorted_refill": {"schedule.kind": "sorted", **STALE},
    "april": {"schedule.kind": "april", "schedule.over": "2.0", **STALE},
}
ARMS_B: dict[str, dict[str, str]] = {
    "sync": {},
    "longest_first": {"schedule.kind": "longest_first"},
}
SIZE_A = {"rollout.prompts": "4", "rollout.samples": "4", "engine.slots": "16"}
SIZE_B = {"rollout.prompts": "16", "rollout.samples": "8", "engine.slots": "16"}
FULL_A = {"train.steps": "192", "task.train_size": "512", "task.eval_size": "128"}
FULL_B = {"train.steps": "24", "task.train_size": "96", "task.eval_size": "32"}
QUICK_A = {"train.steps": "4", "task.train_size": "64", "task.eval_size": "4"}
QUICK_B = {"train.steps": "4", "task.train_size": "32", "task.eval_size": "4"}
BEST = ("sorted_refill", "april")
"""arms with stale tokens, the best of which the keys are about"""
REQUESTS = (1_000, 10_000, 100_000, 1_000_000)
"""of the simulations whose time is measured, on slots for a quarter of them"""


def run(regime: str, arm: str, seed: int, quick: bool) -> dict[str, Any]:
    """Train one arm with one seed: its figures step by step, and its evaluations."""
    arms, size = (ARMS_A, SIZE_A) if regime == "a" else (ARMS_B, SIZE_B)
    full, small = (FULL_A, QUICK_A) if regime == "a" else (FULL_B, QUICK_B)
    settings = {**TASK, **size, **(small if quick else full), **arms[arm]}
    wide = int(settings["rollout.prompts"]) // int(size["rollout.prompts"])
    settings["train.steps"] = str(int(settings["train.steps"]) // wide)
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"run.out": f"{folder}/run", "run.seed": str(seed), "eval.samples": "4"}
        demo = Path(str(resources.files("reroll"))) / "assets" / "demo.toml"
        config = load_config(demo, settings)
        started = time.perf_counter()
        records = train(config).records()
        wall = time.perf_counter() - started
    steps = [r for r in records if r["kind"] == "train"]
    before, *_, after = [r for r in records if r["kind"] == "eval"]
    rollouts = config.rollout.prompts * config.rollout.samples
    return {
        "steps": [
            {
                key: r.get(key, 0.0)
                for key in (
                    "epoch", "goodput", "bubble", "waste", "offpolicy_tokens", "lag_max",
                    "length_bias", "length", "reward", "reprefill", "wait_max", "seconds_rollout",
                    "seconds_train", "seconds_score",
                )
            }
            | {"tokens": r["goodput"] * r["seconds_rollout"], "rollouts": rollouts}
            for r in steps
        ],
        "before": before["reward"],
        "after": after["reward"],
        "length_before": before["length"],
        "length_after": after["length"],
        "wall": wall - before["seconds_eval"] - after["seconds_eval"],
        "version": steps[-1]["version"],
    }  # fmt: skip


def of(measured: dict[str, Any], first: int = 0) -> dict[str, float]:
    """Figures of a run from step `first` on: rates of the whole, not means of rates."""
    steps = measured["steps"][first:]
    seconds = sum(s["seconds_rollout"] for s in steps)
    tokens = sum(s["tokens"] for s in steps)

    def by_tokens(key: str) -> float:
        return sum(s[key] * s["tokens"] for s in steps) / tokens

    return {
        "goodput": tokens / seconds,
        "bubble": sum(s["bubble"] * s["seconds_rollout"] for s in steps) / seconds,
        "waste": by_tokens("waste"),
        "stale": by_tokens("offpolicy_tokens"),
        "lag": max(s["lag_max"] for s in steps),
        "length_bias": fmean(s["length_bias"] for s in steps),
        "reprefill": by_tokens("reprefill"),
        "wait": max(s["wait_max"] for s in steps),
        "tokens": tokens,
        "seconds": seconds,
        "train": sum(s["seconds_train"] + s["seconds_score"] for s in steps),
        "after": measured["after"],
        "gain": measured["after"] - measured["before"],
        "wall": measured["wall"],
    }


def simulations(quick: bool) -> list[dict[str, float]]:
    """Seconds to simulate so many requests under two schedules, on one core."""
    found = []
    for count in REQUESTS[:2] if quick else REQUESTS:
        slots = min(256, count // 4)
        settings = {
            "replicas": str(count // 4 // slots),
            "slots": str(slots),
            "prompts": str(count // 32),
            "samples": "8",
            "updates": "3",
            "warmup": "1",
            "schedules": "sync,sorted",
            "batches": "2",
        }
        config = load_settings(SimulateConfig, None, settings, "reroll simulate")
        cost, replies = make_cost(config), make_replies(config)
        row: dict[str, float] = {"requests": count}
        for name, arm in zip(("sync", "sorted"), make_arms(config), strict=True):
            started = time.perf_counter()
            run_arm(config, arm, cost, replies)
            row[name] = time.perf_counter() - started
        found.append(row)
    return found


def epochs_from(measured: dict[str, Any]) -> int:
    """The first step of the second epoch: from there on lengths are known."""
    return next((i for i, s in enumerate(measured["steps"]) if s["epoch"] >= 1), 0)


def interval(values: Sequence[float]) -> list[float] | None:
    """Student's t, 95 %; None for a single seed."""
    if len(values) < 2:
        return None
    half = T_95[len(values)] * stdev(values) / len(values) ** 0.5
    return [round(fmean(values) - half, 4), round(fmean(values) + half, 4)]


def show(regime: str, found: dict[str, list[dict[str, float]]], title: str) -> None:
    """The table of a regime, means over the seeds."""
    sync = fmean(one["goodput"] for one in found["sync"])
    rows = []
    for arm, seeds in found.items():
        mean = {key: fmean(one[key] for one in seeds) for key in seeds[0]}
        rows.append(
            (
                arm,
                f"{mean['goodput']:,.0f}",
                f"{mean['goodput'] / sync:.2f}",
                f"{mean['bubble']:.1%}",
                f"{mean['waste']:.1%}",
                f"{mean['stale']:.1%}",
                f"{max(one['lag'] for one in seeds):.0f}",
                f"{mean['length_bias']:.2f}",
                f"{mean['reprefill']:.2f}",
                f"{mean['after']:.3f}",
                f"{1000 * mean['gain'] / mean['wall']:+.2f}",
                f"{mean['seconds']:.0f}",
                f"{mean['train']:.0f}",
            )
        )
    columns = (
        regime, "goodput", "rel", "bubble", "waste", "stale", "lag", "bias", "again", "held-out",
        "gain/1000 s", "roll s", "train s",
    )  # fmt: skip
    table(title, columns, rows)


def main() -> None:
    args = arguments(__doc__ or "")
    logging.disable_progress_bar()
    parts = Parts("schedule", args)
    seeds = SEEDS[:1] if args.quick else SEEDS
    arms_a = [*ARMS_A] if not args.quick else ["sync", "sorted_refill", "april"]
    detail: dict[str, Any] = {"a": {}, "b": {}}
    for seed in seeds:  # arms by turns, so that a slow hour hits them all
        for regime, arms in (("a", arms_a), ("b", [*ARMS_B])):
            for arm in arms:
                measured = parts.measure(
                    f"{regime}/{arm}/{seed}",
                    lambda r=regime, a=arm, s=seed: run(r, a, s, args.quick),
                )
                detail[regime].setdefault(arm, {})[str(seed)] = measured
                one = of(measured)
                print(
                    f"seed {seed} {regime} {arm:17} goodput {one['goodput']:6.0f}  bubble "
                    f"{one['bubble']:.1%}  held-out {measured['before']:.3f} -> "
                    f"{measured['after']:.3f}  {one['wall']:.0f} s",
                    flush=True,
                )
    detail["simulated"] = parts.measure("simulated", lambda: simulations(args.quick))
    found_a = {arm: [of(m) for m in by.values()] for arm, by in detail["a"].items()}
    found_b = {arm: [of(m, epochs_from(m)) for m in by.values()] for arm, by in detail["b"].items()}
    mean = {arm: fmean(one["goodput"] for one in found_a[arm]) for arm in BEST}
    best = max(mean, key=lambda arm: mean[arm])
    pairs_a = list(zip(found_a[best], found_a["sync"], strict=True))
    pairs_b = list(zip(found_b["longest_first"], found_b["sync"], strict=True))
    heldout = [one["after"] - other["after"] for one, other in pairs_a]
    ratio_a = [one["goodput"] / other["goodput"] for one, other in pairs_a]
    ratio_b = [one["goodput"] / other["goodput"] for one, other in pairs_b]
    summary = {
        "best_a": best,
        "bubble_sync_a": fmean(one["bubble"] for one in found_a["sync"]),
        "bubble_best_a": fmean(one["bubble"] for one in found_a[best]),
        "goodput_best_a": fmean(ratio_a),
        "goodput_best_a_ci": interval(ratio_a),
        "heldout_diff_best_a": fmean(heldout),
        "heldout_diff_best_a_ci": interval(heldout),
        "bubble_sync_b": fmean(one["bubble"] for one in found_b["sync"]),
        "bubble_longest_first_b": fmean(one["bubble"] for one in found_b["longest_first"]),
        "goodput_longest_first_b": fmean(ratio_b),
        "goodput_longest_first_b_ci": interval(ratio_b),
        "simulated_requests": detail["simulated"][-1]["requests"],
        "simulated_seconds": max(detail["simulated"][-1][k] for k in ("sync", "sorted")),
    }
    show("a", found_a, f"As many rollouts as slots ({SIZE_A['engine.slots']}), all steps")
    show("b", found_b, "Eight times as many rollouts as slots, epochs 2 and later")
    table(
        "Simulating, seconds on one core",
        ("requests", "sync", "sorted, refill"),
        [
            (f"{r['requests']:,.0f}", f"{r['sync']:.2f}", f"{r['sorted']:.2f}")
            for r in detail["simulated"]
        ],
    )
    parts.finish("schedule", summary, seeds, detail)


if __name__ == "__main__":
    main()
