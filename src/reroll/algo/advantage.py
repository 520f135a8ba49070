"""Rewards to advantages. Plain numbers in, plain numbers out; `G` rollouts of one group."""

import math
from collections.abc import Sequence


def grpo(rewards_G: Sequence[float | None], epsilon: float = 1e-4) -> list[float]:
    """Group-normalised advantages `(r - mean) / (std + epsilon)` of GRPO, arXiv 2402.03300, eq. 3.

    std has Bessel's correction (n - 1). `None` marks an ungraded rollout: it stays out of mean and
    deviation and gets 0. Fewer than two graded rollouts, or equal rewards, give all zeros.
    """
    graded = [reward for reward in rewards_G if reward is not None]
    if len(graded) < 2 or min(graded) == max(graded):
        return [0.0] * len(rewards_G)
    mean = math.fsum(graded) / len(graded)
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in graded) / (len(graded) - 1))
    return [0.0 if r is None else (r - mean) / (deviation + epsilon) for r in rewards_G]
