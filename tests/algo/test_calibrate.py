"""Scores to probabilities: by hand, and on data whose truth is known."""

import json
import math

import numpy as np
import pytest

from reroll.algo.calibrate import Bins


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def test_without_data_it_believes_the_score():
    bins = Bins()
    assert len(bins.centres) == 24 and bins.centres[0] == -5.75
    assert bins.probabilities(bins.centres.tolist()) == pytest.approx(sigmoid(bins.centres))
    # between centres a line, level outside
    between = (sigmoid(0.25) + sigmoid(0.75)) / 2
    assert bins.probability(0.5) == pytest.approx(between)
    assert bins.probability(50.0) == bins.probability(6.0) == pytest.approx(sigmoid(5.75))


def test_a_bin_by_hand():
    bins = Bins(low=-1.0, high=1.0, width=1.0, prior=2.0)
    for score, outcome, weight in ((0.9, 1.0, 1.0), (0.9, 0.0, 2.0), (7.0, 1.0, 1.0)):
        bins.add(score, outcome, weight)
    upper = (2.0 + 2 * sigmoid(0.5)) / 6
    at = (0.9 * 3 + 1.0 + 2 * 0.5) / 6
    assert bins.probability(at) == pytest.approx(upper)
    assert bins.probability(1.0) == pytest.approx(upper)
    half = (sigmoid(-0.5) + upper) / 2
    assert bins.probability((at - 0.5) / 2) == pytest.approx(half)
    bins.decay(0.5)
    upper = (1.0 + 2 * sigmoid(0.5)) / 4
    assert bins.probability(1.0) == pytest.approx(upper)
    bins.decay(0.0)
    assert bins.probabilities([-0.5, 0.5]) == pytest.approx(sigmoid([-0.5, 0.5]))


def test_bins_out_of_order_are_pooled():
    bins = Bins(low=-1.0, high=1.0, width=1.0, prior=1e-9)
    for score, outcome in ((-0.5, 1.0), (0.5, 0.0), (0.5, 1.0), (0.5, 0.0)):
        bins.add(score, outcome)
    assert bins.probabilities([-0.5, 0.0, 0.5]) == pytest.approx([0.5] * 3, abs=1e-6)


def test_it_never_falls_and_has_no_jumps():
    source = np.random.default_rng(0)
    grid = np.linspace(-8, 8, 4001)
    for size in (3, 30, 300):
        for _ in range(20):
            bins = Bins(prior=float(source.choice([0.5, 4.0])))
            for score in source.normal(0, 4, size):
                bins.add(float(score), float(source.random() < 0.5), float(source.random()))
            found = np.array(bins.probabilities(grid.tolist()))
            assert (np.diff(found) >= 0).all() and found[0] > 0 and found[-1] < 1
            # the means of neighbouring bins may be close, but never at the same place
            ends = bins._fit()[0]
            assert (np.diff(ends) > 0).all()


def test_it_finds_the_truth_within_sampling_error():
    """The head is twice too sure and off by 1: truth sigmoid(score / 2 - 1)."""
    source = np.random.default_rng(1)
    bins, size = Bins(), 40_000
    scores = source.uniform(-4, 4, size)
    outcomes = source.random(size) < sigmoid(scores / 2 - 1)
    for score, outcome in zip(scores, outcomes, strict=True):
        bins.add(float(score), float(outcome))
    at, truth = bins.centres[4:20], sigmoid(bins.centres[4:20] / 2 - 1)
    each = size / 16
    # 4 deviations of a rate of 2500, the prior's pull of at most 4 / 2500, and the bend of the
    # truth inside a bin and between two: second derivative at most .1 / 4, over .5: / 8
    slack = 4 * np.sqrt(truth * (1 - truth) / each) + 4 / each + 2 * 0.025 * 0.25 / 8
    assert (np.abs(np.array(bins.probabilities(at.tolist())) - truth) < slack).all()
    assert np.abs(sigmoid(at) - truth).max() > 0.3  # the head itself is far off


def test_what_has_changed_is_learnt_by_decay():
    bins = Bins()
    for turn, outcome in enumerate([0.0] * 500 + [1.0] * 100):
        bins.add(1.25, outcome)
        if turn % 10 == 9:
            bins.decay(0.8)
    # 10 a turn, .8 of them left after it: 40 in the long run, .8^10 of that from before the change
    new = 40 * (1 - 0.8**10)
    # more than the next bin's claim, so pooled with it
    found = (new + 4 * sigmoid(1.25) + 4 * sigmoid(1.75)) / (40 + 8)
    assert bins.probability(1.25) == pytest.approx(found, abs=1e-4)


def test_a_weight_counts_as_so_many():
    once, often = Bins(), Bins()
    for score, outcome in ((0.3, 1.0), (2.2, 0.5)):
        once.add(score, outcome, 3.0)
        for _ in range(3):
            often.add(score, outcome)
    grid = np.linspace(-1, 3, 9).tolist()
    assert once.probabilities(grid) == pytest.approx(often.probabilities(grid))


def test_the_state_survives_json():
    bins, other = Bins(), Bins()
    bins.add(0.3, 1.0)
    bins.add(-2.0, 0.25, 2.0)
    other.probability(0.0)
    other.load_state(json.loads(json.dumps(bins.state())))
    for each in (bins, other):
        each.decay(0.9)
        each.add(0.4, 0.0)
    grid = np.linspace(-6, 6, 50).tolist()
    assert other.probabilities(grid) == bins.probabilities(grid)
    with pytest.raises(ValueError, match="not of 12 bins"):
        Bins(width=1.0).load_state(bins.state())


def test_it_refuses():
    bins = Bins()
    for score, outcome, weight in (
        (math.nan, 1.0, 1.0),
        (math.inf, 1.0, 1.0),
        (0.0, 1.1, 1.0),
        (0.0, math.nan, 1.0),
        (0.0, 1.0, -1.0),
        (0.0, 1.0, math.inf),
    ):
        with pytest.raises(ValueError, match="cannot count"):
            bins.add(score, outcome, weight)
    with pytest.raises(ValueError, match="decay"):
        bins.decay(1.5)
    for settings in ({"low": 1.0, "high": 1.0}, {"width": 0.0}, {"prior": 0.0}):
        with pytest.raises(ValueError, match="need low"):
            Bins(**settings)
