"""How often samples follow a draft tree: counted while walking, used to choose what to verify.

At a node that `count` texts pass through, a new sample goes on to one of the node's children or
leaves the tree. The rate of going on is counted by `count` in powers of two; which child is
guessed from the texts. A node is worth verifying when the samples expected to reach it save more
decoding than the node costs.
"""

from typing import Any

import numpy as np

from reroll.model.tree import Tree

_BINS = 7
_STAY, _WEIGHT = 0.97, 50.0
"""assumed rate before anything is counted, and the visits it stands for"""
_DECAY = 0.8
"""of the counts, at each change of the weights"""


class Follow:
    """Counts of visits to nodes and of those that went on in the tree, by bins of `count`."""

    def __init__(self) -> None:
        self.visits = np.full(_BINS, _WEIGHT)
        self.stays = np.full(_BINS, _WEIGHT * _STAY)

    def rate(self, count: np.ndarray) -> np.ndarray:
        """Chance that a sample at nodes of these counts goes on in the tree."""
        return (self.stays / self.visits)[_bin(count)]

    def observe(self, count: np.ndarray, stayed: np.ndarray) -> None:
        """Samples stood at nodes of these counts, and went on or left (stops are neither)."""
        bins = _bin(count)
        self.visits += np.bincount(bins, minlength=_BINS)
        self.stays += np.bincount(bins, weights=stayed, minlength=_BINS)

    def decay(self) -> None:
        """The policy has changed: let what was counted fade, but for the weight of a few."""
        factor = np.maximum(_DECAY, np.minimum(1.0, _WEIGHT / self.visits))
        self.visits *= factor
        self.stays *= factor

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"visits": self.visits.tolist(), "stays": self.stays.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.visits, self.stays = np.array(state["visits"]), np.array(state["stays"])


def _bin(count: np.ndarray) -> np.ndarray:
    """1, 2, 3-4, 5-8, ... texts."""
    return np.minimum(np.ceil(np.log2(np.maximum(count, 1))).astype(np.int64), _BINS - 1)


def expected_visits(tree: Tree, follow: Follow, standing: np.ndarray, depth: int) -> np.ndarray:
    """Samples expected at each node `[N]`, of those that stand at nodes of one depth.

    standing: `[N]` samples there now. Nodes above `depth` get 0.
    """
    node = tree.node[:, depth:]
    there = node >= 0
    count = np.where(there, tree.count[node], 1)
    share = follow.rate(count[:, :-1]) * count[:, 1:] / count[:, :-1]
    reach = np.cumprod(np.concatenate([standing[node[:, :1]], share], axis=1), axis=1)
    expected = np.zeros(len(tree))
    expected[node[there]] = reach[there]
    return expected
