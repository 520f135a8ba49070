"""Where watched requests are probed: events with the states that tokens were drawn from."""

from collections.abc import Iterable, Sequence

import torch

from reroll.engine.base import Probed
from reroll.engine.sequence import Sequence as Running
from reroll.types import Watch

LAST = -1
"""the place of a rollout's end"""


def wants_hidden(sequences: Sequence[Running]) -> bool:
    """Whether any of them is to be reported with hidden states."""
    return any(s.request.watch is not None and s.request.watch.hidden for s in sequences)


def probes(
    sequence: Running, states: torch.Tensor | None, begin: int, drawn: int
) -> Iterable[Probed]:
    """Probe events among the forwards that drew its tokens begin, ..., begin + drawn - 1.

    states: `[drawn, H]`, that from which each of them was drawn, that is, after reading as many
    completion tokens as stand before it; None: nobody wants any.
    """
    watch, end = sequence.request.watch, begin + drawn
    if watch is None or drawn <= 0:
        return ()
    last = watch.last and sequence.finished
    if not (last or watch.steps or any(begin <= at < end for at in watch.at)):
        return ()  # nearly always
    tokens = sequence.completion.token_ids
    found = [
        _event(sequence, states, begin, position, position, place)
        for position in range(begin, end)
        for place in _places(watch, tokens, position)
    ]
    if last:
        found.append(_event(sequence, states, begin, end - 1, len(tokens), LAST))
    return found


def _event(
    sequence: Running, states: torch.Tensor | None, begin: int, position: int, read: int, place: int
) -> Probed:
    request, done = sequence.request, sequence.completion
    hidden = request.watch is not None and request.watch.hidden
    return Probed(
        request.id,
        position,
        states[position - begin].clone() if hidden and states is not None else None,
        done.token_ids[:read],
        done.logprobs[:read],
        done.entropies[:read],
        place,
        last=place == LAST,
    )


def _places(watch: Watch, tokens: list[int], position: int) -> list[int]:
    """Which of a watch's places this is, after reading so many of the tokens."""
    found = [place for place, at in enumerate(watch.at) if at == position]
    if watch.steps and position and tokens[position - 1] in watch.step_ids:
        count = sum(token in watch.step_ids for token in tokens[:position])
        found += [len(watch.at) + i for i, nth in enumerate(watch.steps) if nth == count]
    return found
