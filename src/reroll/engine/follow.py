"""How often samples follow a draft tree: counted while walking, used to choose what to verify.

At a node that `count` texts pass through, a new sample goes on to one of the node's children or
leaves the tree. The rate of going on is counted by `count` in powers of two; which child is
guessed from the texts. A node is worth verifying when the samples expected to reach it save more
decoding than the node costs.
"""

import numpy as np

from reroll.engine.shares import Shares
from reroll.model.tree import Tree

_BINS = 7
_STAY, _WEIGHT = 0.97, 50.0
"""assumed rate before anything is counted, and the visits it stands for"""


def count_follow() -> Shares:
    """Shares of samples at a node that went on in the tree, by `bin_of` its count of texts."""
    return Shares([_STAY] * _BINS, _WEIGHT)


def bin_of(count: np.ndarray) -> np.ndarray:
    """1, 2, 3-4, 5-8, ... texts."""
    return np.minimum(np.ceil(np.log2(np.maximum(count, 1))).astype(np.int64), _BINS - 1)


def expected_visits(tree: Tree, follow: Shares, standing: np.ndarray, depth: int) -> np.ndarray:
    """Samples expected at each node `[N]`, of those that stand at nodes of one depth.

    standing: `[N]` samples there now. Nodes above `depth` get 0.
    """
    node = tree.node[:, depth:]
    there = node >= 0
    count = np.where(there, tree.count[node], 1)
    share = follow.of(bin_of(count[:, :-1])) * count[:, 1:] / count[:, :-1]
    reach = np.cumprod(np.concatenate([standing[node[:, :1]], share], axis=1), axis=1)
    expected = np.zeros(len(tree))
    expected[node[there]] = reach[there]
    return expected
