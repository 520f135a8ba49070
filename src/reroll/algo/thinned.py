"""Advantages and token weights of a group that was thinned out while its rollouts ran.

Pruning (ARRoL, arXiv 2603.24840) trains on survivors. Compared with one another alone, they are
compared with a mean that the thinning raised or lowered, and prefixes between that mean and the
true one are pushed the wrong way. Here every started rollout counts in the baseline: by a doubly
robust estimate of its expected reward (Robins, Rotnitzky and Zhao 1994), stage after stage.

Unbiased up to a constant, whatever the probabilities are: survival that depends only on what was
known at its stage and is drawn for each rollout by itself, rule "rloo", weights "all", no cap.
`G` rollouts of a group, `L` tokens of a completion.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Rule = Literal["grpo", "dr_grpo", "rloo"]
Where = Literal["prefix", "all", "none"]

EPSILON = 1e-4
"""as in `advantage.grpo`"""


class Look(NamedTuple):
    """One stage of the thinning, for one rollout.

    A rollout has one of each stage it reached, in order: none after the stage that dropped it, none
    at all if its group was not thinned. One that a stage spared has survival 1 there.
    """

    position: int
    """completion tokens read when it was decided; all of them for one that had ended by then"""
    probability: float
    """its expected reward given those tokens, in units of reward; its reward if it had ended"""
    survival: float
    """the chance that it was kept, more than 0"""
    kept: bool
    ended: bool


def estimates(looks_G: Sequence[Sequence[Look]], rewards_G: Sequence[float | None]) -> list[float]:
    """An estimate of each started rollout's expected reward, in units of reward, `[G]`.

    p1 + kept1 / s1 (p2 - p1) + ... + product(kept / s) (r - p_last): its mean over the thinning is
    that of the reward, however wrong the p's are; the better they are, the less it varies. A
    kept one that is ungraded (None) ends at its last p, as if that had been right; one without
    looks is its reward, nan if that is None.
    """
    estimates = []
    for looks, reward in zip(looks_G, rewards_G, strict=True):
        if not looks:
            estimates.append(math.nan if reward is None else float(reward))
            continue
        if reward is not None and all(look.kept and look.survival == 1 for look in looks):
            estimates.append(float(reward))  # to the last bit
            continue
        values = [look.probability for look in looks]
        values.append(values[-1] if reward is None else reward)
        estimate, factor = values[0], 1.0
        for look, before, after in zip(looks, values, values[1:], strict=False):
            if not look.kept:
                break
            factor /= look.survival
            estimate += factor * (after - before)
        estimates.append(estimate)
    return estimates


def advantages(
    rule: Rule,
    looks_G: Sequence[Sequence[Look]],
    rewards_G: Sequence[float | None],
    skip_equal: bool = False,
) -> list[float]:
    """Advantages `[G]`, with all that were started in the baseline; 0 for dropped and ungraded.

    "dr_grpo": r - mean of the estimates, its own too. "rloo": r - mean of those of the others.
    "grpo": as "dr_grpo", over deviation + 1e-4, the deviation being that of all started, estimated
    from the known rewards (weights as in `_known`) around the same baseline. Without thinning
    these are the functions of `advantage`. A rollout of which nothing is known (no looks, no
    reward) stays out; fewer than two others than such give all zeros.

    skip_equal: all zeros where all known rewards are equal. Saves work and is biased: that they are
    equal depends on them. ValueError for an unknown rule.
    """
    if rule not in ("grpo", "dr_grpo", "rloo"):
        raise ValueError(f"unknown rule {rule!r}")
    guesses_G = estimates(looks_G, rewards_G)
    guesses = [c for c in guesses_G if not math.isnan(c)]
    trained = {i: r for i, r in enumerate(rewards_G) if r is not None and lives(looks_G[i])}
    known = [_known(looks, r) for looks, r in zip(looks_G, rewards_G, strict=True)]
    seen = [reward for weight, reward in known if weight > 0]
    zeros = [0.0] * len(rewards_G)
    # the mean of equal numbers may be off by rounding, which a deviation of 0 would blow up
    settled = _equal([*guesses, *trained.values()]) or (skip_equal and _equal(seen))
    if len(guesses) < 2 or not trained or settled:
        return zeros
    total, count = math.fsum(guesses), len(guesses)
    if rule == "rloo":
        for i, reward in trained.items():
            zeros[i] = reward - (total - guesses_G[i]) / (count - 1)
        return zeros
    baseline, scale = total / count, 1.0
    if rule == "grpo":
        squares = math.fsum(w * (r - baseline) ** 2 for w, r in known)
        variance = squares / math.fsum(w for w, _ in known) * count / (count - 1)
        scale = math.sqrt(variance) + EPSILON
    for i, reward in trained.items():
        zeros[i] = (reward - baseline) / scale
    return zeros


def weights(
    looks_G: Sequence[Sequence[Look]], lengths_G: Sequence[int], where: Where, cap: float
) -> list[list[float]]:
    """What each token's gradient counts, `[G][L]`; an empty list for those not kept.

    lengths_G: tokens of each completion. Each stage gives the tokens that it had read 1 / survival
    (Horvitz and Thompson 1952): over the kept, divided by all that were started, their sum stands
    for the mean over all started.

    where "prefix": only those tokens. Later ones weigh 1: theirs is the gradient after a prefix,
    right in itself, with prefixes counted as often as they survive. "all": every token, all
    stages; "none": 1. cap: the largest weight, 0 for none. ValueError for an unknown where or a cap
    below 0.
    """
    if where not in ("prefix", "all", "none") or not cap >= 0:
        raise ValueError(f"unknown where {where!r} or cap {cap} below 0")
    weights = []
    for looks, length in zip(looks_G, lengths_G, strict=True):
        row = [1.0] * (length if lives(looks) else 0)
        for look in looks if row and where != "none" else ():
            for t in range(length if where == "all" else min(look.position, length)):
                row[t] /= look.survival
        weights.append([min(w, cap) for w in row] if cap else row)
    return weights


def lives(looks: Sequence[Look]) -> bool:
    """Whether no stage dropped this rollout."""
    return all(look.kept for look in looks)


def _known(looks: Sequence[Look], reward: float | None) -> tuple[float, float]:
    """(weight, reward) of a rollout in the statistics of known rewards; weight 0 where unknown.

    A reward that was known before a stage, as the rollout had ended, owes nothing to that stage.
    """
    if lives(looks) and reward is None:
        return 0.0, 0.0
    weight = 1.0
    for look in looks:
        if look.ended:
            return weight, look.probability
        if not look.kept:
            return 0.0, 0.0
        weight /= look.survival
    return (0.0, 0.0) if reward is None else (weight, float(reward))


def _equal(values: Sequence[float]) -> bool:
    return min(values, default=0.0) == max(values, default=0.0)
