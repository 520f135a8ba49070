"""Sums that have to be written down after customs of their own, and a policy that can sum.

    12b - 5b + 33b =
    steps: 12-5=7, 7+33=40; so 40

Each step may end with a semicolon or a comma, and each problem has a custom that says which, step
by step; nothing but a reward tells it. The policy writes either with the same chance, so a
derivation of m steps has a chance of 2^-m that is known beforehand, times that of summing right.
What one problem wants says nothing about another, and is wrong for it at every second step: a
stand-in for problems that each need an idea of their own. The letter behind the numbers means
nothing; held-out problems are those of the training split with other letters.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reasoning_gym

from bench.taught import taught
from recipes import demo_policy

LETTERS, OTHERS = "abcd", "efgh"
"""of training and of held-out problems"""
LONGEST = 10
"""terms"""
STEPS, SEED = 700, 79
Custom = list[bool]
"""of each step: whether it ends with a comma"""


def some_custom(rng: random.Random) -> Custom:
    """One as good as any other."""
    return [rng.random() < 0.5 for _ in range(LONGEST - 1)]


def lettered(expression: str, letter: str) -> str:
    """What the policy is asked."""
    numbers = (f"{word}{letter}" if word.isdigit() else word for word in expression.split(" "))
    return f"{' '.join(numbers)} =\n"


def worked(expression: str, custom: Custom) -> str:
    """The derivation of `expression` after a custom."""
    first, *rest = expression.split(" ")
    total, steps = int(first), []
    for sign, term, comma in zip(rest[::2], rest[1::2], custom, strict=False):
        left = f"{total}{sign}{term}"
        total += int(f"{sign}{term}")
        steps.append(f"{left}={total}{',' if comma else ';'} ")
    return f"steps: {''.join(steps)}so {total}"


def accustomed(prompt: str, completion: str, answer: str, **columns: Any) -> float:
    """1 if every step is right, goes on from the one before, and ends as the problem wants it."""
    return float(completion.strip() == worked(columns["expression"], columns["custom"]))


def write_problems(folder: Path, count: int, seed: int) -> tuple[Path, Path]:
    """JSONL files of both splits: the same problems with other letters."""
    made = list(
        reasoning_gym.create_dataset(
            "chain_sum", seed=seed, size=count, min_terms=LONGEST, max_terms=LONGEST, min_digits=2,
            max_digits=2,
        )
    )  # fmt: skip
    rng = random.Random(f"customs {seed}")
    wanted = [some_custom(rng) for _ in made]
    paths = folder / f"custom-{seed}.jsonl", folder / f"custom-{seed}-held-out.jsonl"
    for path, letters in zip(paths, (LETTERS, OTHERS), strict=True):
        rows = [
            {
                "prompt": lettered(problem["metadata"]["expression"], rng.choice(letters)),
                "answer": problem["answer"],
                "expression": problem["metadata"]["expression"],
                "custom": custom,
            }
            for problem, custom in zip(made, wanted, strict=True)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def custom_policy() -> str:
    """The folder of the policy; made when it is not there."""

    def write(style: str, expression: str, rng: random.Random) -> str:
        return worked(expression, some_custom(rng))

    def lessons(tokenizer: Any) -> Iterator[tuple[list[int], int]]:
        rng = random.Random(SEED)
        for ids, length in demo_policy.lessons(
            SEED, (2, LONGEST), {"steps": 1.0}, tokenizer, write
        ):
            expression = tokenizer.decode(ids[:length]).removesuffix(" =\n")
            asked = lettered(expression, rng.choice(LETTERS + OTHERS))
            prompt = tokenizer.encode(asked, add_special_tokens=False)
            yield [*prompt, *ids[length:]], len(prompt)

    return taught("custom", lessons, STEPS, SEED)
