"""How samples are expected to spread over a tree, and which nodes that makes worth a forward."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reroll.engine.follow import bin_of, count_follow, expected_visits
from reroll.engine.prefill import Plan
from reroll.engine.shares import Shares
from reroll.model.tree import Tree, merge

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=9)
RATES = (0.9, 0.5, 1.0, 0.25, 0.7, 0.8, 0.95)


def follow_of(rates=RATES) -> Shares:
    return Shares(rates, 100.0)


def brute_visits(tree: Tree, follow: Shares, standing: np.ndarray, depth: int) -> np.ndarray:
    """Down from the standing samples: on in the tree at the rate, to a child by its texts."""
    visits = np.zeros(len(tree))
    for node in range(len(tree)):  # parents come first
        if tree.depth[node] == depth:
            visits[node] = standing[node]
        elif tree.depth[node] > depth:
            above = tree.parent[node]
            on = follow.of(bin_of(tree.count[[above]]))[0]
            visits[node] = visits[above] * on * tree.count[node] / tree.count[above]
    return visits


def some_standing(tree: Tree, depth: int, seed: int) -> np.ndarray:
    """Samples at some of the nodes of one depth."""
    rng = np.random.default_rng(seed)
    return np.where(tree.depth == depth, rng.integers(0, 5, len(tree)), 0).astype(float)


@settings(max_examples=150)
@given(TEXTS, st.integers(0, 4), st.integers(0, 99))
@example([[], []], 0, 0)
@example([[1, 2], [1], [1, 2, 0]], 1, 3)
def test_expected_visits_against_a_walk_over_the_nodes(texts, depth, seed):
    tree, follow = merge(texts), follow_of()
    depth = min(depth, int(tree.depth.max()))
    standing = some_standing(tree, depth, seed)
    got = expected_visits(tree, follow, standing, depth)
    assert got == pytest.approx(brute_visits(tree, follow, standing, depth), abs=1e-12)
    # whoever stays in the tree is somewhere: nothing is counted twice
    for d in range(depth, int(tree.depth.max()) + 1):
        assert got[tree.depth == d].sum() <= standing.sum() + 1e-9


def test_expected_visits_by_hand():
    tree = merge([(5, 6), (5, 7), (5, 6), (8,)])
    follow = follow_of()
    pairs = zip(tree.tokens.tolist(), tree.depth.tolist(), strict=True)
    names = {pair: node for node, pair in enumerate(pairs)}
    visits = expected_visits(tree, follow, np.array([10.0, 0, 0, 0, 0]), 0)
    # 4 texts: bin 2, rate 1; 3 texts: bin 2 as well
    assert visits[0] == 10
    assert visits[names[5, 1]] == pytest.approx(10 * 1.0 * 3 / 4)
    assert visits[names[8, 1]] == pytest.approx(10 * 1.0 * 1 / 4)
    assert visits[names[6, 2]] == pytest.approx(10 * 3 / 4 * 1.0 * 2 / 3)
    assert visits[names[7, 2]] == pytest.approx(10 * 3 / 4 * 1.0 * 1 / 3)


def test_rates_by_powers_of_two():
    bins = [0, 1, 2, 2, 3, 3, 3, 3, *[4] * 8, *[5] * 16, 6, 6, 6]
    counts = np.array([*range(1, 33), 33, 1000, 10**6])
    assert bin_of(counts).tolist() == bins
    assert count_follow().of(bin_of(counts)) == pytest.approx(0.97)  # before any count


# --- which nodes are verified -------------------------------------------------------------------


def plan_of(window: int, least: float) -> Plan:
    return Plan(follow_of(), least, window, True, 4096)


@settings(max_examples=150)
@given(
    TEXTS,
    st.integers(0, 4),
    st.integers(1, 4),
    st.sampled_from([1e-9, 0.2, 0.5, 1.2, 3.0]),
    st.integers(0, 99),
)
def test_nodes_worth_it_are_those_that_enough_are_expected_at(texts, depth, window, least, seed):
    tree = merge(texts)
    depth = min(depth, int(tree.depth.max()))
    standing = some_standing(tree, depth, seed)
    plan = plan_of(window, least)
    got = plan.nodes(tree, standing, depth)
    visits = brute_visits(tree, plan.follow, standing, depth)
    first = max(depth, 1)  # the root is given, not verified
    clear = np.abs(visits - least) > 1e-10
    expected = (visits > least) & (tree.depth >= first) & (tree.depth < first + window)
    mask = np.isin(np.arange(len(tree)), got)
    assert (mask == expected)[clear].all()
    assert (np.diff(got) > 0).all()  # in preorder
    for node in got:  # no node without those above it, up to where the window begins
        assert tree.depth[node] == first or mask[tree.parent[node]]


@settings(max_examples=80)
@given(TEXTS, st.integers(0, 4), st.integers(1, 4))
def test_without_choosing_every_node_of_the_window_is_verified(texts, depth, window):
    tree = merge(texts)
    got = plan_of(window, 0.0).nodes(tree, np.zeros(len(tree)), depth)
    first = max(depth, 1)
    assert got.tolist() == [
        node for node in range(len(tree)) if first <= tree.depth[node] < first + window
    ]
