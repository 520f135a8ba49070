"""Reuse of old rollouts: what it saves, and what it does to the reward of fresh samples.

One prompt set, several epochs of GRPO-like training (Dr. GRPO, one optimizer step a batch). Arms:

    off            plain decoding
    fresh          a tree of the prompt's old rollouts, new noise each epoch      (lossless)
    redraft        the same, finished siblings, and re-drafting after the tree    (lossless)
    held           the noise of the epoch before, never redrawn                   (lossless)
    refresh        held, a quarter of the keys redrawn each epoch                 (lossless)
    lenient1       SPEC-RL's acceptance at lenience 1
    lenient        SPEC-RL's acceptance at lenience e^0.5, as published

The first three write the same tokens by construction, so they share one training run: at every
step each of them collects the same batch, in turn, at 32 and at 64 slots by turns, the tokens are
compared, and the policy is trained once; their rewards are equal by identity. (In the first epoch
`fresh` has nothing to reuse and is left out.) Seconds are of the rollout phase, with look-ups,
verification and the store's write, on one thread unless said. The other arms train runs of their
own on the same prompts in the same order. In every step each problem is also sampled afresh
(`FRESH` samples, keys that nothing else uses, same weights): `gap` is the mean reward of the
rollouts trained on minus that of the fresh.

Policies: `careful` (one style, low entropy), `demo` (three styles, of which training picks one),
`again` (careful, fewer problems that come again more often, at twice the learning rate: where
self-influence shows), `wordy` (replies over five times as long and of higher entropy; one seed),
`threads` (careful on two threads, three epochs); the last two with the first three arms only.
Figures are of epochs 2 and later unless said. Intervals: 95 %, Student's t over seeds for ratios,
normal over (seed, problem) for differences of rewards.

    python -m bench.reuse [--quick] [--fresh]
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers.utils import logging

from bench.common import Parts, arguments, table
from reroll.config import Config, load_config
from reroll.engine.base import Stats
from reroll.engine.local import LocalEngine, Speculation
from reroll.evaluate import evaluate
from reroll.order import stream
from reroll.rollout.collect import collect
from reroll.rollout.collected import Collected, CollectSpec
from reroll.rollout.decisions import Decisions
from reroll.rollout.reuse import Reuse
from reroll.rundir import RunDir
from reroll.setup import Parts as RunParts
from reroll.setup import open_reuse, prepare
from reroll.types import Group, Purpose

RECIPES = Path(__file__).parent.parent / "recipes"
POLICIES = Path(__file__).parent / "policies"
FRESH = 4
SEEDS = (0, 1, 2)
SLOTS = (32, 64)
T_95 = {2: 12.706, 3: 4.303}
LOSSY = {
    "held": {"reuse.rule": "held", "reuse.refresh": "0", "reuse.max_age": "99"},
    "refresh": {"reuse.rule": "held"},
    "lenient1": {"reuse.rule": "lenient", "reuse.lenience": "1"},
    "lenient": {"reuse.rule": "lenient"},
}
"""arms with a training run of their own"""
VARIANTS = {
    "off": Speculation(),
    "fresh": Speculation(gate=True),
    "redraft": Speculation(gate=True, redraft=8, siblings=True),
}
"""arms that share a training run"""


@dataclass(frozen=True)
class Setting:
    """A policy and how it is trained."""

    policy: str
    prompts: int = 240
    batch: int = 48
    epochs: int = 6
    rate: str = "5e-5"
    terms: tuple[int, int] = (4, 7)
    max_tokens: int = 160
    held_out: int = 128
    threads: int = 1


SETTINGS = {
    "careful": Setting("careful"),
    "demo": Setting("demo", rate="2e-4", terms=(5, 9)),
    "again": Setting("careful", prompts=96, batch=24, epochs=10, rate="1e-4"),
    "wordy": Setting(
        "wordy", prompts=48, batch=24, epochs=4, terms=(7, 9), max_tokens=640, held_out=32
    ),
    "threads": Setting("careful", epochs=3, threads=2),
}
SHARED_ALONE = ("wordy", "threads")
"""measured without the arms that have training runs of their own"""
SUFFIX = {name: f"_{name}" if name != "careful" else "" for name in SETTINGS}
"""of the last line's keys"""
RATES = {
    rate: Setting("careful", prompts=96, epochs=4, rate=rate, held_out=32)
    for rate in ("1e-5", "5e-5", "2e-4", "1e-3")
}
"""how well trees are followed at other learning rates; an epoch is two updates"""
QUICK = {
    "careful": Setting("demo", 4, 2, 2, "5e-5", (2, 3), 64, 4),
    "demo": Setting("demo", 4, 2, 2, "2e-4", (2, 3), 64, 4),
}


def policy_path(name: str) -> str:
    """The policy's folder; built by its recipe when it is not there."""
    if name == "demo":
        return name
    folder = POLICIES / name
    if not (folder / "README.md").exists():
        sys.path.insert(0, str(RECIPES))
        import reuse_policies

        print(f"building the policy {name} (minutes)", flush=True)
        reuse_policies.build(name, folder)
    return str(folder)


def configure(setting: Setting, seed: int, out: str, extra: dict[str, str]) -> Config:
    """The run's configuration."""
    demo = Path(str(resources.files("reroll"))) / "assets" / "demo.toml"
    steps = setting.prompts // setting.batch * setting.epochs
    low, high = setting.terms
    return load_config(
        demo,
        {
            "run.out": out,
            "run.seed": str(seed),
            "run.threads": str(setting.threads),
            "model.path": policy_path(setting.policy),
            "task.params": f"{{min_terms={low},max_terms={high},min_digits=2,max_digits=2}}",
            "task.train_size": str(setting.prompts),
            "task.eval_size": str(setting.held_out),
            "rollout.prompts": str(setting.batch),
            "rollout.max_tokens": str(setting.max_tokens),
            "train.steps": str(steps),
            "train.learning_rate": setting.rate,
            "train.warmup": "0",
            "eval.samples": "4",
            "eval.greedy": "false",
            "reuse.on": "true",
            "log.display": "off",
            **extra,
        },
    )


@contextmanager
def opened(
    setting: Setting, seed: int, extra: dict[str, str]
) -> Iterator[tuple[Config, RunParts, Reuse]]:
    """A run's parts, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        config = configure(setting, seed, f"{folder}/run", extra)
        run = RunDir(config.run.out)
        run.open(config)
        with prepare(config, run, None) as parts, open_reuse(config, run, None) as reuse:
            assert reuse is not None
            yield config, parts, reuse


def engines_of(parts: RunParts, speculations: dict[str, Speculation]) -> dict[str, LocalEngine]:
    """An engine for each arm and number of slots, on the one module, with one table of costs."""
    capacity = parts.engine.capacity
    return {
        f"{arm}/{slots}": LocalEngine(
            parts.model,
            slots=slots,
            capacity=capacity,
            speculation=speculation,
            costs=parts.engine.costs,
        )
        for arm, speculation in speculations.items()
        for slots in SLOTS
    }


@dataclass
class Run:
    """One training run: its parts, engines and place."""

    config: Config
    parts: RunParts
    reuse: Reuse
    engines: dict[str, LocalEngine]
    reference: LocalEngine
    """samples afresh and evaluates; not measured"""
    spec: CollectSpec

    def turn(self, step: int, first_epoch: bool) -> list[str]:
        """The engines that collect at this step; who comes first changes from step to step."""
        slots = SLOTS[step % len(SLOTS)]
        names = [n for n in self.engines if n.endswith(f"/{slots}")]
        if first_epoch and len(names) > 1:
            names = [n for n in names if not n.startswith("fresh")]
        first = step // len(SLOTS) % len(names)
        return names[first:] + names[:first]

    def collect(self, name: str, prompts: list, visits: list) -> tuple[list[Group], Reuse]:
        """One collect of an arm's engine, and its decisions; each arm looks the past up anew."""
        reuse = Reuse(self.config.reuse, self.reuse.store, self.config.run.seed)
        decisions = Decisions() if name.startswith("off") else reuse.decisions()
        collected = self._collect(self.engines[name], prompts, visits, self.spec, decisions)
        return collected.groups, reuse

    def sample_afresh(self, prompts: list, visits: list) -> list[Group]:
        """Lossless, on keys that nothing else uses, whatever the arm."""
        spec = replace(self.spec, purpose=Purpose.AUDIT, samples=FRESH)
        decisions = Decisions(self.reuse.start_fresh)
        return self._collect(self.reference, prompts, visits, spec, decisions).groups

    def _collect(
        self,
        engine: LocalEngine,
        prompts: list,
        visits: list,
        spec: CollectSpec,
        decisions: Decisions,
    ) -> Collected:
        parts = self.parts
        return collect(engine, parts.graders, parts.decode, prompts, visits, spec, None, decisions)


def train_run(setting: Setting, seed: int, arm: str) -> dict[str, Any]:
    """One training run of an arm (or of the arms that share one); figures of each epoch."""
    extra = LOSSY.get(arm, {})
    gated = Speculation(gate=not arm.startswith("lenient"))
    speculations = VARIANTS if arm == "shared" else {arm: VARIANTS.get(arm, gated)}
    with opened(setting, seed, extra) as (config, parts, reuse):
        spec = CollectSpec(
            Purpose.TRAIN,
            seed,
            config.rollout.samples,
            replace(parts.sampling, temperature=config.rollout.temperature),
        )
        engines = engines_of(parts, speculations | {"reference": Speculation(gate=True)})
        reference = [engines.pop(f"reference/{slots}") for slots in SLOTS][-1]
        run = Run(config, parts, reuse, engines, reference, spec)
        held_out = [held_out_reward(run)]
        epochs: list[dict[str, Any]] = []
        problems: dict[int, list[float]] = {}
        history: dict[int, list[list[list[int]]]] = {}
        per_epoch = setting.prompts // setting.batch
        for step in range(per_epoch * setting.epochs):
            if step % per_epoch == 0:
                epochs.append({"variants": {}, "steps": []})
            epochs[-1]["steps"].append(one_step(run, step, setting, epochs, problems, history))
            if (step + 1) % per_epoch == 0:
                held_out.append(held_out_reward(run))
        return {
            "epochs": epochs,
            "held_out": held_out,
            "problems": {str(row): gaps for row, gaps in problems.items()},
        }


def one_step(
    run: Run,
    step: int,
    setting: Setting,
    epochs: list[dict[str, Any]],
    problems: dict[int, list[float]],
    history: dict[int, list[list[list[int]]]],
) -> dict[str, Any]:
    """Collect with every engine, compare the tokens, sample afresh, train once."""
    parts, reuse, trainer = run.parts, run.reuse, run.parts.trainer
    seed = run.config.run.seed
    prompts, visits = stream(step * setting.batch, setting.batch, parts.task.train, seed)
    collected: dict[str, list[Group]] = {}
    figures: dict[str, dict[str, float]] = {}
    variants = epochs[-1]["variants"]
    for name in run.turn(step, len(epochs) == 1):
        before, started = deepcopy(run.engines[name].stats()), time.perf_counter()
        collected[name], past = run.collect(name, prompts, visits)
        seconds = time.perf_counter() - started
        add(variants.setdefault(name, {}), before, run.engines[name].stats(), seconds)
        if not name.startswith("off"):
            found = past.metrics(collected[name], trainer.version)
            keep = ("accept_prefix", "full_reuse", "duplicates", "reuse_age")
            figures[name.split("/")[0]] = {key: found[key] for key in keep}
    groups = next(iter(collected.values()))
    fresh = run.sample_afresh(prompts, visits)
    for group, again in zip(groups, fresh, strict=True):
        if epochs[1:]:
            problems.setdefault(group.prompt.row, []).append(mean_of(group) - mean_of(again))
    shares = follow_shares(groups, history)
    started, wrote_with = time.perf_counter(), trainer.version
    credited, _ = trainer.credit(groups)
    trainer.step(credited)
    trainer.take_work()
    train_seconds = time.perf_counter() - started
    live = {id(c.rollout) for group in credited for c in group if c.carries_gradient()}
    started = time.perf_counter()
    reuse.remember(groups, step + 1, wrote_with, live)
    for name in collected:
        if not name.startswith("off"):
            variants[name]["seconds"] += time.perf_counter() - started
    for engine in [*run.engines.values(), run.reference]:
        engine.load_weights(trainer.version)
    completions = [r.completion for group in groups for r in group.rollouts]
    tokens = sum(len(c.token_ids) for c in completions)
    return {
        "reward_trained_on": fmean(map(mean_of, groups)),
        "reward_fresh": fmean(map(mean_of, fresh)),
        "train_seconds": train_seconds,
        "mismatches": sum(different(groups, other) for other in collected.values()),
        "compared": len(completions) * (len(collected) - 1),
        "entropy": -sum(sum(c.logprobs) for c in completions) / tokens,
        "length": tokens / len(completions),
        "reuse": figures,
        **shares,
    }


def add(sums: dict[str, float], before: Stats, after: Stats, seconds: float) -> None:
    """Add up what one collect cost."""
    names = ("ticks", "tokens_decoded", "tokens_verified", "tokens_redrafted", "tokens_reused",
             "tokens_drawn", "nodes_offered")  # fmt: skip
    found = {name: getattr(after, name) - getattr(before, name) for name in names}
    found |= {f"seconds_{k}": after.seconds[k] - before.seconds[k] for k in before.seconds}
    for name, value in (found | {"seconds": seconds, "collects": 1}).items():
        sums[name] = sums.get(name, 0) + value


def mean_of(group: Group) -> float:
    """Mean reward of a group."""
    return fmean(r.reward or 0.0 for r in group.rollouts)


def different(groups: list[Group], other: list[Group]) -> int:
    """Rollouts whose tokens are not the same."""
    pairs = (
        (a.completion.token_ids, b.completion.token_ids)
        for one, two in zip(groups, other, strict=True)
        for a, b in zip(one.rollouts, two.rollouts, strict=True)
    )
    return sum(a != b for a, b in pairs)


def held_out_reward(run: Run) -> float:
    """Mean held-out reward at temperature 1, the same keys at every evaluation."""
    parts = run.parts
    return evaluate(
        run.reference,
        parts.graders,
        parts.decode,
        parts.extract,
        parts.task.held_out,
        run.config.eval,
        seed=run.config.run.seed,
        step=0,
        sampling=parts.sampling,
    )["reward"]


WINDOWS = {
    "own": [1], "last": [1], "last2": [1, 2], "last4": [1, 2, 3, 4],
    "age2": [2], "age3": [3], "age4": [4], "age5": [5],
}  # fmt: skip
"""which epochs back make the tree; "own": the sample's own rollout alone"""


def follow_shares(
    groups: list[Group], history: dict[int, list[list[list[int]]]]
) -> dict[str, float | None]:
    """Share of the new tokens that lie on the tree of some old rollouts, whatever was verified."""
    found = dict.fromkeys(WINDOWS, 0)
    total, epoch = 0, 0
    for group in groups:
        past = history.setdefault(group.prompt.row, [])
        epoch = len(past)
        texts = [r.completion.token_ids for r in group.rollouts]
        for name, back in WINDOWS.items():
            olds = [past[-k] for k in back if k <= epoch]
            for sample, text in enumerate(texts):
                drafts = [t for old in olds for t in ([old[sample]] if name == "own" else old)]
                found[name] += max((shared_prefix(text, draft) for draft in drafts), default=0)
        total += sum(map(len, texts))
        past.append(texts)
    enough = {name: epoch >= max(back) for name, back in WINDOWS.items()}
    return {f"on_{name}": found[name] / total if enough[name] else None for name in WINDOWS}


def shared_prefix(one: list[int], other: list[int]) -> int:
    """Tokens that two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def later(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Epochs 2 and on."""
    return measured["epochs"][1:]


def total(measured: dict[str, Any], variant: str, key: str) -> float:
    """Sum over epochs 2 and on of a figure of an arm, at some slots ("fresh/64") or all."""
    return sum(
        sums[key]
        for epoch in later(measured)
        for name, sums in epoch["variants"].items()
        if name == variant or name.split("/")[0] == variant
    )


def mean_step(epoch: dict[str, Any], key: str) -> float:
    """Mean over an epoch's steps."""
    return fmean(step[key] for step in epoch["steps"])


def by_seeds(values: list[float]) -> tuple[float, list[float] | None]:
    """(mean, Student's t interval over seeds; None with one seed)."""
    if len(values) < 2:
        return fmean(values), None
    half = T_95[len(values)] * stdev(values) / len(values) ** 0.5
    return fmean(values), [fmean(values) - half, fmean(values) + half]


def by_problems(runs: list[dict[str, Any]]) -> tuple[float, list[float] | None]:
    """(mean gap, normal interval over (seed, problem), each the mean of its epochs)."""
    gaps = [fmean(values) for one in runs for values in one["problems"].values()]
    if len(gaps) < 2:
        return fmean(gaps), None
    half = 1.96 * stdev(gaps) / len(gaps) ** 0.5
    return fmean(gaps), [fmean(gaps) - half, fmean(gaps) + half]


RATIOS = {
    **{
        f"{name}_ratio_{arm}": (arm, figure)
        for name, figure in (("decoded", "tokens_decoded"), ("ticks", "ticks"))
        for arm in ("fresh", "redraft")
    },
    **{
        f"rollout_speedup_{arm}_{slots}slots": (f"{arm}/{slots}", "seconds")
        for arm in ("fresh", "redraft")
        for slots in SLOTS
    },
}
"""key -> (variant, figure): the plain variant's sum over the variant's"""


def summarise(runs: dict[str, list[dict[str, Any]]], suffix: str) -> dict[str, Any]:
    """The last line's keys of one policy."""
    found: dict[str, tuple[float, list[float] | None] | None] = {}
    for key, (variant, figure) in RATIOS.items():
        plain = variant.replace(variant.split("/")[0], "off")
        found[key] = by_seeds(
            [total(m, plain, figure) / max(1e-9, total(m, variant, figure)) for m in runs["shared"]]
        )
    for arm in LOSSY:
        values = [
            total(plain, "off", "tokens_decoded") / max(1, total(own, arm, "tokens_decoded"))
            for plain, own in zip(runs["shared"], runs.get(arm, []), strict=False)
        ]
        found[f"decoded_ratio_{arm}"] = by_seeds(values) if values else None
        found[f"gap_{arm}"] = by_problems(runs[arm]) if arm in runs else None
        found[f"heldout_diff_{arm}"] = (
            by_seeds(
                [
                    own["held_out"][-1] - plain["held_out"][-1]
                    for plain, own in zip(runs["shared"], runs[arm], strict=False)
                ]
            )
            if arm in runs
            else None
        )
    found["gap_fresh"] = by_problems(runs["shared"])
    mismatches = sum(
        s["mismatches"] for m in runs["shared"] for e in m["epochs"] for s in e["steps"]
    )
    same = (0.0, [0.0, 0.0]) if mismatches == 0 else None  # identical tokens, identical training
    found |= {"fresh_reward_diff_fresh": same, "heldout_diff_fresh": same}
    summary: dict[str, Any] = {}
    for key, value in found.items():
        summary[f"{key}{suffix}"] = None if value is None else round(value[0], 4)
        interval = None if value is None or value[1] is None else [round(x, 4) for x in value[1]]
        summary[f"{key}{suffix}_ci"] = interval
    compared = sum(s["compared"] for m in runs["shared"] for e in m["epochs"] for s in e["steps"])
    return summary | {f"mismatches{suffix}": mismatches, f"compared{suffix}": compared}


def show(policy: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """The tables of one policy, by arm and epoch: what was spent, and rewards."""
    spent, rewards = [], []
    for arm, measured in runs.items():
        count = len(measured[0]["epochs"])
        for name in VARIANTS if arm == "shared" else (arm,):
            later_ones = [epoch for one in measured for epoch in later(one)]
            spent.append((name, "2 and on", *costs_of(name, later_ones)))
            for index in range(count):
                epochs = [one["epochs"][index] for one in measured]
                spent.append(("", index + 1, *costs_of(name, epochs)))
        for index in range(count):
            epochs = [one["epochs"][index] for one in measured]
            trained_on, fresh = (
                fmean(mean_step(epoch, key) for epoch in epochs)
                for key in ("reward_trained_on", "reward_fresh")
            )
            held_out = fmean(one["held_out"][index + 1] for one in measured)
            shown = [f"{x:.3f}" for x in (trained_on, fresh, held_out, trained_on - fresh)]
            rewards.append((arm if index == 0 else "", index + 1, *shown))
    of = f"{policy}, mean of {len(runs['shared'])} seeds"
    columns = ("", "epoch", "decoded", "verified", "ticks", "kept", "whole", "dupl.",
               "s at 32", "s at 64")  # fmt: skip
    threads = "two threads" if SETTINGS[policy].threads == 2 else "one thread"
    table(f"{of}: a step's costs; s: rollouts / with training, {threads}", columns, spent)
    before = fmean(one["held_out"][0] for one in runs["shared"])
    title = f"{of}: rewards; held-out before {before:.3f}; shared: off, fresh and redraft"
    table(title, ("", "epoch", "trained on", "fresh", "held-out", "gap"), rewards)


def costs_of(name: str, epochs: list[dict[str, Any]]) -> list[str]:
    """Cells of `show`: an arm's costs by step in these epochs, of both numbers of slots."""
    sums = [{s: e["variants"].get(f"{name}/{s}") for s in SLOTS} for e in epochs]
    every = [one for epoch in sums for one in epoch.values() if one]
    if not every:
        return ["-"] * 8
    collects = sum(one["collects"] for one in every)
    cells = [
        f"{sum(one[key] for one in every) / collects:,.0f}"
        for key in ("tokens_decoded", "tokens_verified", "ticks")
    ]
    found = [s["reuse"][name] for e in epochs for s in e["steps"] if name in s["reuse"]]
    cells += [
        f"{fmean(one[key] for one in found):.2f}" if found else "-"
        for key in ("accept_prefix", "full_reuse", "duplicates")
    ]
    train = fmean(mean_step(epoch, "train_seconds") for epoch in epochs)
    for slots in SLOTS:
        those = [epoch[slots] for epoch in sums if epoch[slots]]
        seconds = sum(one["seconds"] for one in those) / max(1, sum(o["collects"] for o in those))
        cells.append(f"{seconds:.2f}/{seconds + train:.1f}" if those else "-")
    return cells


def main() -> None:
    args = arguments(__doc__.split("\n")[0], policy="measure this policy alone, for later")
    logging.disable_progress_bar()
    parts = Parts("reuse", args)
    settings = QUICK if args.quick else SETTINGS
    seeds = SEEDS[:1] if args.quick else SEEDS
    detail: dict[str, dict[str, list[dict[str, Any]]]] = {}
    rates: dict[str, Any] = {}
    for policy, setting in settings.items():
        arms = ["shared", *(() if policy in SHARED_ALONE else LOSSY)]
        if args.quick:
            arms = ["shared", "lenient"] if policy == "careful" else ["shared"]
        if args.policy not in ("", policy):
            continue
        for seed in seeds[:1] if policy == "wordy" else seeds:
            for arm in arms:
                started = time.perf_counter()
                measured = parts.measure(
                    f"{policy}/{arm}/{seed}",
                    lambda s=setting, k=seed, a=arm: train_run(s, k, a),
                )
                detail.setdefault(policy, {}).setdefault(arm, []).append(measured)
                before, *_, after = measured["held_out"]
                took = f"{policy} {arm:9} seed {seed}  {time.perf_counter() - started:5.0f} s"
                print(f"{took}  held-out {before:.3f} -> {after:.3f}", flush=True)
    for rate, setting in RATES.items() if not args.quick and args.policy in ("", "rates") else ():
        measured = parts.measure(f"rate {rate}/fresh/0", lambda s=setting: train_run(s, 0, "fresh"))
        rates[rate] = [measured["epochs"][i]["steps"] for i in range(setting.epochs)]
    if args.policy:
        return
    summary: dict[str, Any] = {}
    for policy, runs in detail.items():
        show(policy, runs)
        summary |= summarise(runs, SUFFIX[policy])
    if args.quick:
        there = [key for key in summary if "_demo" in key]
        others = [suffix for policy, suffix in SUFFIX.items() if policy not in settings]
        summary |= {key.replace("_demo", suffix): None for key in there for suffix in others}
    parts.finish("reuse", summary, seeds, {"policies": detail, "rates": rates})


if __name__ == "__main__":
    main()
