"""SortedRL's published bubble and throughput from a stated cost model, without a GPU.

arXiv 2603.23414 reports, for batches of 512 with replies of up to 8k tokens: `sync` idles 74 % of
its slots; on-policy 5.81 % at 1.076 times the throughput; partial 3.37 % at 1.395 times. Slots,
update size and engine costs are not published. Here they are stated:

    lengths   log-normal, median 1,600, sigma .8, at most 8,192 tokens: 26 % of the limit on average
    slots     512; one rollout a prompt; only rollouts take time
    linear    a tick takes 1 + running / 82, reading nothing: fitted to the partial row, given the
              lengths; the others follow
    roofline  8.03e9 parameters in bf16 with keys and values of 32 layers x 8 heads x 128 (the 8B
              LLaMA 3.1) on one H100 at 70 % of its bandwidth and 50 % of its FLOP/s, 2 ms of
              overhead a tick; what is resumed is read again. Memory is taken to suffice

How large an update is decides what on-policy mode throws away, so its row is run for several. The
two bubbles: of the slots' time, and of slots times ticks, where a tick of few requests counts like
a full one though it is over sooner. Intervals are Student's t over seeds.

    python -m bench.sorted_rl [--quick]
"""

from statistics import fmean
from typing import Any

from bench.common import Parts, arguments, interval, table
from reroll.config import ScheduleSection
from reroll.config.simulate import SimulateConfig
from reroll.simulate import run_arm
from reroll.workload import Arm, make_cost, make_replies

SEEDS = (0, 1, 2)
BATCH = 512
COMMON: dict[str, Any] = dict(
    median=1600, spread=0.8, prompt_share=0.6, cap=8192, prompt_tokens=256, samples=1, slots=512,
    train_tokens_per_second=1e15, max_lag=4,
)  # fmt: skip
MACHINES: dict[str, dict[str, Any]] = {
    "linear": dict(tick_base=1.0, tick_per_request=1 / 82),
    "roofline": dict(
        gpu="h100", parameters=8.03e9, layers=32, kv_heads=8, head_dim=128, overhead=0.002
    ),
}
PARTIAL: dict[str, Any] = dict(kind="sorted", batches=4, max_lag=4)
ON_POLICY: dict[str, Any] = PARTIAL | dict(mode="on_policy")
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    # rollouts of an update, schedule
    "sync": (BATCH, {}),
    "sync_4x": (4 * BATCH, {}),
    "partial_strict": (BATCH, PARTIAL | dict(refill=False)),
    "partial": (BATCH, PARTIAL),
    "on_policy_strict": (BATCH, ON_POLICY | dict(refill=False)),
    **{f"on_policy_{n}": (n, ON_POLICY) for n in (512, 1024, 1536, 2048)},
}
PUBLISHED = {"sync": "1.00  74%", "partial": "1.39  3.4%", "on_policy": "1.08  5.8%"}
"""throughput over that of sync, bubble; on-policy with updates of a size that is not said"""
FIGURES = ("goodput", "bubble", "bubble_ticks", "waste", "offpolicy_tokens", "length_bias")


def run(machine: str, arm: str, seed: int, quick: bool) -> dict[str, float]:
    """Figures of one arm, of as many rollouts in each."""
    size, section = ARMS[arm]
    rollouts = (12 if quick else 60) * BATCH
    config = SimulateConfig(
        **COMMON, **MACHINES[machine], prompts=size, seed=seed, updates=rollouts // size,
        warmup=max(2, rollouts // size // 4),
    )  # fmt: skip
    schedule = ScheduleSection.model_validate(section)
    found = run_arm(config, Arm(arm, schedule), make_cost(config), make_replies(config))
    return {key: found.figures[key] for key in FIGURES}


def show(machine: str, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The table of a machine; its keys of the last line."""
    rows, keys = [], {}
    for arm, seeds in found.items():
        mean = {key: fmean(one[key] for one in seeds) for key in FIGURES}
        over = [a["goodput"] / b["goodput"] for a, b in zip(seeds, found["sync"], strict=True)]
        shares = (f"{mean[key]:.1%}" for key in FIGURES[1:5])
        said = PUBLISHED.get(arm.rstrip("_0123456789"), "")
        rows.append((arm, f"{fmean(over):.2f}", *shares, f"{mean['length_bias']:.2f}", said))
        name = f"{arm}_{machine}"
        keys |= {f"throughput_{name}": fmean(over), f"throughput_{name}_ci": interval(over)}
        keys |= {f"{key}_{name}": mean[key] for key in ("bubble", "bubble_ticks", "waste")}
    columns = (machine, "over sync", "bubble", "of ticks", "waste", "stale", "bias", "published")
    table(f"SortedRL, {machine} costs", columns, rows, width=110)
    return keys


def main() -> None:
    args = arguments(__doc__ or "")
    parts = Parts("sorted_rl", args)
    seeds = SEEDS[:1] if args.quick else SEEDS
    detail: dict[str, dict[str, list[dict[str, float]]]] = {
        machine: {
            arm: [
                parts.measure(
                    f"{machine}/{arm}/{seed}",
                    lambda m=machine, a=arm, s=seed: run(m, a, s, args.quick),
                )
                for seed in seeds
            ]
            for arm in ARMS
        }
        for machine in MACHINES
    }
    summary: dict[str, Any] = {}
    for machine, found in detail.items():
        summary |= show(machine, found)
    parts.finish("sorted_rl", summary, seeds, detail)


if __name__ == "__main__":
    main()
