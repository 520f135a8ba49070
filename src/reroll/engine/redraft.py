"""Re-drafting: after a sample has left its tree, what was written for the same prompt still helps.

The last tokens of a running sample are looked up in the old rollouts and finished siblings of its
prompt (hashed n-grams, longest first, latest text first); what stood behind them there is offered
for the next tick. Verified like any draft, so it changes the time and never the tokens.

    texts   ... 7 + 3 = 10 ; 10 - 4 = 6 ; ...
    sample  ... 2 - 4 = -2 ; 10 - 4            -> offer "= 6 ; ..."
"""

from array import array
from collections.abc import Sequence

from reroll.engine.shares import Shares
from reroll.types import Draft

SIZES = (16, 8, 4, 2)
"""tokens that must match, longest first"""
_WIDTH = array("i").itemsize
_RATE, _WEIGHT = (0.9, 0.8, 0.7, 0.5), 20.0
"""assumed rates before anything is counted, and the offered tokens they stand for"""


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


def count_rates() -> Shares:
    """Shares of offered tokens that were accepted where those before them were, by match size."""
    return Shares(_RATE, _WEIGHT)
