"""Successes made into traces, wherever they come from."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reroll.rollout.traces import Trace, problem_hash, trace_id
from reroll.types import Rollout

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Origin:
    """What traces say of their writer; fields as in `Trace`."""

    sampling: str
    model: str
    tokenizer: str
    graders: str


def trace_of(
    rollout: Rollout, decode: Decode, origin: Origin, source: str, attempt: int, flops: float
) -> Trace:
    """A graded success as a trace."""
    problem, ids = problem_hash(rollout.prompt), tuple(rollout.completion.token_ids)
    assert rollout.reward is not None
    return Trace(
        id=trace_id(problem, ids),
        row=rollout.prompt.row,
        problem=problem,
        token_ids=ids,
        text=rollout.text,
        answer_at=answer_place(ids, rollout.prompt.answer, decode),
        source=source,
        attempt=attempt,
        attempts=attempt + 1,
        sampling=origin.sampling,
        model=origin.model,
        tokenizer=origin.tokenizer,
        graders=origin.graders,
        reward=rollout.reward,
        flops=flops,
    )


def answer_place(ids: Sequence[int], reference: str | None, decode: Decode) -> int:
    """Tokens of a trace before its answer begins: the reference as a word of its own; all of them
    if it never stands there."""
    begins = _answer_begins(decode(list(ids)), reference)
    if begins is None:
        return len(ids)
    low, high = 0, len(ids)  # the most tokens whose text ends by there
    while low < high:
        middle = (low + high + 1) // 2
        if len(decode(list(ids[:middle]))) <= begins:
            low = middle
        else:
            high = middle - 1
    return low


def _answer_begins(text: str, reference: str | None) -> int | None:
    answer = (reference or "").rpartition("####")[2].strip()
    if not answer:
        return None
    word = re.search(rf"(?<![\w-]){re.escape(answer)}(?!\w)", text)
    return word and word.start()
