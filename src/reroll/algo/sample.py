"""Draw tokens from logits with position-keyed noise, and say with which log-prob.

Two log-probs go with every token. `logprob` is tempered and untruncated: the old log-prob of the
policy loss. `behaviour_logprob` is that of the law actually sampled: tempered, cut to the top-k
and then the top-p tokens (in that order, as Hugging Face does), renormalised.

`B` rows, `V` vocabulary.
"""

from typing import NamedTuple

import torch

from reroll.algo.noise import gumbel, gumbel_at, uniform_bits

DENSE_VOCABULARY = 4096
"""above this many tokens, noise is computed only for those that can still win"""
_CHUNK = 1 << 16  # elements whose noise is computed at a time, so that they stay in cache


class Law(NamedTuple):
    """How each row is sampled; `[B]` tensors, and whether any row needs the slow parts."""

    keys: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    any_greedy: bool
    any_truncated: bool
    any_entropy: bool = False


class Drawn(NamedTuple):
    """Drawn tokens int64 `[B]`, with both log-probs `[B]`."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    behaviour_logprobs: torch.Tensor
    entropies: torch.Tensor | None = None
    """`[B]` of the tempered laws, in nats, if any row wants it"""


def draw(logits_BV: torch.Tensor, positions_B: torch.Tensor, law: Law) -> Drawn:
    """Draw one token a row: argmax of tempered (and truncated) logits plus the row's noise.

    Rows of temperature 0 take the argmax of the logits; their `logprobs` are at temperature 1
    and their `behaviour_logprobs` 0 (the law has one outcome).
    """
    assert logits_BV.ndim == 2 and positions_B.shape == law.keys.shape == logits_BV.shape[:1]
    wide = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    greedy_B = law.temperature == 0
    if law.any_greedy:
        tempered_BV = wide / torch.where(greedy_B, 1.0, law.temperature)[:, None].to(wide.dtype)
    else:
        tempered_BV = wide / law.temperature[:, None].to(wide.dtype)
    sampled_BV = truncate(tempered_BV, law.top_k, law.top_p) if law.any_truncated else tempered_BV
    tokens_B = choose(sampled_BV, law.keys, positions_B)
    if law.any_greedy:
        tokens_B = torch.where(greedy_B, wide.argmax(-1), tokens_B)
    logprobs_B = pick(tempered_BV, tokens_B)
    behaviour_B = pick(sampled_BV, tokens_B) if law.any_truncated else logprobs_B
    if law.any_greedy:
        behaviour_B = torch.where(greedy_B, 0.0, behaviour_B)
    entropies_B = entropy(tempered_BV) if law.any_entropy else None
    return Drawn(tokens_B, logprobs_B, behaviour_B, entropies_B)


def entropy(logits_BV: torch.Tensor) -> torch.Tensor:
    """Of the law that logits stand for, in nats, `[B]`."""
    logprobs_BV = logits_BV.log_softmax(-1)
    # what is impossible (-inf) adds nothing: 0 times a number
    finite_BV = logprobs_BV.clamp(min=torch.finfo(logits_BV.dtype).min)
    return -torch.einsum("bv,bv->b", logprobs_BV.exp(), finite_BV)


def pick(logits_BV: torch.Tensor, tokens_B: torch.Tensor) -> torch.Tensor:
    """Log-softmax of `logits_BV` at one token a row, `[B]`, without the whole log-softmax."""
    chosen_B = logits_BV.gather(-1, tokens_B[:, None]).squeeze(-1)
    return chosen_B - logits_BV.logsumexp(-1)


def choose(
    logits_BV: torch.Tensor, keys_B: torch.Tensor, positions_B: torch.Tensor
) -> torch.Tensor:
    """`argmax(logits + gumbel(key, position))`, `[B]`; -inf logits never win."""
    size = logits_BV.shape[1]
    if size <= DENSE_VOCABULARY:
        return (gumbel(keys_B, positions_B, size) + logits_BV).argmax(-1)
    rows = max(1, _CHUNK // size)
    parts = [slice(start, start + rows) for start in range(0, len(logits_BV), rows)]
    return torch.cat([_choose_sparse(logits_BV[p], keys_B[p], positions_B[p]) for p in parts])


def _choose_sparse(
    logits_BV: torch.Tensor, keys_B: torch.Tensor, positions_B: torch.Tensor
) -> torch.Tensor:
    """Exactly `choose`, with logarithms only for the few tokens that can still win.

    A token beats the score s of the likeliest one only if its uniform u has
    -log(-log u) > s - logit, that is u > exp(-w) with w = exp(logit - s), and exp(-w) >= 1 - w:
    so u > 1 - w is needed. About sum(w) tokens pass, a handful.
    """
    likeliest_B = logits_BV.argmax(-1)
    top_B1 = logits_BV.gather(-1, likeliest_B[:, None])
    noise_B = gumbel_at(keys_B, positions_B, likeliest_B)
    # the largest logit is taken off alone, which rounds little however large the logits are;
    # float32 rounding of w is then below 1e-5 w, and the slack keeps the filter on the safe side
    scale_B1 = noise_B[:, None].neg().exp().mul(-(2.0**32) * 1.001).to(logits_BV.dtype)
    needed_BV = (logits_BV - top_B1).exp_().mul_(scale_B1).add_(2.0**32 - 1024)
    able_BV = uniform_bits(keys_B, positions_B, logits_BV.shape[1]) >= needed_BV
    able_BV.scatter_(-1, likeliest_B[:, None], True)
    rows_N, tokens_N = able_BV.nonzero(as_tuple=True)
    scores_N = logits_BV[rows_N, tokens_N] + gumbel_at(
        keys_B[rows_N], positions_B[rows_N], tokens_N
    )
    best_B = torch.full_like(noise_B, -torch.inf).scatter_reduce_(0, rows_N, scores_N, "amax")
    winner_N = scores_N == best_B[rows_N]
    return torch.zeros_like(likeliest_B).scatter_reduce_(
        0, rows_N[winner_N], tokens_N[winner_N], "amin", include_self=False
    )  # equal scores: the lower token, as argmax has it


def truncate(logits_BV: torch.Tensor, top_k_B: torch.Tensor, top_p_B: torch.Tensor) -> torch.Tensor:
    """Set to -inf what top-k (0: off), then top-p (1: off) leave out; the likeliest stays."""
    size = logits_BV.shape[1]
    ordered_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(size, device=logits_BV.device)
    outside_BV = rank_V >= torch.where(top_k_B > 0, top_k_B, size)[:, None]
    kept_BV = ordered_BV.masked_fill(outside_BV, -torch.inf)
    before_BV = kept_BV.softmax(-1).cumsum(-1).roll(1, -1)
    before_BV[:, 0] = 0
    off_B = top_p_B >= 1
    outside_BV |= (before_BV >= top_p_B[:, None].to(before_BV.dtype)) & ~off_B[:, None]
    outside_BV[:, 0] = False
    mask_BV = torch.zeros_like(outside_BV).scatter_(-1, order_BV, outside_BV)
    return logits_BV.masked_fill(mask_BV, -torch.inf)
