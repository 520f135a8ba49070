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


class Stream:
    """The same as a source of prompts for a collector."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self._rows = {prompt.row: prompt for prompt in prompts}

    def __call__(self, start: int, count: int) -> tuple[list[Prompt], list[int]]:
        """`count` places from place `start`."""
        return stream(start, count, self.prompts, self.seed)

    def find(self, row: int, trace: int = 0, cut: int = 0) -> Prompt | None:
        """The prompt of an identity; none has a prefix here."""
        return None if trace else self._rows.get(row)
