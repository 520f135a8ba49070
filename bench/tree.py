"""Training on prefix trees: seconds and memory against training rollout by rollout.

Training steps (layout, forward, backward, clipping, optimizer) of Dr. GRPO over the same graded
rollouts, by tree and flat in turn; medians of the paired ratios. The weights stay as they are (the
learning rate is too small to move a float32), so that every repeat does the same, and the two
gradients are compared. Groups carry a signal: others need no forward. Memory is what the largest
microbatch, of at most so many tokens in both arms, keeps for its backward.

    start, after     the demo's task and policy before training, and after 32 steps; n = 8 and 16
    long64, long256  512 random tokens of prompt, 64 and 256 of reply, nothing shared but the prompt
    unshared         rollouts of one token of common text: nothing to gain
    careful          the whole step, `bench.reuse`'s policy over several epochs: draft trees and
                     training trees against neither; the same tokens, at 32 and 64 slots by turns

    python -m bench.tree [--quick] [--fresh]
"""

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from bench.common import Parts, arguments, table
from bench.reuse import (
    SLOTS,
    VARIANTS,
    Run,
    Setting,
    by_seeds,
    different,
    engines_of,
    mean_of,
    opened,
)
from reroll.config import AlgoSection, TrainSection, load_config
from reroll.engine.local import LocalEngine, Speculation
from reroll.order import stream
from reroll.rollout.collect import collect
from reroll.rollout.collected import CollectSpec
from reroll.rollout.decisions import Decisions
from reroll.rundir import RunDir
from reroll.setup import Parts as RunParts
from reroll.setup import load_policy, prepare
from reroll.train.forwards import Shares
from reroll.train.trainer import Trainer
from reroll.types import Completion, Group, Prompt, Purpose, Rollout

SEEDS = (0, 1, 2)
REPEATS = 20
DEMO = Path(str(resources.files("reroll"))) / "assets" / "demo.toml"
STILL = 1e-30
"""a learning rate that moves no float32 weight"""
E2E = Setting("careful", epochs=3, threads=2)
QUICK_E2E = Setting("demo", 4, 2, 2, "5e-5", (2, 3), 64, 4)


def trainers(model: PreTrainedModel, budget: int, max_tokens: int) -> dict[str, Trainer]:
    """One that trains by tree and one that does not, on the one module, which they leave alone."""
    algo = AlgoSection(name="dr_grpo")
    train = TrainSection(learning_rate=STILL, microbatch_tokens=budget, max_grad_norm=1e9)
    made = {}
    for arm in ("flat", "tree"):
        trees = arm == "tree"
        made[arm] = Trainer(
            model, algo, train, temperature=1.0, max_tokens=max_tokens, shares=Shares(trees)
        )
    return made


def compare(
    model: PreTrainedModel, groups: list[Group], budget: int, repeats: int
) -> dict[str, Any]:
    """Steps of both arms by turns: seconds of each, tokens, memory, difference of gradients."""
    longest = max(len(r.completion.token_ids) for group in groups for r in group.rollouts)
    arms = trainers(model, budget, longest)
    version = groups[0].rollouts[0].completion.versions[0]
    for trainer in arms.values():
        trainer.version = version
    credited = {arm: trainer.credit(groups)[0] for arm, trainer in arms.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    found: dict[str, Any] = {"seconds": seconds}
    gradients = {}
    for repeat in range(repeats + 1):
        for arm in list(arms) if repeat % 2 else list(arms)[::-1]:
            arms[arm].version = version  # all tokens are fresh
            started = time.perf_counter()
            metrics = arms[arm].step(credited[arm])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[arm].append(time.perf_counter() - started)
            arms[arm].take_work()
            if repeat == 0:
                gradients[arm] = gradient_of(arms[arm])
                found[f"ratio_{arm}"] = metrics["tree_tokens_ratio"]
                found[f"megabytes_{arm}"] = kept(arms[arm], credited[arm])
    for arm in arms:
        seconds[arm] = seconds[arm][1:]  # the first ones warm up
    pairs = zip(seconds["flat"], seconds["tree"], strict=True)
    tokens = sum(
        len(group.prompt.token_ids) + len(r.completion.token_ids)
        for group in groups
        for r in group.rollouts
    )
    return found | {
        "speedup": median(flat / tree for flat, tree in pairs),
        "difference": apart(gradients["tree"], gradients["flat"]),
        "tokens": tokens,
        "rollouts": sum(len(group.rollouts) for group in groups),
    }


def kept(trainer: Trainer, credited: Sequence[Any]) -> float:
    """Megabytes that the largest microbatch's forward keeps for its backward."""
    largest, there = 0, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        there[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    original = trainer.policy_loss
    try:

        def after(*args: Any) -> torch.Tensor:
            nonlocal largest
            loss = original(*args)
            largest = max(largest, sum(n for key, n in there.items() if key not in own))
            there.clear()
            return loss

        trainer.policy_loss = after  # type: ignore[assignment]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.step(credited)
    finally:
        trainer.policy_loss = original
    return largest / 1e6


def demo_groups(n: int, seed: int, steps: int, prompts: int) -> tuple[PreTrainedModel, list[Group]]:
    """The demo's policy after some training, and graded groups of it that carry a gradient."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run.out": f"{folder}/run",
            "run.seed": str(seed),
            "eval.samples": "1",
            "log.display": "off",
        }
        config = load_config(DEMO, settings)
        run = RunDir(config.run.out)
        run.open(config)
        with prepare(config, run, None) as parts:
            for step in range(steps):
                groups = demo_collect(parts, config.rollout.samples, seed, step, prompts)
                parts.trainer.step(parts.trainer.credit(groups)[0])
                parts.trainer.take_work()
                parts.engine.load_weights(parts.trainer.version)
            groups, step = [], steps
            while len(groups) < prompts:
                made = demo_collect(parts, n, seed, step, prompts)
                groups += [g for g in made if len({r.reward for r in g.rollouts}) > 1]
                step += 1
            return parts.model, groups[:prompts]


def demo_collect(parts: RunParts, n: int, seed: int, step: int, prompts: int) -> list[Group]:
    spec = CollectSpec(Purpose.TRAIN, seed, n, replace(parts.sampling, temperature=1.0))
    asked, visits = stream(step * prompts, prompts, parts.task.train, seed)
    return collect(
        parts.engine, parts.graders, parts.decode, asked, visits, spec, None, Decisions()
    ).groups


def random_groups(
    seed: int, groups: int, n: int, prompt: int, reply: int, vocabulary: int
) -> list[Group]:
    """Groups that share their prompt and nothing else, of random rewards."""
    lot = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [lot.randrange(vocabulary) for _ in range(count)]

    made = []
    for row in range(groups):
        asked = Prompt(row, "", tuple(tokens(prompt)))
        rollouts = []
        for sample in range(n):
            ids, logs = tokens(reply), [-1.0] * reply
            done = Completion(0, ids, logs, list(logs), [0] * reply, [True] * reply)
            rollouts.append(Rollout(asked, sample, 0, done, reward=float(sample % 2)))
        made.append(Group(asked, rollouts))
    return made


def longer(positions: int) -> PreTrainedModel:
    """A model of the demo policy's shape with more positions, its weights random."""
    config = load_policy(load_config(DEMO)).config
    config.max_position_embeddings = positions
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@dataclass
class Sizes:
    """How much is measured."""

    prompts: int = 32
    steps: int = 32
    repeats: int = REPEATS
    long_groups: int = 4
    long_prompt: int = 512
    replies: tuple[int, int] = (64, 256)


def measure(case: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """One case of the training step."""
    kind, _, n = case.partition("_n")
    if kind in ("start", "after"):
        steps = sizes.steps if kind == "after" else 0
        model, groups = demo_groups(int(n), seed, steps, sizes.prompts)
        return compare(model, groups, 8192, sizes.repeats)
    model = longer(4 * sizes.long_prompt)
    vocabulary = model.config.vocab_size
    if kind == "unshared":
        # a prompt of one token: what a group shares
        groups = random_groups(seed, 8 * sizes.long_groups, 8, 1, 80, vocabulary)
        return compare(model, groups, 8192, 2 * sizes.repeats)
    reply = sizes.replies[kind == "long256"]
    groups = random_groups(seed, sizes.long_groups, 8, sizes.long_prompt, reply, vocabulary)
    return compare(model, groups, 8192, sizes.repeats)


def whole_steps(setting: Setting, seed: int) -> dict[str, Any]:
    """Whole steps of a run: plain decoding and flat training against draft trees and trees."""
    with opened(setting, seed, {}) as (config, parts, reuse):
        spec = CollectSpec(
            Purpose.TRAIN,
            seed,
            config.rollout.samples,
            replace(parts.sampling, temperature=config.rollout.temperature),
        )
        arms = {name: VARIANTS[name] for name in ("off", "fresh")}
        engines = engines_of(parts, arms)
        reference = LocalEngine(
            parts.model, slots=64, capacity=parts.engine.capacity, speculation=Speculation()
        )
        run = Run(config, parts, reuse, engines, reference, spec)
        still = config.train.model_copy(update={"learning_rate": STILL})
        trained = {
            arm: Trainer(
                parts.model,
                config.algo,
                still,
                temperature=config.rollout.temperature,
                max_tokens=config.rollout.max_tokens,
                shares=Shares(arm == "fresh"),
            )
            for arm in arms
        }
        per_epoch = setting.prompts // setting.batch
        steps = [
            whole_step(run, trained, step, setting, step < per_epoch)
            for step in range(per_epoch * setting.epochs)
        ]
        return {"steps": steps, "per_epoch": per_epoch}


def whole_step(
    run: Run, trained: dict[str, Trainer], step: int, setting: Setting, first: bool
) -> dict[str, Any]:
    """Both arms do one step from the same weights, by turns; then the policy is updated."""
    parts, trainer = run.parts, run.parts.trainer
    prompts, visits = stream(step * setting.batch, setting.batch, parts.task.train, run.spec.seed)
    seconds: dict[str, float] = {}
    collected, gradients = {}, {}
    for name in run.turn(step, first):
        started = time.perf_counter()
        collected[name.split("/")[0]], _ = run.collect(name, prompts, visits)
        seconds[name.split("/")[0]] = time.perf_counter() - started
    groups = collected.get("fresh") or collected["off"]
    ratio = 1.0
    for arm in list(trained) if step % 4 < 2 else list(trained)[::-1]:
        one = trained[arm]
        one.version = trainer.version
        started = time.perf_counter()
        credited, _ = one.credit(groups)
        ratio = min(ratio, one.step(credited)["tree_tokens_ratio"])
        seconds[f"train_{arm}"] = time.perf_counter() - started
        one.take_work()
        gradients[arm] = gradient_of(one)
    trainer.step(trainer.credit(groups)[0])
    trainer.take_work()
    started = time.perf_counter()
    run.reuse.remember(groups, step + 1, trainer.version - 1, set())
    seconds["store"] = time.perf_counter() - started
    for engine in [*run.engines.values(), run.reference]:
        engine.load_weights(trainer.version)
    return {
        "slots": SLOTS[step % len(SLOTS)],
        "seconds": seconds,
        "reward": fmean(map(mean_of, groups)),
        "difference": apart(gradients["fresh"], gradients["off"]),
        "mismatches": sum(different(groups, other) for other in collected.values()),
        "ratio": ratio,
    }


def gradient_of(trainer: Trainer) -> torch.Tensor:
    """All parameters' gradients."""
    every = trainer.parameters.values()
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                      for p in every])  # fmt: skip


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Distance of gradients over the other's norm; 0 where a batch had no signal."""
    return ((one - other).norm() / other.norm().clamp(min=1e-30)).item()


def gain(measured: dict[str, Any], slots: int | None = None) -> float:
    """Seconds of whole steps of epochs 2 and on, neither over both."""
    steps = [s["seconds"] for s in measured["steps"][measured["per_epoch"] :]
             if slots in (None, s["slots"])]  # fmt: skip
    plain = sum(s["off"] + s["train_off"] for s in steps)
    return plain / sum(s["fresh"] + s["store"] + s["train_fresh"] for s in steps)


CASES = ("start_n8", "start_n16", "after_n8", "after_n16", "long64", "long256", "unshared")


def main() -> None:
    args = arguments(__doc__.split("\n")[0])
    logging.disable_progress_bar()
    parts = Parts("tree", args)
    sizes = Sizes(4, 1, 3, 1, 64, (8, 32)) if args.quick else Sizes()
    seeds = SEEDS[:1] if args.quick else SEEDS
    detail: dict[str, list[dict[str, Any]]] = {}
    for case in CASES:
        for seed in seeds:
            detail.setdefault(case, []).append(
                parts.measure(f"{case}/{seed}", lambda c=case, s=seed: measure(c, s, sizes))
            )
            print(f"{case} seed {seed}: {detail[case][-1]['speedup']:.2f}x", flush=True)
    e2e = []
    setting = QUICK_E2E if args.quick else E2E
    for seed in seeds:
        e2e.append(parts.measure(f"whole/{seed}", lambda s=seed: whole_steps(setting, s)))
        print(f"whole steps seed {seed}: {gain(e2e[-1]):.2f}x", flush=True)
    show(detail, e2e)
    parts.finish("tree", summarise(detail, e2e), seeds, {"cases": detail, "whole": e2e})


def show(detail: dict[str, list[dict[str, Any]]], e2e: list[dict[str, Any]]) -> None:
    """The tables."""
    rows = []
    for case, runs in detail.items():
        flat, tree = (fmean(median(r["seconds"][arm]) for r in runs) for arm in ("flat", "tree"))
        memory = [f"{fmean(r[f'megabytes_{arm}'] for r in runs):,.0f}" for arm in ("flat", "tree")]
        rows.append(
            (
                case,
                f"{fmean(r['tokens'] for r in runs):,.0f}",
                f"{fmean(r['ratio_tree'] for r in runs):.2f}",
                f"{flat:.2f}",
                f"{tree:.2f}",
                f"{fmean(r['speedup'] for r in runs):.2f}x",
                *memory,
                f"{max(r['difference'] for r in runs):.0e}",
            )
        )
    columns = ("a training step", "tokens", "of them run", "flat s", "tree s", "faster",
               "flat MB", "tree MB", "gradient off")  # fmt: skip
    table(f"Training by tree and flat, mean of {len(e2e)} seeds", columns, rows)
    rows = []
    for slots in SLOTS:
        steps = [s for m in e2e for s in m["steps"][m["per_epoch"] :] if s["slots"] == slots]
        keys = ("off", "fresh", "store", "train_off", "train_fresh")
        mean = {key: fmean(s["seconds"][key] for s in steps) for key in keys} if steps else {}
        if mean:
            times = (
                mean["off"], mean["fresh"] + mean["store"], mean["train_off"], mean["train_fresh"]
            )  # fmt: skip
            rows.append(
                (slots, *(f"{x:.2f}" for x in times), f"{fmean(gain(m, slots) for m in e2e):.2f}x")
            )
    columns = ("slots", "decoding s", "draft trees s", "flat s", "tree s", "whole step, faster")
    table("Whole steps, epochs 2 and later", columns, rows)


def summarise(detail: dict[str, list[dict[str, Any]]], e2e: list[dict[str, Any]]) -> dict[str, Any]:
    """The last line's keys."""
    keys = {
        "train_speedup_n8": ("start_n8", "speedup"),
        "train_speedup_n16": ("start_n16", "speedup"),
        "train_speedup_n8_after": ("after_n8", "speedup"),
        "train_speedup_n16_after": ("after_n16", "speedup"),
        "train_speedup_long_prompt": ("long64", "speedup"),
        "train_speedup_long_reply": ("long256", "speedup"),
        "unshared_speedup": ("unshared", "speedup"),
        "tokens_ratio_n8": ("start_n8", "ratio_tree"),
        "tokens_ratio_n16": ("start_n16", "ratio_tree"),
    }
    found = {key: by_seeds([r[name] for r in detail[case]]) for key, (case, name) in keys.items()}
    found["e2e_speedup_exact"] = by_seeds([gain(one) for one in e2e])
    for slots in SLOTS:
        there = [m for m in e2e if any(s["slots"] == slots for s in m["steps"][m["per_epoch"] :])]
        if there:
            found[f"e2e_speedup_exact_{slots}slots"] = by_seeds([gain(m, slots) for m in there])
    summary: dict[str, Any] = {}
    for key, (mean, interval) in found.items():
        summary[key] = round(mean, 4)
        summary[f"{key}_ci"] = None if interval is None else [round(x, 4) for x in interval]
    every = [r["difference"] for runs in detail.values() for r in runs]
    every += [s["difference"] for m in e2e for s in m["steps"]]
    summary["gradient_difference"] = float(f"{max(every):.2g}")
    summary["mismatches"] = sum(s["mismatches"] for m in e2e for s in m["steps"])
    return summary


if __name__ == "__main__":
    main()
