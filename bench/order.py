"""Longest first by what is known, against the order of lengths that nobody can know.

Simulated: 64 prompts x 8 rollouts an update, the problems come round and round, lengths log-normal
(median 1,500, sigma .8, at most 8,192 tokens) with some of the variance of their logarithm between
prompts. `longest_first` goes by the longest rollout of the prompt's last visit, `sync` by order of
admission, `oracle` by the true lengths of the very rollouts. A tick takes 1 + running / 512.
Seconds of the rollouts alone, over those of the oracle; intervals are Student's t over seeds.

    python -m bench.order [--quick]
"""

from statistics import fmean
from typing import Any

from bench.common import Parts, arguments, interval, table
from reroll.config.simulate import SimulateConfig
from reroll.simulate import run_arm
from reroll.workload import make_arms, make_cost, make_replies

SEEDS = (0, 1, 2, 3, 4)
SHARES = (0.6, 0.8, 0.9)
"""of the variance between prompts"""
SLOTS = (128, 64, 32)
"""for 512 rollouts: 4, 8 and 16 of them a slot"""
ARMS = ("sync", "longest_first", "oracle")


def run(share: float, slots: int, seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """Seconds an update and bubble of each arm; the first visits of all problems are left out."""
    settings: dict[str, Any] = dict(
        tick_base=1.0, tick_per_request=1 / 512, slots=slots, median=1500, spread=0.8, cap=8192,
        prompt_share=share, problems=256, warmup=4, updates=4 if quick else 24, seed=seed,
        schedules=[*ARMS],
    )  # fmt: skip
    config = SimulateConfig(**settings)
    cost, replies = make_cost(config), make_replies(config)
    found = {}
    for name, arm in zip(ARMS, make_arms(config), strict=True):
        figures = run_arm(config, arm, cost, replies).figures
        found[name] = {"seconds": figures["seconds_update"], "bubble": figures["bubble"]}
    return found


def main() -> None:
    args = arguments(__doc__ or "")
    parts = Parts("order", args)
    seeds = SEEDS[:1] if args.quick else SEEDS
    rows, keys, detail = [], {}, {}
    for slots in SLOTS:
        for share in SHARES:
            key = f"q{512 // slots}_share{share:g}"
            found = [
                parts.measure(
                    f"{key}/{seed}", lambda q=slots, f=share, s=seed: run(f, q, s, args.quick)
                )
                for seed in seeds
            ]
            detail[key] = found
            over = {a: [f[a]["seconds"] / f["oracle"]["seconds"] for f in found] for a in ARMS[:2]}
            keys |= {f"over_oracle_{key}": fmean(over["longest_first"])}
            keys |= {f"over_oracle_{key}_ci": interval(over["longest_first"])}
            keys |= {f"sync_over_oracle_{key}": fmean(over["sync"])}
            bubbles = (fmean(f[a]["bubble"] for f in found) for a in ARMS)
            rows.append(
                (
                    f"{512 // slots} a slot",
                    f"{share:g}",
                    *(f"{fmean(over[a]):.3f}" for a in ARMS[:2]),
                    *(f"{bubble:.1%}" for bubble in bubbles),
                )
            )
    columns = (
        "rollouts", "between prompts", "sync / oracle", "longest first / oracle", "bubble: sync",
        "longest first", "oracle",
    )  # fmt: skip
    table("Seconds of an update, from the second visit on", columns, rows, width=120)
    parts.finish("order", keys, seeds, detail)


if __name__ == "__main__":
    main()
