"""Policy and value losses: pure functions on packed tensors, each with the paper it comes from.

Packed means rollout after rollout, `T` completion tokens in all, `R` rollouts. Advantages are
credit per token; `mask_T` is 1.0 where the policy gradient applies.
"""

from collections.abc import Sequence

import torch

LARGEST_LOG_RATIO = 20.0
"""larger ones are taken for this (a ratio of 5e8) and have no gradient: past any clip range, and
short of infinity, whose products with 0 would be nan"""


def clipped_surrogate(
    log_ratio_T: torch.Tensor, advantages_T: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) per token, and where the clip binds.

    PPO, arXiv 1707.06347, eq. 7; with clip_low != clip_high the clip-higher of DAPO, arXiv
    2503.14476, eq. 10. Returns (loss `[T]`, bool `[T]`).
    """
    assert log_ratio_T.shape == advantages_T.shape and log_ratio_T.ndim == 1
    ratio_T = bounded_ratio(log_ratio_T)
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    loss_T = -torch.min(ratio_T * advantages_T, clipped_T * advantages_T)
    binds_T = ((ratio_T < 1 - clip_low) & (advantages_T < 0)) | (
        (ratio_T > 1 + clip_high) & (advantages_T > 0)
    )
    return loss_T, binds_T


def bounded_ratio(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """exp of a log-ratio, which is cut at `LARGEST_LOG_RATIO`. `[T]`."""
    return log_ratio_T.clamp(max=LARGEST_LOG_RATIO).exp()


def level_ratio(
    log_ratio_T: torch.Tensor, mask_T: torch.Tensor, lengths: Sequence[int], level: str
) -> torch.Tensor:
    """Log of the importance ratio that a token's surrogate uses, `[T]`.

    level = "token": its own (PPO, GRPO). "sequence": the mean over the rollout's trained tokens,
    the geometric mean of the ratios (GSPO, arXiv 2507.18071, eq. 7). "product": their sum, the
    ratio of the whole reply taken as one action (RLOO, arXiv 2402.14740).
    """
    assert log_ratio_T.shape == mask_T.shape == (sum(lengths),)
    if level == "token":
        return log_ratio_T
    assert level in ("sequence", "product"), level
    sums_R = rollout_sums(log_ratio_T * mask_T, lengths)
    if level == "sequence":
        sums_R = sums_R / rollout_sums(mask_T, lengths).clamp(min=1)
    return sums_R.repeat_interleave(_sizes(lengths, mask_T))


def kl_k1(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """k1 estimate of KL(policy || reference) per token: policy - reference. Unbiased. `[T]`.

    For rewards. As a loss its expected gradient at a state is zero, times the ratio it is that of
    the KL (Schulman, "Approximating KL divergence", 2020, has the three estimators).
    """
    assert logprobs_T.shape == reference_logprobs_T.shape and logprobs_T.ndim == 1
    return logprobs_T - reference_logprobs_T


def kl_k2(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """k2 estimate: (policy - reference)^2 / 2. Biased; as a loss its gradient is exact. `[T]`.

    Exact at the state where the token was drawn: how the policy changes which states come is left
    out, as in any KL in the loss.
    """
    return kl_k1(logprobs_T, reference_logprobs_T) ** 2 / 2


def kl_k3(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """k3 estimate: exp(d) - d - 1, d = reference - policy. Unbiased, never negative. `[T]`.

    GRPO's, arXiv 2402.03300, eq. 4. As a loss its expected gradient at a state is that of
    KL(reference || policy); times the ratio it is that of KL(policy || reference).
    """
    difference_T = -kl_k1(logprobs_T, reference_logprobs_T)
    return difference_T.exp() - difference_T - 1


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def value_loss(
    values_T: torch.Tensor, old_values_T: torch.Tensor, returns_T: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of the critic per token, and where the clip binds; clip = 0 switches it off.

    max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2) / 2: value clipping as in the code of
    PPO, arXiv 1707.06347. Returns (loss `[T]`, bool `[T]`).
    """
    assert values_T.shape == old_values_T.shape == returns_T.shape and values_T.ndim == 1
    loss_T = (values_T - returns_T) ** 2 / 2
    if clip == 0:
        return loss_T, torch.zeros_like(loss_T, dtype=torch.bool)
    clipped_T = old_values_T + (values_T - old_values_T).clamp(-clip, clip)
    clipped_loss_T = (clipped_T - returns_T) ** 2 / 2
    return torch.max(loss_T, clipped_loss_T), clipped_loss_T > loss_T


def token_weights(
    mask_T: torch.Tensor,
    lengths: Sequence[int],
    average: str,
    *,
    tokens: float,
    rollouts: float,
    max_tokens: int = 1,
    weights_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight of each token's loss so that the weighted sum is the minibatch's average, `[T]`.

    average = "token": every token alike, 1 / tokens (DAPO, arXiv 2503.14476, eq. 8).
    average = "sequence": each rollout alike, 1 / (rollouts * its tokens) (GRPO, arXiv 2402.03300,
    eq. 3). average = "constant": 1 / (rollouts * max_tokens), which leaves no bias to length
    (Dr. GRPO, arXiv 2503.20783, section 3.2).
    lengths: tokens of each rollout here. weights_R: weight of each rollout, 1 unless given.
    tokens, rollouts: of the whole minibatch, weighted likewise, so that the sum over microbatches
    is the average over the minibatch.
    """
    assert mask_T.ndim == 1 and len(mask_T) == sum(lengths)
    sizes = _sizes(lengths, mask_T)
    weighted_T = mask_T if weights_R is None else mask_T * weights_R.repeat_interleave(sizes)
    if average == "token":
        return weighted_T / max(tokens, 1e-9)
    if average == "constant":
        return weighted_T / max(rollouts * max_tokens, 1e-9)
    assert average == "sequence", average
    counts_R = rollout_sums(mask_T, lengths).clamp(min=1)
    return weighted_T / (counts_R.repeat_interleave(sizes) * max(rollouts, 1e-9))


def rollout_sums(values_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Sum over each rollout's tokens, `[R]`."""
    sizes = _sizes(lengths, values_T)
    rows_T = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    return values_T.new_zeros(len(sizes)).index_add(0, rows_T, values_T)


def _sizes(lengths: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(lengths, device=like.device, dtype=torch.long)
