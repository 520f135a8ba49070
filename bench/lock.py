"""A lock of H digits: what plain RL pays for a success that is exponentially rare.

Every reply of H characters must have the right parity at every place; an untaught policy with
learnt positions gets each right with a chance of about one half, and what it learns at one place
says nothing about another. So a success has a chance of 2^-H, known beforehand.

    rl8       Dr. GRPO, 8 rollouts of each prompt
    prefix    the same from the prefix of one old success, cut at three places in 40-80 %, mixed
              3 : 1 with the prompts without

Both run for TRACES times what a success costs on average, and TRAINING; a lock counts as open when
nine of ten held-out prompts (of the same lock) open it. Cost is counted in FLOPs as the paper does,
from the first collected token on.

    python -m bench.lock [--quick] [--fresh]
"""

import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers.utils import logging

from bench.common import Parts, arguments, interval, reached, table
from bench.prefix_plots import DOCS, new_axes

SEEDS = (0, 1, 2)
LENGTHS = (4, 6, 8, 10, 12, 14)
RATES = ("1e-3", "3e-3")
TRACES, TRAINING = 8, 6e10
"""an arm ends when it has spent as much: attempts that a success takes, and FLOPs"""
EVERY = 10
"""steps between evaluations"""
OPEN = 0.9
PROBLEMS = 16
ARMS = ("rl8", "prefix")
NAMES = {"rl8": "RL, n = 8", "prefix": "PrefixRL"}
PICTURE = DOCS / "prefix_lock.png"
COMMON = {
    "task.source": "jsonl", "task.train_size": "8", "task.eval_size": "8",
    "task.graders": '[{name = "bench.lock:opened"}]',
    "rollout.prompts": "32", "algo.name": "dr_grpo", "train.steps": "100000",
    "train.warmup": "0", "eval.samples": "8", "eval.greedy": "false", "log.display": "off",
    "log.timeline": "0", "log.samples": "0", "checkpoint.every": "1000", "engine.slots": "128",
}  # fmt: skip
PREFIX = {
    "prefix.on": "true", "prefix.least": "1", "prefix.guard": "false", "prefix.retire": "1.0",
    "prefix.ladder": "[]", "prefix.untraced": "true", "collect.screen": "0",
    "collect.traces": "1",
}  # fmt: skip


def opened(prompt: str, completion: str, answer: str, **columns: object) -> float:
    """1 if every character has the parity that the lock wants."""
    fits = (ord(c) % 2 == int(bit) for c, bit in zip(completion, answer, strict=False))
    return float(len(completion) >= len(answer) and all(fits))


def combination(length: int, seed: int) -> str:
    """The lock's parities."""
    source = torch.Generator().manual_seed(seed * 1000 + length)
    return "".join(map(str, torch.randint(2, (length,), generator=source).tolist()))


def make_folder(folder: Path, length: int, seed: int) -> float:
    """An untaught policy with learnt positions, and prompts of one lock; FLOPs of an attempt."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from recipes.demo_policy import character_tokenizer

    tokenizer = character_tokenizer()
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    rows = [
        {"prompt": f"lock {i:02d}", "answer": combination(length, seed)} for i in range(PROBLEMS)
    ]
    (folder / "locks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 2.0 * model.num_parameters() * (len(rows[0]["prompt"]) + 1 + length)


def run(arm: str, rate: str, length: int, seed: int, quick: bool) -> dict[str, Any]:
    """One arm: held-out success and cost over the steps."""
    from reroll.config import load_config
    from reroll.loop import train
    from reroll.rollout.traces import TraceStore

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        attempt = make_folder(folder, length, seed)
        settings = COMMON | (PREFIX if arm == "prefix" else {})
        settings |= {
            "run.out": f"{name}/run", "run.seed": str(seed), "model.path": f"{name}/policy",
            "task.name": f"{name}/locks.jsonl", "rollout.max_tokens": str(length),
            "train.learning_rate": rate, "eval.every": str(EVERY),
            "train.flops": str((TRACES * 2**length * attempt + TRAINING) / (40 if quick else 1)),
        }  # fmt: skip
        if arm == "prefix":
            settings |= {"collect.cap": str(64 * 2**length)}
        records = train(load_config(None, settings)).records()
        spent = {r["step"]: r["flops_total_paper"] for r in records if r["kind"] == "train"}
        spent[0] = 0.0
        if arm == "prefix":
            with TraceStore(folder / "run" / "traces.sqlite", read_only=True) as store:
                spent[0] = store.ledger()["flops_paper"]
    evals = [r for r in records if r["kind"] == "eval"]
    return {"curve": [[r["step"], spent[r["step"]], r["reward"]] for r in evals]}


def cost(found: dict[str, Any]) -> float | None:
    """FLOPs until the lock was open; None: it never was."""
    return reached(found["curve"], OPEN)


def best(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The runs of the better rate: that opens more locks, then the cheaper one."""

    def merit(its: list[dict[str, Any]]) -> tuple[int, float]:
        found = [c for one in its if (c := cost(one)) is not None]
        return len(found), -fmean(found) if found else 0.0

    return max(runs.values(), key=merit)


def draw(detail: dict[str, list[dict[str, Any]]]) -> None:
    """FLOPs until the lock was open, by its length; crosses: spent, and it never was."""
    figure, axes = new_axes()
    for arm, colour, shift in zip(ARMS, ("#777777", "#4477aa"), (-0.12, 0.12), strict=True):
        means = []
        for length in LENGTHS:
            its = detail[f"{arm}/{length}"]
            for one in its:
                spent, never = cost(one), one["curve"][-1][1]
                mark = "x" if spent is None else "o"
                label = f"{NAMES[arm]}: {'still shut' if spent is None else 'open'}"
                axes.plot(length + shift, spent or never, mark, color=colour, label=label)
            means.append(fmean(cost(one) or one["curve"][-1][1] for one in its))
        axes.plot([length + shift for length in LENGTHS], means, color=colour, linewidth=0.8)
    handles, labels = axes.get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    axes.legend(known.values(), known.keys(), frameon=False)
    axes.set(xlabel="characters of the lock", ylabel="FLOPs, collecting included", yscale="log")
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    args = arguments(__doc__ or "")
    parts = Parts("lock", args)
    seeds = SEEDS[:1] if args.quick else SEEDS
    lengths = LENGTHS[:2] if args.quick else LENGTHS
    detail: dict[str, list[dict[str, Any]]] = {}
    for length in lengths:
        for arm in ARMS:
            detail[f"{arm}/{length}"] = best(
                {
                    rate: [
                        parts.measure(
                            f"{arm}/{rate}/{length}/{seed}",
                            lambda a=arm, r=rate, n=length, s=seed: run(a, r, n, s, args.quick),
                        )
                        for seed in seeds
                    ]
                    for rate in (RATES[1:] if args.quick else RATES)
                }
            )
    summary = dict.fromkeys(
        f"{name}_{arm}_{length}{end}"
        for length in LENGTHS
        for arm in ARMS
        for name, end in (("solved", ""), ("flops", ""), ("final", ""), ("final", "_ci"))
    )
    rows = []
    for length in lengths:
        cells = [str(length), f"{2.0**-length:.2g}"]
        for arm in ARMS:
            found = [cost(one) for one in detail[f"{arm}/{length}"]]
            solved = [c for c in found if c is not None]
            last = [one["curve"][-1][2] for one in detail[f"{arm}/{length}"]]
            end = f"{arm}_{length}"
            summary[f"solved_{end}"] = len(solved) / len(found)
            summary[f"flops_{end}"] = fmean(solved) if len(solved) == len(found) else None
            summary[f"final_{end}"], summary[f"final_{end}_ci"] = fmean(last), interval(last)
            cells += [f"{len(solved)}/{len(found)}", f"{fmean(solved):.2e}" if solved else "-"]
            cells.append(f"{fmean(last):.2f}")
        rows.append(cells)
    columns = ["H", "chance"]
    for arm in ARMS:
        columns += [f"{arm} open", "FLOPs", "at the end"]
    table("A lock of H characters", columns, rows, width=110)
    if not args.quick:
        draw(detail)
    parts.finish("lock", summary, seeds, detail)


if __name__ == "__main__":
    main()
