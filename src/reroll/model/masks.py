"""Attention masks of decode ticks and prefix trees, in the form that the model takes.

Most models take one 4-D mask for all layers. Models whose configuration lists layer types
(full, sliding) take a mask for each type. Models with one window for every layer (Mistral, Phi-3,
StarCoder2) take one mask with the window in it. Eager attention adds its mask to the scores, the
others take booleans or such numbers. The start-up self-check finds out whether the form chosen here
is right.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig

Mask = torch.Tensor | BlockMask | dict[str, torch.Tensor] | dict[str, BlockMask]


class MaskStyle(NamedTuple):
    """How a model wants to be told what each token may see."""

    window: int | None
    """tokens a sliding layer sees, its own included"""
    by_layer_type: bool
    additive: bool


def mask_style(config: PreTrainedConfig) -> MaskStyle:
    """Read the style off a model's configuration."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or []
    window = getattr(text, "sliding_window", None)
    by_layer_type = "sliding_attention" in types
    if types and not by_layer_type:
        window = None  # a window that no layer uses
    return MaskStyle(window, by_layer_type, text._attn_implementation == "eager")


def decode_mask(
    style: MaskStyle, lengths: torch.Tensor, longest: int, dtype: torch.dtype, chunk: int = 1
) -> Mask:
    """Mask `[active, 1, chunk, longest]` for tokens at positions `lengths` (`[active]`) and the
    `chunk - 1` after, each seeing itself and what stands before it in its slot."""
    index = torch.arange(longest, device=lengths.device)
    position = lengths[:, None] + torch.arange(chunk, device=lengths.device)
    return attention_mask(style, index <= position[..., None], position, index[None], dtype)


def attention_mask(
    style: MaskStyle,
    seen: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    dtype: torch.dtype,
) -> Mask:
    """The mask `[R, 1, Q, C]` in the model's form, a dictionary by layer type where needed.

    seen: `[R, Q, C]` what each query may see; query, key: `[R, Q]`, `[R, C]` positions.
    """
    if style.window is None:
        return _shape(seen, style.additive, dtype)
    near = query[:, :, None] - key[:, None, :] < style.window
    sliding = _shape(seen & near, style.additive, dtype)
    if not style.by_layer_type:
        return sliding
    return {
        "full_attention": _shape(seen, style.additive, dtype),
        "sliding_attention": sliding,
    }


def flex_mask(
    style: MaskStyle, order: torch.Tensor, end: torch.Tensor, position: torch.Tensor
) -> Mask:
    """The mask of trees (`model/tree.py`; `[R, C]` each) for flex attention: which blocks of pairs
    hold something that is seen, and a formula for the rest."""

    def seen(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        at = order[row, query]
        return (order[row, key] <= at) & (at < end[row, key])

    def blocks(formula: Callable[..., torch.Tensor]) -> BlockMask:
        rows, width = order.shape
        return create_block_mask(formula, rows, None, width, width, device=order.device)

    window = style.window
    if window is None:
        return blocks(seen)

    def near(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        distance = position[row, query] - position[row, key]
        return seen(row, head, query, key) & (distance < window)

    if not style.by_layer_type:
        return blocks(near)
    return {"full_attention": blocks(seen), "sliding_attention": blocks(near)}


def _shape(seen: torch.Tensor, additive: bool, dtype: torch.dtype) -> torch.Tensor:
    if additive:
        lowest = torch.finfo(dtype).min
        seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest)
    return seen[:, None]
