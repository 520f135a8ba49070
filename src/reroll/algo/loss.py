"""Policy losses: pure functions on packed tensors, each with the paper it comes from.

Packed means rollout after rollout, `T` completion tokens in all. Advantages are credit per token;
`mask_T` is 1.0 where the policy gradient applies.
"""

import torch


def clipped_surrogate(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) per token, and where the clip binds.

    PPO, arXiv 1707.06347, eq. 7; with clip_low != clip_high the clip-higher of DAPO, arXiv
    2503.14476, eq. 10. Returns (loss `[T]`, bool `[T]`).
    """
    assert logprobs_T.shape == old_logprobs_T.shape == advantages_T.shape and logprobs_T.ndim == 1
    ratio_T = (logprobs_T - old_logprobs_T).exp()
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    loss_T = -torch.min(ratio_T * advantages_T, clipped_T * advantages_T)
    binds_T = ((ratio_T < 1 - clip_low) & (advantages_T < 0)) | (
        (ratio_T > 1 + clip_high) & (advantages_T > 0)
    )
    return loss_T, binds_T


def kl_k3(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """k3 estimate of KL(policy || reference) per token: exp(d) - d - 1, d = reference - policy.

    Non-negative; GRPO, arXiv 2402.03300, eq. 4 (estimator from Schulman, 2020). Returns `[T]`.
    """
    assert logprobs_T.shape == reference_logprobs_T.shape and logprobs_T.ndim == 1
    difference_T = reference_logprobs_T - logprobs_T
    return difference_T.exp() - difference_T - 1


def token_weights(
    lengths: list[int], mask_T: torch.Tensor, average: str, tokens: float, rollouts: float
) -> torch.Tensor:
    """Weight of each token's loss so that the weighted sum is the minibatch's average, `[T]`.

    average = "token": every token alike, 1 / tokens (DAPO, arXiv 2503.14476, eq. 8).
    average = "sequence": each rollout alike, 1 / (rollouts * its tokens) (GRPO, eq. 3).
    lengths: tokens of each rollout here; tokens, rollouts: of the whole minibatch, so that the
    sum over microbatches is the average over the minibatch.
    """
    assert mask_T.ndim == 1 and len(mask_T) == sum(lengths)
    if average == "token":
        return mask_T / max(tokens, 1.0)
    assert average == "sequence", average
    counts = torch.stack([part.sum().clamp(min=1) for part in mask_T.split(lengths)])
    sizes = torch.tensor(lengths, device=mask_T.device)
    return mask_T / (counts.repeat_interleave(sizes) * max(rollouts, 1.0))
