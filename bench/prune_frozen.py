"""Pruning measured on a policy that stands still: signals, rules, gradients; see `bench.prune`."""

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from bench.common import interval, table
from bench.prune_policy import rare_policy
from reroll.algo.calibrate import Bins
from reroll.algo.separation import WithinAuc, calibration_error
from reroll.algo.survive import balanced, systematic, tilt, widest
from reroll.config import AlgoSection, PruneSection, TrainSection, load_config
from reroll.engine.base import Probed
from reroll.order import stream
from reroll.rollout.collect import collect
from reroll.rollout.collected import CollectSpec
from reroll.rollout.decisions import Decisions, StopsNone
from reroll.rollout.signal import Signal, features
from reroll.rollout.unit import Member
from reroll.rundir import RunDir
from reroll.setup import Parts as RunParts
from reroll.setup import prepare
from reroll.train.forwards import Shares
from reroll.train.trainer import Trainer
from reroll.types import Group, Look, Prompt, Purpose, Watch

AT = (8, 16, 24, 32)
DECIDED = 16
"""tokens after which the rules decide here"""
SAMPLES, KEEP, RATIO, FLOOR = 16, 8, 0.5, 0.2
PROMPTS = 24
STEPS = 12
"""of training before "trained" is measured"""
TEACH, DRAWS = 3, 10
"""batches that the signals learn from alone; those that are measured (and learnt from then)"""
STILL = 1e-30
"""a learning rate that moves no float32 weight"""
DEMO = Path(str(resources.files("reroll"))) / "assets" / "demo.toml"
KINDS = ("confidence", "quality", "length")
CORRECTED = {
    "corrected": PruneSection(on=True),
    "all tokens": PruneSection(on=True, weigh="all"),
    "no weights": PruneSection(on=True, weigh="none"),
    "equal too": PruneSection(on=True, equal="train"),
    "no cap": PruneSection(on=True, weigh="all", cap=0, equal="train"),
}
"""estimators of a thinned group beside the paper's"""
ARMS = ("random", "paper", *CORRECTED, "pods")
RULES = ("all", "random", "tilt", "fixed", "pods")
ALGOS = ("dr_grpo", "grpo", "rloo")
FEW = ("random", "paper", "corrected")
"""estimators under the algorithms but the first"""


@dataclass
class Recorder(StopsNone):
    """Sees every rollout at every place."""

    ends: frozenset[int]
    seen: dict[tuple[int, int], dict[int, Probed]] = field(default_factory=dict)

    def watch(self, prompt: Prompt) -> Watch:
        """Every place."""
        return Watch(at=AT, entropy=True)

    def see(self, member: Member, probed: Probed) -> None:
        """One came to a place."""
        key = member.rollout.prompt.row, member.rollout.sample
        self.seen.setdefault(key, {})[probed.position] = probed


def measure_frozen(policy: str, seed: int, quick: bool) -> dict[str, Any]:
    """Everything about one policy: see the module."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run.out": f"{folder}/run", "run.seed": str(seed), "log.display": "off",
            "task.seed": str(seed), "train.steps": "32",
            "model.path": rare_policy(policy) if policy == "rare" else "demo",
        }  # fmt: skip
        config = load_config(DEMO, settings)
        run = RunDir(config.run.out)
        run.open(config)
        with prepare(config, run, None) as parts:
            steps = 0 if policy != "trained" else 2 if quick else STEPS
            for step in range(steps):
                groups, _ = batch(parts, 4 if quick else 32, 8, seed, 1000 + step)
                parts.trainer.step(parts.trainer.credit(groups)[0])
                parts.trainer.take_work()
                parts.engine.load_weights(parts.trainer.version)
            teach, draws = (1, 2) if quick else (TEACH, DRAWS)
            batches = [
                batch(parts, 3 if quick else PROMPTS, SAMPLES, seed, number)
                for number in range(teach + draws)
            ]
            return judge(parts, batches, teach, seed)


def batch(
    parts: RunParts, prompts: int, samples: int, seed: int, number: int
) -> tuple[list[Group], Recorder]:
    """Whole groups of problems of their own, and what was seen on the way."""
    spec = CollectSpec(Purpose.TRAIN, seed, samples, replace(parts.sampling, temperature=1.0))
    asked, visits = stream(number * prompts, prompts, parts.task.train, seed)
    ids = range(len(parts.tokenizer))
    recorder = Recorder(frozenset(i for i in ids if ";" in parts.decode([i])))
    groups = collect(
        parts.engine, parts.graders, parts.decode, asked, visits, spec, None,
        Decisions(prune=recorder),
    ).groups  # fmt: skip
    return groups, recorder


def judge(
    parts: RunParts, batches: list[tuple[list[Group], Recorder]], teach: int, seed: int
) -> dict[str, Any]:
    """Signals batch by batch, each score before its rollout is learnt from; then the rules."""
    auc: dict[str, float] = {}
    chances: list[dict[tuple[int, int], float]] = []
    error = 0.0
    started = time.perf_counter()
    for kind in KINDS:
        for at in AT:
            found, area, honest = follow(kind, at, batches, teach, seed)
            auc[f"{kind}_{at}"] = area.auc
            if (kind, at) == ("confidence", DECIDED):
                chances, error = found, honest
    seconds = time.perf_counter() - started
    measured = [groups for groups, _ in batches[teach:]]
    lot = random.Random(seed)
    thinned = [
        [thin(group, found, lot) for group in groups]
        for groups, found in zip(measured, chances, strict=True)
    ]
    reward = fmean(r.reward or 0.0 for groups in measured for g in groups for r in g.rollouts)
    length = fmean(
        len(r.completion.token_ids) for groups in measured for g in groups for r in g.rollouts
    )
    return {
        "auc": auc,
        "calibration_error": error,
        "seconds_signals": seconds,
        "reward": reward,
        "length": length,
        "rules": rules(measured, thinned, chances, lot),
        "cosines": {name: cosines(parts, name, measured, thinned, lot) for name in ALGOS},
    }


def follow(
    kind: str, at: int, batches: list[tuple[list[Group], Recorder]], teach: int, seed: int
) -> tuple[list[dict[tuple[int, int], float]], WithinAuc, float]:
    """A signal through all batches: of those measured, each probed rollout's chance of success; the
    area inside groups; the calibration error."""
    signal, bins, area = Signal(16, 1e-2, 4096, seed), Bins(), WithinAuc()
    chances, pairs = [], []
    for number, (groups, recorder) in enumerate(batches):
        found: dict[tuple[int, int], float] = {}
        rows: list[tuple[np.ndarray, float]] = []
        for group in groups:
            mine = [
                (r, features(kind, seen[at], recorder.ends, True))
                for r in group.rollouts
                if at in (seen := recorder.seen.get((r.prompt.row, r.sample), {}))
            ]
            rewards = [r.reward or 0.0 for r, _ in mine]
            scores = signal.scores(np.stack([x for _, x in mine])) if mine else []
            guesses = bins.probabilities(scores)
            if number >= teach:
                area.add(scores, rewards)
                pairs += list(zip(guesses, rewards, strict=True))
                found |= {
                    (r.prompt.row, r.sample): p for (r, _), p in zip(mine, guesses, strict=True)
                }
            for score, reward in zip(scores, rewards, strict=True):
                if number:
                    bins.add(score, reward)
            rows += [(x, reward) for (_, x), reward in zip(mine, rewards, strict=True)]
        signal.learn(np.stack([x for x, _ in rows]), [y for _, y in rows], [1.0] * len(rows))
        if number >= teach:
            chances.append(found)
    guesses, rewards = zip(*pairs, strict=True)
    return chances, area, calibration_error(guesses, rewards, [1.0] * len(pairs))


def chances_of(group: Group, found: dict[tuple[int, int], float]) -> list[float]:
    """Of success: the signal's, or the reward of one that had ended."""
    return [found.get((r.prompt.row, r.sample), r.reward or 0.0) for r in group.rollouts]


def thin(group: Group, found: dict[tuple[int, int], float], lot: random.Random) -> Group:
    """A whole group as the rule would have left it; stopped rollouts have their tokens still."""
    chances = chances_of(group, found)
    survival = tilt(chances, KEEP, RATIO, FLOOR)
    order = sorted(range(len(chances)), key=lambda i: chances[i])
    kept = systematic(survival, order, lot.random())
    out = Group(group.prompt)
    for i, rollout in enumerate(group.rollouts):
        ended = (rollout.prompt.row, rollout.sample) not in found
        position = len(rollout.completion.token_ids) if ended else DECIDED
        look = Look(position, None, chances[i], survival[i], kept[i], ended, 1)
        copy = replace(rollout, looks=[look])
        (out.rollouts if kept[i] else out.pruned).append(copy)
    return out


def subset(group: Group, kept: Sequence[bool]) -> Group:
    """The kept rollouts, as if there had been no others."""
    pairs = zip(group.rollouts, kept, strict=True)
    return Group(group.prompt, [replace(r, looks=[]) for r, stays in pairs if stays])


def rewards_of(group: Group) -> list[float]:
    return [rollout.reward or 0.0 for rollout in group.rollouts]


def rules(
    measured: list[list[Group]],
    thinned: list[list[Group]],
    chances: list[dict[tuple[int, int], float]],
    lot: random.Random,
) -> dict[str, dict[str, float]]:
    """Share of groups with signal and variance of rewards (without bias) that each rule leaves."""
    chosen: dict[str, list[list[float]]] = {name: [] for name in RULES}
    for groups, left, found in zip(measured, thinned, chances, strict=True):
        for group, mine in zip(groups, left, strict=True):
            every = rewards_of(group)
            chosen["all"].append(every)
            chosen["random"].append(lot.sample(every, KEEP))
            chosen["tilt"].append(rewards_of(mine))
            fixed = balanced(chances_of(group, found), KEEP, RATIO)
            chosen["fixed"].append(rewards_of(subset(group, fixed)))
            chosen["pods"].append(rewards_of(subset(group, widest(every, KEEP))))
    return {
        name: {
            "live": fmean(len(set(one)) > 1 for one in each),
            "variance": fmean(float(np.var(one, ddof=1)) for one in each),
        }
        for name, each in chosen.items()
    }


def cosines(
    parts: RunParts,
    algorithm: str,
    measured: list[list[Group]],
    thinned: list[list[Group]],
    lot: random.Random,
) -> dict[str, list[list[float]]]:
    """[to the gradient of all 16 of the same batch, to that of all the other batches], by batch.
    Of "all 16" the first is to the batch before."""
    made = {"": trainer_of(parts, algorithm, None)}
    made |= {name: trainer_of(parts, algorithm, prune) for name, prune in CORRECTED.items()}
    whole = [gradient(made[""], groups) for groups in measured]
    every = torch.stack(whole).sum(0)
    arms = ARMS if algorithm == ALGOS[0] else FEW
    found: dict[str, list[list[float]]] = {}
    for number, (groups, left) in enumerate(zip(measured, thinned, strict=True)):
        others = every - whole[number]
        found.setdefault("all 16", []).append(
            [cosine(whole[number], whole[number - 1]), cosine(whole[number], others)]
        )
        for arm in arms:
            if arm == "random":
                kept = [subset(g, in_lot(len(g.rollouts), lot)) for g in groups]
            elif arm == "pods":
                kept = [subset(g, widest(rewards_of(g), KEEP)) for g in groups]
            else:
                kept = left
            mine = gradient(made[arm if arm in CORRECTED else ""], kept)
            found.setdefault(arm, []).append([cosine(mine, whole[number]), cosine(mine, others)])
    return found


def in_lot(count: int, lot: random.Random) -> list[bool]:
    chosen = set(lot.sample(range(count), KEEP))
    return [i in chosen for i in range(count)]


def trainer_of(parts: RunParts, algorithm: str, prune: PruneSection | None) -> Trainer:
    """One that takes the gradient and moves nothing."""
    train = TrainSection(learning_rate=STILL, microbatch_tokens=8192, max_grad_norm=1e9)
    # the ratio is 1 everywhere: one of tokens and one of the reply have the same gradient
    algo = AlgoSection(name=algorithm, ratio="token", kl_in="loss", kl_estimator="k3")  # type: ignore[arg-type]
    return Trainer(
        parts.model, algo, train, temperature=1.0, max_tokens=160, prune=prune, shares=Shares(True)
    )


def gradient(trainer: Trainer, groups: list[Group]) -> torch.Tensor:
    """Of the loss on these groups, all parameters in a row."""
    trainer.version = max(r.completion.versions[0] for g in groups for r in g.rollouts)
    # without what was left out it is the survivors' own group
    plain = [Group(g.prompt, [replace(r, looks=[]) for r in g.rollouts]) for g in groups]
    trainer.step(trainer.credit(groups if trainer.prune else plain)[0])
    trainer.take_work()
    parts = [p.grad for p in trainer.parameters.values() if p.grad is not None]
    return torch.cat([part.flatten() for part in parts])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one, other, dim=0).item()


def show_frozen(policy: str, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The tables of a policy; its keys of the last line."""
    keys = _keys(policy, measured)
    if not measured:
        return keys
    of = f"{policy}, reward {fmean(m['reward'] for m in measured):.2f}, "
    of += f"length {fmean(m['length'] for m in measured):.0f}: means of {len(measured)} seeds"
    rows = [
        (kind, *(f"{fmean(m['auc'][f'{kind}_{at}'] for m in measured):.3f}" for at in AT))
        for kind in KINDS
    ]
    table(f"Area inside groups, {of}", ("tokens read", *map(str, AT)), rows)
    rows = [
        (
            rule,
            f"{fmean(m['rules'][rule]['live'] for m in measured):.3f}",
            f"{fmean(m['rules'][rule]['variance'] for m in measured):.3f}",
        )
        for rule in measured[0]["rules"]
    ]
    table(f"What is kept, {of}", ("rule", "groups with signal", "variance of rewards"), rows)
    rows = []
    for arm in ("all 16", *ARMS):
        cells = [
            f"{cosine_of(measured, name, arm, 0):.3f}  {cosine_of(measured, name, arm, 1):.3f}"
            if arm in measured[0]["cosines"][name]
            else ""
            for name in ALGOS
        ]
        rows.append((arm, *cells))
    title = f"Cosine to the gradient of all 16 of the same batch, and of the others, {of}"
    table(title, ("estimator", *ALGOS), rows)
    return keys


def _keys(policy: str, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Null where nothing was measured."""
    end = "" if policy == "start" else f"_{policy}"
    found = {
        f"within_auc_{policy}": [m["auc"][f"confidence_{DECIDED}"] for m in measured],
        f"within_auc_quality_{policy}": [m["auc"][f"quality_{DECIDED}"] for m in measured],
        f"calibration_error_{policy}": [m["calibration_error"] for m in measured],
    }
    for rule in RULES:
        for figure in ("live", "variance"):
            found[f"{figure}_{rule}_{policy}"] = [m["rules"][rule][figure] for m in measured]
    for arm in ("all 16", *ARMS):
        name = f"grad_cosine_{arm.replace(' ', '_')}{end}"
        for column, to in enumerate(("", "_to_others")):
            found[f"{name}{to}"] = [
                fmean(x[column] for x in m["cosines"][ALGOS[0]][arm]) for m in measured
            ]
    keys: dict[str, Any] = {}
    for name, values in found.items():
        keys |= {name: fmean(values) if values else None, f"{name}_ci": interval(values)}
    return keys


def cosine_of(measured: list[dict[str, Any]], algorithm: str, arm: str, column: int) -> float:
    """Mean over seeds and batches."""
    return fmean(x[column] for m in measured for x in m["cosines"][algorithm][arm])
