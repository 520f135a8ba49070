"""Per-token log-probs of ragged rollouts under the model, with gradients where wanted.

The one way in which trainer, reference, critic and engine scoring ask "how likely is this text?".
In: (context, continuation) token lists, or forwards laid out of them (`model/layout.py`); out:
packed `[T]` tensors, continuation after continuation. Callers never see how rows were padded or
shared.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from reroll.model.attention import in_blocks
from reroll.model.flops import CostModel
from reroll.model.hidden import hidden_states
from reroll.model.layout import Layout, Pair, in_order, lay_out
from reroll.model.masks import attention_mask, flex_mask, mask_style
from reroll.model.tree import tree_mask


class LogProbs(NamedTuple):
    """Packed `[T]`: log-prob of each continuation token; entropy of the law it was drawn from.

    hidden `[T, H]`: the last hidden state that each token was drawn from.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    hidden: torch.Tensor | None


def token_logprobs(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    hidden: bool = False,
    max_tokens: int | None = None,
    cost: CostModel | None = None,
) -> LogProbs:
    """Tempered log-probs of every continuation token given all before it.

    temperature: logits are divided by it. entropy: also return that of each law, in nats.
    hidden: also return the last hidden states.
    max_tokens: split into forwards of at most this many tokens, padding included (None: one).
    cost: the model's, for running what texts begin with alike once; None: each runs alone.
    """
    behind = cost is not None and not (model.training and model.is_gradient_checkpointing)
    layouts = lay_out(pairs, max_tokens, cost, behind)
    parts = [
        layout_logprobs(model, layout, temperature=temperature, entropy=entropy, hidden=hidden)
        for layout in layouts
    ]
    streams = in_order(layouts, parts, [len(continuation) for _, continuation in pairs])
    return LogProbs(*streams)  # type: ignore[arg-type]


def layout_logprobs(
    model: PreTrainedModel,
    layout: Layout,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    hidden: bool = False,
) -> LogProbs:
    """The same of one forward, in the order of its rollouts."""
    layout = layout.to(model.device)
    with hidden_states(model, hidden) as states, _blocks(model, layout):
        logits_WV = _joined(
            [model(**call, logits_to_keep=wanted).logits for wanted, call in _calls(model, layout)]
        )
    states_TH = layout.of_rollouts(_joined(states)) if hidden else None
    with torch.autocast(model.device.type, enabled=False):
        logits_WV = logits_WV if logits_WV.dtype == torch.float64 else logits_WV.float()
        logits_WV = logits_WV / temperature
        norm_W = logits_WV.logsumexp(-1)
        if layout.source is None or layout.gather is None:
            logprobs_T = logits_WV.gather(-1, layout.target[:, None]).squeeze(-1) - norm_W
        else:
            # a prediction's tokens differ: no element is taken twice, as elsewhere, where the
            # gradient of indexing would add in any order
            drawn_M = logits_WV[layout.source, layout.target] - norm_W.index_select(
                0, layout.source
            )
            logprobs_T = drawn_M.index_select(0, layout.gather)
        if not entropy:
            return LogProbs(logprobs_T, None, states_TH)
        probs_WV = (logits_WV - norm_W[:, None]).exp()
        entropy_W = norm_W - (probs_WV * logits_WV).sum(-1)
        return LogProbs(logprobs_T, layout.of_rollouts(entropy_W), states_TH)


def layout_states(trunk: PreTrainedModel, layout: Layout) -> torch.Tensor:
    """Last hidden state of a model without head before each continuation token, `[T, H]`."""
    layout = layout.to(trunk.device)
    with _blocks(trunk, layout):
        states = [trunk(**call).last_hidden_state[wanted] for wanted, call in _calls(trunk, layout)]
    return layout.of_rollouts(_joined(states))


def _blocks(model: PreTrainedModel, layout: Layout) -> AbstractContextManager[None]:
    return in_blocks(model, layout.flex) if layout.columns is not None else nullcontext()


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _calls(model: PreTrainedModel, layout: Layout) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """(predictions asked for, arguments) of each call of the model, to be made before the next."""
    inputs: dict[str, Any] = {"input_ids": layout.tokens, "use_cache": False}
    if layout.columns is None:  # plain texts need neither mask nor positions
        yield layout.wanted, inputs
        return
    order, end, position = layout.columns
    if layout.flex:
        mask = flex_mask(mask_style(model.config), order, end, position)
        inputs |= {"attention_mask": mask, "position_ids": position}
    else:
        seen = tree_mask(order, end, layout.tokens.shape[1])
        inputs |= _where(model, seen, position, position)
    cache = DynamicCache()
    if layout.leaves:
        inputs |= {"use_cache": True, "past_key_values": cache}
    yield layout.wanted, inputs
    # [R * N, heads * head width] of each layer
    kept = [
        tuple(x.transpose(1, 2).flatten(0, 1).flatten(1) for x in (layer.keys, layer.values))
        for layer in list[Any](cache.layers)
    ]
    heads = [layer.keys.shape[1] for layer in list[Any](cache.layers)]
    for leaves in layout.leaves:
        (rows, width), there = leaves.tokens.shape, leaves.past >= 0
        cell = leaves.past.clamp(min=0).flatten()
        behind = DynamicCache()
        for index, pair in enumerate(kept):
            taken = (x.index_select(0, cell).unflatten(0, (rows, -1)) for x in pair)
            behind.update(
                *(x.unflatten(-1, (heads[index], -1)).transpose(1, 2) for x in taken), index
            )
        step = torch.arange(width, device=cell.device)
        before = torch.arange(there.shape[1], device=cell.device).expand(rows, -1)
        causal = (step <= step[:, None]).expand(rows, width, width)
        seen = torch.cat([there[:, None].expand(rows, width, -1), causal], -1)
        yield (
            leaves.wanted,
            {
                "input_ids": leaves.tokens,
                "use_cache": True,
                "past_key_values": behind,
                **_where(model, seen, leaves.position, torch.cat([before, leaves.position], 1)),
            },
        )


def _where(
    model: PreTrainedModel, seen: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> dict[str, Any]:
    """Mask and positions; see `attention_mask`."""
    device = model.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else model.dtype
    style = mask_style(model.config)
    if device == "cpu":  # where every layer would turn booleans into numbers, for itself
        style = style._replace(additive=True)
    return {
        "attention_mask": attention_mask(style, seen, query, key, dtype),
        "position_ids": query,
    }
