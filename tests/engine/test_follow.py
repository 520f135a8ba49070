"""How samples are expected to spread over a tree, and which nodes that makes worth a forward."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reroll.engine.follow import Follow, expected_visits
from reroll.engine.prefill import Plan
from reroll.model.tree import Tree, merge

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=9)
RATES = (0.9, 0.5, 1.0, 0.25, 0.7, 0.8, 0.95)


def follow_of(rates=RATES) -> Follow:
    follow = Follow()
    follow.visits = np.full(7, 100.0)
    follow.stays = np.array(rates) * 100
    return follow


def brute_visits(tree: Tree, follow: Follow, standing: np.ndarray, depth: int) -> np.ndarray:
    """Down from the standing samples: on in the tree at the rate, to a child by its texts."""
    visits = np.zeros(len(tree))
    for node in range(len(tree)):  # parents come first
        if tree.depth[node] == depth:
            visits[node] = standing[node]
        elif tree.depth[node] > depth:
            above = tree.parent[node]
            on = follow.rate(tree.count[[above]])[0]
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
    assert follow_of().rate(counts).tolist() == [RATES[b] for b in bins]


def test_observe_counts_those_who_came_and_those_who_stayed():
    follow = Follow()
    assert follow.rate(np.array([1, 2, 8])) == pytest.approx(0.97)  # assumed, before any count
    before = Counter({0: 50.0, 1: 50.0, 3: 50.0})
    follow.observe(np.array([1, 1, 2, 7, 7, 7]), np.array([True, False, True, False, False, True]))
    after = {0: (52, 48.5 + 1), 1: (51, 48.5 + 1), 2: (50, 48.5), 3: (53, 48.5 + 1)}
    for index, (visits, stays) in after.items():
        assert follow.visits[index] == visits and follow.stays[index] == pytest.approx(stays)
        assert visits >= before[index]
    follow.observe(np.array([], int), np.array([], bool))
    assert follow.visits.tolist() == [52, 51, 50, 53, 50, 50, 50]


def test_many_counts_outweigh_the_assumption():
    follow = Follow()
    follow.observe(np.full(10_000, 4), np.arange(10_000) % 4 == 0)
    assert follow.rate(np.array([4]))[0] == pytest.approx((2500 + 48.5) / 10_050)
    assert follow.rate(np.array([1]))[0] == pytest.approx(0.97)


def test_decay_fades_counts_but_keeps_rates_and_a_few():
    follow = Follow()
    follow.observe(np.array([1] * 950 + [2] * 5), np.array([False] * 950 + [True] * 5))
    rates = follow.rate(np.array([1, 2, 4]))
    follow.decay()
    assert follow.rate(np.array([1, 2, 4])) == pytest.approx(rates)
    assert follow.visits[0] == pytest.approx(0.8 * 1000)
    assert follow.visits[1] == pytest.approx(50)  # 0.8 * 55 is fewer than the few
    assert follow.visits[2] == 50
    for _ in range(100):
        follow.decay()
    assert follow.visits == pytest.approx(50)
    assert follow.rate(np.array([1, 2, 4])) == pytest.approx(rates)


def test_state_goes_through_json():
    follow = Follow()
    follow.observe(np.array([1, 3, 3, 9]), np.array([True, False, True, True]))
    other = Follow()
    other.load_state(json.loads(json.dumps(follow.state())))
    assert other.visits.tolist() == follow.visits.tolist()
    assert other.stays.tolist() == follow.stays.tolist()
    other.observe(np.array([1]), np.array([True]))  # and goes on counting, on its own
    assert other.visits[0] == follow.visits[0] + 1


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
