"""Shares counted while the engine runs: how often samples go on in a tree, how often offers hold.

What is verified is chosen by them, and they change no token. They are part of a checkpoint, so that
a resumed run chooses as the run that was not interrupted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

_DECAY = 0.8
"""of the counts, at each change of the weights"""


class Shares:
    """For each of `K` kinds of trial the share that succeeded, `hits / trials`.

    prior: `[K]` shares assumed before anything is counted; weight: the trials these stand for.
    """

    def __init__(self, prior: Sequence[float], weight: float) -> None:
        self.trials = np.full(len(prior), weight)
        self.hits = np.array(prior) * weight
        self._weight = weight

    def of(self, kind: np.ndarray | int) -> np.ndarray:
        """Shares of these kinds."""
        return (self.hits / self.trials)[kind]

    def add(self, kind: np.ndarray | int, trials: np.ndarray | int, hits: np.ndarray | int) -> None:
        """Count trials of these kinds, which may repeat, and how many of them succeeded."""
        np.add.at(self.trials, kind, trials)
        np.add.at(self.hits, kind, hits)

    def decay(self) -> None:
        """The policy has changed: let what was counted fade, but for the weight of a few."""
        factor = np.maximum(_DECAY, np.minimum(1.0, self._weight / self.trials))
        self.trials *= factor
        self.hits *= factor

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"trials": self.trials.tolist(), "hits": self.hits.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.trials, self.hits = np.array(state["trials"]), np.array(state["hits"])
