"""Shares that are counted from a prior, and fade."""

import json

import numpy as np
import pytest

from reroll.engine.shares import Shares

PRIOR = [0.9, 0.5, 0.25]


def test_what_is_assumed_before_anything_is_counted():
    shares = Shares(PRIOR, 20.0)
    assert [float(shares.of(kind)) for kind in range(3)] == pytest.approx(PRIOR)
    assert shares.of(np.array([[2, 0], [0, 1]])) == pytest.approx(
        np.array([[0.25, 0.9], [0.9, 0.5]])
    )


def test_add_counts_kinds_that_repeat():
    shares = Shares(PRIOR, 20.0)
    shares.add(np.array([0, 2, 0, 0]), 1, np.array([True, False, False, True]))
    shares.add(1, 4, 3)
    shares.add(np.array([], int), 1, np.array([], bool))
    assert shares.trials.tolist() == [23, 24, 21]
    assert shares.hits == pytest.approx([18 + 2, 10 + 3, 5])
    assert shares.of(1) == pytest.approx(13 / 24)


def test_many_counts_outweigh_the_prior():
    shares = Shares(PRIOR, 50.0)
    shares.add(np.full(10_000, 1), 1, np.arange(10_000) % 4 == 0)
    assert shares.of(np.arange(3)) == pytest.approx([0.9, (2500 + 25) / 10_050, 0.25])


def test_decay_fades_counts_but_keeps_shares_and_a_few():
    shares = Shares(PRIOR, 50.0)
    shares.add(0, 950, 0)
    shares.add(1, 5, 5)
    before = shares.of(np.arange(3))
    shares.decay()
    assert shares.of(np.arange(3)) == pytest.approx(before)
    # 0.8 * 55 is fewer than the few
    assert shares.trials == pytest.approx([0.8 * 1000, 50, 50])
    for _ in range(100):
        shares.decay()
    assert shares.trials == pytest.approx(50)
    assert shares.of(np.arange(3)) == pytest.approx(before)


def test_state_goes_through_json():
    shares, other = Shares(PRIOR, 20.0), Shares([0.1] * 3, 20.0)
    shares.add(np.array([1, 1, 2]), 1, np.array([True, False, True]))
    other.load_state(json.loads(json.dumps(shares.state())))
    assert other.trials.tolist() == shares.trials.tolist()
    assert other.hits.tolist() == shares.hits.tolist()
    other.add(0, 1, 1)  # and goes on counting, on its own
    assert other.trials[0] == shares.trials[0] + 1
