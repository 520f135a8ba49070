"""Starting hard problems from the prefix of an old success, against everything else it could be.

    rl8          Dr. GRPO, 8 rollouts of each of 16 prompts
    rl64         64 rollouts of each of 2 prompts
    sft_rl       supervised training on the same traces, then as rl8
    hint         the same fragments as a hint at the end of the prompt; mixed 3 : 1
    prefix_only  groups with a prefix alone, cut as in uniform
    uniform      PrefixRL: three cuts a trace in 40-80 %, drawn once; mixed 3 : 1
    target       the cut that holds success at one half; mixed 3 : 1
    along        cuts all along the trace, a new one at every visit; mixed 3 : 1

`hard`: 16 sums of ten terms, graded step by step, that each want to be written after a custom of
their own, and a policy that knows none (`custom_policy.py`): next to no group of plain RL has
unequal rewards, and what one success teaches is wrong for the other problems. Held-out are the same
problems in other words.

`alike`: sums of ten terms and a policy taught to get each step wrong with a known chance
(`slip_policy.py`): just as few groups have unequal rewards, but one success teaches everything.

`demo`: the negative control, the demo policy's sums of nine and ten terms, where plain RL finds
successes by itself.

`reroll collect` runs once a task and seed; what that cost is charged to every arm that uses its
traces, and every arm ends when it has spent as much plus TRAINING. Every arm runs at each of RATES;
its own is the one that is best on the other seeds, and so is the variant of PrefixRL of which
claims are made.

FLOPs are counted as the paper does, from the first collected token on, evaluations apart. Reward is
that of held-out problems without prefix. Intervals are Student's t over seeds.

    python -m bench.prefix [--quick] [--fresh] [--part TASK/SEED]
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers.utils import logging

from bench.common import Parts, arguments, interval, reached, table
from bench.custom_policy import custom_policy, write_problems
from bench.prefix_plots import draw, draw_ladder
from bench.slip_policy import slip_policy
from reroll.config import load_config
from reroll.gathering import collect_traces
from reroll.loop import train

SEEDS = (0, 1, 2)
PROBLEMS = 16
"""of hard"""
SLIP = 0.6
"""chance that a step is wrong, of alike"""
TRAINING = {"hard": 1.5e13, "alike": 4e12, "demo": 3e12}
"""FLOPs of an arm beside what collecting has cost on its seed"""
RATES = {"hard": ("1e-4", "3e-4"), "alike": ("1e-4", "3e-4"), "demo": ("1e-4",)}
ON = {"prefix.on": "true", "prefix.retire": "1.0", "prefix.untraced": "true"}
ARMS: dict[str, dict[str, str]] = {
    "rl8": {},
    "rl64": {"rollout.prompts": "2", "rollout.samples": "64"},
    "sft_rl": ON | {"prefix.prefixed": "0", "sft.epochs": "20"},
    "hint": ON | {"prefix.placement": "hint"},
    "prefix_only": ON
    | {"prefix.prefixed": "1", "prefix.original": "0", "prefix.untraced": "false"},
    "uniform": ON,
    "target": ON | {"prefix.cut": "target"},
    "along": ON | {"prefix.cut": "resample", "prefix.low": "0.1", "prefix.high": "0.9"},
}
SOME = ("rl8", "sft_rl", "uniform", "target")
"""arms of the other tasks"""
OURS = ("uniform", "target", "along")
"""variants of PrefixRL"""
PLAIN = ("rl8", "rl64")
"""arms without traces"""
COMMON = {
    "task.source": "reasoning_gym", "task.name": "chain_sum", "task.template": "{expression} =\n",
    "task.answer_pattern": r"so (-?\d+)$", "task.graders": '[{name = "derivation"}]',
    "rollout.max_tokens": "140", "rollout.prompts": "16", "rollout.samples": "8",
    "algo.name": "dr_grpo", "train.warmup": "2", "train.beta2": "0.95", "train.steps": "100000",
    "train.microbatch_tokens": "8192", "eval.samples": "4", "eval.greedy": "false",
    "engine.slots": "256", "log.display": "off", "log.timeline": "0", "log.samples": "0",
    "checkpoint.every": "100000",
}  # fmt: skip
TASKS = {
    "hard": {
        "task.source": "jsonl", "task.template": "{prompt}", "task.answer_pattern": "",
        "task.graders": '[{name = "bench.custom_policy:accustomed"}]',
        "task.train_size": str(PROBLEMS), "task.eval_size": str(PROBLEMS), "eval.samples": "16",
        "collect.screen": "0", "collect.cap": "65536",
    },
    "alike": {
        "task.params": "{min_terms = 10, max_terms = 10, min_digits = 2, max_digits = 2}",
        "task.train_size": "128", "task.eval_size": "64",
        "collect.screen": "0", "collect.cap": "65536", "collect.traces": "1",
    },
    "demo": {
        "model.path": "demo", "rollout.max_tokens": "160",
        "task.params": "{min_terms = 9, max_terms = 10, min_digits = 2, max_digits = 2}",
        "task.train_size": "64", "task.eval_size": "64",
        "collect.screen": "4", "collect.cap": "256",
    },
}  # fmt: skip
QUICK = {
    "task.eval_size": "4", "eval.samples": "1", "train.steps": "1", "eval.every": "0",
    "rollout.prompts": "4", "rollout.max_tokens": "130",
    "task.params": "{min_terms = 6, max_terms = 6, min_digits = 2, max_digits = 2}",
}  # fmt: skip
"""the demo policy and its sums under `hard`, too: there is no time to teach another"""
KEYS = (
    "gate_live_share", "gate_live_share_30", "final_vs_rl8", "final_minus_rl8", "flops_to_sft_rl",
    "flops_to_sft_rl_after_collecting", "back_generalisation", "copied", "collect_share",
    *(f"final_{arm}" for arm in ARMS),
    *(f"final_{arm}_at_{rate}" for rate in RATES["hard"] for arm in ARMS),
    *(
        f"{task}_{name}"
        for task in ("alike", "demo")
        for name in ("live_share", "vs_rl8", "minus_rl8", *(f"final_{arm}" for arm in SOME))
    ),
)  # fmt: skip
"""of the last line, each with `_ci`"""

Run = dict[str, Any]


def settings_of(task: str, arm: str, seed: int, traces: Path, quick: bool) -> dict[str, str]:
    """Of an arm, but for rate and budget."""
    found = COMMON | TASKS["demo" if quick else task] | ARMS[arm] | {"run.seed": str(seed)}
    if task == "hard" and not quick:
        paths = write_problems(traces.parent, PROBLEMS, 1000 + seed)
        found |= {"task.name": str(paths[0]), "task.eval_name": str(paths[1])}
        found["model.path"] = custom_policy()
    elif task == "alike" and not quick:
        found["model.path"] = slip_policy(SLIP)
    found["eval.every"] = "20" if arm in PLAIN else "5"
    if quick:
        found |= QUICK | {"collect.screen": "0", "collect.cap": "32", "collect.problems": "16"}
        found |= {"rollout.prompts": "2"} if arm == "rl64" else {}
    if arm in PLAIN:
        return {k: v for k, v in found.items() if not k.startswith("collect.")}
    return found | {"prefix.traces": str(traces)}


def collect(task: str, seed: int, traces: Path, quick: bool) -> dict[str, Any]:
    """Traces of a seed, for all its arms, and what `reroll collect` says of them."""
    settings = settings_of(task, "uniform", seed, traces, quick)
    return collect_traces(load_config(None, settings), probes=1 if quick else 32, quiet=True)


def run(
    task: str, arm: str, rate: str, seed: int, traces: Path, collected: Run, quick: bool
) -> Run:
    """Train one arm to the end of its budget."""
    settings = settings_of(task, arm, seed, traces, quick)
    settings |= {"train.learning_rate": rate}
    if not quick:
        settings["train.flops"] = str(collected["flops_paper"] + TRAINING[task])
    with tempfile.TemporaryDirectory() as folder:
        settings["run.out"] = f"{folder}/run"
        records = train(load_config(None, settings)).records()
    steps = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    spent = {r["step"]: r["flops_total_paper"] for r in steps}
    spent[0] = 0.0 if arm in PLAIN else collected["flops_paper"]
    of_a_step = ("live_groups", "success_prefixed", "success_original", "prefix_share")
    return {
        "curve": [[r["step"], spent[r["step"]], r["reward"]] for r in evals],
        "flops_actual": steps[-1]["flops_total"],
        "steps": {x: [r.get(x) for r in steps] for x in of_a_step if x in steps[-1]},
        "ladder": [
            {k: v for k, v in r.items() if k.startswith(("ladder@", "hard_"))}
            for r in (evals[0], evals[-1])
        ],
    }


def final(one: Run) -> float:
    """Held-out reward at the end of the budget."""
    return one["curve"][-1][2]


def best_elsewhere(runs: dict[str, list[Run]]) -> list[str]:
    """For each seed the name (a rate, an arm) that ends best on the others, so that what is
    reported of a seed was not chosen by it; of equals the last. runs: of each name, a seed each.
    """
    chosen, names = [], list(runs)
    for seed in range(len(runs[names[0]])):
        ends = [sum(final(x) for i, x in enumerate(runs[name]) if i != seed) for name in names]
        chosen.append(max(range(len(names)), key=lambda index, ends=ends: (ends[index], index)))
    return [names[index] for index in chosen]


def picked(runs: dict[str, list[Run]], names: Sequence[str]) -> list[Run]:
    """The run of each seed under its own name."""
    return [runs[name][seed] for seed, name in enumerate(names)]


def versus(ours: Sequence[Run], rivals: Sequence[Run], held_out: int) -> dict[str, list[float]]:
    """Ratio and difference at the end, a seed each."""
    both = [(final(a), final(b)) for a, b in zip(ours, rivals, strict=True)]
    return {"vs": [a / max(b, 1 / held_out) for a, b in both], "minus": [a - b for a, b in both]}


def claims(
    arms: dict[str, list[Run]], collected: Sequence[Run], held_out: int
) -> dict[str, list[float]]:
    """What is claimed of `hard`, of each seed."""
    found = {f"final_{arm}": [final(one) for one in its] for arm, its in arms.items()}
    live = [one["steps"]["live_groups"] for one in arms["rl8"]]
    found["gate_live_share"] = [fmean(shares[:10]) for shares in live]
    found["gate_live_share_30"] = [fmean(shares[25:35] or shares) for shares in live]
    variants = {arm: arms[arm] for arm in OURS}
    ours = picked(variants, best_elsewhere(variants))
    compared = versus(ours, arms["rl8"], held_out)
    found["final_vs_rl8"], found["final_minus_rl8"] = compared["vs"], compared["minus"]
    found["back_generalisation"] = [final(one) - one["curve"][0][2] for one in arms["prefix_only"]]
    found["copied"] = [one["ladder"][1].get("hard_copied", 0.0) for one in ours]
    found["collect_share"] = [
        c["flops_paper"] / one["curve"][-1][1] for c, one in zip(collected, ours, strict=True)
    ]
    found["flops_to_sft_rl"], found["flops_to_sft_rl_after_collecting"] = [], []
    for one, rival, spent in zip(ours, arms["sft_rl"], collected, strict=True):
        equal = 0.9 * min(final(one), final(rival))
        mine, its = reached(one["curve"], equal), reached(rival["curve"], equal)
        if equal >= 1 / held_out and mine and its:
            begun = spent["flops_paper"]
            found["flops_to_sft_rl"].append(mine / its)
            found["flops_to_sft_rl_after_collecting"].append((mine - begun) / (its - begun + 1))
    return found


def main() -> None:
    args = arguments(__doc__ or "", part="only this seed of this task, as hard/0")
    logging.disable_progress_bar()
    parts, seeds = Parts("prefix", args), SEEDS[:1] if args.quick else SEEDS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if args.quick else parts.folder
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [(t, s) for t in TASKS for s in seeds if args.part in ("", f"{t}/{s}")]
        measured = {(t, s): measure(parts, folder, t, s, args.quick) for t, s in wanted}
    if not args.part:
        report(parts, measured, seeds, args.quick)


def arms_of(task: str, quick: bool) -> Sequence[str]:
    """Arms that run on a task."""
    if quick and task == "alike":
        return ()
    return tuple(ARMS) if task == "hard" else SOME[:1] if quick else SOME


def measure(parts: Parts, folder: Path, task: str, seed: int, quick: bool) -> Run:
    """All arms of a seed at all rates."""
    traces = folder / f"{task}-{seed}.sqlite"
    if not arms_of(task, quick):
        return {}
    collected = parts.measure(f"{task}/collect/{seed}", lambda: collect(task, seed, traces, quick))
    print(f"{task}, seed {seed}: {collected['attempts']} attempts", flush=True)
    found: Run = {"collected": collected}
    for rate in RATES[task][:1] if quick else RATES[task]:
        for arm in arms_of(task, quick):
            key = f"{task}/{arm}/{rate}/{seed}"
            found[f"{arm}/{rate}"] = one = parts.measure(
                key, lambda a=arm, r=rate: run(task, a, r, seed, traces, collected, quick)
            )
            print(f"{key}: {len(one['steps']['live_groups'])} steps, {final(one):.3f}", flush=True)
    return found


def report(
    parts: Parts, measured: dict[tuple[str, int], Run], seeds: Sequence[int], quick: bool
) -> None:
    """Tables, pictures, and the last line."""
    found: dict[str, list[float]] = {}
    detail: dict[str, Any] = {}
    for task in filter(lambda task: arms_of(task, quick), TASKS):
        of_seeds = [measured[task, seed] for seed in seeds]
        rates = RATES[task][:1] if quick else RATES[task]
        grid = {
            arm: {rate: [its[f"{arm}/{rate}"] for its in of_seeds] for rate in rates}
            for arm in arms_of(task, quick)
        }
        chosen = {arm: best_elsewhere(its) for arm, its in grid.items()}
        arms = {arm: picked(grid[arm], chosen[arm]) for arm in grid}
        collected = [its["collected"] for its in of_seeds]
        held_out = int((QUICK if quick else TASKS[task])["task.eval_size"])
        if task == "hard":
            found |= claims(arms, collected, held_out)
            for arm, its in grid.items():
                found |= {f"final_{arm}_at_{rate}": [final(x) for x in its[rate]] for rate in its}
        else:
            found |= {f"{task}_final_{arm}": [final(one) for one in arms[arm]] for arm in arms}
            found[f"{task}_live_share"] = [c.get("live_original", 0.0) for c in collected]
            if not quick:
                compared = versus(arms["uniform"], arms["rl8"], held_out)
                found |= {f"{task}_{end}_rl8": values for end, values in compared.items()}
        show(task, arms, chosen)
        detail[task] = {"grid": grid, "rates": chosen, "collected": collected}
        if not quick:
            draw(arms, task)
        if task == "hard" and not quick:
            draw_ladder({arm: its for arm, its in arms.items() if arm not in PLAIN})
    summary: dict[str, Any] = {}
    for key in KEYS:
        values = found.get(key, [])
        summary[key] = round(fmean(values), 4) if values else None
        summary[f"{key}_ci"] = interval(values)
    rows = [[key, summary[key], summary[f"{key}_ci"]] for key in KEYS]
    table("Claims", ["", "mean", "95 %"], rows)
    parts.finish("prefix", summary, seeds, detail)


def show(task: str, arms: dict[str, list[Run]], chosen: dict[str, list[str]]) -> None:
    """An arm a row."""
    rows = [
        [
            arm,
            f"{fmean(map(final, its)):.3f}",
            str(interval([final(one) for one in its]) or ""),
            f"{fmean(len(one['steps']['live_groups']) for one in its):.0f}",
            f"{fmean(fmean(one['steps']['live_groups']) for one in its):.3f}",
            f"{fmean(one['curve'][-1][1] for one in its):.2e}",
            f"{fmean(one['flops_actual'] for one in its):.2e}",
            " ".join(chosen[arm]),
        ]
        for arm, its in arms.items()
    ]
    columns = ["arm", "held-out", "95 %", "steps", "live", "FLOPs, paper", "actual", "rates"]
    table(task, columns, rows, width=110)


if __name__ == "__main__":
    main()
