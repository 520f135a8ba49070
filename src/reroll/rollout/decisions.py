"""What techniques decide about a rollout, and the null decisions that make the plain loop.

Each decision is a function; `collect` asks it at one moment of a rollout's life.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reroll.types import Draft, Lenience, Prompt, Rollout

RESTART = 1 << 32
"""added to a rollout's visit in its noise key each time it is started anew, far above any epoch"""


class Start(NamedTuple):
    """How one rollout starts."""

    key_visit: int
    """the visit that its noise key is made with"""
    drafts: tuple[Draft, ...] = ()
    lenience: Lenience | None = None


class Graded(NamedTuple):
    """A grade that need not be asked for."""

    reward: float
    rewards: dict[str, float]


StartRule = Callable[[Prompt, int, int], Sequence[Start]]
"""(prompt, visit, samples) -> how each sample starts"""
GradeRule = Callable[[Rollout], Graded | None]
"""a finished rollout -> its grade, if that is known already"""


def start_plainly(prompt: Prompt, visit: int, samples: int) -> list[Start]:
    """The null decision: noise of this visit, no drafts."""
    return [Start(visit)] * samples


def grade_everything(rollout: Rollout) -> None:
    """The null decision: nothing is known."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """What one collect asks its techniques."""

    start: StartRule = start_plainly
    grade: GradeRule = grade_everything
    stagger: bool = False
    """submit one sample of each prompt after the other where there are no drafts, so that what
    finishes first can be a draft for its siblings"""


NOTHING = Decisions()
"""no technique decides anything"""
