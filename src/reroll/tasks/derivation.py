"""A grader of whole derivations, for sums: the answer alone may be a lucky guess.

Of old successes at problems that are hard, many are right in the end and wrong inside: two slips
that cancel, a guess that hit. Such a one teaches its slips when rollouts are started from it.

    expression   12 - 5 + 33
    right        steps: 12-5=7; 7+33=40; so 40        a step a line will do as well
    wrong        12-5=8; 8+33=40; so 40               a step is wrong
    wrong        12-5=7; 8+33=41; so 41               a step does not go on from the one before
    wrong        12-5=7; so 40                        not complete
"""

import re
from typing import Any

_STEP = re.compile(r"\s*(-?\d+)((?:\s*[+-]\s*\d+)+)\s*=\s*(-?\d+)\s*\.?\s*")
_TERM = re.compile(r"([+-])\s*(\d+)")
_LABEL = re.compile(r"\s*[A-Za-z]+\s*:")


def derivation(prompt: str, completion: str, answer: str | None, columns: dict[str, Any]) -> float:
    """1 for a chain of steps that are all right, each going on from the one before, that takes in
    every term of `columns["expression"]` in its order and ends with `so ANSWER`; else 0.

    Raises KeyError for a task whose problems have no expression.
    """
    first, terms = _parse(columns["expression"])
    body, so, said = completion.rpartition("so ")
    if not so or not re.fullmatch(r"-?\d+\s*\.?\s*", said):
        return 0.0
    total, used = first, 0
    for line in re.split(r"[;\n]", _LABEL.sub("", body, count=1)):
        if not line.strip():
            continue
        step = _STEP.fullmatch(line)
        if step is None or int(step[1]) != total:
            return 0.0
        taken = [(sign, int(term)) for sign, term in _TERM.findall(step[2])]
        if taken != terms[used : used + len(taken)]:
            return 0.0
        used += len(taken)
        total += sum(term if sign == "+" else -term for sign, term in taken)
        if int(step[3]) != total:
            return 0.0
    return float(used == len(terms) and int(said.strip().rstrip(".")) == total)


def _parse(expression: str) -> tuple[int, list[tuple[str, int]]]:
    """First term, and the others with their signs."""
    start = re.match(r"\s*(-?\d+)", expression)
    if start is None:
        raise ValueError(f"derivation: {expression!r} is not a sum")
    rest = expression[start.end() :]
    terms = [(sign, int(term)) for sign, term in _TERM.findall(rest)]
    if _TERM.sub("", rest).strip():
        raise ValueError(f"derivation: {expression!r} is not a sum of whole numbers")
    return int(start[1]), terms
