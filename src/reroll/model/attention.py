"""Attention under the masks of trees, without most of what each token does not see.

The columns of a tree stand in depth-first order, and no token sees what comes after it; but under a
dense mask the kernels compute all pairs. On CPUs, blocks of queries, each with the keys up to its
own end, compute little more than half of them. On CUDA, flex attention leaves out every block of
128 x 128 pairs that holds nothing seen, other branches included. What is left out are zeros.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BLOCK = 64
"""queries a block; with 128 the step took as long (docs/log.md)"""
FLEX_BLOCK = 128
"""queries and keys a block of flex attention, torch's own default"""
FLEX_FROM = 1024
"""columns of a row from which flex attention is used. Counted, since it has not been timed: below
that, attention under a dense mask is about a twentieth of a forward of 1.5 billion parameters"""
FLEX_ON = "cuda"
NAME = "reroll_in_blocks"


def takes_blocks(model: PreTrainedModel) -> bool:
    """Whether the model attends in blocks of queries: on CPUs."""
    return model.device.type == "cpu" and _looks_up(model)


def takes_flex(model: PreTrainedModel) -> bool:
    """Whether to try flex attention with the model: on CUDA, where transformers lists it."""
    return model.device.type == FLEX_ON and _looks_up(model) and model._supports_flex_attn


def _looks_up(model: PreTrainedModel) -> bool:
    """Whether the model looks up torch's fused attention at each forward, and does not pick the
    keys itself (DeepSeek's sparse attention)."""
    config = model.config.get_text_config()
    looks_up = model._supports_attention_backend and not hasattr(config, "index_topk")
    return looks_up and config._attn_implementation == "sdpa"


@contextmanager
def in_blocks(model: PreTrainedModel, flex: bool = False) -> Iterator[None]:
    """Forwards within attend in blocks, if the model takes that.

    Their masks must hide from each token what stands after it. flex: some of them are block masks.
    """
    if not (takes_blocks(model) or (flex and takes_flex(model))):
        yield
        return
    with _attending(model, NAME):
        yield


@contextmanager
def _attending(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    config = model.config.get_text_config()
    before = config._attn_implementation
    # what models look up at each forward
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Switch gradient checkpointing on; what is run again attends as it did the first time."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        name = model.config.get_text_config()._attn_implementation
        return nullcontext(), _attending(model, name)

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def attention_in_blocks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function. query: `[R, heads, Q, D]`; key, value: `[R, heads or
    fewer, C, D]`, C >= Q, the queries' own keys last; attention_mask: `[R, 1, Q, C]`."""
    if isinstance(attention_mask, BlockMask):
        # autocast leaves the rotated ones in float32
        query, key = query.to(value.dtype), key.to(value.dtype)
        out, _ = flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return out, None
    queries, before = query.shape[2], key.shape[2] - query.shape[2]
    special = any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    dense = query.device.type != "cpu" or queries <= BLOCK or special
    if attention_mask is None or dense:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    blocks = []
    for start in range(0, queries, BLOCK):
        rows, end = slice(start, start + BLOCK), before + start + BLOCK
        blocks.append(
            scaled_dot_product_attention(
                query[:, :, rows],
                key[:, :, :end],
                value[:, :, :end],
                attention_mask[:, :, rows, :end],
                dropout_p=options.get("dropout", 0.0),
                scale=scaling,
                enable_gqa=key.shape[1] < query.shape[1],  # on CPUs without copies of the keys
            )
        )
    return torch.cat(blocks, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention_in_blocks)
