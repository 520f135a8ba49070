"""Which rollouts of a group go on while they run: probabilities -> survival -> the kept.

The rules of pruning (ARRoL, arXiv 2603.24840, which names the two aims, a share kept and a share of
successes among them, and not the formula). `G` rollouts of a group. A probability is the expected
reward of a rollout given what it has said so far, in units of reward. A survival is the chance that
it goes on: what corrects for the stopped ones (`thinned`) needs it, and it depends on nothing that
comes later. `balanced` and `widest` are deterministic, so they have none.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from scipy.optimize import root_scalar

STEEPEST = 100.0
"""Bound of `tilt`'s slope, per unit of probability: .01 apart is never more than e times as likely,
so what the calibrator cannot tell apart is not torn apart in pursuit of a ratio out of reach."""
LARGEST_EXPONENT = 500.0
"""e to this is still far from overflow"""
TICKS = 1 << 28
"""`systematic` counts in these parts of 1, so that sums are exact and 1e-9 off an integer is it"""


def tilt(probabilities_G: Sequence[float], keep: int, ratio: float, floor: float) -> list[float]:
    """Survival `[G]` of which `keep` are expected to live, with mean reward near `ratio`.

    s_i = clip(c exp(beta p_i), floor', 1). c makes sum(s) = keep; beta, at most STEEPEST, brings
    sum(s p) / sum(s) as near to `ratio` as the bounds allow. floor' = min(floor, keep / G): no
    survival is below it, so no correction weight is above keep / (G floor'). Equal probabilities
    all get keep / G; keep >= G gives all 1. ValueError for keep < 1, a floor outside [0, 1],
    anything that is not finite.
    """
    p_G = np.asarray(probabilities_G, dtype=np.float64)
    if keep < 1 or not 0 <= floor <= 1 or not math.isfinite(ratio) or not np.isfinite(p_G).all():
        raise ValueError(
            "need keep >= 1, 0 <= floor <= 1, a finite ratio and finite probabilities, "
            f"got {keep}, {floor}, {ratio}, {list(probabilities_G)}"
        )
    count = len(p_G)
    if keep >= count:
        return [1.0] * count
    middle, spread = p_G.mean(), float(p_G.max() - p_G.min())
    if spread == 0:
        return [keep / count] * count
    lowest = min(floor, keep / count)
    steepest = min(STEEPEST, LARGEST_EXPONENT / spread)

    def survival(beta: float) -> np.ndarray:
        return _scaled(np.exp(beta * (p_G - middle)), keep, lowest)

    def excess(beta: float) -> float:
        return float(survival(beta) @ p_G) / keep - ratio

    # rising in beta: two slopes cross at one p, above it the steeper one gives more, below it less,
    # and what the sums leave equal is moved upwards; clipping keeps that order
    if excess(steepest) <= 0:
        beta = steepest
    elif excess(-steepest) >= 0:
        beta = -steepest
    else:
        beta = float(root_scalar(excess, bracket=(-steepest, steepest), xtol=1e-10).root)
    return survival(beta).tolist()


def _scaled(sizes_G: np.ndarray, total: float, lowest: float) -> np.ndarray:
    """clip(c sizes, lowest, 1) with the c that gives this total: piecewise linear, so exact."""
    bends = np.sort(np.concatenate([[0.0], lowest / sizes_G, 1 / sizes_G]))
    totals = np.clip(bends[:, None] * sizes_G, lowest, 1).sum(1)
    return np.clip(np.interp(total, totals, bends) * sizes_G, lowest, 1)


def systematic(survival_G: Sequence[float], order_G: Sequence[int], uniform: float) -> list[bool]:
    """Who is kept, `[G]`: as many as sum(survival) says, each as often as its survival says.

    Systematic sampling (Madow 1949): survivals end to end along `order_G`, a pick at uniform + 0,
    1, 2, ... So the kept are spread evenly over the order (callers sort by probability). `uniform`
    in [0, 1). A sum between integers gives one of the two. Whether two are kept is not independent:
    chances of pairs may be 0. Survival counts to a part in TICKS. ValueError for a survival outside
    [0, 1], a uniform outside [0, 1), an order that is none.
    """
    if not all(0 <= s <= 1 for s in survival_G) or not 0 <= uniform < 1:
        raise ValueError(f"need survival in [0, 1], uniform in [0, 1), got {survival_G}, {uniform}")
    if sorted(order_G) != list(range(len(survival_G))):
        raise ValueError(f"not an order of {len(survival_G)}: {list(order_G)}")
    start = int(uniform * TICKS)
    kept_G = [False] * len(survival_G)
    end, picks = Fraction(0), 0
    for index in order_G:
        end += Fraction(survival_G[index]) * TICKS  # exact: a survival of 1 holds one pick, always
        before, picks = picks, -((start - round(end)) // TICKS)
        kept_G[index] = picks > before
    return kept_G


def independent(survival_G: Sequence[float], uniforms_G: Sequence[float]) -> list[bool]:
    """Who is kept, `[G]`, each on its own: uniform (in [0, 1)) below survival."""
    return [u < s for s, u in zip(survival_G, uniforms_G, strict=True)]


def balanced(probabilities_G: Sequence[float], keep: int, ratio: float) -> list[bool]:
    """The kept, `[G]`: some lowest and `keep - some` highest, with mean nearest to `ratio`.

    Ties go to earlier rollouts, and to fewer lowest ones. Not random, so nothing corrects for it.
    keep >= G keeps all; ValueError for keep < 1.
    """
    sums = _sums_of_ends(probabilities_G, keep)
    if sums is None:
        return [True] * len(probabilities_G)
    return _ends(probabilities_G, keep, _first(-np.abs(sums / keep - ratio)))


def widest(rewards_G: Sequence[float], keep: int) -> list[bool]:
    """The kept, `[G]`: those `keep` whose rewards vary most, PODS, arXiv 2504.13818.

    Some lowest and `keep - some` highest, its theorem; O(G log G). Ties as in `balanced`.
    keep >= G keeps all; ValueError for keep < 1.
    """
    values = np.asarray(rewards_G, dtype=np.float64)
    centred = values - values.mean() if len(values) else values
    sums = _sums_of_ends(centred.tolist(), keep)
    if sums is None:
        return [True] * len(values)
    squares = _sums_of_ends(centred.tolist(), keep, power=2)
    assert squares is not None
    return _ends(rewards_G, keep, _first(squares / keep - (sums / keep) ** 2))


def _sums_of_ends(values_G: Sequence[float], keep: int, power: int = 1) -> np.ndarray | None:
    """Sum of values ** power over i lowest and keep - i highest, i = 0 .. keep. None: all kept."""
    if keep < 1:
        raise ValueError(f"need keep >= 1, got {keep}")
    if keep >= len(values_G):
        return None
    below = np.concatenate([[0.0], np.cumsum(np.sort(values_G) ** power)])
    lowest = np.arange(keep + 1)
    return below[lowest] + below[-1] - below[len(values_G) - keep + lowest]


def _first(scores: np.ndarray) -> int:
    """The first of the highest, with rounding counted as equal."""
    slack = 1e-12 * float(np.abs(scores).max())
    return int(np.argmax(scores >= scores.max() - slack))


def _ends(values_G: Sequence[float], keep: int, lowest: int) -> list[bool]:
    """That many lowest and the rest of keep highest; among equal values the earlier ones."""
    ordered = sorted(range(len(values_G)), key=lambda i: values_G[i])
    low = ordered[:lowest]
    left = sorted(ordered[lowest:], key=lambda i: -values_G[i])
    chosen = {*low, *left[: keep - lowest]}
    return [i in chosen for i in range(len(values_G))]
