"""Stale tokens: what the surrogate's ratio is taken against, and how much each token counts.

A token is stale when an earlier policy version drew it: `lag` is the version that a batch's first
optimizer step starts from, minus the version at the draw. Partial rollouts and lenient reuse bring
such tokens; a synchronous run has none, and every correction then does nothing. Packed tensors,
`T` tokens; nothing here passes a gradient on to the present log-probs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Anchor(NamedTuple):
    """`[T]` each: log-probs that the ratio is taken against, and a factor on the token's loss."""

    old_T: torch.Tensor
    weights_T: torch.Tensor


def uncorrected(behaviour_T: torch.Tensor) -> Anchor:
    """The ratio against the behaviour policy, whichever version that was (`none`, and `mask`).

    What PPO's clip does by itself: stale tokens whose ratio left the clip range lose their gradient
    on one side and keep an unbounded ratio on the other.
    """
    return Anchor(behaviour_T, torch.ones_like(behaviour_T))


def truncated(
    now_T: torch.Tensor, behaviour_T: torch.Tensor, lag_T: torch.Tensor, cap: float
) -> Anchor:
    """Truncated importance sampling: a stale token's gradient is weighted by min(ratio, cap).

    ratio = now / behaviour, both at the token alone, so what came before it in the rollout is not
    corrected for (V-trace's rho, IMPALA, arXiv 1802.01561, section 4.1). cap = 0: no cap. Fresh
    tokens keep the clipped surrogate.
    """
    now_T = now_T.detach()
    weights_T = _capped((now_T - behaviour_T).exp(), cap)
    stale_T = lag_T > 0
    return Anchor(
        torch.where(stale_T, now_T, behaviour_T),
        torch.where(stale_T, weights_T, torch.ones_like(weights_T)),
    )


def decoupled(
    proximal_T: torch.Tensor, behaviour_T: torch.Tensor, lag_T: torch.Tensor, cap: float
) -> Anchor:
    """Decoupled PPO, arXiv 2110.00641; for language models AReaL, arXiv 2505.24298.

    The clip is around the proximal policy, that of the batch's first optimizer step, and a stale
    token is weighted by proximal / behaviour, at most `cap` (0: no cap). A fresh token's two
    policies are one, so its weight is 1. Under a ratio of whole replies the reply's surrogate is
    weighted token by token, so its weight is in effect the mean over its tokens.
    """
    weights_T = _capped((proximal_T - behaviour_T).exp(), cap)
    return Anchor(proximal_T, torch.where(lag_T > 0, weights_T, torch.ones_like(weights_T)))


def within_lag(lags: Sequence[int], max_lag: int) -> list[bool]:
    """Which tokens are recent enough to be trained on (`mask`)."""
    return [lag <= max_lag for lag in lags]


def effective_sample_size(weights: torch.Tensor) -> float:
    """(sum w)^2 / (n sum w^2) of importance weights, 1.0 when all are equal (Kish, 1965)."""
    return (weights.sum() ** 2 / (len(weights) * (weights**2).sum())).item()


def _capped(weights_T: torch.Tensor, cap: float) -> torch.Tensor:
    return weights_T.clamp(max=cap) if cap > 0 else weights_T
