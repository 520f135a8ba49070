"""How long rollouts are, when some were stopped before their end."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from reroll.types import Finish, Rollout

BATCHES = 8
"""batches whose lengths are remembered"""
FADE = 0.8
"""what a batch's mean length counts one batch later"""


def represents(rollout: Rollout) -> float:
    """How many started rollouts one stands for that came to its end: itself, and those like it
    that were stopped where it was spared. 1 / survival of every look at it on its way."""
    return math.prod(1 / look.survival for look in rollout.looks if not look.ended and look.kept)


class Lengths:
    """The law of completion lengths over the last batches, in tokens.

    What was stopped has no length. It is censored where its chances were poor, so not at random,
    and Kaplan and Meier's estimate would be wrong; but the chance to be spared is known, and those
    spared stand for the others (Horvitz and Thompson 1952). limit: of a completion's tokens, the
    mean before anything is known.
    """

    def __init__(self, limit: int) -> None:
        self.mean = float(limit)
        """running mean over batches"""
        self._batches: list[list[tuple[int, float]]] = []
        """(length, how many it stands for) of what ended, the latest batches"""
        self._longer: np.ndarray | None = None
        """`[3, N]` lengths rising; from each on, how many there are, and their tokens"""

    @property
    def known(self) -> bool:
        """Whether anything has ended yet."""
        return bool(self._batches)

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """A batch of rollouts, those that were stopped among them."""
        ended = [
            (r.drawn, represents(r))
            for r in rollouts
            if r.completion.finish is not Finish.ABORT and (r.looks == [] or _counts(r))
        ]
        if not ended:
            return
        mean = sum(n * w for n, w in ended) / sum(w for _, w in ended)
        first = not self._batches
        self.mean = mean if first else FADE * self.mean + (1 - FADE) * mean
        self._batches = [*self._batches, ended][-BATCHES:]
        self._longer = None

    def left(self, tokens: int) -> float:
        """Tokens still to come, as expected after so many; 0 where nothing was longer."""
        if self._longer is None:
            rows = sorted(row for batch in self._batches for row in batch)
            lengths, counts = np.array(rows, float).reshape(-1, 2).T
            sums = (x[::-1].cumsum()[::-1] for x in (counts, counts * lengths))
            self._longer = np.stack([lengths, *sums])
        lengths, counts, totals = self._longer
        first = int(np.searchsorted(lengths, tokens, side="right"))
        return float(totals[first] / counts[first] - tokens) if first < len(lengths) else 0.0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"mean": self.mean, "batches": [[list(x) for x in b] for b in self._batches]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.mean = state["mean"]
        self._batches = [[(int(n), float(w)) for n, w in batch] for batch in state["batches"]]
        self._longer = None


def _counts(rollout: Rollout) -> bool:
    """Whether it is known as itself: it was kept, or had ended before it was judged. (One that was
    dropped though it had ended since its probe is stood for by those that were kept.)"""
    last = rollout.looks[-1]
    return last.kept or last.ended
