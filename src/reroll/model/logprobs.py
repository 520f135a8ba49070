"""Per-token log-probs of ragged rollouts under the model, with gradients where wanted.

The one way in which trainer, reference and engine scoring ask "how likely is this text?". In:
(context, continuation) token lists; out: packed `[T]` tensors, continuation after continuation.
Callers never see how rows were padded or shared.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from reroll.model.hidden import hidden_states
from reroll.model.ragged import Padded, pad, padded_size

Pair = tuple[Sequence[int], Sequence[int]]


class LogProbs(NamedTuple):
    """Packed `[T]`: log-prob of each continuation token; entropy of the law it was drawn from.

    hidden `[T, H]`: the last hidden state that each token was drawn from.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    hidden: torch.Tensor | None


def token_logprobs(
    model: PreTrainedModel,
    sequences: Sequence[Pair],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    hidden: bool = False,
    max_tokens: int | None = None,
) -> LogProbs:
    """Tempered log-probs of every continuation token given all before it.

    temperature: logits are divided by it. entropy: also return that of each law, in nats.
    hidden: also return the last hidden states.
    max_tokens: split into forwards of at most this many tokens, padding included (None: one).
    """
    parts = [
        _forward(model, sequences[start:end], temperature, entropy, hidden)
        for start, end in chunks(sequences, max_tokens)
    ]
    return LogProbs(
        torch.cat([part.logprobs for part in parts]),
        torch.cat([p.entropy for p in parts if p.entropy is not None]) if entropy else None,
        torch.cat([p.hidden for p in parts if p.hidden is not None]) if hidden else None,
    )


def token_states(trunk: PreTrainedModel, sequences: Sequence[Pair]) -> torch.Tensor:
    """Last hidden state of a model without head before each continuation token, `[T, H]`."""
    tokens, wanted = _padded(sequences, trunk.device)
    return trunk(input_ids=tokens, use_cache=False).last_hidden_state[wanted]


def _padded(sequences: Sequence[Pair], device: torch.device) -> Padded:
    """Rows of context and continuation; wanted is what comes before each continuation token."""
    rows = [[*context, *continuation] for context, continuation in sequences]
    starts = [len(context) - 1 for context, _ in sequences]
    return pad(rows, starts, [len(row) - 1 for row in rows], device)


def _forward(
    model: PreTrainedModel,
    sequences: Sequence[Pair],
    temperature: float,
    entropy: bool,
    hidden: bool,
) -> LogProbs:
    tokens, wanted = _padded(sequences, model.device)
    with hidden_states(model, hidden) as states:
        logits_TV = model(input_ids=tokens, use_cache=False, logits_to_keep=wanted).logits
    states_TH = states[0] if hidden else None
    with torch.autocast(model.device.type, enabled=False):
        logits_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
        logits_TV = logits_TV / temperature
        targets_T = tokens[:, 1:][wanted[:, :-1]]
        norm_T = logits_TV.logsumexp(-1)
        logprobs_T = logits_TV.gather(-1, targets_T[:, None]).squeeze(-1) - norm_T
        if not entropy:
            return LogProbs(logprobs_T, None, states_TH)
        probs_TV = (logits_TV - norm_T[:, None]).exp()
        return LogProbs(logprobs_T, norm_T - (probs_TV * logits_TV).sum(-1), states_TH)


def chunks(sequences: Sequence[Pair], max_tokens: int | None) -> list[tuple[int, int]]:
    """Bounds of consecutive runs whose padded size stays within `max_tokens`."""
    bounds, start, lengths = [], 0, []
    for index, (context, continuation) in enumerate(sequences):
        lengths.append(len(context) + len(continuation))
        if max_tokens is not None and len(lengths) > 1 and padded_size(lengths) > max_tokens:
            bounds.append((start, index))
            start, lengths = index, lengths[-1:]
    return [*bounds, (start, len(sequences))]
