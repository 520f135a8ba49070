"""How well scores tell the rollouts of one prompt apart, and how honest probabilities are.

Which prompt it is says most about success, so over all rollouts almost any score looks good.
Pruning within a group gains only from what a score knows beyond that: pairs of one group. `G`
rollouts of a group, `N` rollouts of any.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def within_pairs(scores_G: Sequence[float], rewards_G: Sequence[float]) -> tuple[float, int]:
    """(concordant, pairs) over the pairs of one group that have different rewards.

    concordant: those whose better rollout has the higher score, equal scores counting 1/2. Summed
    over groups, concordant / pairs is the area under the ROC curve within prompts (for one
    group, that of Mann and Whitney 1947); 1/2 is chance.
    """
    scores, rewards = (np.asarray(x, dtype=np.float64) for x in (scores_G, rewards_G))
    assert scores.shape == rewards.shape
    higher = np.sign(np.subtract.outer(scores, scores))
    better = np.subtract.outer(rewards, rewards) > 0
    return float(((higher + 1) / 2)[better].sum()), int(better.sum())


class WithinAuc:
    """The area within prompts over all groups so far, earlier ones fading, with its error."""

    NAMES = ("concordant", "pairs", "groups", "aa", "ab", "bb", "squares")
    """of the sums: weighted by w over groups the first three, by w squared the products a a, a b,
    b b (a concordant, b pairs) and 1. w: what is left of a group's weight."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = dict.fromkeys(self.NAMES, 0.0)

    def add(self, scores_G: Sequence[float], rewards_G: Sequence[float]) -> None:
        """Count a group; one whose rewards are all equal has no pairs and says nothing."""
        a, b = within_pairs(scores_G, rewards_G)
        if b:
            values = (a, b, 1.0, a * a, a * b, b * b, 1.0)
            for name, value in zip(self.NAMES, values, strict=True):
                self.sums[name] += value

    def decay(self, factor: float) -> None:
        """All groups so far count `factor` (0 to 1) of what they did."""
        if not 0 <= factor <= 1:
            raise ValueError(f"decay {factor} is not in [0, 1]")
        for index, name in enumerate(self.NAMES):
            self.sums[name] *= factor if index < 3 else factor**2

    @property
    def auc(self) -> float:
        """Concordant pairs / pairs, in [0, 1]; nan without pairs."""
        pairs = self.sums["pairs"]
        return self.sums["concordant"] / pairs if pairs else math.nan

    @property
    def error(self) -> float:
        """Standard error of `auc`, groups being independent, pairs of one group not.

        That of a ratio of sums (delta method, Cochran 1977, 6.4): root of sum w^2 (a - auc b)^2
        over sum w b, with n / (n - 1) for n = (sum w)^2 / sum w^2 groups. nan below two.
        """
        s, auc = self.sums, self.auc
        count = s["groups"] ** 2 / s["squares"] if s["squares"] else 0.0
        if not s["pairs"] or count <= 1 + 1e-9:
            return math.nan
        squares = max(0.0, s["aa"] - 2 * auc * s["ab"] + auc**2 * s["bb"])
        return math.sqrt(squares * count / (count - 1)) / s["pairs"]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dict(self.sums)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.sums = {name: float(state[name]) for name in self.NAMES}


def calibration_error(
    probabilities_N: Sequence[float],
    outcomes_N: Sequence[float],
    weights_N: Sequence[float] | None = None,
    bins: int = 10,
) -> float:
    """Expected calibration error (arXiv 1706.04599, eq. 3), in units of probability.

    Mean over bins of |mean outcome - mean probability|, each bin counting its share of the weight
    (1 each if None). Equal bins of [0, 1]; what lies outside counts in the first or last. nan
    without weight. Sampling alone makes it positive. ValueError for bins < 1.
    """
    if bins < 1:
        raise ValueError(f"need at least one bin, got {bins}")
    p, outcomes = (np.asarray(x, dtype=np.float64) for x in (probabilities_N, outcomes_N))
    weights = np.ones_like(p) if weights_N is None else np.asarray(weights_N, dtype=np.float64)
    assert p.shape == outcomes.shape == weights.shape
    if not weights.sum():
        return math.nan
    places = np.clip((p * bins).astype(int), 0, bins - 1)
    gaps = np.bincount(places, weights * (outcomes - p), minlength=bins)
    return float(np.abs(gaps).sum() / weights.sum())
