"""What a schedule made of the engine's time: figures of a batch, real or simulated.

docs/glossary.md has each name. Seconds are whatever the engine's clock counts.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from reroll.engine.base import Stats
from reroll.rollout.collected import Collected
from reroll.train.metrics import OLDEST
from reroll.types import Group
from reroll.versions import runs


def schedule_metrics(
    collected: Collected, before: Stats, after: Stats, seconds: float, version: int
) -> dict[str, float]:
    """Figures of one batch.

    before, after: the engine's counters around it. seconds: of collecting it, on its clock.
    version: the policy's, which the batch is trained from.
    """
    trained = _lengths(collected.trained())
    tokens, every = sum(trained), sum(_lengths(collected.groups))
    busy = after.slot_seconds - before.slot_seconds
    clock = after.clock - before.clock
    resumed = after.tokens_resumed - before.tokens_resumed
    return {
        "goodput": tokens / max(seconds, 1e-12),
        "bubble": 1 - busy / (after.capacity * clock) if clock else 0.0,
        "waste": 1 - tokens / max(1, every + collected.tokens_dropped),
        "reprefill": resumed / max(1, tokens),
        "length_bias": length_bias(trained, collected.cut, collected.lost),
        "wait": fmean(collected.waits) if collected.waits else 0.0,
        "wait_max": float(max(collected.waits, default=0)),
        "restarts": float(collected.restarts),
        **oldest(collected.trained(), version),
    }


def lag_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """The trained tokens by lag, under the names that the trainer gives them (`train/metrics.py`),
    for a simulated run. Given tokens are left out."""
    tokens: Counter[int] = Counter()
    for group in groups:
        for rollout in group.rollouts:
            for written, count in runs(rollout.completion.versions):
                tokens[version - written if written >= 0 else 0] += count
    every = max(1, tokens.total())
    shares = Counter[int]()
    for lag, count in tokens.items():
        shares[min(lag, OLDEST)] += count
    stale = (every - tokens[0]) / every if tokens else 0.0
    return {"offpolicy_tokens": stale} | {
        f"tokens_lag_{lag}": shares[lag] / every for lag in sorted(shares) if stale
    }


def oldest(groups: Sequence[Group], version: int) -> dict[str, float]:
    """The largest lag of a token, in policy versions, and the most versions in one rollout."""
    lag = span = 0
    for group in groups:
        for rollout in group.rollouts:
            written = {v for v, _ in runs(rollout.completion.versions) if v >= 0}
            lag = max(lag, version - min(written, default=version))
            span = max(span, len(written))
    return {"lag_max": float(lag), "versions_max": float(span)}


def length_bias(trained: Sequence[int], cut: Sequence[int], lost: Sequence[int] = ()) -> float:
    """Mean length of what is trained on, over that of all that came to an end, or was dropped.

    cut: how far those had come that were dropped: their lengths are censored there, and the mean is
    that of the Kaplan-Meier estimate, up to the longest seen. lost: those that had ended. What is
    kept will be trained on. 1: no bias.
    """
    if not trained:
        return 1.0
    mine = sum(trained) / len(trained)
    ends = np.sort(np.asarray([*trained, *lost], float))
    times = np.concatenate([ends, np.asarray(cut, float)])
    moments, died = np.unique(ends, return_counts=True)
    # at risk at a moment: everything that came at least so far
    at_risk = len(times) - np.searchsorted(np.sort(times), moments, side="left")
    survival = np.concatenate([[1.0], np.cumprod(1 - died / at_risk)])
    stops = np.concatenate([[0.0], moments, [max(times.max(), moments[-1])]])
    mean = float((survival * np.diff(stops)).sum())
    return mine / mean if mean else 1.0


def _lengths(groups: Sequence[Group]) -> list[int]:
    return [r.drawn for group in groups for r in group.rollouts]
