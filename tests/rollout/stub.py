"""Graders without processes: a function of the job, answered when the test says so."""

from collections.abc import Callable, Sequence

from reroll.tasks.pool import Grade, GradeJob


class StubGraders:
    """Stands in for GraderPool. `behind`: jobs kept back until `poll(wait=True)` asks for them.

    judge: text to a reward, or to a string, the reason why it is ungraded.
    """

    def __init__(self, judge: Callable[[str], float | str], behind: int = 0) -> None:
        self.judge, self.behind = judge, behind
        self.jobs: list[GradeJob] = []
        self.polls: list[tuple[bool, int]] = []
        """(wait, how many grades were given) of each call"""
        self._queue: list[GradeJob] = []

    @property
    def pending(self) -> int:
        return len(self._queue)

    def submit(self, job: GradeJob) -> None:
        self.jobs.append(job)
        self._queue.append(job)

    def poll(self, wait: bool = False) -> list[Grade]:
        count = 1 if wait else max(0, len(self._queue) - self.behind)
        # the newest first: grades may come back in any order
        ready, self._queue = self._queue[-count:] if count else [], self._queue[: -count or None]
        self.polls.append((wait, len(ready)))
        return [self._grade(job) for job in reversed(ready)]

    def _grade(self, job: GradeJob) -> Grade:
        verdict = self.judge(job.completion)
        if isinstance(verdict, str):
            return Grade(job.id, None, None, verdict, 0.25)
        return Grade(job.id, {"stub": verdict}, verdict, "", 0.25)


def spell(ids: Sequence[int]) -> str:
    """Token ids as text: a character each."""
    return "".join(chr(ord("0") + i) for i in ids)
