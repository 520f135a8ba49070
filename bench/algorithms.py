"""The demo policy under each algorithm: same prompts and number of rollouts, held-out reward.

Every arm starts from the packaged policy and takes the same steps on the demo's task (prompts and
noise keys are functions of seed and step alone), two optimizer steps a batch so that ratios and
clips have something to do, one learning rate for all. Within a seed all arms have one "before".
`dapo` runs without its dynamic sampling, which starts more rollouts; `dapo_refill` runs with it,
its rollouts counted beside. Intervals are Student's t over seeds, of the gain within each seed.

    python -m bench.algorithms [--quick] [--fresh]
"""

import tempfile
from importlib import resources
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers.utils import logging

from bench.common import Parts, arguments, table
from reroll.config import load_config
from reroll.loop import train

ARMS: dict[str, dict[str, str]] = {
    "grpo": {},
    "dr_grpo": {},
    "dapo": {"algo.dynamic_sampling": "false"},
    "dapo_refill": {"algo.name": "dapo"},
    "gspo": {},
    "rloo": {},
    "reinforce_pp": {},
    "ppo": {"critic.learning_rate": "1e-3"},
    "ppo_shared": {
        "algo.name": "ppo",
        "critic.trunk": "shared",
        "critic.learning_rate": "1e-3",
    },
}
QUICK_ARMS = ("grpo", "dapo_refill", "gspo", "rloo", "ppo")
"""an arm costs five seconds of loading; with --quick the others' keys are null"""
SEEDS = (0, 1, 2)
FULL = {
    "train.steps": "16",
    "train.minibatches": "2",
    "train.learning_rate": "5e-4",
    "eval.samples": "4",
}
QUICK = {
    "train.steps": "2",
    "train.warmup": "0",
    "train.minibatches": "2",
    "rollout.prompts": "4",
    "rollout.samples": "4",
    "task.train_size": "32",
    "task.eval_size": "8",
    "eval.samples": "2",
}
FIGURES = ("after", "greedy_after", "gain", "gain_low", "gain_high")
T_95 = {3: 4.303}
"""Student's t for a two-sided 95 % interval of the mean of that many seeds"""


def run(arm: str, seed: int, quick: bool) -> dict[str, Any]:
    """Train one arm with one seed; its held-out figures, rollouts and seconds."""
    settings = {"algo.name": arm, **(QUICK if quick else FULL), **ARMS[arm]}
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"run.out": f"{folder}/run", "run.seed": str(seed), "log.display": "off"}
        demo = Path(str(resources.files("reroll"))) / "assets" / "demo.toml"
        config = load_config(demo, settings)
        records = train(config).records()
    before, *_, after = [r for r in records if r["kind"] == "eval"]
    steps = [r for r in records if r["kind"] == "train"]
    groups = sum(r.get("groups_started", config.rollout.prompts) for r in steps)
    keys = ("reward", "reward_low", "reward_high", "greedy_reward", "length")
    return {
        "before": {key: before[key] for key in keys},
        "after": {key: after[key] for key in keys},
        "rollouts": int(groups) * config.rollout.samples,
        "clip_fraction": fmean(r["clip_fraction"] for r in steps),
        "explained_variance": steps[-1].get("explained_variance"),
        "rollout_seconds": sum(r["seconds_rollout"] for r in steps),
        "train_seconds": sum(r["seconds_train"] + r["seconds_score"] for r in steps),
    }


def main() -> None:
    args = arguments(__doc__ or "")
    logging.disable_progress_bar()
    parts = Parts("algorithms", args)
    seeds = SEEDS[:1] if args.quick else SEEDS
    detail: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        for arm in QUICK_ARMS if args.quick else ARMS:
            measured = parts.measure(f"{arm}/{seed}", lambda a=arm, s=seed: run(a, s, args.quick))
            detail.setdefault(arm, {})[str(seed)] = measured
            before, after = measured["before"]["reward"], measured["after"]["reward"]
            print(f"seed {seed} {arm:13} held-out {before:.3f} -> {after:.3f}", flush=True)
    summary: dict[str, Any] = {"before": mean_of(detail["grpo"], "before", "reward")}
    rows = []
    for arm, by_seed in detail.items():
        low, gain, high = interval(
            [r["after"]["reward"] - r["before"]["reward"] for r in by_seed.values()]
        )
        after = mean_of(by_seed, "after", "reward")
        greedy = mean_of(by_seed, "after", "greedy_reward")
        values = (after, greedy, gain, low, high)
        summary |= {
            f"{arm}_{figure}": round(value, 4)
            for figure, value in zip(FIGURES, values, strict=True)
        }
        rows.append(
            (
                arm,
                f"{after:.3f}",
                f"{gain:+.3f} ± {high - gain:.3f}",
                f"{greedy:.3f}",
                f"{fmean(r['after']['length'] for r in by_seed.values()):.0f}",
                f"{fmean(r['rollouts'] for r in by_seed.values()):,.0f}",
                f"{fmean(r['clip_fraction'] for r in by_seed.values()):.4f}",
                f"{fmean(r['rollout_seconds'] for r in by_seed.values()):.0f}",
                f"{fmean(r['train_seconds'] for r in by_seed.values()):.0f}",
            )
        )
    summary["every_algorithm_improves"] = all(summary[f"{arm}_gain_low"] > 0 for arm in detail)
    for arm in ARMS:
        for figure in FIGURES:
            summary.setdefault(f"{arm}_{figure}", None)
    columns = ("", "after", "gain", "greedy", "length", "rollouts", "clipped", "roll s", "train s")
    title = f"Held-out reward, {summary['before']:.3f} before, mean over {len(seeds)} seeds"
    table(title, columns, rows)
    parts.finish("algorithms", summary, seeds, detail)


def mean_of(by_seed: dict[str, Any], when: str, key: str) -> float:
    """Mean over the seeds of one held-out figure."""
    return fmean(measured[when][key] for measured in by_seed.values())


def interval(gains: list[float]) -> tuple[float, float, float]:
    """(low, mean, high); with one seed (--quick) the bounds are the value itself."""
    mean = fmean(gains)
    if len(gains) < 2:
        return mean, mean, mean
    half = T_95[len(gains)] * stdev(gains) / len(gains) ** 0.5
    return mean - half, mean, mean + half


if __name__ == "__main__":
    main()
