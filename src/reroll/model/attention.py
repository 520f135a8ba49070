"""Attention under the masks of trees, without most of what stands after each token.

The columns of a tree stand in depth-first order, and no token sees what comes after it; but under a
mask the kernels compute all pairs. Blocks of queries, each with the keys up to its own end, compute
little more than half of them. The same sums in the same order, so the same numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

BLOCK = 64
"""queries a block; 128 and 192 were no faster (docs/log.md)"""
NAME = "reroll_in_blocks"


@contextmanager
def in_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Forwards within attend in blocks, if the model uses torch's fused attention on a CPU.

    Their masks must hide from each token what stands after it. Not where gradient checkpointing
    would run them again, outside. On other devices no gain has been measured.
    """
    config = model.config.get_text_config()
    again = model.training and model.is_gradient_checkpointing
    if config._attn_implementation != "sdpa" or model.device.type != "cpu" or again:
        yield
        return
    # what models look up at each forward
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def attention_in_blocks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function. query: `[R, heads, Q, D]`; key, value: `[R, heads, C, D]`,
    C >= Q, the queries' own keys last; attention_mask: `[R, 1, Q, C]`."""
    queries, before = query.shape[2], key.shape[2] - query.shape[2]
    special = any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if attention_mask is None or queries <= BLOCK or special:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    heads = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, heads), repeat_kv(value, heads)
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
            )
        )
    return torch.cat(blocks, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention_in_blocks)
