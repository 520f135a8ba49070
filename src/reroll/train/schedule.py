"""Learning rate over a run: linear warm-up, then decay towards 0 at the end."""

import math

from reroll.config import TrainSection


def schedule(train: TrainSection, taken: int, batches: int) -> float:
    """Share of the peak rate after `taken` optimizer steps of a run over that many batches."""
    warm = min(1.0, (taken + 1) / train.warmup) if train.warmup else 1.0
    total = batches * train.epochs * train.minibatches
    done = min(1.0, max(0, taken - train.warmup) / max(1, total - train.warmup))
    left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return warm * left[train.decay]
