"""Which rollouts share a row, and which rows a forward.

In sorted order, texts with a long common prefix are neighbours; the cheapest way to cut that order
into rows is found by what rows cost. Groups of one prompt, nested prefixes, and groups too long for
one row (each piece then carries the trunk) are all cut so.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from reroll.model.flops import CostModel

LEAST_GAIN = 1.05
"""how many times cheaper a tree must count to be run: masks and gathering cost something too"""
LEAF, COPY = 20, 24
"""what a leaf costs besides its tokens, in tokens run, and for each token before it, whose keys and
values have to be brought, in tokens attended to; fitted on a CPU (docs/log.md)"""
KEPT = 8
"""keys and values brought for so many tokens stay in memory like about one token that is run"""

FULL, SMALL, SMALL_LEAVES = 0.9, 0.1, 0.03
"""share of a forward that is not padding, at least; share of the token budget below which a forward
is small and takes what comes, and one of leaves"""


class Row(NamedTuple):
    """Texts that share a row; leafy: with what each has of its own behind it."""

    texts: list[int]
    leafy: bool


def cut(
    texts: Sequence[np.ndarray], cost: CostModel, widest: int, most: int, behind: bool = True
) -> list[Row]:
    """Which texts share a row: the cheapest cut of the sorted order, by dynamic programming, where
    neighbours that have next to nothing in common are never joined.

    widest: of a row under a dense mask. most: tokens of a row that several share, its leaves
    included. behind: whether it may have any.

    Costs are FLOPs of one forward, counted, not timed: with measured prices, two runs of one seed
    would lay out other forwards, and float noise would make them other runs. A plain text attends
    to what stands before each token; under a tree's mask more is computed (`CostModel.attended`).
    """
    order, shared = neighbours(texts)
    lengths = [len(texts[k]) for k in order]
    # ends the search, for all prompts may begin alike: that little would not make a tree of single
    # texts, and joins trees of several for a saving of a few tokens each
    for k, size in enumerate(map(min, lengths[1:], lengths), 1):
        shared[k] *= shared[k] > (LEAST_GAIN - 1) * size
    alone = [cost.flops(n, n * (n + 1) / 2) for n in lengths]
    least, start, split = [0.0], [], []
    for stop in range(1, len(order) + 1):
        begin = first = stop - 1
        apart = False
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
                context -= leaf_context(cost, length - common, common)
            for rest, before in (
                (length - max(now, common), max(now, common)),
                (lengths[first - 1] - now, now),
            ):
                leaves += rest > 0
                context += leaf_context(cost, rest, before)
            common, first = now, first - 1
            price, leafy = dense_cost(cost, width, widest), False
            if behind and trunk <= widest:
                other = leafy_cost(cost, width, trunk, leaves, context)
                price, leafy = min(price, other), other < price
            whole = least[first] + price
            if whole < best:
                best, begin, apart = whole, first, leafy
        least.append(best)
        start.append(begin)
        split.append(apart)
    rows, stop = [], len(order)
    while stop:
        rows.append(Row(order[start[stop - 1] : stop], split[stop - 1]))
        stop = start[stop - 1]
    return rows[::-1]


def dense_cost(cost: CostModel, width: int, widest: int) -> float:
    """FLOPs of a row under a dense mask."""
    return LEAST_GAIN * cost.flops(width, cost.attended(width)) if width <= widest else float("inf")


def leaf_context(cost: CostModel, length: int, before: int) -> float:
    """What a leaf costs in tokens attended to; what stands before it has to be brought, too."""
    return cost.attended(length) + (length + COPY) * before if length > 0 else 0


def leafy_cost(cost: CostModel, width: int, trunk: int, leaves: int, context: float) -> float:
    """FLOPs of a row of `trunk` nodes with its leaves; width: nodes of both."""
    return LEAST_GAIN * cost.flops(width + LEAF * leaves, cost.attended(trunk) + context)


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
    widths: Sequence[int],
    max_tokens: int,
    mask_elements: int | None,
    small: float = SMALL,
    before: Sequence[int] | None = None,
) -> list[slice]:
    """Runs of rows (the narrowest first) that go into a forward together: as many as may be, but
    where a forward is not small already, it takes no row that would leave much of it to padding.

    mask_elements: of its mask at most; None: it has none. before: tokens in front of each row.
    """
    found, start, real, longest = [], 0, 0, 0
    for stop in range(1, len(widths) + 1):
        real += widths[stop - 1]
        longest = max(longest, before[stop - 1] if before else 0)
        if stop < len(widths):
            count, width = stop + 1 - start, widths[stop]
            past = max(longest, before[stop] if before else 0)
            fits = count * width <= max_tokens
            fits &= mask_elements is None or count * width * (past + width) <= mask_elements
            full = real + width >= FULL * count * width
            if fits and (full or real < max_tokens * small):
                continue
        found.append(slice(start, stop))
        start, real, longest = stop, 0, 0
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
