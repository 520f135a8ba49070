"""Rewards to advantages, one function for each rule, named after its algorithm.

The first three compare the rollouts of one group: plain numbers in, plain numbers out, `G` rollouts
of a group of any size, `None` for an ungraded one, which stays out of all statistics and gets 0.
Fewer than two graded rollouts, or equal rewards, give all zeros. Weights are those of the rollouts
in the group's statistics (1 unless the group was thinned out by design).

The last two credit every token of a batch: packed tensors, rollout after rollout, `T` tokens.
"""

import math
from collections.abc import Sequence

import torch


def grpo(
    rewards_G: Sequence[float | None],
    weights_G: Sequence[float] | None = None,
    epsilon: float = 1e-4,
) -> list[float]:
    """Group-normalised `(r - mean) / (std + epsilon)` of GRPO, arXiv 2402.03300, 4.1.2.

    std has Bessel's correction (n - 1). Biased as a policy gradient: each group is scaled by
    its own deviation, and the mean includes the rollout itself (a factor (n - 1) / n).
    """
    centred = dr_grpo(rewards_G, weights_G)
    if not any(centred):
        return centred
    graded = _graded(rewards_G, weights_G)
    count, total = len(graded), math.fsum(w for _, _, w in graded)
    variance = math.fsum(w * centred[i] ** 2 for i, _, w in graded) / total * count / (count - 1)
    return [advantage / (math.sqrt(variance) + epsilon) for advantage in centred]


def dr_grpo(
    rewards_G: Sequence[float | None], weights_G: Sequence[float] | None = None
) -> list[float]:
    """`r - mean` of the group, no deviation: Dr. GRPO, arXiv 2503.20783, section 3.2.

    The mean includes the rollout itself, so with average = "constant" the expected gradient is
    (n - 1) / n of the policy gradient (over max_tokens).
    """
    graded = _graded(rewards_G, weights_G)
    advantages = [0.0] * len(rewards_G)
    if _has_signal(graded):
        mean = math.fsum(w * r for _, r, w in graded) / math.fsum(w for _, _, w in graded)
        for index, reward, _ in graded:
            advantages[index] = reward - mean
    return advantages


def rloo(
    rewards_G: Sequence[float | None], weights_G: Sequence[float] | None = None
) -> list[float]:
    """`r - mean of the others`, REINFORCE leave-one-out, arXiv 2402.14740.

    Unbiased with a whole-reply ratio ("product") or average = "constant".
    """
    graded = _graded(rewards_G, weights_G)
    advantages = [0.0] * len(rewards_G)
    if _has_signal(graded):
        total = math.fsum(w for _, _, w in graded)
        rewards = math.fsum(w * r for _, r, w in graded)
        for index, reward, weight in graded:
            advantages[index] = reward - (rewards - weight * reward) / (total - weight)
    return advantages


def reinforce_pp(
    rewards_T: torch.Tensor, lengths: Sequence[int], weights_T: torch.Tensor, gamma: float = 1.0
) -> torch.Tensor:
    """Returns to go, normalised over the batch: REINFORCE++, arXiv 2501.03262. `[T]`.

    rewards_T: the reward at a rollout's last token, minus a KL penalty at every token if there is
    one. weights_T: weight of each token in mean and deviation, 0 where it is not trained on. Works
    with one rollout a prompt. Biased (batch mean and deviation include the rollout itself), ever
    less the larger the batch.
    """
    returns_T = gae(rewards_T, torch.zeros_like(rewards_T), lengths, gamma, 1.0)
    return whiten(returns_T, weights_T)


def gae(
    rewards_T: torch.Tensor,
    values_T: torch.Tensor,
    lengths: Sequence[int],
    gamma: float,
    lam: float,
) -> torch.Tensor:
    """Generalised advantage estimation, arXiv 1506.02438, eq. 16, rollout by rollout. `[T]`.

    A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t; the value after the last
    token is 0. values_T: V before each token is drawn. Returns are these advantages + values_T.
    With gamma = 1 and average = "constant", lam = 1 is unbiased whatever the values are; lam < 1
    only where they are right; normalising over the batch adds a bias that shrinks with the batch.
    """
    assert rewards_T.shape == values_T.shape == (sum(lengths),)
    sizes = torch.tensor(lengths, device=rewards_T.device)
    order = sizes.argsort(descending=True, stable=True)
    last = (sizes.cumsum(0) - 1)[order]
    steps = torch.arange(int(sizes.max()) if lengths else 0, device=sizes.device)
    alive = (sizes[:, None] > steps).sum(0).tolist()
    """rollouts with more than k tokens, for each k"""
    advantages_T = torch.zeros_like(rewards_T)
    following = torch.zeros(len(lengths), dtype=rewards_T.dtype, device=rewards_T.device)
    value_after = torch.zeros_like(following)
    for k, rows in enumerate(alive):  # from each rollout's end, all rollouts at once
        index = last[:rows] - k
        delta = rewards_T[index] + gamma * value_after[:rows] - values_T[index]
        following[:rows] = delta + gamma * lam * following[:rows]
        value_after[:rows] = values_T[index]
        advantages_T[index] = following[:rows]
    return advantages_T


def whiten(values_T: torch.Tensor, weights_T: torch.Tensor, epsilon: float = 1e-8) -> torch.Tensor:
    """`(x - mean) / sqrt(var + epsilon)` over the batch, `[T]`; all zeros where nothing varies.

    Mean and variance (n - 1) are weighted by weights_T; tokens of weight 0 have no say. The
    variance's n counts tokens of positive weight.
    """
    assert values_T.shape == weights_T.shape and values_T.ndim == 1
    counted = weights_T > 0
    count = int(counted.sum())
    if count < 2 or values_T[counted].min() == values_T[counted].max():
        return torch.zeros_like(values_T)
    total = weights_T.sum()
    centred_T = values_T - (weights_T * values_T).sum() / total
    variance = (weights_T * centred_T**2).sum() / total * count / (count - 1)
    return centred_T / (variance + epsilon).sqrt()


def _graded(
    rewards_G: Sequence[float | None], weights_G: Sequence[float] | None
) -> list[tuple[int, float, float]]:
    """(index, reward, weight) of the graded rollouts."""
    weights = weights_G if weights_G is not None else [1.0] * len(rewards_G)
    assert len(weights) == len(rewards_G) and all(w > 0 for w in weights)
    rows = zip(range(len(rewards_G)), rewards_G, weights, strict=True)
    return [(i, r, w) for i, r, w in rows if r is not None]


def _has_signal(graded: Sequence[tuple[int, float, float]]) -> bool:
    rewards = [reward for _, reward, _ in graded]
    return len(rewards) >= 2 and min(rewards) != max(rewards)
