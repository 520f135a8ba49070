"""Chain sums whose replies have a long tail of lengths: problems and their grader.

The demo policy's replies grow with the terms of a sum. Here a sum has k of 3 to 20 terms with
chance in proportion to 1 / k^2: half of them have 3 or 4, one in seventeen 15 or more.
"""

import json
import random
import re
from pathlib import Path

from reasoning_gym.factory import create_dataset

TERMS = range(3, 21)
_SAID = re.compile(r"so (-?\d+)$")


def write_problems(path: Path, count: int, seed: int) -> None:
    """A JSONL file of `count` sums, {"prompt", "answer"} a line."""
    chance = [1 / terms**2 for terms in TERMS]
    drawn = random.Random(seed).choices(TERMS, chance, k=count)
    of = {
        terms: create_dataset(
            "chain_sum", seed=seed * 1_000_003 + terms * 10_007, size=count,
            min_terms=terms, max_terms=terms, min_digits=2, max_digits=2,
        )
        for terms in TERMS
    }  # fmt: skip
    with path.open("w", encoding="utf-8") as file:
        for index, terms in enumerate(drawn):
            entry = of[terms][index]
            line = {"prompt": f"{entry['metadata']['expression']} =", "answer": entry["answer"]}
            file.write(json.dumps(line) + "\n")


def score(prompt: str, completion: str, answer: str | None, **columns: object) -> float:
    """1 if the reply ends by saying the answer."""
    said = _SAID.search(completion)
    return float(said is not None and said[1] == answer)
