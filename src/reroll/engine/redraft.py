"""Re-drafting: after a sample has left its tree, what was written for the same prompt still helps.

The last tokens of a running sample are looked up in the old rollouts and finished siblings of its
prompt (hashed n-grams, longest first, latest text first); what stood behind them there is offered
for the next tick. Verified like any draft, so it changes the time and never the tokens.

    texts   ... 7 + 3 = 10 ; 10 - 4 = 6 ; ...
    sample  ... 2 - 4 = -2 ; 10 - 4            -> offer "= 6 ; ..."
"""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from reroll.types import Draft

SIZES = (16, 8, 4, 2)
"""tokens that must match, longest first"""
_WIDTH = array("i").itemsize
_RATE = (0.9, 0.8, 0.7, 0.5)
_WEIGHT = 20.0
_DECAY = 0.8


class Texts:
    """What was written for one prompt and prefix: drafts of its requests, finished siblings."""

    def __init__(self) -> None:
        self.drafts: tuple[Draft, ...] = ()
        self._known: set[int] = set()
        self._indexed = 0
        """texts that the index holds"""
        self._arrays: list[array[int]] = []
        self._index: list[dict[bytes, tuple[int, int]]] = [{} for _ in SIZES]
        """n-gram -> (text, place behind it), by size"""

    def add(self, drafts: Sequence[Draft]) -> None:
        """Take in drafts; those that are here already are left out."""
        new = [draft for draft in drafts if id(draft) not in self._known]
        self._known.update(map(id, new))
        self.drafts += tuple(new)

    def mean_length(self) -> float | None:
        """Of the texts; None without any."""
        if not self.drafts:
            return None
        return sum(len(draft.token_ids) for draft in self.drafts) / len(self.drafts)

    def propose(self, tokens: list[int], count: int) -> tuple[list[int], int]:
        """(up to `count` tokens that may follow `tokens`, which of `SIZES` matched)."""
        self._read()
        tail = array("i", tokens[-SIZES[0] :]).tobytes()
        for which, size in enumerate(SIZES):
            if len(tail) < size * _WIDTH:
                continue
            found = self._index[which].get(tail[-size * _WIDTH :])
            if found is not None:
                text, place = found
                return self._arrays[text][place : place + count].tolist(), which
        return [], -1

    def _read(self) -> None:
        """Index the texts that are not yet: n-grams as bytes, later places win."""
        for draft in self.drafts[self._indexed :]:
            numbers = array("i", draft.token_ids)
            text, raw = len(self._arrays), numbers.tobytes()
            self._arrays.append(numbers)
            for size, index in zip(SIZES, self._index, strict=True):
                for place in range(size, len(numbers)):
                    index[raw[(place - size) * _WIDTH : place * _WIDTH]] = (text, place)
        self._indexed = len(self.drafts)


class Rates:
    """Counted chance that an offered token is accepted if those before it are, by match size."""

    def __init__(self) -> None:
        self.offered = np.full(len(SIZES), _WEIGHT)
        self.accepted = np.array(_RATE) * _WEIGHT

    def rate(self, which: int) -> float:
        """Of offers that matched `SIZES[which]` tokens; below 1."""
        return min(0.99, float(self.accepted[which] / self.offered[which]))

    def observe(self, which: int, offered: int, accepted: int) -> None:
        """Count an offer: the first refusal ends it, what comes after was not tried."""
        self.accepted[which] += accepted
        self.offered[which] += accepted + (accepted < offered)

    def decay(self) -> None:
        """The policy has changed: let what was counted fade, but for the weight of a few."""
        factor = np.maximum(_DECAY, np.minimum(1.0, _WEIGHT / self.offered))
        self.offered *= factor
        self.accepted *= factor

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"offered": self.offered.tolist(), "accepted": self.accepted.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.offered = np.array(state["offered"])
        self.accepted = np.array(state["accepted"])
