"""The engine's tensors: prefill rows, decode the active slots, draw. It never sees queues.

`R` prefill rows, `N` (sequence, position) pairs to draw at, `V` vocabulary, `H` hidden width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from reroll.algo.sample import Drawn, Law, draw
from reroll.engine.fastlinear import onednn_forwards, replaced
from reroll.engine.masks import decode_mask, mask_style
from reroll.engine.slots import SlotCache
from reroll.model.hidden import hidden_states
from reroll.model.ragged import pad
from reroll.types import Request


@dataclass(slots=True)
class Prefilled:
    """Rows run through the model: their keys and values, and what is drawn after each."""

    cache: DynamicCache
    """`[R, heads, width, head width]` a layer; `SlotCache.load` copies from it"""
    logits: torch.Tensor
    """`[N, V]`, for each row at its wanted positions, row after row"""
    hidden: torch.Tensor | None
    """`[N, H]` last hidden states there, if asked for"""
    first: list[int]
    """index in N of each row's first wanted position"""


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
    )


def take(law: Law, rows: torch.Tensor) -> Law:
    """The law of some of its rows."""
    picked = (law.keys[rows], law.temperature[rows], law.top_k[rows], law.top_p[rows])
    return Law(*picked, law.any_greedy, law.any_truncated)


class Runner:
    """Forwards of one module, in eval mode, under one autocast, without gradients."""

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None) -> None:
        self.model, self.autocast = model, autocast
        self.device = model.device
        self.style = mask_style(model.config)
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

    def prefill(
        self, rows: Sequence[Sequence[int]], given: Sequence[int], hidden: bool
    ) -> Prefilled:
        """Run rows through the model; logits from token `given - 1` of each row to its last.

        A row is what a sequence has (its first `given` tokens) and a draft behind it.
        """
        tokens, wanted = pad(rows, [g - 1 for g in given], list(map(len, rows)), self.device)
        cache = DynamicCache()
        with hidden_states(self.model, hidden) as states:
            logits = self.model(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=wanted
            ).logits
        first, total = [], 0
        for row, g in zip(rows, given, strict=True):
            first.append(total)
            total += len(row) - g + 1
        assert logits.shape[0] == total, "the model ignores logits_to_keep"
        return Prefilled(cache, logits, states[0] if hidden else None, first)

    def decode(
        self,
        cache: SlotCache,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        longest: int,
        hidden: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One token a slot: logits `[active, V]` (and hidden states) after it."""
        cache.begin_tick(lengths, longest)
        mask = decode_mask(self.style, lengths, longest, self.autocast or self.model.dtype)
        with hidden_states(self.model, hidden) as states:
            logits = self.model(
                input_ids=tokens[:, None],
                position_ids=lengths[:, None],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits[:, -1], states[0][:, -1] if hidden else None

    def draw(self, logits: torch.Tensor, positions: torch.Tensor, law: Law) -> Drawn:
        """Draw with autocast off: the law is computed in float32 or wider."""
        with torch.autocast(self.device.type, enabled=False):
            return draw(logits, positions, law)
