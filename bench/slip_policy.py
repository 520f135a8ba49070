"""A policy of one style whose every step slips with a known chance: whole sums are rarely right.

It writes sums step by step, gets each step wrong with that chance, and goes on from the wrong
number. A derivation of m steps is right with a chance of (1 - slip)^m, and answers cannot be
guessed; from a prefix of one that was right, only the steps that are left count.
"""

import random
from collections.abc import Iterator
from typing import Any

from bench.taught import taught
from recipes import demo_policy

STEPS, SEED = 240, 78
OFFSET = 10


def slipping(expression: str, slip: float, rng: random.Random) -> str:
    """A solution of `expression`, one operation a step."""
    first, *rest = expression.split(" ")
    total, steps = int(first), []
    for sign, term in zip(rest[::2], map(int, rest[1::2]), strict=True):
        left = f"{total}{sign}{term}"
        total += term if sign == "+" else -term
        if rng.random() < slip:
            total += OFFSET
        steps.append(f"{left}={total}; ")
    return f"steps: {''.join(steps)}so {total}"


def slip_policy(slip: float) -> str:
    """The folder of the policy; made when it is not there."""

    def write(style: str, expression: str, rng: random.Random) -> str:
        return slipping(expression, slip, rng)

    def lessons(tokenizer: Any) -> Iterator[tuple[list[int], int]]:
        return demo_policy.lessons(SEED, (2, 10), {"steps": 1.0}, tokenizer, write)

    return taught(f"slip{round(100 * slip)}", lessons, STEPS, SEED)
