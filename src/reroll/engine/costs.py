"""What a forward costs on this machine: measured once at start, kept with the run, never again.

Which drafts are verified, and how many tokens a tick takes, is decided from this table and from
counted tokens, so a resumed run decides as the run that was not interrupted.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from reroll.errors import UserError

CHUNKS = (1, 2, 4, 8)
"""tokens a slot and tick that are measured, and may be chosen"""

_DECAY = 0.5


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a tick by running sequences and tokens a slot; seconds a token of prefill."""

    batches: tuple[int, ...]
    ticks: tuple[tuple[float, ...], ...]
    """`[batch][chunk]`, chunks as in `CHUNKS`"""
    prefill: float
    """a token of a forward over draft trees"""
    rounded: bool = False
    """whether trees are verified in bfloat16, which was allowed and faster"""

    def tick(self, batch: int, chunk: int = 1) -> float:
        """Seconds of a tick with this many sequences, interpolated."""
        column = [row[CHUNKS.index(chunk)] for row in self.ticks]
        return float(np.interp(batch, self.batches, column))

    def token(self, batch: int) -> float:
        """Seconds of one decoded token at this many running sequences."""
        return self.tick(max(batch, 1)) / max(batch, 1)

    def save(self, path: Path) -> None:
        """Write as JSON, all of it or nothing."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        os.replace(temporary, path)


TYPICAL = Costs(
    batches=(1, 8, 64),
    ticks=((1.0, 1.1, 1.4, 2.0), (1.5, 1.9, 2.7, 4.5), (4.0, 6.0, 10.0, 17.0)),
    prefill=0.03,
)
"""in units of a tick of one sequence, roughly those of a small model on a CPU: for engines that
nobody has measured"""


class Pace:
    """What a decoded token has cost lately, by the table: thin ticks at a batch's end and tokens
    that re-drafting brings included."""

    def __init__(self) -> None:
        self.seconds = self.tokens = 0.0

    def token(self, costs: Costs, slots: int) -> float:
        """Seconds of one token; before anything was decoded, that of full slots."""
        return self.seconds / self.tokens if self.tokens else costs.token(slots)

    def observe(self, seconds: float, tokens: int) -> None:
        """A tick that costs so much by the table has brought so many tokens."""
        self.seconds += seconds
        self.tokens += tokens

    def decay(self) -> None:
        """The policy has changed: let what was counted fade."""
        self.seconds *= _DECAY
        self.tokens *= _DECAY

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"seconds": self.seconds, "tokens": self.tokens}

    def load_state(self, state: dict[str, float]) -> None:
        """Go on from `state()`."""
        self.seconds, self.tokens = state["seconds"], state["tokens"]


def load_costs(path: Path) -> Costs | None:
    """What `save` wrote, or None if there is nothing. Raises UserError for another file."""
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        ticks = tuple(tuple(map(float, row)) for row in saved["ticks"])
        batches, rounded = tuple(map(int, saved["batches"])), bool(saved["rounded"])
        if not batches or [*map(len, ticks)] != [len(CHUNKS)] * len(batches):
            raise ValueError("a row for each batch, a column for each chunk is missing")
        return Costs(batches, ticks, float(saved["prefill"]), rounded)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the table of costs that reroll wrote ({error}); delete it, and it is "
            "measured again"
        ) from None


def best_chunk(
    costs: Costs,
    running: int,
    lengths: Sequence[int],
    rates: Sequence[float],
    chunks: Sequence[int] = CHUNKS,
) -> int:
    """Tokens a slot of the next tick, of these: most expected tokens a second.

    lengths, rates: proposed tokens of each sequence that has any, and the chance that each of
    them is accepted if those before it are.
    """
    length, rate = np.array(lengths), np.array(rates)
    best, most = 1, running / costs.tick(running)
    for chunk in chunks[1:]:
        # the accepted run is geometric: rate + rate^2 + ... up to what is proposed
        reach = np.minimum(length, chunk - 1)
        gained = (rate * (1 - rate**reach) / (1 - rate)).sum()
        speed = (running + gained) / costs.tick(running, chunk)
        if speed > most:
            best, most = chunk, speed
    return best
