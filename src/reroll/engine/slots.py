"""Slot key/value cache: preallocated `[slots, heads, capacity, width]` per layer, read as views.

A `transformers` Cache that an unmodified model updates while it decodes. Running sequences stay
packed in slots 0..active-1, so attention reads a view of the first `active` slots up to the
longest length in use: no gather, no copy. Who writes what:

    [0, length)          written: by `load` (prefilled rows) and then by `update`, tick by tick
    [length, longest)    stale: other sequences' longer slots, refused drafts; hidden by the mask
    [longest, capacity)  not read this tick
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from reroll.errors import UserError


class LayerShape(NamedTuple):
    """Key and value shape of one layer (under autocast their dtypes may differ)."""

    heads: int
    key_width: int
    value_width: int
    key_dtype: torch.dtype
    value_dtype: torch.dtype


class SlotLayer(CacheLayerMixin):
    """One layer's slots. `write_at` and the view's bounds are set by the owning `SlotCache`."""

    is_sliding = False

    def __init__(self, shape: LayerShape, slots: int, capacity: int, device: torch.device) -> None:
        super().__init__()
        size = (slots, shape.heads, capacity)
        # zeros, not empty: stale memory could hold nan, and nan times a masked 0 is still nan
        self.keys: Any = torch.zeros(*size, shape.key_width, dtype=shape.key_dtype, device=device)
        self.values: Any = torch.zeros(
            *size, shape.value_width, dtype=shape.value_dtype, device=device
        )
        self.is_initialized = True
        self.rows = torch.empty(0, dtype=torch.long)
        self.write_at = torch.empty(0, dtype=torch.long)
        self.longest = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: slots are made at once."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a tick's tokens (`[active, heads, chunk, width]`); return views up to `longest`."""
        active = len(self.rows)
        # under autocast values come narrower than what a prefilled cache promoted them to
        self.keys[self.rows, :, self.write_at] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[self.rows, :, self.write_at] = value_states.transpose(1, 2).to(
            self.values.dtype
        )
        return self.keys[:active, :, : self.longest], self.values[:active, :, : self.longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that attention sees."""
        return self.longest, 0

    def get_seq_length(self) -> int:
        """Tokens before this tick's, in the longest slot (models ask; positions are explicit)."""
        return self.longest - self.write_at.shape[1]

    def get_max_length(self) -> int:
        """Tokens a slot can hold."""
        return self.keys.shape[2]


class SlotCache(Cache):
    """All layers' slots."""

    layers: list[Any]  # of SlotLayer

    def __init__(
        self, shapes: list[LayerShape], slots: int, capacity: int, device: torch.device
    ) -> None:
        super().__init__(layers=[SlotLayer(shape, slots, capacity, device) for shape in shapes])
        self.slots, self.capacity = slots, capacity

    def begin_tick(self, lengths: torch.Tensor, longest: int, chunk: int = 1) -> None:
        """This tick writes token `lengths[i]` and the `chunk - 1` after it of slot i, for the
        first `len(lengths)` slots."""
        rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        write_at = lengths[:, None] + torch.arange(chunk, device=lengths.device)
        for layer in self.layers:
            layer.rows, layer.write_at, layer.longest = rows, write_at, longest

    def load(
        self, slot: int, source: DynamicCache, rows: list[int], columns: list[np.ndarray]
    ) -> None:
        """Copy what stands in these rows of a prefilled cache at these columns (one array a row)
        into the slots from `slot` on."""
        longest = max(map(len, columns))
        padded = np.zeros((len(rows), longest), np.int64)  # what is copied for a pad is stale
        for index, own in enumerate(columns):
            padded[index, : len(own)] = own
        device = self.layers[0].keys.device
        row = torch.tensor(rows, device=device)[:, None]
        column, last = torch.from_numpy(padded).to(device), slot + len(rows)
        for layer, prefilled in zip(self.layers, list[Any](source.layers), strict=True):
            layer.keys[slot:last, :, :longest] = prefilled.keys[row, :, column].transpose(1, 2)
            layer.values[slot:last, :, :longest] = prefilled.values[row, :, column].transpose(1, 2)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot, to keep running sequences packed at the front."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]


def layer_shapes(prefilled: DynamicCache) -> list[LayerShape]:
    """Shapes read off a prefilled cache, so that no model's configuration needs guessing."""
    return [
        LayerShape(k.shape[1], k.shape[3], v.shape[3], k.dtype, v.dtype)
        for k, v in ((layer.keys, layer.values) for layer in list[Any](prefilled.layers))
    ]


def slot_bytes(shapes: list[LayerShape]) -> int:
    """Bytes of one token in one slot, all layers."""
    return sum(
        s.heads * (s.key_width * s.key_dtype.itemsize + s.value_width * s.value_dtype.itemsize)
        for s in shapes
    )


def check_fits(shapes: list[LayerShape], slots: int, capacity: int, bound_gb: float) -> str:
    """One line on the memory that the slots will take; UserError if it is over the bound."""
    token, bound = slot_bytes(shapes), bound_gb * 2**30
    total = token * slots * capacity
    line = f"{slots} slots x {capacity} tokens x {token:,} bytes = {total / 2**30:.2f} GiB of cache"
    if total > bound:
        fewer, shorter = int(bound // (token * capacity)), int(bound // (token * slots))
        raise UserError(
            f"engine.cache_gb = {bound_gb}: {line}; what would fit: {fewer} slots of {capacity} "
            f"tokens (engine.slots), or {slots} slots of {shorter} tokens "
            "(task.max_prompt_tokens + rollout.max_tokens)"
        )
    return line
