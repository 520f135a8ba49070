"""Group-normalised advantages, by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroll.algo.advantage import grpo


def test_by_hand():
    # mean 2, squares 4 + 0 + 4 over n - 1 = 2: deviation 2
    assert grpo([0.0, 2.0, 4.0], epsilon=0.0) == [-1.0, 0.0, 1.0]
    # deviation sqrt(1/2) with Bessel's correction (1/2 without)
    assert grpo([1.0, 0.0], epsilon=0.0) == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    # mean 1/4, deviation 1/2
    assert grpo([0, 0, 0, 1], epsilon=0.0) == [-0.5, -0.5, -0.5, 1.5]


def test_epsilon_stands_beside_the_deviation():
    assert grpo([0.0, 2.0, 4.0], epsilon=2.0) == [-0.5, 0.0, 0.5]
    assert grpo([0.0, 2.0, 4.0])[2] == pytest.approx(2 / 2.0001, rel=1e-12)


def test_ungraded_rollouts_stay_out():
    assert grpo([None, 0.0, 2.0, None, 4.0], epsilon=0.0) == [0.0, -1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "rewards",
    [[], [1.0], [None], [None, None], [3.0, None], [1.0, 1.0], [0.1, 0.1, 0.1], [None, 0.7, 0.7]],
)
def test_groups_without_signal_give_zeros(rewards):
    # 0.1 three times: their mean is not 0.1, so that a deviation of rounding errors would be
    # blown up to advantages near 1
    assert grpo(rewards, epsilon=0.0) == [0.0] * len(rewards)


REWARDS = st.lists(st.integers(-20, 20).map(lambda i: i / 4), min_size=2, max_size=12)


@given(REWARDS, st.integers(-8, 8), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_shift_and_scale_of_the_rewards_do_not_matter(rewards, shift, scale):
    moved = [scale * r + shift for r in rewards]
    assert grpo(moved, epsilon=0.0) == pytest.approx(grpo(rewards, epsilon=0.0), abs=1e-9)


@given(REWARDS)
def test_advantages_are_centred_with_deviation_one(rewards):
    advantages = grpo(rewards, epsilon=0.0)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-9)
    spread = 0 if len(set(rewards)) == 1 else len(rewards) - 1
    assert sum(a * a for a in advantages) == pytest.approx(spread, abs=1e-9)
    assert sorted(range(len(rewards)), key=lambda i: (rewards[i], i)) == sorted(
        range(len(rewards)), key=lambda i: (round(advantages[i], 9), i)
    )
