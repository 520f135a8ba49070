"""Attention under the masks of trees, without most of what stands after each token.

The columns of a tree stand in depth-first order, and no token sees what comes after it; but under a
mask the kernels compute all pairs. Blocks of queries, each with the keys up to its own end, compute
little more than half of them. What they leave out are zeros.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BLOCK = 64
"""queries a block; with 128 the step took as long (docs/log.md)"""
NAME = "reroll_in_blocks"


def takes_blocks(model: PreTrainedModel) -> bool:
    """Whether the model looks up torch's fused attention at each forward, and is on a CPU.

    On other devices no gain has been measured. Not where gradient checkpointing would run the
    forward again, outside, nor where a model picks the keys itself (DeepSeek's sparse attention).
    """
    config = model.config.get_text_config()
    again = model.training and model.is_gradient_checkpointing
    looks_up = model._supports_attention_backend and not hasattr(config, "index_topk")
    fused = config._attn_implementation == "sdpa"
    return looks_up and fused and model.device.type == "cpu" and not again


@contextmanager
def in_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Forwards within attend in blocks, if the model takes that.

    Their masks must hide from each token what stands after it.
    """
    if not takes_blocks(model):
        yield
        return
    config = model.config.get_text_config()
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
    """transformers' attention function. query: `[R, heads, Q, D]`; key, value: `[R, heads or
    fewer, C, D]`, C >= Q, the queries' own keys last; attention_mask: `[R, 1, Q, C]`."""
    queries, before = query.shape[2], key.shape[2] - query.shape[2]
    special = any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if attention_mask is None or queries <= BLOCK or special:
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
