"""Per-token log-probs of ragged rollouts under the model, with gradients where wanted.

The one way in which trainer, reference and engine scoring ask "how likely is this text?". In:
(context, continuation) token lists; out: packed `[T]` tensors, continuation after continuation.
Callers never see how rows were padded or shared.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from reroll.model.ragged import pad, padded_size

Pair = tuple[Sequence[int], Sequence[int]]


class LogProbs(NamedTuple):
    """Packed `[T]`: log-prob of each continuation token; entropy of the law it was drawn from."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


def token_logprobs(
    model: PreTrainedModel,
    sequences: Sequence[Pair],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    max_tokens: int | None = None,
) -> LogProbs:
    """Tempered log-probs of every continuation token given all before it.

    temperature: logits are divided by it. entropy: also return that of each law, in nats.
    max_tokens: split into forwards of at most this many tokens, padding included (None: one).
    """
    parts = [
        _forward(model, sequences[start:end], temperature, entropy)
        for start, end in _chunks(sequences, max_tokens)
    ]
    entropies = [part.entropy for part in parts if part.entropy is not None]
    return LogProbs(
        torch.cat([part.logprobs for part in parts]), torch.cat(entropies) if entropy else None
    )


def _forward(
    model: PreTrainedModel, sequences: Sequence[Pair], temperature: float, entropy: bool
) -> LogProbs:
    rows = [[*context, *continuation] for context, continuation in sequences]
    starts = [len(context) - 1 for context, _ in sequences]
    tokens, wanted = pad(rows, starts, [len(row) - 1 for row in rows], model.device)
    logits_TV = model(input_ids=tokens, use_cache=False, logits_to_keep=wanted).logits
    with torch.autocast(model.device.type, enabled=False):
        logits_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
        logits_TV = logits_TV / temperature
        targets_T = tokens[:, 1:][wanted[:, :-1]]
        norm_T = logits_TV.logsumexp(-1)
        logprobs_T = logits_TV.gather(-1, targets_T[:, None]).squeeze(-1) - norm_T
        if not entropy:
            return LogProbs(logprobs_T, None)
        probs_TV = (logits_TV - norm_T[:, None]).exp()
        return LogProbs(logprobs_T, norm_T - (probs_TV * logits_TV).sum(-1))


def _chunks(sequences: Sequence[Pair], max_tokens: int | None) -> list[tuple[int, int]]:
    """Bounds of consecutive runs whose padded size stays within `max_tokens`."""
    bounds, start, lengths = [], 0, []
    for index, (context, continuation) in enumerate(sequences):
        lengths.append(len(context) + len(continuation))
        if max_tokens is not None and len(lengths) > 1 and padded_size(lengths) > max_tokens:
            bounds.append((start, index))
            start, lengths = index, lengths[-1:]
    return [*bounds, (start, len(sequences))]
