"""The rules that keep rollouts: exact survival and sizes, and brute force over all choices."""

import math
from itertools import combinations

import numpy as np
import pytest

from reroll.algo.survive import (
    STEEPEST,
    TICKS,
    balanced,
    independent,
    systematic,
    tilt,
    widest,
)
from tests.algo.thinning import over_uniform

SOURCE = np.random.default_rng(0)


def random_group() -> tuple[list[float], int, float, float]:
    """Probabilities (some equal, 0 or 1), keep < G, ratio (also out of reach), floor (also 0)."""
    size = int(SOURCE.integers(2, 20))
    p = SOURCE.beta(*SOURCE.choice([0.3, 1.0, 5.0], 2), size)
    if SOURCE.random() < 0.5:
        p = p.round(1)
    keep = int(SOURCE.integers(1, size))
    ratio = p.mean() + SOURCE.choice([-2.0, -0.1, 0.0, 0.02, 0.1, 0.3, 2.0])
    return p.tolist(), keep, float(ratio), float(SOURCE.choice([0.0, 0.1, 0.2, 1.0]))


GROUPS = [random_group() for _ in range(300)]


def furthest(p: list[float], keep: int, floor: float, upwards: bool) -> float:
    """The highest (lowest) mean in reach: floors for all, the rest to the best, up to 1."""
    left, total = keep - floor * len(p), floor * sum(p)
    for value in sorted(p, reverse=upwards):
        extra = min(left, 1 - floor)
        left, total = left - extra, total + extra * value
    return total / keep


# ---- tilt --------------------------------------------------------------------------------------


def test_survival_adds_up_within_its_bounds():
    for p, keep, ratio, floor in GROUPS:
        survival = tilt(p, keep, ratio, floor)
        assert math.fsum(survival) == pytest.approx(keep, abs=1e-9)
        assert all(min(floor, keep / len(p)) - 1e-12 <= s <= 1 for s in survival)


def test_the_mean_is_the_ratio_or_the_slope_is_at_its_bound():
    reached = 0
    for p, keep, ratio, floor in GROUPS:
        survival = np.array(tilt(p, keep, ratio, floor))
        mean = float(survival @ p) / keep
        lowest = min(floor, keep / len(p))
        free = (survival > lowest * (1 + 1e-9)) & (survival < 1 - 1e-9)
        x, y = np.array(p)[free], np.log(survival[free])
        if abs(mean - ratio) < 1e-8:
            reached += 1
            if len(set(x)) > 1:  # and log survival is a line where it is free
                line = np.polyfit(x, y, 1)
                assert np.abs(np.polyval(line, x) - y).max() < 1e-6
            continue
        sign = 1 if mean < ratio else -1
        assert np.allclose(y - y[:1], sign * STEEPEST * (x - x[:1]), atol=1e-6)
        # d from where survival is 1 it is at most exp(-STEEPEST d) above the floor, so each
        # rollout loses at most the largest d exp(-STEEPEST d)
        lost = sign * (furthest(p, keep, lowest, sign > 0) - mean)
        assert -1e-9 < lost < len(p) / keep / STEEPEST / math.e
    assert 50 < reached < 250


def test_tilt_is_monotone_in_the_probability():
    for p, keep, ratio, floor in GROUPS:
        pairs = sorted(zip(p, tilt(p, keep, ratio, floor), strict=True))
        survival = np.array([s for _, s in pairs])
        steps = np.diff(survival)
        assert (steps >= -1e-12).all() or (steps <= 1e-12).all()


def test_tilt_of_equal_or_few_rollouts():
    assert tilt([0.3] * 8, 2, 0.5, 0.1) == [0.25] * 8
    assert tilt([0.1, 0.2], 2, 0.5, 0.1) == [1.0, 1.0]
    assert tilt([0.1], 3, 0.5, 0.1) == [1.0]
    assert tilt([], 1, 0.5, 0.1) == []
    # nearly equal: what is no difference makes none
    assert tilt([0.3, 0.3 + 1e-9] * 4, 2, 0.5, 0.1) == pytest.approx([0.25] * 8, abs=1e-7)
    # the order of the group does not matter, and other units of reward need no other rule
    assert tilt([0.9, 0.1, 0.2], 2, 0.5, 0.1)[::-1] == tilt([0.2, 0.1, 0.9], 2, 0.5, 0.1)
    far = tilt([0.0, 10.0, 1e4], 1, 20.0, 0.0)
    assert sum(far) == pytest.approx(1) and np.dot(far, [0, 10, 1e4]) == pytest.approx(20)


@pytest.mark.parametrize(
    ("p", "keep", "ratio", "floor"),
    [
        ([0.1, 0.2], 0, 0.5, 0.1),
        ([0.1, 0.2], 1, 0.5, -0.1),
        ([0.1, 0.2], 1, 0.5, 1.1),
        ([0.1, 0.2], 1, math.nan, 0.1),
        ([0.1, math.nan], 1, 0.5, 0.1),
        ([math.inf, 0.1], 2, 0.5, 0.1),
    ],
)
def test_tilt_refuses(p, keep, ratio, floor):
    with pytest.raises(ValueError, match="need keep"):
        tilt(p, keep, ratio, floor)


# ---- who is kept -------------------------------------------------------------------------------


def test_systematic_sampling_keeps_each_as_often_as_stated_and_as_many_as_stated():
    """Integrated over the uniform: what is kept changes at whole ticks only."""
    for p, keep, ratio, floor in GROUPS[:150]:
        survival = tilt(p, keep, ratio, floor)
        order = sorted(range(len(p)), key=lambda i: p[i])
        share = np.zeros(len(p))
        for chance, kept in over_uniform(survival, order):
            assert sum(kept) == keep
            share += chance * np.array(kept)
        assert share == pytest.approx(survival, abs=2 / TICKS)


def test_systematic_sampling_at_the_edges():
    edges = [0.0, 0.3, 1 / 3, 0.5, 2 / 3, math.nextafter(1.0, 0.0)]
    for uniform in edges:
        thirds = [0.1 + 0.2, 1.0, 0.7, 1.0]  # .30000000000000004
        kept = systematic(thirds, range(4), uniform)
        assert sum(kept) == 3 and kept[1] and kept[3]
        assert sum(systematic([1 / 3 + 1e-10] * 3, [2, 0, 1], uniform)) == 1
        assert systematic([0.0, 1.0], [1, 0], uniform) == [False, True]
        assert sum(systematic([0.4, 0.3], [0, 1], uniform)) == (uniform < 0.7)
    assert systematic([0.5, 0.5], [1, 0], 0.1) == [False, True]  # along the order
    for survival, order, uniform in (
        ([1.1, 0.9], [0, 1], 0.5),
        ([math.nan, 0.9], [0, 1], 0.5),
        ([0.5, 0.5], [0, 1], 1.0),
        ([0.5, 0.5], [0, 0], 0.5),
    ):
        with pytest.raises(ValueError, match=r"need survival|not an order"):
            systematic(survival, order, uniform)


def test_systematic_sampling_spreads_the_kept_over_the_order():
    for chance, kept in over_uniform([0.5] * 6, range(6)):
        assert chance == pytest.approx(0.5) and sum(kept[:2]) == sum(kept[2:4]) == 1


def test_independent():
    assert independent([0.5, 0.5, 1.0, 0.0], [0.49, 0.5, 0.999, 0.0]) == [True, False, True, False]


# ---- deterministic -----------------------------------------------------------------------------


def test_balanced_is_the_best_of_its_kind():
    for p, keep, ratio, _ in GROUPS:
        ordered = sorted(p)
        means = [
            (sum(ordered[:low]) + sum(ordered[len(p) - keep + low :])) / keep
            for low in range(keep + 1)
        ]
        kept = [x for x, k in zip(p, balanced(p, keep, ratio), strict=True) if k]
        assert len(kept) == keep
        found = abs(sum(kept) / keep - ratio)
        assert found == pytest.approx(min(abs(m - ratio) for m in means), abs=1e-12)


def test_widest_is_the_best_of_all():
    for trial in range(150):
        size = int(SOURCE.integers(1, 9))
        rewards = SOURCE.normal(size=size) if trial % 2 else SOURCE.integers(0, 3, size) / 2
        keep = int(SOURCE.integers(1, size + 1))
        best = max(np.var(subset) for subset in combinations(rewards, keep))
        kept = rewards[widest(rewards.tolist(), keep)]
        assert len(kept) == keep and np.var(kept) == pytest.approx(best, abs=1e-12)


def test_ties_go_to_earlier_rollouts():
    assert widest([0.0, 1.0, 0.0, 1.0, 0.0], 2) == [True, True, False, False, False]
    assert widest([1.0, 1.0, 1.0], 2) == [True, True, False]
    assert balanced([0.0, 1.0, 0.0, 1.0], 2, 0.5) == [True, True, False, False]
    assert balanced([0.4, 0.6, 0.5], 1, 0.5) == [False, True, False]  # as near from both ends
    # rewards far from 0 or close together lose no digits
    assert widest([0.0, 1e-9, 0.0, 0.0], 2) == [True, True, False, False]
    assert widest([1e9, 1e9 + 1, 1e9 + 1, 1e9 + 1], 2) == [True, True, False, False]


def test_keeping_all_and_none():
    for rule in (widest, lambda values, keep: balanced(values, keep, 0.5)):
        assert rule([0.3, 0.1], 2) == rule([0.3, 0.1], 5) == [True, True]
        assert rule([], 1) == []
        with pytest.raises(ValueError, match="need keep"):
            rule([0.3, 0.1], 0)
