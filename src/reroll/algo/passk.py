"""Evaluation statistics over several samples of a problem: pass@k, maj@k, intervals."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is correct, 1 - C(n-c, k) / C(n, k).

    Codex, arXiv 2107.03374, eq. 1. Raises ValueError for k > samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"need 0 <= correct <= samples and 1 <= k <= samples, got {correct}, {samples}, {k}"
        )
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Whether the commonest answer is correct (maj@k of arXiv 2203.11171), ties shared out.

    answers: extracted answers, None where there was none (never the majority).
    """
    return vote_at_k(answers, [1.0] * len(answers), correct)


def vote_at_k(
    answers: Sequence[str | None], weights: Sequence[float], correct: Sequence[bool]
) -> float:
    """Whether the answer with the greatest sum of weights is correct, ties shared out.

    weights: of each answer, 0 or more; as calibrated chances of success they are ARRoL's vote at
    test time (arXiv 2603.24840). answers: as in `majority_at_k`.
    """
    assert len(answers) == len(weights) == len(correct)
    sums: defaultdict[str, float] = defaultdict(float)
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            sums[answer] += weight
    if not sums:
        return 0.0
    top = max(sums.values())
    tied = [answer for answer, total in sums.items() if total >= top * (1 - 1e-12)]
    right = dict(zip(answers, correct, strict=True))
    return sum(right[answer] for answer in tied) / len(tied)


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over problems (Efron 1979), from a fixed seed."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return (float("nan"), float("nan"))
    picks = np.random.default_rng(seed).integers(len(array), size=(draws, len(array)))
    means = array[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
