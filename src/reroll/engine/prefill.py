"""Prefill and verification: what is given runs through the model, and the draft behind it with it.

One forward serves many requests; those with the same tokens (a group's prompt) share a row. The
sampler's own choice, under each request's own noise, is drawn at the last given token and at every
draft token; what agrees is kept, and the first choice that does not is the next token anyway.
"""

from collections import deque
from collections.abc import Iterator

import torch

from reroll.algo.accept import lossless
from reroll.algo.sample import Drawn
from reroll.engine.base import Probed
from reroll.engine.runner import Prefilled, Runner, make_law, take
from reroll.engine.sequence import Sequence


def next_rows(waiting: deque[Sequence], max_tokens: int, max_rows: int) -> list[list[Sequence]]:
    """Take requests for one forward off the queue, in order, grouped into rows of equal tokens.

    The padded forward has at most `max_tokens` tokens in `max_rows` rows; a longer row runs alone.
    """
    rows: dict[tuple[int, tuple[int, ...]], list[Sequence]] = {}
    longest = 0
    while waiting:
        tokens = waiting[0].tokens_to_prefill()
        key = (waiting[0].given, tokens)
        if key not in rows and rows:
            width = max(longest, len(tokens))
            if len(rows) == max_rows or (len(rows) + 1) * width > max_tokens:
                break
        longest = max(longest, len(tokens))
        rows.setdefault(key, []).append(waiting.popleft())
    return list(rows.values())


def prefill(
    runner: Runner, rows: list[list[Sequence]], version: int
) -> Iterator[tuple[Sequence, list[Probed]]]:
    """Run the rows; each sequence takes what was drawn for it and remembers its row.

    Yields the sequences in order with the probe events of the positions they passed.
    """
    leaders = [row[0] for row in rows]
    hidden = any(s.request.probe_at for row in rows for s in row)
    prefilled = runner.prefill(
        [s.tokens_to_prefill() for s in leaders], [s.given for s in leaders], hidden
    )
    sequences = [(index, s) for index, row in enumerate(rows) for s in row]
    drawn, accepted = _verify(runner, prefilled, sequences)
    streams = [stream.tolist() for stream in drawn]
    at = 0
    for (index, sequence), kept in zip(sequences, accepted, strict=True):
        tokens, logprobs, behaviour = (stream[at : at + kept + 1] for stream in streams)
        at += len(sequence.draft) + 1
        states = None if prefilled.hidden is None else prefilled.hidden[prefilled.first[index] :]
        events = probes(sequence, states, len(sequence.completion.token_ids), kept + 1)
        sequence.take_verified(tokens, logprobs, behaviour, version)
        sequence.source = (prefilled.cache, index)
        yield sequence, events


def _verify(
    runner: Runner, prefilled: Prefilled, sequences: list[tuple[int, Sequence]]
) -> tuple[Drawn, list[int]]:
    """The sampler's own choice at every draft position, and how much of each draft it is."""
    device = runner.device
    counts = [len(s.draft) + 1 for _, s in sequences]
    width = max(counts)
    offset = torch.arange(width, device=device)
    size = torch.tensor(counts, device=device)
    inside = offset < size[:, None]
    first = torch.tensor([prefilled.first[index] for index, _ in sequences], device=device)
    begin = torch.tensor([len(s.completion.token_ids) for _, s in sequences], device=device)
    law = make_law([s.request for _, s in sequences], device)
    which = torch.arange(len(sequences), device=device).repeat_interleave(size)
    logits = prefilled.logits[(first[:, None] + offset)[inside]]
    drawn = runner.draw(logits, (begin[:, None] + offset)[inside], take(law, which))
    if width == 1:
        return drawn, [0] * len(sequences)
    choices = torch.zeros(inside.shape, dtype=torch.long, device=device)
    choices[inside] = drawn.tokens
    drafts = [[*s.draft, *[0] * (width - len(s.draft))] for _, s in sequences]
    accepted = lossless(torch.tensor(drafts, device=device)[:, :-1], choices[:, :-1], size - 1)
    return drawn, accepted.tolist()


def probes(sequence: Sequence, states: torch.Tensor | None, begin: int, drawn: int) -> list[Probed]:
    """Probe events among the forwards that drew tokens begin, ..., begin + drawn - 1.

    `states[i]` is the hidden state from which token begin + i was drawn, that is, after reading
    begin + i completion tokens.
    """
    if states is None:
        return []
    return [
        Probed(sequence.request.id, position, states[position - begin].clone())
        for position in sequence.request.probe_at
        if begin <= position < begin + drawn
    ]
