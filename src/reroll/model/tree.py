"""Prefix trees: several continuations of one text, merged so that each distinct prefix stands once.

The nodes of a tree are numbered in preorder: a node comes before its descendants, and these are
the numbers up to its `end`. So "does j see i?" is `i <= j < end[i]`, and a forward over a whole
tree needs one comparison for its attention mask and one array for its positions (depths); the
same formula with `end` at infinity is a plain text's causal mask. Everything here is array code.

`K` texts, `N` nodes (node 0 is the root: all that stands before the texts), `D` longest text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

EVERYTHING = 2**31 - 1
"""`end` of a token that all later ones see: a prompt's"""


@dataclass(frozen=True, slots=True)
class Tree:
    """Merged texts. Arrays int64."""

    tokens: np.ndarray
    """`[N]` token of each node; -1 at the root"""
    depth: np.ndarray
    """`[N]` tokens from the root to the node, its own included"""
    parent: np.ndarray
    """`[N]`; -1 at the root"""
    end: np.ndarray
    """`[N]` first number after the node's descendants"""
    count: np.ndarray
    """`[N]` texts that pass through the node"""
    via: np.ndarray
    """`[N]` a text that passes through the node: the middle one in order, so mostly one that goes
    on to a child of many"""
    node: np.ndarray
    """`[K, D + 1]` node of each text after so many tokens, -1 beyond its end"""

    def __len__(self) -> int:
        return len(self.tokens)


def merge(texts: Sequence[Sequence[int] | np.ndarray]) -> Tree:
    """The prefix tree of `texts` (any number, empty ones and repeated ones included)."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    width = int(lengths.max(initial=0))
    padded = np.full((max(len(texts), 1), width), -1, np.int64)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    # sorted, texts that share a prefix are neighbours, and each adds what it does not share
    # with the one before
    rows = [row.tobytes() for row in padded]
    order = np.array(sorted(range(len(rows)), key=rows.__getitem__))
    padded = padded[order]
    same = (padded[1:] == padded[:-1]) & (padded[1:] >= 0)
    shared = np.logical_and.accumulate(same, axis=1).sum(1)
    return _number(padded, np.concatenate([[0], shared]), order)


def _number(padded: np.ndarray, shared: np.ndarray, order: np.ndarray) -> Tree:
    """Number the nodes row by row, which is preorder; text k begins like k - 1 for `shared[k]`."""
    texts, width = padded.shape
    step = np.arange(width)
    new = (step >= shared[:, None]) & (padded >= 0)
    size = int(new.sum()) + 1
    node = np.zeros((texts, width + 1), np.int64)
    node[:, 1:][new] = np.arange(1, size)
    # a shared node is the last one made at its depth
    node[:, 1:] = np.where(padded >= 0, np.maximum.accumulate(node[:, 1:], axis=0), -1)
    rows, depths = new.nonzero()
    # a node's texts are its own and the following ones that share more than its depth with it
    stops = np.full((texts + 1, width), texts)
    breaks = np.where(shared[:, None] <= step, np.arange(texts)[:, None], texts)
    stops[:texts] = np.minimum.accumulate(breaks[::-1], axis=0)[::-1]
    stop = stops[rows + 1, depths]
    first = 1 + np.concatenate([[0], np.cumsum(new.sum(1))])
    root = np.zeros(1, np.int64)
    return Tree(
        tokens=np.concatenate([root - 1, padded[new]]),
        depth=np.concatenate([root, depths + 1]),
        parent=np.concatenate([root - 1, node[rows, depths]]),
        end=np.concatenate([root + size, first[stop]]),
        count=np.concatenate([root + texts, stop - rows]),
        via=order[np.concatenate([root + texts // 2, (rows + stop) // 2])],
        node=node[np.argsort(order)],
    )


def tree_mask(order: torch.Tensor, end: torch.Tensor, queries: int) -> torch.Tensor:
    """Which columns the last `queries` columns of each row see, bool `[R, queries, C]`.

    order, end: `[R, C]` preorder number of each column and the first number it is hidden from; a
    pad has an order of its own, so that it sees itself (a softmax over nothing is nan) and no
    other column does.
    """
    return (order[:, None, :] <= order[:, -queries:, None]) & (
        order[:, -queries:, None] < end[:, None, :]
    )


def pad_columns(columns: np.ndarray, width: int) -> np.ndarray:
    """Order, end and position of a row's columns, `[3, C]`, padded to `[3, width]`: a pad is seen
    by pads alone."""
    pads = np.array([[EVERYTHING], [EVERYTHING + 1], [0]])
    return np.concatenate([columns, np.repeat(pads, width - columns.shape[1], axis=1)], axis=1)
