"""pass@k against enumeration, maj@k by hand, the bootstrap against SciPy's and by its coverage."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from reroll.algo.passk import bootstrap_interval, majority_at_k, pass_at_k, vote_at_k


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(samples):
    for correct in range(samples + 1):
        marks = [i < correct for i in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(marks, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 2, 3) == 1.0
    assert pass_at_k(1000, 500, 500) == 1.0  # no overflow on the way


@pytest.mark.parametrize("samples, correct, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_what_makes_no_sense(samples, correct, k):
    with pytest.raises(ValueError, match="need 0 <= correct"):
        pass_at_k(samples, correct, k)


@pytest.mark.parametrize(
    "answers, correct, expected",
    [
        (["7", "7", "8"], [True, True, False], 1.0),
        (["7", "8", "8"], [True, False, False], 0.0),
        (["7", "8"], [True, False], 0.5),  # a tie is shared out
        (["7", "8", "9"], [True, False, False], 1 / 3),
        (["7", "7", "8", "8", "9"], [False, False, True, True, False], 0.5),
        (["6", "7", "7", "8", "8"], [True, False, False, False, False], 0.0),
        ([None, None, "7"], [False, False, True], 1.0),  # no answer is no majority
        ([None, None], [False, False], 0.0),
        ([], [], 0.0),
    ],
)
def test_majority_by_hand(answers, correct, expected):
    assert majority_at_k(answers, correct) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    "answers, weights, correct, expected",
    [
        (["7", "8", "8"], [0.9, 0.3, 0.3], [True, False, False], 1.0),
        (["7", "8", "8"], [0.6, 0.3, 0.3], [True, False, False], 0.5),  # a tie is shared out
        (["7", "8", "8"], [0.5, 0.3, 0.3], [True, False, False], 0.0),
        ([None, "8", "9"], [5.0, 0.2, 0.1], [False, True, False], 1.0),  # no answer has no vote
        (["7", "7", "7", "8"], [0.1, 0.1, 0.1, 0.3], [True, True, True, False], 0.5),
        (["7", "8"], [0.0, 0.0], [True, False], 0.5),
    ],
)
def test_weighted_votes_by_hand(answers, weights, correct, expected):
    assert vote_at_k(answers, weights, correct) == pytest.approx(expected, abs=1e-15)


def test_equal_weights_are_the_majority():
    dice = np.random.default_rng(1)
    for _ in range(200):
        answers = [str(x) for x in dice.integers(4, size=7)]
        marks = [answer == "2" for answer in answers]
        weight = float(dice.random())
        assert vote_at_k(answers, [weight] * 7, marks) == majority_at_k(answers, marks)


def test_the_interval_is_that_of_scipy():
    # A bound is the 2.5 % quantile of 20,000 means, about normal with deviation s: its Monte Carlo
    # error is sqrt(0.025 * 0.975 / 20,000) / 0.0584 s = 0.019 s, 0.027 s between two of them.
    values = np.random.default_rng(0).gamma(2.0, size=40)
    s = values.std() / math.sqrt(len(values))
    for level, tolerance in ((0.95, 5 * 0.027 * s), (0.5, 5 * 0.014 * s)):
        expected = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=20_000,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(1),
        ).confidence_interval
        low, high = bootstrap_interval(values.tolist(), level, draws=20_000)
        assert low == pytest.approx(expected.low, abs=tolerance)
        assert high == pytest.approx(expected.high, abs=tolerance)


def test_the_interval_covers_the_truth():
    # 95 % nominal; for 30 normal values the percentile interval, which lacks Student's factor and
    # Bessel's correction, covers P(|t_29| < 1.96 sqrt(29 / 30)) = 93.6 %. Over 1,000 trials one
    # deviation is 0.8 %, 4 of them 3.1 %.
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(1000):
        low, high = bootstrap_interval(rng.normal(3.0, 2.0, size=30).tolist(), draws=400)
        hits += low <= 3.0 <= high
    assert hits / 1000 == pytest.approx(0.936, abs=0.031)


def test_the_interval_by_hand():
    # the mean of two resampled values is 0, 1/2, 1 with chances 1/4, 1/2, 1/4
    assert bootstrap_interval([0.0, 1.0], level=0.95) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.25) == (0.5, 0.5)
    assert bootstrap_interval([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))


def test_the_interval_is_repeatable_and_needs_two_values():
    values = [0.0, 0.25, 1.0, 0.5]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=0) != bootstrap_interval(values, draws=50, seed=5)
    assert all(map(math.isnan, bootstrap_interval([0.5]) + bootstrap_interval([])))
