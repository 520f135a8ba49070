"""How ragged rollouts become forwards: those that begin alike share a row, which holds their prefix
tree, so that each distinct prefix is computed once; the others have a row each.

A `Layout` is one forward. What the model says about nodes is gathered back to rollouts, so callers
see packed tokens and never nodes. In sorted order, texts with a long common prefix are neighbours;
the cheapest way to cut that order into rows is found by what rows cost. Groups of one prompt,
nested prefixes, and groups too long for one row (each piece then carries the trunk) are all cut so.

`K` rollouts of a layout, `R` rows, `N` width, `W` predictions asked for, `M` drawn nodes, `T`
packed tokens of the K rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from reroll.model.flops import CostModel
from reroll.model.ragged import pad
from reroll.model.tree import Tree, merge, pad_columns

Pair = tuple[Sequence[int], Sequence[int]]
"""(context, continuation) token ids; the context is not empty"""

LEAST_GAIN = 1.05
"""how many times cheaper a tree must count to be run: masks and gathering cost something too"""
FULL, SMALL = 0.9, 0.1
"""share of a forward that is not padding, at least; share of the token budget below which a forward
is small and takes what comes"""
MASK_ELEMENTS = 1 << 26
"""of one forward's mask at most: 64 MiB of booleans"""


@dataclass(frozen=True, slots=True)
class Layout:
    """One forward over some rollouts; index tensors int64."""

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

    def to(self, device: torch.device) -> "Layout":
        """The same with its tensors on a device."""
        tensors = {
            name: value.to(device)
            for name in self.__dataclass_fields__
            if isinstance(value := getattr(self, name), torch.Tensor)
        }
        return replace(self, **tensors)  # type: ignore[arg-type]

    def of_rollouts(self, predictions: torch.Tensor) -> torch.Tensor:
        """`[W, ...]` by prediction to `[T, ...]` by token."""
        if self.source is None or self.gather is None:
            return predictions
        return predictions[self.source[self.gather]]


def lay_out(
    pairs: Sequence[Pair], max_tokens: int | None = None, cost: CostModel | None = None
) -> list[Layout]:
    """Forwards over all these rollouts, each of them in one.

    max_tokens: of a forward, padding included; a longer row runs alone. None: no bound.
    cost: the model's, to choose rows by. None: a row for each rollout, whatever they share.
    """
    texts = [np.array([*context, *continuation]) for context, continuation in pairs]
    rows = [[k] for k in range(len(pairs))]
    bound = max_tokens or 1 << 62
    if cost is not None:
        rows = cut(texts, cost, min(bound, int(MASK_ELEMENTS**0.5)))
    layouts = []
    alone = sorted((row[0] for row in rows if len(row) == 1), key=lambda k: len(texts[k]))
    for pack in _packs([len(texts[k]) for k in alone], bound, None):
        layouts.append(_flat(pairs, alone[pack]))
    trees = [(row, merge([texts[k] for k in row])) for row in rows if len(row) > 1]
    trees.sort(key=lambda each: len(each[1]))
    for pack in _packs([len(tree) - 1 for _, tree in trees], bound, MASK_ELEMENTS):
        layouts.append(_shared(pairs, trees[pack]))
    return layouts


def cut(texts: Sequence[np.ndarray], cost: CostModel, widest: int) -> list[list[int]]:
    """Which texts share a row: the cheapest cut of the sorted order, by dynamic programming.

    widest: of a row that several share.
    """
    order, shared = neighbours(texts)
    lengths = [len(texts[k]) for k in order]
    alone = [row_cost(cost, n, shared=False) for n in lengths]
    least, start = [0.0], []
    for stop in range(1, len(order) + 1):
        begin = first = stop - 1
        best, width = least[first] + alone[first], lengths[first]
        while shared[first] > 0:
            # the row's first text stands whole, each other one adds what it does not share
            width += lengths[first - 1] - shared[first]
            first -= 1
            if width > widest:
                break
            whole = least[first] + row_cost(cost, width, shared=True)
            if whole < best:
                best, begin = whole, first
        least.append(best)
        start.append(begin)
    rows, stop = [], len(order)
    while stop:
        rows.append(order[start[stop - 1] : stop])
        stop = start[stop - 1]
    return rows[::-1]


def row_cost(cost: CostModel, width: int, *, shared: bool) -> float:
    """What a row of this width costs, in FLOPs of one forward.

    Counted, not timed: with measured prices, two runs of one seed would lay out other forwards,
    and float noise would make them other runs. A plain text attends to what stands before each
    token; a tree's mask is dense, so all pairs are computed.
    """
    if shared:
        return LEAST_GAIN * cost.flops(width, width * width)
    return cost.flops(width, width * (width + 1) / 2)


def neighbours(texts: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """(an order in which texts with a common prefix are neighbours, tokens that each of them shares
    with the one before it)."""
    keys = [text.tobytes() for text in texts]
    order = sorted(range(len(texts)), key=keys.__getitem__)
    shared = [0]
    for before, after in pairwise(order):
        size = min(len(texts[before]), len(texts[after]))
        differ = texts[before][:size] != texts[after][:size]
        shared.append(int(differ.argmax()) if differ.any() else size)
    return order, shared[: len(order)]


def _packs(widths: Sequence[int], max_tokens: int, mask_elements: int | None) -> list[slice]:
    """Runs of rows (the narrowest first) that go into a forward together: as many as may be, but
    where a forward is not small already, it takes no row that would leave much of it to padding."""
    packs, start, real = [], 0, 0
    for stop in range(1, len(widths) + 1):
        real += widths[stop - 1]
        if stop < len(widths):
            count, width = stop + 1 - start, widths[stop]
            fits = count * width <= max_tokens
            fits &= mask_elements is None or count * width**2 <= mask_elements
            full = real + width >= FULL * count * width
            if fits and (full or real < max_tokens * SMALL):
                continue
        packs.append(slice(start, stop))
        start, real = stop, 0
    return packs


def _flat(pairs: Sequence[Pair], which: list[int]) -> Layout:
    """A row for each."""
    rows = [[*context, *continuation] for context, continuation in (pairs[k] for k in which)]
    lengths = list(map(len, rows))
    starts = [len(pairs[k][0]) - 1 for k in which]
    tokens, wanted = pad(rows, starts, [n - 1 for n in lengths])
    target = tokens[:, 1:][wanted[:, :-1]]
    size, context = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    return Layout(which, tokens, wanted, target, None, None, None, size, context, size)


def _shared(pairs: Sequence[Pair], trees: Sequence[tuple[list[int], Tree]]) -> Layout:
    """A row for each tree."""
    rows, wanted, columns, source, target, gather = [], [], [], [], [], []
    predictions = drawn_so_far = flat = 0
    width = max(len(tree) for _, tree in trees) - 1
    for members, tree in trees:
        # there is no text before the first token: the root has no column, node i is column i - 1
        ends = [(len(pairs[k][0]), len(pairs[k][0]) + len(pairs[k][1])) for k in members]
        paths = [tree.node[i, a + 1 : b + 1] for i, (a, b) in enumerate(ends)]
        drawn, asked = np.zeros((2, len(tree)), bool)
        drawn[np.concatenate(paths)] = True
        nodes = drawn.nonzero()[0]
        asked[tree.parent[nodes]] = True
        rows.append(tree.tokens[1:])
        wanted.append(np.pad(asked[1:], (0, width + 1 - len(tree))))
        own = np.stack([np.arange(len(tree) - 1), tree.end[1:] - 1, tree.depth[1:] - 1])
        columns.append(pad_columns(own, width))
        source.append(predictions + (np.cumsum(asked) - 1)[tree.parent[nodes]])
        target.append(tree.tokens[nodes])
        gather += [drawn_so_far + (np.cumsum(drawn) - 1)[path] for path in paths]
        predictions += int(asked.sum())
        drawn_so_far += len(nodes)
        flat += sum(end for _, end in ends)
    joined = [torch.from_numpy(np.concatenate(parts)) for parts in (target, source, gather)]
    sizes = [len(row) for row in rows]
    tokens = pad([row.tolist() for row in rows], sizes, sizes).tokens
    return Layout(
        [k for members, _ in trees for k in members],
        tokens,
        torch.from_numpy(np.stack(wanted)),
        joined[0],
        torch.from_numpy(np.stack(columns, axis=1)),
        *joined[1:],
        nodes=sum(sizes),
        context=sum(int(tree.depth.sum()) for _, tree in trees),
        flat=flat,
    )


def in_order(
    layouts: Sequence[Layout], streams: Sequence[torch.Tensor], lengths: Sequence[int]
) -> torch.Tensor:
    """What the layouts' forwards said `[T, ...]`, in the order of the call that laid them out."""
    parts: list[torch.Tensor | None] = [None] * len(lengths)
    for layout, stream in zip(layouts, streams, strict=True):
        split = stream.split([lengths[k] for k in layout.which])
        for k, part in zip(layout.which, split, strict=True):
            parts[k] = part
    return torch.cat([part for part in parts if part is not None])
