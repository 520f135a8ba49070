"""From the score of a rollout that still runs to its chance of success, learnt along the way.

The head that scores prefixes drifts as it and the policy learn, and its claims are never quite
right; counting what came of earlier scores is (online posteriors of bins of the score, as pruning
in ARRoL, arXiv 2603.24840, uses them; bins, prior and decay are ours). `N` scores.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression


class Bins:
    """Posterior success rates of equal bins of the score, joined to a rising curve.

    Scores are log-odds (natural logarithm), clamped to [low, high]. A bin starts from `prior`
    rollouts at its centre that did just what the score says; those never fade. The posteriors are
    made monotone (weighted isotonic regression, Ayer et al. 1955) and interpolated between the
    mean scores of the bins, level outside. ValueError unless low < high and width, prior > 0.
    """

    def __init__(
        self, low: float = -6.0, high: float = 6.0, width: float = 0.5, prior: float = 4.0
    ) -> None:
        if not (low < high and width > 0 and prior > 0):
            raise ValueError(f"need low < high, width > 0, prior > 0: {low, high, width, prior}")
        bins = max(1, round((high - low) / width))
        self.low, self.high, self.prior = low, high, prior
        self.centres = low + (np.arange(bins) + 0.5) * (high - low) / bins
        self.counts, self.successes, self.scores = np.zeros((3, bins))
        """decayed sums over each bin's rollouts: weights, weights x outcome, weights x score"""
        self._curve: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, score: float, outcome: float, weight: float = 1.0) -> None:
        """Count a rollout: its score then, what came of it.

        outcome: in [0, 1]. weight: 1 / the chance to learn the outcome, where that was not sure.
        ValueError for an outcome outside, a weight below 0, a score that is no finite number.
        """
        if not (0 <= outcome <= 1 and 0 <= weight < math.inf and math.isfinite(score)):
            raise ValueError(f"cannot count score {score}, outcome {outcome}, weight {weight}")
        score = min(max(score, self.low), self.high)
        place = int((score - self.low) / (self.high - self.low) * len(self.centres))
        place = min(place, len(self.centres) - 1)
        self.counts[place] += weight
        self.successes[place] += weight * outcome
        self.scores[place] += weight * score
        self._curve = None

    def decay(self, factor: float) -> None:
        """All that has been counted counts `factor` (0 to 1) of what it did."""
        if not 0 <= factor <= 1:
            raise ValueError(f"decay {factor} is not in [0, 1]")
        for sums in (self.counts, self.successes, self.scores):
            sums *= factor
        self._curve = None

    def probability(self, score: float) -> float:
        """Chance of success at this score, strictly between 0 and 1, never falling in it."""
        return self.probabilities([score])[0]

    def probabilities(self, scores_N: Sequence[float]) -> list[float]:
        """The same for several scores, `[N]`."""
        if self._curve is None:
            self._curve = self._fit()
        return np.interp(np.asarray(scores_N, dtype=np.float64), *self._curve).tolist()

    def _fit(self) -> tuple[np.ndarray, np.ndarray]:
        """(score, probability) of each bin."""
        sizes = self.counts + self.prior
        claims = 1 / (1 + np.exp(-self.centres))
        rates = (self.successes + self.prior * claims) / sizes
        rising = np.asarray(isotonic_regression(rates, weights=sizes).x)
        return (self.scores + self.prior * self.centres) / sizes, rising

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain lists."""
        return {
            "counts": self.counts.tolist(),
            "successes": self.successes.tolist(),
            "scores": self.scores.tolist(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; ValueError if that had other bins."""
        loaded = [np.array(state[name], float) for name in ("counts", "successes", "scores")]
        if any(sums.shape != self.centres.shape for sums in loaded):
            raise ValueError(f"the state is not of {len(self.centres)} bins")
        self.counts, self.successes, self.scores = loaded
        self._curve = None
