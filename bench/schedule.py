"""Schedules on the real engine: what each makes of the same slots, and what is learnt meanwhile.

The demo policy on chain sums of 3 to 20 terms, whose replies are 5 to 200 tokens long:

    a   as many rollouts as slots, few enough that a tick is mostly latency, and a long tail of
        lengths (`bench/chain.py`): without a schedule the long ones finish alone. REINFORCE++ with
        one rollout a prompt, as SortedRL has it; every arm trains on the same number of rollouts;
        stale tokens are corrected (truncated importance sampling) wherever there are any
    b   eight times as many rollouts as slots, 3 to 20 terms equally often, several epochs: the same
        tokens, in the order of the prompts' last lengths (Dr. GRPO)
    g   like a, in groups of four under Dr. GRPO: siblings are of a length, and a batch waits for
        whole groups

`sync_4x` collects four batches at once and takes four optimizer steps on them: the cheapest rival,
without any machinery. Its rollouts are of one policy, but the later steps train a policy up to
three steps on (under PPO's clip), and in a its advantages are normalised over four times as many.
The arms of a seed run by turns, a step each (`bench/turns.py`). Goodput is trained completion
tokens per second of rollout; held-out reward is that of the last evaluation, after as many trained
rollouts in every arm. `best_a` is the better of two arms by the very figures that are then given.
Intervals are Student's t over seeds, of differences and ratios to `sync` with the same seed.
`--quick` leaves arms, steps and seeds out, runs arms one after another and has no intervals.

    python -m bench.schedule [--quick] [--fresh]
"""

import tempfile
import time
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

from transformers.utils import logging

from bench.chain import write_problems
from bench.common import Parts, arguments, interval, table
from bench.turns import side_by_side, yield_turn
from reroll import loop
from reroll.config import load_config
from reroll.config.load import load_settings
from reroll.config.simulate import SimulateConfig
from reroll.simulate import run_arm
from reroll.workload import make_arms, make_cost, make_replies

SEEDS = {"a": (0, 1, 2), "b": (0, 1, 2), "g": (0, 1)}
COMMON = {
    "rollout.max_tokens": "300",
    "run.threads": "2",
    "log.display": "off",
    "log.timeline": "0",
    "checkpoint.every": "1000",
    "train.learning_rate": "2e-4",
    "eval.samples": "4",
}
EVEN = {"task.params": "{min_terms = 3, max_terms = 20, min_digits = 2, max_digits = 2}"}
TAIL = {
    "task.source": "jsonl",
    "task.params": "{}",
    "task.template": "{prompt}\n",
    "task.graders": "[{ name = 'bench.chain:score' }]",
}
STALE = {"correct.mode": "tis"}
ARMS_A: dict[str, dict[str, str]] = {
    "sync": {},
    "sync_4x": {"rollout.prompts": "64", "train.minibatches": "4"},
    "longest_first": {"schedule.kind": "longest_first"},
    "sorted_on_policy": {
        "schedule.kind": "sorted",
        "schedule.mode": "on_policy",
        "schedule.refill": "false",
    },
    "sorted_refill": {"schedule.kind": "sorted", **STALE},
    "april": {"schedule.kind": "april", "schedule.over": "2.0", **STALE},
}
ARMS: dict[str, dict[str, dict[str, str]]] = {
    "a": ARMS_A,
    "b": {name: ARMS_A[name] for name in ("sync", "longest_first")},
    "g": {name: ARMS_A[name] for name in ("sync", "sync_4x", "sorted_refill", "april")},
}
ARMS["g"]["sync_4x"] = ARMS_A["sync_4x"] | {"rollout.prompts": "16"}
SLOTS = {"engine.slots": "16"}
SINGLE = {"algo.name": "reinforce_pp", "rollout.prompts": "16", "rollout.samples": "1", **SLOTS}
GROUPS = {"rollout.prompts": "4", "rollout.samples": "4", **SLOTS}
MANY = {"rollout.prompts": "16", "rollout.samples": "8", **SLOTS}
SIZE = {"a": TAIL | SINGLE, "b": EVEN | MANY, "g": TAIL | GROUPS}
FULL = {
    "a": {"train.steps": "128", "task.train_size": "2048", "task.eval_size": "256"},
    "b": {"train.steps": "24", "task.train_size": "96", "task.eval_size": "32"},
    "g": {"train.steps": "128", "task.train_size": "512", "task.eval_size": "256"},
}
QUICK_ARMS = {"a": ("sync", "sorted_refill", "april"), "b": ("sync", "longest_first")}
QUICK = {
    "a": {"train.steps": "8", "task.train_size": "128", "task.eval_size": "4"},
    "b": {
        "train.steps": "4",
        "rollout.prompts": "8",
        "task.train_size": "16",
        "task.eval_size": "4",
    },
}
BEST = ("sorted_refill", "april")
"""arms with stale tokens, the best of which the keys are about"""
TITLES = {
    "a": "a: as many rollouts as slots (16), a long tail",
    "b": "b: eight times as many rollouts as slots, epochs 2 and later",
    "g": "g: the same in groups of four",
}
REQUESTS = (1_000, 10_000, 100_000, 1_000_000)
"""of the simulations whose time is measured, on slots for a quarter of them"""


def run(regime: str, seed: int, quick: bool) -> dict[str, Any]:
    """Train all arms with one seed, by turns: by arm, figures step by step, and evaluations."""
    arms = QUICK_ARMS[regime] if quick else tuple(ARMS[regime])
    jobs = [(regime, arm, seed, quick) for arm in arms]
    # a process takes seconds to start
    found = [run_arm_of(*job) for job in jobs] if quick else side_by_side(run_arm_of, jobs)
    return dict(zip(arms, found, strict=True))


def run_arm_of(regime: str, arm: str, seed: int, quick: bool) -> dict[str, Any]:
    """One of them."""
    logging.disable_progress_bar()
    size = (QUICK if quick else FULL)[regime]
    settings = {**COMMON, **SIZE[regime], **size, **ARMS[regime][arm]}
    prompts = SIZE[regime]["rollout.prompts"]
    wide = int(ARMS[regime][arm].get("rollout.prompts", prompts)) // int(prompts)
    settings["train.steps"] = str(int(settings["train.steps"]) // wide)
    with tempfile.TemporaryDirectory() as folder:
        if "task.source" in SIZE[regime]:
            for number, (name, split) in enumerate((("name", "train"), ("eval_name", "eval")), 1):
                path = Path(folder) / f"{split}.jsonl"
                write_problems(path, int(settings[f"task.{split}_size"]), seed=number)
                settings[f"task.{name}"] = str(path)
        settings |= {"run.out": f"{folder}/run", "run.seed": str(seed)}
        demo = Path(str(resources.files("reroll"))) / "assets" / "demo.toml"
        config = load_config(demo, settings)
        rollouts = config.rollout.prompts * config.rollout.samples
        step = loop._Run._step

        def in_turn(self: loop._Run, number: int) -> None:
            yield_turn((number - 1) * rollouts)
            step(self, number)

        with patch.object(loop._Run, "_step", in_turn):
            records = loop.train(config).records()
    steps = [r for r in records if r["kind"] == "train"]
    before, *_, after = [r for r in records if r["kind"] == "eval"]
    return {
        "steps": [
            {
                key: r.get(key, 0.0)
                for key in (
                    "epoch", "goodput", "bubble", "waste", "offpolicy_tokens", "lag_max",
                    "length_bias", "length", "reward", "reprefill", "wait_max", "seconds_rollout",
                    "seconds_train", "seconds_score", "seconds_prefill", "seconds_decode",
                )
            }
            | {"tokens": r["goodput"] * r["seconds_rollout"], "rollouts": rollouts}
            for r in steps
        ],
        "before": before["reward"],
        "after": after["reward"],
        "length_before": before["length"],
        "length_after": after["length"],
        "version": steps[-1]["version"],
    }  # fmt: skip


def of(measured: dict[str, Any], first: int = 0) -> dict[str, float]:
    """Figures of a run from step `first` on: rates of the whole, not means of rates."""
    steps = measured["steps"][first:]
    seconds = sum(s["seconds_rollout"] for s in steps)
    tokens = sum(s["tokens"] for s in steps)
    train = sum(s["seconds_train"] + s["seconds_score"] for s in steps)

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
        "train": train,
        "after": measured["after"],
        "gain": measured["after"] - measured["before"],
        "wall": seconds + train,
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
    table(title, columns, rows, width=130)


def main() -> None:
    args = arguments(__doc__ or "")
    logging.disable_progress_bar()
    parts = Parts("schedule", args)
    detail: dict[str, Any] = {}
    for regime, seed in planned(args.quick):
        measured = parts.measure(f"{regime}/{seed}", lambda r=regime, s=seed: run(r, s, args.quick))
        for arm, one in measured.items():
            detail.setdefault(regime, {}).setdefault(arm, {})[str(seed)] = one
            told = of(one)
            print(
                f"{regime} seed {seed} {arm:17} goodput {told['goodput']:6.0f}  bubble "
                f"{told['bubble']:.1%}  held-out {one['before']:.3f} -> {one['after']:.3f}  "
                f"{told['wall']:.0f} s",
                flush=True,
            )
    detail["simulated"] = parts.measure("simulated", lambda: simulations(args.quick))
    found = {
        regime: {
            arm: [of(m, epochs_from(m) if regime == "b" else 0) for m in by.values()]
            for arm, by in detail[regime].items()
        }
        for regime in ARMS
        if regime in detail
    }
    for regime, title in TITLES.items():
        if regime in found:
            show(regime, found[regime], title)
    table(
        "Simulating, seconds on one core",
        ("requests", "sync", "sorted, refill"),
        [
            (f"{r['requests']:,.0f}", f"{r['sync']:.2f}", f"{r['sorted']:.2f}")
            for r in detail["simulated"]
        ],
    )
    parts.finish("schedule", summary(found, detail["simulated"][-1]), SEEDS["a"], detail)


def planned(quick: bool) -> list[tuple[str, int]]:
    """(regime, seed)."""
    if quick:
        return [(regime, 0) for regime in QUICK_ARMS]
    first = [(regime, seed) for seed in SEEDS["a"] for regime in ("a", "b")]
    return [*first, *(("g", seed) for seed in SEEDS["g"])]


def summary(
    found: dict[str, dict[str, list[dict[str, float]]]], simulated: dict[str, float]
) -> dict[str, Any]:
    """The keys of the last line; ratios and differences are between runs of one seed."""

    def against(regime: str, arm: str, rival: str = "sync") -> list[float]:
        pairs = zip(found[regime][arm], found[regime][rival], strict=True)
        return [one["goodput"] / other["goodput"] for one, other in pairs]

    def mean(regime: str, arm: str, key: str) -> float:
        return fmean(one[key] for one in found[regime][arm])

    best = max(BEST, key=lambda arm: mean("a", arm, "goodput"))
    heldout = [
        one["after"] - other["after"]
        for one, other in zip(found["a"][best], found["a"]["sync"], strict=True)
    ]
    ratio_a, ratio_b = against("a", best), against("b", "longest_first")
    keys = {
        "best_a": best,
        "bubble_sync_a": mean("a", "sync", "bubble"),
        "bubble_best_a": mean("a", best, "bubble"),
        "goodput_best_a": fmean(ratio_a),
        "goodput_best_a_ci": interval(ratio_a),
        "heldout_diff_best_a": fmean(heldout),
        "heldout_diff_best_a_ci": interval(heldout),
        "bubble_sync_b": mean("b", "sync", "bubble"),
        "bubble_longest_first_b": mean("b", "longest_first", "bubble"),
        "goodput_longest_first_b": fmean(ratio_b),
        "goodput_longest_first_b_ci": interval(ratio_b),
        "simulated_requests": simulated["requests"],
        "simulated_seconds": max(simulated[k] for k in ("sync", "sorted")),
    }
    for name, regime, arm in (
        ("goodput_sync_4x_a", "a", "sync_4x"),
        ("goodput_sorted_refill_a", "a", "sorted_refill"),
        ("goodput_april_a", "a", "april"),
        ("goodput_sync_4x_g", "g", "sync_4x"),
        ("goodput_sorted_refill_g", "g", "sorted_refill"),
        ("goodput_april_g", "g", "april"),
    ):
        there = regime in found and arm in found[regime]
        ratio = against(regime, arm) if there else None
        keys[name] = fmean(ratio) if ratio else None
        keys[f"{name}_ci"] = interval(ratio) if ratio else None
    return keys


if __name__ == "__main__":
    main()
