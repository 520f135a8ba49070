"""Which prompts come next: epochs of a seeded shuffle, a function of the place in the stream."""

from collections.abc import Sequence

import numpy as np

from reroll.types import Prompt


def stream(
    start: int, count: int, prompts: Sequence[Prompt], seed: int
) -> tuple[list[Prompt], list[int]]:
    """(prompts, visits) of `count` places of the endless stream, from place `start`.

    Every prompt comes once an epoch, in an order drawn from (seed, epoch); `visit` is the epoch.
    A batch may span the end of one epoch and the beginning of the next.
    """
    chosen, visits = [], []
    orders: dict[int, np.ndarray] = {}
    for index in range(start, start + count):
        epoch, place = divmod(index, len(prompts))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        chosen.append(prompts[orders[epoch][place]])
        visits.append(epoch)
    return chosen, visits
