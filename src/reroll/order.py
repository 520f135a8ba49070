"""Which prompts a step gets: epochs of a seeded shuffle, a function of the step alone."""

from collections.abc import Sequence

import numpy as np

from reroll.types import Prompt


def batch_of(
    step: int, size: int, prompts: Sequence[Prompt], seed: int
) -> tuple[list[Prompt], list[int], int]:
    """(prompts, visits, epoch) of training step `step` (from 1).

    Every prompt comes once an epoch, in an order drawn from (seed, epoch); `visit` is the epoch.
    A batch may span the end of one epoch and the beginning of the next.
    """
    chosen, visits = [], []
    orders: dict[int, np.ndarray] = {}
    for index in range((step - 1) * size, step * size):
        epoch, place = divmod(index, len(prompts))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        chosen.append(prompts[orders[epoch][place]])
        visits.append(epoch)
    return chosen, visits, visits[0]
