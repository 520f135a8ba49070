"""Prefix trees against a dictionary of prefixes, and their mask against "is an ancestor of"."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reroll.model.tree import EVERYTHING, Tree, merge, tree_mask

# few tokens, so that texts share prefixes; 0 is also a usual pad, 256 has the low byte of 0, and
# the sort inside goes by bytes
TOKENS = st.sampled_from([0, 1, 2, 255, 256, 151_643])
TEXTS = st.lists(st.lists(TOKENS, max_size=6), max_size=8)


def prefixes(texts) -> list[tuple[int, ...]]:
    """All distinct prefixes, the empty one among them."""
    return sorted({tuple(text[:n]) for text in [(), *texts] for n in range(len(text) + 1)})


def spelled(tree: Tree) -> list[tuple[int, ...]]:
    """The text from the root to each node, read off parents and tokens."""
    out = [()]
    for node in range(1, len(tree)):
        assert 0 <= tree.parent[node] < node
        out.append((*out[tree.parent[node]], int(tree.tokens[node])))
    return out


def begins(text, prefix) -> bool:
    return tuple(text[: len(prefix)]) == prefix


@settings(max_examples=150)
@given(TEXTS)
@example([])
@example([[]])
@example([[], [], []])
@example([[1], [1], [1]])
@example([[1, 2], [1], [], [1, 2, 0]])
@example([[0, 0, 0], [0, 0], [0]])
@example([[256], [0], [256], [1]])
def test_merge_against_a_dictionary_of_prefixes(texts):
    tree = merge(texts)
    names = spelled(tree)
    number = {name: node for node, name in enumerate(names)}
    assert tree.tokens[0] == tree.parent[0] == -1
    assert len(number) == len(tree) == len(tree.tokens)  # each prefix stands once
    assert sorted(names) == prefixes(texts)
    assert tree.depth.tolist() == list(map(len, names))
    for node, name in enumerate(names):
        below = [other for other, text in enumerate(names) if begins(text, name)]
        assert below == list(range(node, int(tree.end[node])))  # preorder, one interval
    assert tree.node.shape == (max(1, len(texts)), max(map(len, texts), default=0) + 1)
    for k, text in enumerate(texts):  # in the given order, whatever the sort did
        path = [number[tuple(text[:n])] for n in range(len(text) + 1)]
        assert tree.node[k].tolist() == path + [-1] * (tree.node.shape[1] - len(path))
    if not texts:
        assert tree.node.tolist() == [[0]] and tree.via.tolist() == [0]


@settings(max_examples=150)
@given(TEXTS.filter(len))
@example([[1], [1, 2], [1, 2], [1, 0]])
@example([[], [], [3]])
@example([[3], [], [3]])
@example([[2, 2], [1, 1], [2, 2], [0]])
def test_counts_and_the_likeliest_way_on(texts):
    tree = merge(texts)
    for node, name in enumerate(spelled(tree)):
        through = [k for k, text in enumerate(texts) if begins(text, name)]
        assert tree.count[node] == len(through)
        way = int(tree.via[node])
        assert way in through
        nexts = [tuple(texts[k][: len(name) + 1]) for k in through]
        for child in set(nexts):
            if 2 * nexts.count(child) > len(through):
                assert tuple(texts[way][: len(name) + 1]) == child


def test_merge_by_hand():
    #         +- 6 -- 7
    #  root --+
    #         +- 8
    tree = merge([(8,), (6, 7), (6,), (6, 7)])
    names = spelled(tree)
    six, seven, eight = (names.index(name) for name in ((6,), (6, 7), (8,)))
    assert len(tree) == 4 and seven == six + 1
    assert tree.count[[0, six, seven, eight]].tolist() == [4, 3, 2, 1]
    assert tree.end[[six, seven, eight]].tolist() == [six + 2, seven + 1, eight + 1]
    assert tree.node.tolist() == [[0, eight, -1], [0, six, seven], [0, six, -1], [0, six, seven]]
    assert tree.via[six] in (1, 3) and tree.via[0] in (1, 2, 3) and tree.via[eight] == 0


@st.composite
def forwards(draw):
    """Rows as a forward has them: (given tokens, texts of the tree, which nodes are run, order)."""
    out = []
    for _ in range(draw(st.integers(1, 3))):
        tree = merge(draw(TEXTS))
        kept = [True]  # a part that holds the parent of whatever it holds
        for node in range(1, len(tree)):
            kept.append(kept[tree.parent[node]] and draw(st.integers(0, 4)) > 0)
        nodes = np.flatnonzero(kept)[1:]
        out.append((draw(st.integers(1, 4)), tree, nodes))
    return out


@settings(max_examples=100)
@given(forwards(), st.randoms(use_true_random=False), st.integers(1, 30))
def test_mask_is_the_relation_of_ancestors(rows, random, queries):
    width = max(start + len(nodes) for start, _, nodes in rows)
    order, end = (np.full((len(rows), width), EVERYTHING) for _ in range(2))
    end += 1  # what is not set below is a pad
    what = [[None] * width for _ in rows]
    for row, (start, tree, nodes) in enumerate(rows):
        columns = list(range(width))
        random.shuffle(columns)  # the formula knows no places, only numbers
        names = spelled(tree)
        for column, step in zip(columns, range(start), strict=False):
            order[row, column], end[row, column] = step, EVERYTHING
            what[row][column] = tuple(range(1000, 1000 + step + 1))
        for column, node in zip(columns[start:], nodes, strict=False):
            order[row, column] = node - 1 + start
            end[row, column] = tree.end[node] - 1 + start
            what[row][column] = (*range(1000, 1000 + start), *names[node])
    queries = min(queries, width)
    mask = tree_mask(torch.from_numpy(order), torch.from_numpy(end), queries)
    assert mask.shape == (len(rows), queries, width) and mask.dtype == torch.bool
    for row, texts in enumerate(what):
        for query in range(queries):
            mine = texts[width - queries + query]
            for column, other in enumerate(texts):
                if mine is None or other is None:  # pads see pads, and nothing else does
                    expected = mine is None and other is None
                else:
                    expected = begins(mine, other)
                assert bool(mask[row, query, column]) == expected
    assert mask.any(-1).all()  # nobody sees nothing: that softmax would be nan
