"""Where watched requests are probed: events with the states that tokens were drawn from."""

from collections.abc import Iterator, Sequence

import torch

from reroll.engine.base import Probed
from reroll.engine.sequence import Sequence as Running
from reroll.types import Watch


def wants_hidden(sequences: Sequence[Running]) -> bool:
    """Whether any of them is to be reported with hidden states."""
    return any(s.request.watch is not None and s.request.watch.hidden for s in sequences)


def probes(
    sequence: Running, states: torch.Tensor | None, begin: int, drawn: int
) -> Iterator[Probed]:
    """Probe events among the forwards that drew its tokens begin, ..., begin + drawn - 1.

    states: `[drawn, H]`, that from which each of them was drawn, that is, after reading as many
    completion tokens as stand before it; None: nobody wants any.
    """
    watch, done = sequence.request.watch, sequence.completion
    if watch is None or drawn <= 0:
        return

    def event(position: int, read: int, place: int, last: bool = False) -> Probed:
        hidden = states[position - begin].clone() if watch.hidden and states is not None else None
        return Probed(
            sequence.request.id,
            position,
            hidden,
            done.token_ids[:read],
            done.logprobs[:read],
            done.entropies[:read],
            place,
            last,
        )

    for position in range(begin, begin + drawn):
        for place in _places(watch, done.token_ids, position):
            yield event(position, position, place)
    if watch.last and sequence.finished:
        yield event(begin + drawn - 1, len(done.token_ids), -1, last=True)


def _places(watch: Watch, tokens: list[int], position: int) -> list[int]:
    """Which of a watch's places this is, after reading so many of the tokens."""
    found = [place for place, at in enumerate(watch.at) if at == position]
    if watch.steps and position and tokens[position - 1] in watch.step_ids:
        count = sum(token in watch.step_ids for token in tokens[:position])
        found += [len(watch.at) + i for i, nth in enumerate(watch.steps) if nth == count]
    return found
