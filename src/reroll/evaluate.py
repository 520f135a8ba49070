"""Held-out evaluation: mean reward, unbiased pass@k, maj@k, with bootstrap intervals over problems.

Samples are drawn under keys of purpose `eval`, which training never uses; the same keys at every
evaluation, so that two evaluations of one run differ by their weights and not by their luck.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from reroll.algo.passk import bootstrap_interval, majority_at_k, pass_at_k
from reroll.config import EvalSection
from reroll.engine.base import Engine
from reroll.rollout.collect import collect
from reroll.rollout.collected import CollectSpec, Progress
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
) -> dict[str, float]:
    """Metrics of the held-out `prompts`; keys of the greedy part begin with `greedy_`.

    extract: completion text to the answer that maj@k counts. step: names the evaluation.
    sampling: its temperature is replaced by the configuration's.
    """
    spec = CollectSpec(
        Purpose.EVAL,
        seed,
        config.samples,
        replace(sampling, temperature=config.temperature),
        label=f"eval-{step}",
    )
    visits = [0] * len(prompts)
    groups = collect(engine, graders, decode, prompts, visits, spec, progress).groups
    metrics = _statistics(groups, extract, config.correct_at)
    if config.greedy:
        greedily = replace(sampling, temperature=0.0)
        once = replace(spec, samples=1, sampling=greedily, label=f"eval-{step}-greedy")
        greedy = collect(engine, graders, decode, prompts, visits, once, progress).groups
        rewards = [_reward(group.rollouts[0]) for group in greedy]
        low, high = bootstrap_interval(rewards)
        metrics |= {
            "greedy_reward": fmean(rewards),
            "greedy_reward_low": low,
            "greedy_reward_high": high,
        }
    return metrics


def _statistics(
    groups: Sequence[Group], extract: Callable[[str], str | None], correct_at: float
) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    means = [fmean(map(_reward, group.rollouts)) for group in groups]
    low, high = bootstrap_interval(means)
    metrics = {"reward": fmean(means), "reward_low": low, "reward_high": high}
    correct = [[_reward(r) >= correct_at for r in group.rollouts] for group in groups]
    samples = len(groups[0].rollouts)
    for k in _powers_of_two(samples):
        chances = [pass_at_k(samples, sum(marks), k) for marks in correct]
        low, high = bootstrap_interval(chances)
        metrics |= {f"pass@{k}": fmean(chances), f"pass@{k}_low": low, f"pass@{k}_high": high}
    votes = [
        majority_at_k([extract(r.text) for r in group.rollouts], marks)
        for group, marks in zip(groups, correct, strict=True)
    ]
    low, high = bootstrap_interval(votes)
    metrics |= {
        f"maj@{samples}": fmean(votes),
        f"maj@{samples}_low": low,
        f"maj@{samples}_high": high,
    }
    truncated = fmean(r.completion.finish is Finish.LENGTH for r in rollouts)
    return metrics | {
        "length": fmean(len(r.completion.token_ids) for r in rollouts),
        "truncated": truncated,
        "ungraded": float(sum(r.reward is None for r in rollouts)),
        "problems": float(len(groups)),
        "samples": float(samples),
    }


def _reward(rollout: Rollout) -> float:
    """An ungraded rollout earns nothing at evaluation; `ungraded` says how many there were."""
    return rollout.reward if rollout.reward is not None else 0.0


def _powers_of_two(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length())]
