"""A problem as its source has it, before it becomes text for a particular tokenizer."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a source.

    Problem(row=2, where="sums.jsonl: line 3", text="2 + 3 =", answer="5", columns={"level": 1})
    """

    row: int
    """row in its file or split, or index in its generated dataset"""
    where: str
    """how an error message names the row"""
    text: str
    answer: str | None
    columns: dict[str, Any] = field(default_factory=dict)
    """every other column"""


@dataclass(frozen=True, slots=True)
class Problems:
    """What a source yields."""

    train: list[Problem]
    held_out: list[Problem]
    notes: list[str] = field(default_factory=list)
    """one-line remarks for the user"""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name nearest to `name`, if any is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
