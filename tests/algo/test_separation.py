"""The area within prompts against brute force, its error against simulation, and calibration."""

import json
import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from reroll.algo.separation import WithinAuc, calibration_error, within_pairs


def random_group(source, size: int, skill: float = 1.0) -> tuple[list[float], list[float]]:
    """Scores, and rewards of 0 or 1 of a prompt whose difficulty is in both."""
    ease = source.normal(0, 1.5)
    latent = source.normal(0, 1, size)
    rewards = source.random(size) < 1 / (1 + np.exp(-(ease + 2 * latent)))
    return (ease + skill * latent + source.normal(0, 1, size)).tolist(), rewards.tolist()


def test_pairs_by_brute_force():
    source = np.random.default_rng(0)
    for _ in range(100):
        size = int(source.integers(0, 9))
        scores, rewards = source.integers(0, 4, (2, size)).astype(float)
        concordant, pairs = 0.0, 0
        for i in range(size):
            for j in range(i):
                if rewards[i] != rewards[j]:
                    pairs += 1
                    product = (scores[i] - scores[j]) * (rewards[i] - rewards[j])
                    concordant += 1.0 if product > 0 else 0.5 if product == 0 else 0.0
        assert within_pairs(scores.tolist(), rewards.tolist()) == (concordant, pairs)


def test_pairs_of_two_rewards_are_those_of_mann_and_whitney():
    source = np.random.default_rng(1)
    for _ in range(20):
        scores, rewards = source.normal(size=12).round(1), np.arange(12) % 3 == 0
        statistic = mannwhitneyu(scores[rewards], scores[~rewards]).statistic
        assert within_pairs(scores.tolist(), rewards.tolist()) == (statistic, 4 * 8)


def test_groups_add_up_and_what_is_between_them_does_not_count():
    running = WithinAuc()
    assert math.isnan(running.auc) and math.isnan(running.error)
    running.add([5.0, 6.0], [1.0, 1.0])  # no pairs
    assert math.isnan(running.auc)
    running.add([9.0, 8.0, 7.0], [1.0, 0.0, 0.0])  # 2 of 2
    assert running.auc == 1.0 and math.isnan(running.error)
    running.add([1.0, 1.0], [1.0, 0.0])  # 1/2 of 1
    assert running.auc == pytest.approx(2.5 / 3)
    # residuals a - auc b: 1/3 and -1/3
    assert running.error == pytest.approx(math.sqrt(2 / 9 * 2 / 1) / 3)


def test_earlier_groups_fade():
    running = WithinAuc()
    running.add([1.0, 0.0], [1.0, 0.0])
    running.decay(0.5)
    running.add([0.0, 1.0, 0.0], [1.0, 0.0, 0.0])  # 1/2 of 2
    auc = (0.5 + 0.5) / (0.5 + 2)
    assert running.auc == pytest.approx(auc)
    squares = 0.25 * (1 - auc) ** 2 + (0.5 - 2 * auc) ** 2
    count = 1.5**2 / 1.25
    assert running.error == pytest.approx(math.sqrt(squares * count / (count - 1)) / 2.5)
    other = WithinAuc()
    other.load_state(json.loads(json.dumps(running.state())))
    other.decay(0.9)
    running.decay(0.9)
    assert (other.auc, other.error) == (running.auc, running.error)
    with pytest.raises(ValueError, match="decay"):
        running.decay(-0.1)


def test_the_error_is_the_deviation_over_repetitions():
    """400 repetitions: their deviation is known to 1 / sqrt(800), 3.5 %; 3 of those and the
    curvature of the ratio, about 1 / 40 groups."""
    source = np.random.default_rng(2)
    areas, errors = [], []
    for _ in range(400):
        running = WithinAuc()
        for _ in range(40):
            running.add(*random_group(source, 8))
        areas.append(running.auc)
        errors.append(running.error)
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(areas, ddof=1), rel=0.13)


def test_the_area_within_prompts_leaves_their_difficulty_out():
    source = np.random.default_rng(3)
    running, scores, rewards = WithinAuc(), [], []
    for _ in range(400):
        group = random_group(source, 8, skill=0.0)
        running.add(*group)
        scores += group[0]
        rewards += group[1]
    concordant, pairs = within_pairs(scores, rewards)
    assert abs(running.auc - 0.5) < 4 * running.error < 0.1
    assert concordant / pairs > 0.65


def test_calibration_error_by_hand():
    p, outcomes = [0.05, 0.08, 0.55, 1.0, 1.2], [0.0, 1.0, 1.0, 1.0, 0.2]
    gaps = [abs(1.0 - 0.13), 0.45, 1.2 - 2.2]
    assert calibration_error(p, outcomes) == pytest.approx(sum(map(abs, gaps)) / 5)
    weighted = calibration_error(p, outcomes, [1.0, 3.0, 0.0, 2.0, 0.0])
    assert weighted == pytest.approx(abs(3.0 - 0.05 - 0.24) / 6)
    assert calibration_error([0.2, 0.4], [0.6, 0.0], bins=1) == pytest.approx(0.0)
    assert math.isnan(calibration_error([], []))
    with pytest.raises(ValueError, match="at least one bin"):
        calibration_error([0.5], [1.0], bins=0)


def test_calibration_error_of_the_truth_is_sampling_alone():
    source = np.random.default_rng(4)
    p = source.random(20_000)
    outcomes = (source.random(20_000) < p).astype(float)
    # each of 10 bins of 2000: a mean of at most .5 / sqrt(2000), of which |.| averages .8
    assert calibration_error(p.tolist(), outcomes.tolist()) < 0.8 * 0.5 / math.sqrt(2000) * 1.5
    off = calibration_error((p / 2).tolist(), outcomes.tolist())
    assert off == pytest.approx(0.25, abs=4 * 0.5 / math.sqrt(20_000))
