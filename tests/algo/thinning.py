"""A thinned group that can be enumerated: every prefix, suffix and choice of whom to keep.

One prompt, one token a step. Token 0 of any step but the last ends the rollout, so some rewards are
known before the thinning. A stage follows each step but the last. `V` tokens of a step, `N`
parameters (the logits after each prefix, one block after another), `G` rollouts of a group.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import accumulate, combinations, pairwise, product
from typing import NamedTuple

import numpy as np

from reroll.algo.survive import TICKS, independent, systematic, tilt
from reroll.algo.thinned import Look

Path = tuple[int, ...]


class Group(NamedTuple):
    """One outcome: what the rollouts said before they were dropped or ended."""

    probability: float
    paths: tuple[Path, ...]
    looks: tuple[tuple[Look, ...], ...]


class World:
    """A softmax after each prefix, any reward for each reply, any (wrong) guess for each prefix.

    sizes: tokens to choose from at each step. ends: whether token 0 ends the rollout. Tests may
    overwrite laws, rewards and guesses before they use them.
    """

    def __init__(self, sizes: Sequence[int], seed: int = 0, ends: bool = True) -> None:
        source = random.Random(seed)
        self.depth, self.ends = len(sizes), ends
        self.laws: dict[Path, list[float]] = {}
        self.rewards: dict[Path, float] = {}
        self.guesses: dict[Path, float] = {}
        level: list[Path] = [()]
        for size in sizes:
            for path in level:
                odds = [math.exp(1.5 * (2 * source.random() - 1)) for _ in range(size)]
                self.laws[path] = [x / sum(odds) for x in odds]
            everyone = [(*path, v) for path in level for v in range(size)]
            level = [path for path in everyone if not self.ended(path)]
            for path in everyone:
                if self.ended(path):
                    self.rewards[path] = 0.3 + 2 * source.random() - 1
                else:
                    self.guesses[path] = source.random()
        self.starts, self.parameters = {}, 0
        for path, law in self.laws.items():
            self.starts[path] = self.parameters
            self.parameters += len(law)

    def ended(self, path: Path) -> bool:
        return len(path) == self.depth or (self.ends and len(path) > 0 and path[-1] == 0)

    def guess(self, path: Path) -> float:
        return self.rewards[path] if self.ended(path) else self.guesses[path]

    @cache  # noqa: B019
    def score(self, path: Path, step: int) -> np.ndarray:
        """Gradient of log pi of one token, `[N]`."""
        before, law = path[:step], self.laws[path[:step]]
        gradient = np.zeros(self.parameters)
        start = self.starts[before]
        gradient[start : start + len(law)] = -np.array(law)
        gradient[start + path[step]] += 1
        return gradient

    def chance(self, path: Path) -> float:
        return math.prod(self.laws[path[:step]][path[step]] for step in range(len(path)))

    def value(self, path: Path) -> float:
        """Expected reward after a prefix."""
        if self.ended(path):
            return self.rewards[path]
        return sum(p * self.value((*path, v)) for v, p in enumerate(self.laws[path]))

    def policy_gradient(self) -> np.ndarray:
        """Of the expected reward, `[N]`."""
        return sum(
            self.chance(path) * reward * sum(self.score(path, t) for t in range(len(path)))
            for path, reward in self.rewards.items()
        )


Survival = Callable[[Sequence[Path], Sequence[float]], Sequence[float]]
"""paths of those still running or ended, and their guesses -> survival"""
Drawing = Callable[[Sequence[float], Sequence[float]], Iterator[tuple[float, list[bool]]]]
"""survival and guesses -> every (chance, kept)"""


def tilted(keep: int, ratio: float = 0.5, floor: float = 0.1) -> Survival:
    rule = cache(lambda guesses: tilt(guesses, min(keep, len(guesses)), ratio, floor))
    return lambda paths, guesses: rule(tuple(guesses))


def uniformly(keep: int) -> Survival:
    return lambda paths, guesses: [keep / len(guesses)] * len(guesses)


def by_prefix(table: dict[Path, float]) -> Survival:
    return lambda paths, guesses: [table[path] for path in paths]


def each_alone(survival: Sequence[float], guesses: Sequence[float]):
    """All patterns of independent thinning: two picks of the uniform, weighted, for each."""
    halves = [[(s, s / 2), (1 - s, (1 + s) / 2)] if s < 1 else [(1.0, 0.5)] for s in survival]
    for picks in product(*halves):
        yield math.prod(p for p, _ in picks), independent(survival, [u for _, u in picks])


def spread_out(survival: Sequence[float], guesses: Sequence[float]):
    """All outcomes of systematic sampling, in the order of the guesses."""
    order = sorted(range(len(survival)), key=lambda i: guesses[i])
    yield from over_uniform(survival, order)


def any_subset(survival: Sequence[float], guesses: Sequence[float]):
    """As many as are expected, all choices of them alike."""
    n, keep = len(survival), round(sum(survival))
    for chosen in combinations(range(n), keep):
        yield 1 / math.comb(n, keep), [i in chosen for i in range(n)]


def over_uniform(survival: Sequence[float], order: Sequence[int]):
    """(chance, kept) of each piece of the uniform on which systematic sampling is constant."""
    ends = accumulate(Fraction(survival[i]) for i in order)
    bends = sorted({0.0, 1.0, *(round(end * TICKS) % TICKS / TICKS for end in ends)})
    for low, high in pairwise(bends):
        yield high - low, systematic(survival, order, (low + high) / 2)


def thinned_groups(
    world: World, n: int, survival: Survival | None, draw: Drawing = each_alone
) -> list[Group]:
    """Every outcome of a group of n. No survival: never thinned, no looks."""
    found = []

    def step(t: int, paths: list[Path], looks: list[tuple[Look, ...]], probability: float) -> None:
        alive = [i for i in range(n) if all(look.kept for look in looks[i])]
        if t == world.depth or not alive:
            found.append(Group(probability, tuple(paths), tuple(looks)))
            return
        running = [i for i in alive if not world.ended(paths[i])]
        for tokens in product(*(range(len(world.laws[paths[i]])) for i in running)):
            longer, chance = list(paths), probability
            for i, token in zip(running, tokens, strict=True):
                chance *= world.laws[paths[i]][token]
                longer[i] = (*paths[i], token)
            if survival is None or t + 1 == world.depth:
                step(t + 1, longer, looks, chance)
                continue
            guesses = [world.guess(longer[i]) for i in alive]
            chances = survival([longer[i] for i in alive], guesses)
            for share, kept in draw(chances, guesses):
                after = list(looks)
                for i, guess, s, k in zip(alive, guesses, chances, kept, strict=True):
                    at = longer[i]
                    after[i] = (*after[i], Look(len(at), guess, s, k, world.ended(at)))
                step(t + 1, longer, after, chance * share)

    step(0, [()] * n, [()] * n, 1.0)
    return found


def expected(
    world: World,
    groups: Sequence[Group],
    credit: Callable[[Group, list[float | None]], Sequence[float]],
    weigh: Callable[[Group], tuple[Sequence[Sequence[float]], float]],
) -> np.ndarray:
    """Expectation of sum over kept of advantage x sum over tokens of weight grad log pi, `[N]`.

    credit: a group and its rewards (None for the dropped) -> advantages. weigh: a group -> (weights
    `[G][L]`, what to divide by).
    """
    total = np.zeros(world.parameters)
    for group in groups:
        rewards = [
            world.rewards[path] if all(look.kept for look in looks) else None
            for path, looks in zip(group.paths, group.looks, strict=True)
        ]
        weights, size = weigh(group)
        for path, advantage, row in zip(group.paths, credit(group, rewards), weights, strict=True):
            for t, weight in enumerate(row):
                share = group.probability / size * advantage * weight
                total += share * world.score(path, t)
    return total


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of a from b, in lengths of b."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
