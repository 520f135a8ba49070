"""Samples walk down draft trees, each by its own noise.

Where a sample stands, the model's law at that node and the sample's own noise give its next
token. If the node has that token for a child, the sample goes on there, else it leaves with the
right token in hand: a draft changes the time and never the tokens. Several nodes are drawn at
once along one text's way (`Tree.via`); what comes after the first surprise is thrown away.

`S` samples of all rows of a forward, `A` of them on their way, `C` nodes drawn at once.
"""

from collections.abc import Sequence

import numpy as np
import torch

from reroll.engine.follow import bin_of
from reroll.engine.runner import Runner, make_law, take
from reroll.engine.sequence import Sequence as Running
from reroll.engine.shares import Shares
from reroll.model.tree import Tree

STRETCH = 8
"""nodes drawn at once"""
_TOKENS = 1 << 32


class Forest:
    """Trees side by side, nodes numbered through; `at[r]` is the root of tree r."""

    def __init__(self, trees: Sequence[Tree]) -> None:
        sizes = np.array([len(tree) for tree in trees])
        self.at = np.concatenate([[0], sizes.cumsum()])[:-1]
        self.tokens = np.concatenate([tree.tokens for tree in trees])
        self.depth = np.concatenate([tree.depth for tree in trees])
        self.count = np.concatenate([tree.count for tree in trees])
        self.leaf = np.concatenate([tree.end == np.arange(len(tree)) + 1 for tree in trees])
        texts = np.array([len(tree.node) for tree in trees])
        self.first_text = np.concatenate([[0], texts.cumsum()])[:-1]
        self.via = np.concatenate(
            [tree.via + first for tree, first in zip(trees, self.first_text, strict=True)]
        )
        width = max(tree.node.shape[1] for tree in trees) + STRETCH + 1
        self.paths = np.full((texts.sum(), width), -1)
        """node of each text at each depth"""
        self.logit = np.full(sizes.sum(), -1)
        """row of the present forward's logits after each node; -1: not in it"""
        self.state = np.full(sizes.sum(), -1)
        """row of the remembered hidden states after each node; -1: none is"""
        self.column = np.full(sizes.sum(), -1)
        """column of each node in its row's keys and values"""
        parents = []
        for tree, first, root in zip(trees, self.first_text, self.at, strict=True):
            block = self.paths[first : first + len(tree.node), : tree.node.shape[1]]
            block[:] = np.where(tree.node >= 0, tree.node + root, -1)
            parents.append(np.where(tree.parent >= 0, tree.parent + root, -1))
        keys = np.concatenate(parents) * _TOKENS + self.tokens
        self._order = keys.argsort()
        self._keys = keys[self._order]

    def child(self, node: np.ndarray, token: np.ndarray) -> np.ndarray:
        """The child of each node with that token, or -1."""
        key = node * _TOKENS + token
        place = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        return np.where(self._keys[place] == key, self._order[place], -1)

    def path(self, node: int, start: int, stop: int) -> np.ndarray:
        """Nodes at depths start, ..., stop - 1 on the way to `node`."""
        return self.paths[self.via[node], start:stop]


class Walk:
    """Where the samples of some rows stand in their trees."""

    def __init__(
        self,
        runner: Runner,
        forest: Forest,
        samples: Sequence[tuple[int, Running]],
        version: int,
        follow: Shares,
    ) -> None:
        self.runner, self.forest, self.version, self.follow = runner, forest, version, follow
        self.samples = [sample for _, sample in samples]
        self.row = np.array([row for row, _ in samples])
        self.at = forest.at[self.row]
        """`[S]` node each stands at; for one that left the tree, the node it left from"""
        self.walking = np.ones(len(samples), bool)
        self.begin = np.array([len(s.completion.token_ids) for s in self.samples])
        self.law = make_law([s.request for s in self.samples], runner.device)
        self._states: list[torch.Tensor] = []

    def remember(self, states: torch.Tensor) -> None:
        """Hidden states `[N, H]` of the present forward, in the order of its logits."""
        forest, before = self.forest, sum(map(len, self._states))
        inside = forest.logit >= 0
        forest.state[inside] = before + forest.logit[inside]
        self._states.append(states)

    def states(self, nodes: np.ndarray) -> torch.Tensor | None:
        """Of these nodes, remembered; None: no states were."""
        if not self._states:
            return None
        if len(self._states) > 1:
            self._states = [torch.cat(self._states)]
        return self._states[0][torch.from_numpy(self.forest.state[nodes]).to(self.runner.device)]

    def go(self, logits: torch.Tensor) -> None:
        """Walk as far as `logits` (rows by `forest.logit`) and the trees go."""
        while True:
            live = np.flatnonzero(self.walking & (self.forest.logit[self.at] >= 0))
            if not len(live):
                return
            self._stretch(live, logits)

    def draw(
        self, live: np.ndarray, index: np.ndarray, ready: np.ndarray, logits: torch.Tensor
    ) -> list[np.ndarray]:
        """The samplers' own choices `[A, C]` after nodes with these logits, their log-probs, and
        entropies (zeros where nobody wants them).

        live: samples; index: rows of logits `[A, C]` at depths from where each stands; ready:
        which of them are wanted.
        """
        which, step = ready.nonzero()
        position = (self.begin[live] + self.forest.depth[self.at[live]])[which] + step
        device = self.runner.device
        drawn = self.runner.draw(
            logits[torch.from_numpy(index[ready]).to(device)],
            torch.from_numpy(position).to(device),
            take(self.law, torch.from_numpy(live[which]).to(device)),
        )
        streams = [np.zeros(ready.shape, np.int64 if i == 0 else float) for i in range(4)]
        for stream, values in zip(streams, drawn, strict=True):
            if values is not None:
                stream[ready] = values.cpu().numpy()
        return streams

    def _stretch(self, live: np.ndarray, logits: torch.Tensor) -> None:
        forest, at = self.forest, self.at[live]
        steps = forest.depth[at][:, None] + np.arange(STRETCH + 1)
        ahead = forest.paths[forest.via[at][:, None], steps]
        index = np.where(ahead[:, :-1] >= 0, forest.logit[ahead[:, :-1]], -1)
        ready = np.logical_and.accumulate(index >= 0, axis=1)
        tokens, *others = self.draw(live, index, ready, logits)
        guess = np.where(ahead[:, 1:] >= 0, forest.tokens[ahead[:, 1:]], -1)
        agree = np.logical_and.accumulate((tokens == guess) & ready, axis=1)
        kept, size = agree.sum(1), ready.sum(1)
        last = np.minimum(kept, size - 1)
        rows = np.arange(len(live))
        child = np.where(
            kept == size,
            ahead[rows, size],
            forest.child(ahead[rows, last], tokens[rows, last]),
        )
        left = ahead[rows, last]
        streams = [stream.tolist() for stream in (tokens, *others)]
        stopped = np.zeros(len(live), bool)
        for i, sample in enumerate(self.samples[j] for j in live):
            drawn = last[i] + 1
            on_tree = int(last[i] + (child[i] >= 0))
            sample.take_walked(*(stream[i][:drawn] for stream in streams), self.version, on_tree)
            stopped[i] = sample.finished
        self._observe(ahead, last, child, stopped)
        stays = (child >= 0) & ~stopped
        self.walking[live] = stays
        self.at[live] = np.where(stays, child, left)

    def _observe(
        self, ahead: np.ndarray, last: np.ndarray, child: np.ndarray, stopped: np.ndarray
    ) -> None:
        """Count who went on at which nodes; an ending or a leaf says nothing about following."""
        step = np.arange(STRETCH)
        seen = (step <= last[:, None] - stopped[:, None]) & ~self.forest.leaf[ahead[:, :-1]]
        stayed = (step < last[:, None]) | (child >= 0)[:, None]
        self.follow.add(bin_of(self.forest.count[ahead[:, :-1][seen]]), 1, stayed[seen])

    def waiting(self) -> np.ndarray:
        """Samples that stand at a node which no forward has reached yet."""
        return np.flatnonzero(self.walking & (self.forest.column[self.at] < 0))
