"""The engine's tensors: prefill rows, decode the active slots, draw. It never sees queues.

`R` prefill rows, `N` (sequence, position) pairs to draw at, `V` vocabulary, `H` hidden width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from reroll.algo.sample import Drawn, Law, draw
from reroll.engine.fastlinear import onednn_forwards, replaced
from reroll.engine.slots import SlotCache
from reroll.model.hidden import hidden_states
from reroll.model.masks import attention_mask, decode_mask, mask_style
from reroll.model.ragged import pad
from reroll.model.tree import tree_mask
from reroll.types import Request

WIDTHS = 16
"""under oneDNN prefilled rows have multiples of this for widths: it prepares a product anew for
each number of tokens that it has not met lately, which took a third of a forward (docs/log.md)"""


@dataclass(slots=True)
class Prefilled:
    """Rows run through the model: their keys and values, and what is drawn after each."""

    cache: DynamicCache
    """`[R, heads, width, head width]` a layer; `SlotCache.load` copies from it"""
    logits: torch.Tensor
    """`[N, V]`, for each row at its wanted positions, row after row"""
    hidden: torch.Tensor | None
    """`[N, H]` last hidden states there, if asked for"""


class Columns(NamedTuple):
    """Of the keys and values of rows that hold trees, `[R, C]` each; see `model/tree.py`."""

    order: np.ndarray
    end: np.ndarray
    position: np.ndarray


def make_law(requests: Sequence[Request], device: torch.device) -> Law:
    """The sampling laws of these requests, one row each."""
    settings = [request.sampling for request in requests]
    return Law(
        keys=torch.tensor([request.key for request in requests], device=device),
        temperature=torch.tensor([float(s.temperature) for s in settings], device=device),
        top_k=torch.tensor([s.top_k for s in settings], device=device),
        top_p=torch.tensor([float(s.top_p) for s in settings], device=device),
        any_greedy=any(s.temperature == 0 for s in settings),
        any_truncated=any(s.top_k > 0 or s.top_p < 1 for s in settings),
        any_entropy=any(r.watch is not None and r.watch.entropy for r in requests),
    )


def take(law: Law, rows: torch.Tensor) -> Law:
    """The law of some of its rows."""
    picked = (law.keys[rows], law.temperature[rows], law.top_k[rows], law.top_p[rows])
    return Law(*picked, law.any_greedy, law.any_truncated, law.any_entropy)


class Runner:
    """Forwards of one module, in eval mode, under one autocast, without gradients."""

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None) -> None:
        self.model, self.autocast = model, autocast
        self.device = model.device
        self.verify: torch.dtype | None = None
        """run draft trees under this autocast instead"""
        self.style = mask_style(model.config)
        self._last = getattr(model.config, "max_position_embeddings", 1 << 40) - 1
        self._modules = list(model.modules())
        self._forwards = [] if autocast is not None else onednn_forwards(model)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients, eval mode (restored afterwards), the trainer's autocast."""
        training = [module for module in self._modules if module.training]
        for module in training:
            module.training = False
        try:
            with (
                torch.inference_mode(),
                replaced(self._forwards),
                torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
            ):
                yield
        finally:
            for module in training:
                module.training = True

    def width(self, longest: int) -> int:
        """What rows of up to `longest` tokens are padded to, never beyond the model's positions."""
        if not self._forwards:
            return longest
        return max(longest, min(-(-longest // WIDTHS) * WIDTHS, self._last + 1))

    @contextmanager
    def _rounding(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Autocast to `dtype`, with the module's own products; None: nothing changes."""
        if dtype is None:
            yield
            return
        forwards = [(module, module.__dict__.pop("forward")) for module, _ in self._forwards]
        try:
            with torch.autocast(self.device.type, dtype):
                yield
        finally:
            for module, forward in forwards:
                module.__dict__["forward"] = forward

    def prefill(
        self,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
        hidden: bool,
        columns: Columns | None = None,
        past: DynamicCache | None = None,
        width: int = 0,
    ) -> Prefilled:
        """Run rows, padded at least to `width`, through the model; logits from token `starts[r]` of
        row r to its last.

        Rows are plain texts, or (columns) trees, perhaps behind keys and values of the `past`,
        which are added to.
        """
        tokens, wanted = pad(rows, starts, list(map(len, rows)), self.device, width)
        cache = past if past is not None else DynamicCache()
        where = {}
        if columns is not None:
            queries = tokens.shape[1]
            order, end, position = (torch.from_numpy(x).to(self.device) for x in columns)
            dtype = self.verify or self.autocast or self.model.dtype
            seen = tree_mask(order, end, queries)
            own = position[:, -queries:]
            where["position_ids"] = own
            where["attention_mask"] = attention_mask(self.style, seen, own, position, dtype)
        rounded = self.verify if columns is not None else None
        with hidden_states(self.model, hidden) as states, self._rounding(rounded):
            logits = self.model(
                input_ids=tokens,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=wanted,
                **where,
            ).logits
        total = sum(len(row) - start for row, start in zip(rows, starts, strict=True))
        assert logits.shape[0] == total, "the model ignores logits_to_keep"
        return Prefilled(cache, logits, states[0] if hidden else None)

    def decode(
        self,
        cache: SlotCache,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        longest: int,
        hidden: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A chunk of tokens `[active, chunk]` in each slot: logits `[active, chunk, V]` (and hidden
        states) after each."""
        chunk = tokens.shape[1]
        cache.begin_tick(lengths, longest, chunk)
        mask = decode_mask(self.style, lengths, longest, self.autocast or self.model.dtype, chunk)
        # what pads a chunk may lie behind the last position that the model knows
        positions = (lengths[:, None] + torch.arange(chunk, device=self.device)).clamp(
            max=self._last
        )
        with hidden_states(self.model, hidden) as states:
            logits = self.model(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=chunk,
            ).logits
        return logits, states[0] if hidden else None

    def draw(self, logits: torch.Tensor, positions: torch.Tensor, law: Law) -> Drawn:
        """Draw with autocast off: the law is computed in float32 or wider."""
        with torch.autocast(self.device.type, enabled=False):
            return draw(logits, positions, law)
