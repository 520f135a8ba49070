"""How ragged rollouts become forwards: those that begin alike share a row, which holds their prefix
tree, so that each distinct prefix is computed once; the others have a row each.

A `Layout` is one forward. A tree's mask is dense, so wide trees are dear in attention; where that
counts, the row holds only what several texts pass through, and the rest of each text is a row of
its own behind the keys and values of its path (`Leaves`). Which rollouts share a row, which rows
have leaves and which rows a forward: `model/cut.py` chooses. What the model says about nodes is
gathered back to rollouts, so callers see packed tokens and never nodes.

`K` rollouts of a layout, `R` rows, `N` width, `P` longest path before leaves, `W` predictions asked
for, `M` drawn nodes, `T` packed tokens of the K rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from reroll.model.cut import KEPT, SMALL_LEAVES, Row, cut, packs, packs_of_leafy
from reroll.model.flops import CostModel
from reroll.model.ragged import pad
from reroll.model.tree import Tree, merge, pad_columns

Pair = tuple[Sequence[int], Sequence[int]]
"""(context, continuation) token ids; the context is not empty"""

MASK_ELEMENTS = 1 << 26
"""of one forward's mask at most: 64 MiB of booleans, 256 of float32 numbers"""


@dataclass(frozen=True, slots=True)
class Leaves:
    """Rows that stand behind their paths in the trees of a layout, run after them."""

    tokens: torch.Tensor
    """`[R, N]`, pads 0"""
    wanted: torch.Tensor
    """bool `[R, N]`"""
    past: torch.Tensor
    """`[R, P]` cell of each token before a row, in the layout's tokens flattened; -1: none"""
    position: torch.Tensor
    """`[R, N]`; pads have their row's last one"""

    def to(self, device: torch.device) -> "Leaves":
        """The same on a device."""
        parts = (self.tokens, self.wanted, self.past, self.position)
        return Leaves(*(part.to(device) for part in parts))


@dataclass(frozen=True, slots=True)
class Layout:
    """One forward over some rollouts, and those behind it; index tensors int64."""

    which: list[int]
    """`[K]` the rollouts, numbered as in the call, in the order of the packed tokens"""
    tokens: torch.Tensor
    """`[R, N]`, pads 0"""
    wanted: torch.Tensor
    """bool `[R, N]` where a prediction is asked for"""
    target: torch.Tensor
    """`[M]` token of each drawn node"""
    columns: torch.Tensor | None
    """`[3, R, N]` order, end and position of each column (`model/tree.py`); None: plain texts,
    and then W, M and T are the same"""
    source: torch.Tensor | None
    """`[M]` the prediction that each drawn node was drawn from"""
    gather: torch.Tensor | None
    """`[T]` the drawn node of each token"""
    nodes: int
    """tokens that are run, pads left out"""
    context: int
    """tokens that these attend to, in all"""
    flat: int
    """tokens of the rollouts, each counted alone"""
    leaves: tuple[Leaves, ...] = ()
    """their predictions follow those of the trees"""
    flex: bool = False
    """whether the trees attend through flex attention"""

    def padded(self) -> int:
        """Tokens of all its forwards, padding included."""
        return sum(part.tokens.numel() for part in (self, *self.leaves))

    def to(self, device: torch.device) -> "Layout":
        """The same with its tensors on a device."""
        tensors = {
            name: value.to(device)
            for name in self.__dataclass_fields__
            if isinstance(value := getattr(self, name), torch.Tensor)
        }
        leaves = tuple(part.to(device) for part in self.leaves)
        return replace(self, leaves=leaves, **tensors)  # type: ignore[arg-type]

    def of_rollouts(self, predictions: torch.Tensor) -> torch.Tensor:
        """`[W, ...]` by prediction to `[T, ...]` by token."""
        if self.source is None or self.gather is None:
            return predictions
        # its gradient adds up in one order; that of indexing does not, on several threads
        return predictions.index_select(0, self.source[self.gather])


def lay_out(
    pairs: Sequence[Pair],
    max_tokens: int | None = None,
    cost: CostModel | None = None,
    behind: bool = True,
) -> list[Layout]:
    """Forwards over all these rollouts, each of them in one.

    max_tokens: of a forward (leaves included), padding included; what is longer runs alone. None:
    no bound. cost: the model's, to choose rows by. None: a row for each rollout, whatever they
    share. behind: whether there may be leaves (gradient checkpointing drops keys and values).
    """
    texts = [np.array([*context, *continuation]) for context, continuation in pairs]
    rows = [Row([k], False) for k in range(len(pairs))]
    bound, widest = max_tokens or 1 << 62, int(MASK_ELEMENTS**0.5)
    if cost is not None:
        rows = cut(texts, cost, widest, bound, behind)
    layouts = []
    alone = sorted((k for (k, *more), _ in rows if not more), key=lambda k: len(texts[k]))
    for pack in packs([len(texts[k]) for k in alone], bound, None):
        layouts.append(_flat(pairs, alone[pack]))
    trees = [(merge([texts[k] for k in row.texts]), row) for row in rows if len(row.texts) > 1]
    whole = [(row.texts, tree) for tree, row in trees if not row.leafy]
    split = [(row.texts, tree) for tree, row in trees if row.leafy]
    whole.sort(key=lambda each: len(each[1]))
    for pack in packs([len(tree) - 1 for _, tree in whole], bound, MASK_ELEMENTS):
        layouts.append(_shared(pairs, whole[pack], False, bound, cost))
    split.sort(key=lambda each: int((each[1].count >= 2).sum()))
    for pack in packs_of_leafy([_kept(tree) for _, tree in split], bound):
        layouts += _within(pairs, split[pack], bound, cost)
    return layouts


def one_tree(pairs: Sequence[Pair], leafy: bool, flex: bool = False) -> Layout:
    """All in one row, whatever that costs; leafy: but for what each has of its own. flex: through
    flex attention, however narrow it is."""
    tree = merge([[*context, *continuation] for context, continuation in pairs])
    layout = _shared(pairs, [(list(range(len(pairs))), tree)], leafy, 1 << 62, None)
    return replace(layout, flex=flex)


def _kept(tree: Tree) -> int:
    """Tokens of a tree with leaves, and what is brought to these in tokens' worth of memory."""
    brought = (tree.count[tree.node[:, 1:]] >= 2) & (tree.node[:, 1:] >= 0)
    return len(tree) - 1 + int(brought.sum()) // KEPT


def _flat(pairs: Sequence[Pair], which: list[int]) -> Layout:
    """A row for each."""
    rows = [[*context, *continuation] for context, continuation in (pairs[k] for k in which)]
    lengths = list(map(len, rows))
    starts = [len(pairs[k][0]) - 1 for k in which]
    tokens, wanted = pad(rows, starts, [n - 1 for n in lengths])
    target = tokens[:, 1:][wanted[:, :-1]]
    size, context = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    return Layout(which, tokens, wanted, target, None, None, None, size, context, size)


def _within(
    pairs: Sequence[Pair],
    trees: Sequence[tuple[list[int], Tree]],
    max_tokens: int,
    cost: CostModel | None,
) -> list[Layout]:
    """Trees with leaves, in halves where padding or their masks would make them too large."""
    layout = _shared(pairs, trees, True, max_tokens, cost)
    mask = layout.tokens.numel() * layout.tokens.shape[1]  # those of leaves are bounded
    if len(trees) == 1 or (layout.padded() <= max_tokens and mask <= MASK_ELEMENTS):
        return [layout]
    half = len(trees) // 2
    halves = (trees[:half], trees[half:])
    return [layout for part in halves for layout in _within(pairs, part, max_tokens, cost)]


def _shared(
    pairs: Sequence[Pair],
    trees: Sequence[tuple[list[int], Tree]],
    leafy: bool,
    max_tokens: int,
    cost: CostModel | None,
) -> Layout:
    """A row for each tree; leafy: of what several texts pass through, leaves for the rest."""
    rows, columns, cells = [], [], []
    # there is no text before the first token: the root has no column
    inside = [(tree.count >= 2) | (not leafy) for _, tree in trees]
    width = max(int(kept[1:].sum()) for kept in inside)
    for index, ((_, tree), kept) in enumerate(zip(trees, inside, strict=True)):
        nodes = np.flatnonzero(kept[1:]) + 1
        rank = np.concatenate([[0, 0], np.cumsum(kept[1:])])  # kept nodes before each number
        rows.append(tree.tokens[nodes])
        own = np.stack([np.arange(len(nodes)), rank[tree.end[nodes]], tree.depth[nodes] - 1])
        columns.append(pad_columns(own, width))
        cell = np.full(len(tree), -1)
        cell[nodes] = index * width + np.arange(len(nodes))
        cells.append(cell)
    tokens = _tokens(rows)
    leaves = _leaves(trees, cells, tokens.numel(), max_tokens) if leafy else []
    asked = np.zeros(tokens.numel() + sum(part.numel() for part, *_ in leaves), bool)
    before, target, gather, drawn_so_far, flat = [], [], [], 0, 0
    for (members, tree), cell in zip(trees, cells, strict=True):
        ends = [(len(pairs[k][0]), len(pairs[k][0]) + len(pairs[k][1])) for k in members]
        paths = [tree.node[i, a + 1 : b + 1] for i, (a, b) in enumerate(ends)]
        drawn = np.zeros(len(tree), bool)
        drawn[np.concatenate(paths)] = True
        nodes = drawn.nonzero()[0]
        before.append(cell[tree.parent[nodes]])
        target.append(tree.tokens[nodes])
        gather += [drawn_so_far + (np.cumsum(drawn) - 1)[path] for path in paths]
        drawn_so_far += len(nodes)
        flat += sum(end for _, end in ends)
    asked[np.concatenate(before)] = True
    source = (np.cumsum(asked) - 1)[np.concatenate(before)]
    bounds = np.cumsum([0, tokens.numel(), *(part.numel() for part, *_ in leaves)])
    wanted = [torch.from_numpy(asked[a:b]) for a, b in pairwise(bounds)]
    return Layout(
        [k for members, _ in trees for k in members],
        tokens,
        wanted[0].view(tokens.shape),
        torch.from_numpy(np.concatenate(target)),
        torch.from_numpy(np.stack(columns, axis=1)),
        torch.from_numpy(source),
        torch.from_numpy(np.concatenate(gather)),
        nodes=sum(len(tree) - 1 for _, tree in trees),
        context=sum(int(tree.depth.sum()) for _, tree in trees),
        flat=flat,
        leaves=tuple(
            Leaves(part, mask.view(part.shape), past, position)
            for (part, past, position), mask in zip(leaves, wanted[1:], strict=True)
        ),
        flex=cost is not None and cost.flexes(width),
    )


def _leaves(
    trees: Sequence[tuple[list[int], Tree]],
    cells: Sequence[np.ndarray],
    first_cell: int,
    max_tokens: int,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(tokens, past, position) of the leaves' forwards; `cells` learn where their nodes are, from
    `first_cell` on."""
    found = []
    for (members, tree), cell in zip(trees, cells, strict=True):
        for text in range(len(members)):
            path = tree.node[text, 1:]
            path = path[path >= 0]
            alone = tree.count[path] == 1
            if alone.any():
                found.append((path[alone], cell[path[~alone]], tree, cell))
    found.sort(key=lambda leaf: (len(leaf[0]), len(leaf[1])))
    made = []
    lengths, befores = [len(nodes) for nodes, *_ in found], [len(path) for _, path, *_ in found]
    for pack in packs(lengths, max_tokens, MASK_ELEMENTS, SMALL_LEAVES, befores):
        some = found[pack]
        tokens = _tokens([tree.tokens[nodes] for nodes, _, tree, _ in some])
        last = np.minimum(np.arange(tokens.shape[1]), np.array(lengths[pack])[:, None] - 1)
        position = np.array(befores[pack])[:, None] + last
        past = np.full((len(some), max(befores[pack])), -1)
        for row, (nodes, before, _, cell) in enumerate(some):
            past[row, : len(before)] = before
            cell[nodes] = first_cell + row * tokens.shape[1] + np.arange(len(nodes))
        first_cell += tokens.numel()
        made.append((tokens, torch.from_numpy(past), torch.from_numpy(position)))
    return made


def _tokens(rows: Sequence[np.ndarray]) -> torch.Tensor:
    sizes = list(map(len, rows))
    return pad(rows, sizes, sizes).tokens


def in_order(
    layouts: Sequence[Layout],
    said: Sequence[Sequence[torch.Tensor | None]],
    lengths: Sequence[int],
) -> list[torch.Tensor | None]:
    """What the layouts' forwards said, stream by stream `[T, ...]`, in the order of the call that
    laid them out. said: the streams of each layout; None where there is none, then of all.

    lengths: tokens of each rollout.
    """
    place = sorted((k, i, j) for i, x in enumerate(layouts) for j, k in enumerate(x.which))
    streams: list[torch.Tensor | None] = []
    for stream in zip(*said, strict=True):
        split = [
            part.split([lengths[k] for k in layout.which])
            for layout, part in zip(layouts, stream, strict=True)
            if part is not None
        ]
        streams.append(torch.cat([split[i][j] for _, i, j in place]) if split else None)
    return streams
