"""Which rollouts share a row, and which rows a forward.

In sorted order, texts with a long common prefix are neighbours; the cheapest way to cut that order
into rows is found by what rows cost. Groups of one prompt, nested prefixes, and groups too long for
one row (each piece then carries the trunk) are all cut so.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from reroll.model.attention import BLOCK
from reroll.model.flops import CostModel
from reroll.model.tree import Tree

LEAST_GAIN = 1.05
"""how many times cheaper a tree must count to be run: masks and gathering cost something too"""
LEAF, COPY = 20, 24
"""what a leaf costs besides its tokens, in tokens run, and for each token before it, whose keys and
values have to be brought, in tokens attended to; fitted on a CPU (docs/log.md)"""

FULL, SMALL, SMALL_LEAVES = 0.9, 0.1, 0.03
"""share of a forward that is not padding, at least; share of the token budget below which a forward
is small and takes what comes, and one of leaves"""


def cut(
    texts: Sequence[np.ndarray], cost: CostModel, widest: int, most: int, behind: bool = True
) -> list[list[int]]:
    """Which texts share a row: the cheapest cut of the sorted order, by dynamic programming.

    widest: of a row under a dense mask. most: tokens of a row that several share, its leaves
    included. behind: whether it may have any.

    Costs are FLOPs of one forward, counted, not timed: with measured prices, two runs of one seed
    would lay out other forwards, and float noise would make them other runs. A plain text attends
    to what stands before each token; under a tree's mask whole blocks are computed
    (`model/attention.py`; all pairs, where a model or device does not take them).
    """
    order, shared = neighbours(texts)
    lengths = [len(texts[k]) for k in order]
    # what could save no more than a tree must gain ends the search: prompts begin alike, too
    for k, size in enumerate(map(min, lengths[1:], lengths), 1):
        shared[k] *= shared[k] > (LEAST_GAIN - 1) * size
    alone = [cost.flops(n, n * (n + 1) / 2) for n in lengths]
    least, start = [0.0], []
    for stop in range(1, len(order) + 1):
        begin = first = stop - 1
        best, width = least[first] + alone[first], lengths[first]
        # of the row: nodes that several texts pass through, its leaves, and what its first text
        # shares with the next
        trunk, leaves, context, common = 0, 0, 0.0, 0
        while shared[first] > 0:
            # the row's first text stands whole, each other one adds what it does not share
            length, now = lengths[first], shared[first]
            width += lengths[first - 1] - now
            if width > most:
                break
            trunk += max(0, now - common)
            if common:  # it was a leaf already
                leaves -= length > common
                context -= leaf_context(length - common, common)
            for rest, before in (
                (length - max(now, common), max(now, common)),
                (lengths[first - 1] - now, now),
            ):
                leaves += rest > 0
                context += leaf_context(rest, before)
            common, first = now, first - 1
            price = dense_cost(cost, width, widest)
            if behind and trunk <= widest:
                price = min(price, leafy_cost(cost, width, trunk, leaves, context))
            whole = least[first] + price
            if whole < best:
                best, begin = whole, first
        least.append(best)
        start.append(begin)
    rows, stop = [], len(order)
    while stop:
        rows.append(order[start[stop - 1] : stop])
        stop = start[stop - 1]
    return rows[::-1]


def dense_cost(cost: CostModel, width: int, widest: int) -> float:
    """FLOPs of a row under a dense mask, as attention in blocks computes it."""
    return LEAST_GAIN * cost.flops(width, attended(width)) if width <= widest else float("inf")


def attended(width: int) -> float:
    """Tokens attended to among so many columns under a mask: in blocks, but what comes later."""
    return width * (width + min(width, BLOCK)) / 2


def leaf_context(length: int, before: int) -> float:
    """What a leaf costs in tokens attended to; what stands before it has to be brought, too."""
    return attended(length) + (length + COPY) * before if length > 0 else 0


def leafy_cost(cost: CostModel, width: int, trunk: int, leaves: int, context: float) -> float:
    """FLOPs of a row of `trunk` nodes with its leaves; width: nodes of both."""
    return LEAST_GAIN * cost.flops(width + LEAF * leaves, attended(trunk) + context)


def leaves_pay(cost: CostModel, tree: Tree, widest: int) -> bool:
    """Whether a tree is cheaper with leaves than under a dense mask."""
    width = len(tree) - 1
    trunk = int((tree.count[1:] >= 2).sum())
    there = tree.node[:, 1:] >= 0
    before = (there & (tree.count[tree.node[:, 1:]] >= 2)).sum(1)
    rests = (there.sum(1) - before).tolist()
    context = sum(leaf_context(n, m) for n, m in zip(rests, before.tolist(), strict=True))
    split = leafy_cost(cost, width, trunk, sum(n > 0 for n in rests), context)
    return trunk <= widest and split < dense_cost(cost, width, widest)


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


def packs(
    widths: Sequence[int], max_tokens: int, mask_elements: int | None, small: float = SMALL
) -> list[slice]:
    """Runs of rows (the narrowest first) that go into a forward together: as many as may be, but
    where a forward is not small already, it takes no row that would leave much of it to padding."""
    found, start, real = [], 0, 0
    for stop in range(1, len(widths) + 1):
        real += widths[stop - 1]
        if stop < len(widths):
            count, width = stop + 1 - start, widths[stop]
            fits = count * width <= max_tokens
            fits &= mask_elements is None or count * width**2 <= mask_elements
            full = real + width >= FULL * count * width
            if fits and (full or real < max_tokens * small):
                continue
        found.append(slice(start, stop))
        start, real = stop, 0
    return found


def packs_of_leafy(sizes: Sequence[int], max_tokens: int) -> list[slice]:
    """Runs of trees whose rows and leaves, a tenth of padding included, go into a forward."""
    found, start, total = [], 0, 0
    for stop, size in enumerate(sizes):
        if stop > start and (total + size) / FULL > max_tokens:
            found.append(slice(start, stop))
            start, total = stop, 0
        total += size
    return [*found, slice(start, len(sizes))] if sizes else []
