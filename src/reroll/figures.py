"""A step's figures from what was collected; docs/glossary.md has each name."""

import math
from collections.abc import Collection, Sequence
from statistics import fmean
from typing import Any

from reroll.config import Config
from reroll.engine.base import Stats
from reroll.pruning import expected_rewards
from reroll.rollout.collected import Collected
from reroll.train.credit import graded
from reroll.types import Finish, Group, Rollout

LOGPROB_BOUNDS = {"float": 1e-3, "bfloat16": 0.05}
"""mean |sampling - recomputed log-prob| above which `train.check_logprobs` warns, in nats"""


def rollout_metrics(collected: Collected) -> dict[str, float]:
    """Rewards, lengths and entropy of a batch; see docs/glossary.md for each name."""
    rollouts = [rollout for group in collected.groups for rollout in group.rollouts]
    graded = [r for r in rollouts if r.reward is not None]
    sizes = lengths(collected.groups)
    rewards = [reward for group in collected.groups for reward in expected_rewards(group)]
    metrics = {
        "reward": fmean(rewards) if rewards else 0.0,
        "length": _mean_length(rollouts),
        "length_max": float(max(sizes)),
        "truncated": collected.truncated / len(rollouts),
        "ungraded": float(collected.ungraded),
        # mean surprise of sampled tokens: an unbiased estimate of the entropy per token
        "entropy": -sum(sum(r.completion.logprobs) for r in rollouts) / max(1, sum(sizes)),
        "stopped": fmean(r.completion.finish is Finish.STOP for r in rollouts),
    }
    for name in graded[0].rewards if graded else ():
        metrics[f"reward_{name}"] = fmean(r.rewards[name] for r in graded)
    return metrics


def _mean_length(rollouts: Sequence[Rollout]) -> float:
    """Of all that were started: one that was spared by lot stands for those that were not."""
    counts = [1 / math.prod(look.survival for look in r.looks) for r in rollouts]
    tokens = (n * r.drawn for n, r in zip(counts, rollouts, strict=True))
    return sum(tokens) / sum(counts)


def refill_metrics(collected: Collected, groups: Sequence[Group]) -> dict[str, float]:
    """What dynamic sampling cost; see docs/glossary.md."""
    return {
        "groups_started": float(len(collected.groups)),
        "groups_trained": float(len(groups)),
        "live_groups": len(groups) / len(collected.groups),
        "small_groups": float(sum(len(graded([group])) < 2 for group in collected.groups)),
    }


def speculation_metrics(before: Stats, after: Stats) -> dict[str, float]:
    """What drafts did between two copies of the engine's counters."""
    trees = after.trees_offered - before.trees_offered
    names = ("ticks", "tokens_reused", "tokens_redrafted", "tokens_redraft_reused", "nodes_offered")
    return {name: float(getattr(after, name) - getattr(before, name)) for name in names} | {
        "trees_skipped": (after.trees_skipped - before.trees_skipped) / max(1, trees)
    }


def graded_tokens(collected: Collected) -> int:
    """Tokens of the rollouts that the graders were given, those left out after it among them."""
    every = [r for group in collected.groups for r in (*group.rollouts, *group.pruned)]
    ended = (r for r in every if r.completion.finish is not Finish.ABORT)
    return sum(r.drawn for r in ended) - collected.tokens_known


def tokens_read(groups: Sequence[Group], live: Collection[int]) -> tuple[float, float]:
    """Tokens of all rollouts, prompts and prefixes included, and of those trained on.

    live: ids of the latter.
    """
    every = [r for group in groups for r in (*group.rollouts, *group.pruned)]
    sizes = [len(r.prompt.token_ids) + len(r.completion.token_ids) for r in every]
    trained = (n for n, r in zip(sizes, every, strict=True) if id(r) in live)
    return float(sum(sizes)), float(sum(trained))


def lengths(groups: Sequence[Group]) -> list[int]:
    """Tokens drawn for each rollout."""
    return [r.drawn for group in groups for r in group.rollouts]


def samples(step: int, groups: Sequence[Group], count: int) -> list[dict[str, Any]]:
    """The first rollouts of the step's first groups, to read."""
    return [
        {
            "step": step,
            "row": group.prompt.row,
            "prompt": group.prompt.text,
            "completion": group.rollouts[0].text,
            "answer": group.prompt.answer,
            "reward": group.rollouts[0].reward,
            "finish": group.rollouts[0].completion.finish,
        }
        for group in groups[:count]
    ]


def warnings(
    config: Config, metrics: dict[str, Any], collected: Collected, rounds: bool
) -> list[str]:
    """What a user should know of a step. rounds: whether forwards are in bfloat16."""
    said = []
    if collected.ungraded:
        first = collected.first_failure.strip().splitlines()[-1]
        said.append(f"{collected.ungraded} rollouts left ungraded ({first})")
    if metrics["skipped_steps"]:
        said.append("loss or gradient not finite, optimizer step skipped")
    if (short := config.rollout.prompts - metrics.get("groups_trained", math.inf)) > 0:
        said.append(
            f"{short:.0f} groups short of rollout.prompts: no more with signal within "
            f"algo.generation_bound = {config.algo.generation_bound}"
        )
    bound = LOGPROB_BOUNDS["bfloat16" if rounds else "float"]
    if (off := metrics.get("logprob_difference_mean", 0.0)) > bound:
        said.append(
            f"sampling and training log-probs differ by {off:.2g} nats on average (more than "
            f"{bound})"
        )
    return said
