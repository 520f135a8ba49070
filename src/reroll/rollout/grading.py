"""Rollouts to the graders and grades back, without keeping the engine waiting."""

from collections.abc import Callable, Sequence

from reroll.rollout.collected import CollectSpec, Graders, grade_job
from reroll.rollout.decisions import GradeRule
from reroll.tasks.pool import Grade
from reroll.types import Rollout


class Grading:
    """Owns the rollouts whose grades have been asked for.

    decode: token ids to text, special tokens left out. known: what need not be asked for.
    """

    def __init__(
        self,
        graders: Graders,
        decode: Callable[[list[int]], str],
        spec: CollectSpec,
        known: GradeRule,
    ) -> None:
        self.graders, self.decode, self.spec, self.known = graders, decode, spec, known
        self._asked: dict[int, Rollout] = {}
        """by request id"""

    def ask(self, rollout: Rollout) -> int:
        """A rollout has ended; returns its tokens if its grade was known already, else 0."""
        completion = rollout.completion
        rollout.text = self.decode(completion.token_ids)
        if (known := self.known(rollout)) is None:
            self._asked[completion.request_id] = rollout
            self.graders.submit(grade_job(rollout, completion.request_id, self.spec))
            return 0
        rollout.reward, rollout.rewards = known
        return rollout.drawn

    def take(self) -> None:
        """Fill in the grades that have come."""
        self._fill(self.graders.poll())

    def wait(self) -> None:
        """Fill in all grades that are due."""
        while self.graders.pending:
            self._fill(self.graders.poll(wait=True))

    def _fill(self, grades: Sequence[Grade]) -> None:
        for grade in grades:
            rollout = self._asked.pop(grade.id)
            rollout.reward, rollout.rewards = grade.reward, grade.rewards or {}
            rollout.failure, rollout.seconds_grading = grade.failure, grade.seconds
