"""What techniques decide about a rollout, and the null decisions that make the plain loop.

Each decision is a function; `collect` asks it at one moment of a rollout's life.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from reroll.engine.base import Probed
from reroll.rollout.unit import Member, Unit
from reroll.types import Draft, Lenience, Prompt, Rollout, Watch

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


Earned = Callable[[Rollout], float | None]
"""a rollout that has ended -> the reward that it will be trained on; None: ungraded"""


class Pruning(Protocol):
    """Which members of a unit are stopped on their way; see `rollout/prune.py`."""

    def watch(self, prompt: Prompt) -> Watch | None:
        """Where the members of a unit of this prompt that is opened now are probed."""
        ...

    def see(self, member: Member, probed: Probed) -> None:
        """A member came to a probe."""
        ...

    def ended(self, member: Member) -> None:
        """A member ended by itself."""
        ...

    def due(self, unit: Unit) -> bool:
        """Whether a unit is to be judged now."""
        ...

    def decide(self, unit: Unit, earned: Earned) -> list[Member]:
        """Judge it, once the grades due are there: those of its members that are left out."""
        ...

    def more(self, unit: Unit, stopped: int) -> int:
        """Members to start in place of so many that were stopped."""
        ...

    def learn(self, units: Sequence[Unit]) -> None:
        """What came of a batch, graded and settled."""
        ...


class StopsNone:
    """The part of `Pruning` that decides, for what only looks."""

    def ended(self, member: Member) -> None:
        """Nothing to do."""

    def due(self, unit: Unit) -> bool:
        """Never."""
        return False

    def decide(self, unit: Unit, earned: Earned) -> list[Member]:
        """Nobody is left out."""
        return []

    def more(self, unit: Unit, stopped: int) -> int:
        """No more."""
        return 0

    def learn(self, units: Sequence[Unit]) -> None:
        """Nothing."""


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
    prune: Pruning | None = None
    """None: nothing is pruned"""
    stagger: bool = False
    """submit one sample of each prompt after the other where there are no drafts, so that what
    finishes first can be a draft for its siblings"""


NOTHING = Decisions()
"""no technique decides anything"""
