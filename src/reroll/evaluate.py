"""Held-out evaluation: mean reward, unbiased pass@k, maj@k, with bootstrap intervals over problems.

Samples are drawn under keys of purpose `eval`, which training never uses; the same keys at every
evaluation, so that two evaluations of one run differ by their weights and not by their luck.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from reroll.algo.passk import bootstrap_interval, majority_at_k, pass_at_k, vote_at_k
from reroll.config import EvalSection
from reroll.engine.base import Engine
from reroll.rollout.collect import collect
from reroll.rollout.collected import CollectSpec, Progress
from reroll.rollout.decisions import Decisions
from reroll.rollout.vote import Voter
from reroll.tasks.pool import GraderPool
from reroll.types import Finish, Group, Prompt, Purpose, Rollout, Sampling


def evaluate(
    engine: Engine,
    graders: GraderPool,
    decode: Callable[[list[int]], str],
    extract: Callable[[str], str | None],
    prompts: Sequence[Prompt],
    config: EvalSection,
    *,
    seed: int,
    step: int,
    sampling: Sampling,
    progress: Progress | None = None,
    voter: Voter | None = None,
) -> dict[str, float]:
    """Metrics of the held-out `prompts`; keys of the greedy part begin with `greedy_`.

    extract: completion text to the answer that maj@k counts. step: names the evaluation.
    sampling: its temperature is replaced by the configuration's. voter: gives a weighted vote
    (`vote@k`) beside the majority.
    """
    spec = CollectSpec(
        Purpose.EVAL,
        seed,
        config.samples,
        replace(sampling, temperature=config.temperature),
        label=f"eval-{step}",
    )
    visits = [0] * len(prompts)
    looks = Decisions(prune=voter)
    groups = collect(engine, graders, decode, prompts, visits, spec, progress, looks).groups
    metrics = _statistics(groups, extract, config.correct_at, voter)
    if config.greedy:
        greedily = replace(sampling, temperature=0.0)
        once = replace(spec, samples=1, sampling=greedily, label=f"eval-{step}-greedy")
        greedy = collect(engine, graders, decode, prompts, visits, once, progress).groups
        rewards = [_reward(group.rollouts[0]) for group in greedy]
        metrics |= with_interval("greedy_reward", rewards)
    return metrics


def success_rate(group: Group, correct_at: float) -> float:
    """Share of its rollouts that count as correct; one without a grade does not."""
    return fmean(_reward(rollout) >= correct_at for rollout in group.rollouts)


def _statistics(
    groups: Sequence[Group],
    extract: Callable[[str], str | None],
    correct_at: float,
    voter: Voter | None,
) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    means = [fmean(map(_reward, group.rollouts)) for group in groups]
    metrics = with_interval("reward", means)
    correct = [[_reward(r) >= correct_at for r in group.rollouts] for group in groups]
    samples = len(groups[0].rollouts)
    for k in powers_of_two(samples):
        chances = [pass_at_k(samples, sum(marks), k) for marks in correct]
        metrics |= with_interval(f"pass@{k}", chances)
    answers = [[extract(r.text) for r in group.rollouts] for group in groups]
    majority = [majority_at_k(said, marks) for said, marks in zip(answers, correct, strict=True)]
    metrics |= with_interval(f"maj@{samples}", majority)
    if voter is not None:
        weights = [voter.weights(group.rollouts) for group in groups]
        votes = [vote_at_k(*each) for each in zip(answers, weights, correct, strict=True)]
        metrics |= with_interval(f"vote@{samples}", votes)
        gains = [a - b for a, b in zip(votes, majority, strict=True)]
        metrics |= with_interval(f"vote@{samples} - maj@{samples}", gains)
    truncated = fmean(r.completion.finish is Finish.LENGTH for r in rollouts)
    return metrics | {
        "length": fmean(r.drawn for r in rollouts),
        "truncated": truncated,
        "ungraded": float(sum(r.reward is None for r in rollouts)),
        "problems": float(len(groups)),
        "samples": float(samples),
    }


def with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean over problems, and its interval as `name_low` and `name_high`."""
    low, high = bootstrap_interval(values)
    return {name: fmean(values), f"{name}_low": low, f"{name}_high": high}


def _reward(rollout: Rollout) -> float:
    """An ungraded rollout earns nothing at evaluation; `ungraded` says how many there were."""
    return rollout.reward if rollout.reward is not None else 0.0


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to the limit."""
    return [2**i for i in range(limit.bit_length())]
