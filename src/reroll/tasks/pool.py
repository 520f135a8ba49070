"""Grader processes beside the engine.

Jobs go in by `submit`, grades come out of `poll` in whatever order they are done; neither waits for
a grader. A job past the time limit, or one that takes its process down, comes back ungraded; its
process is replaced and the jobs behind it are given to others. A reward is a function of the job
alone, but for time-outs: those are written to `timeouts_path` and replayed from it.

Not for threads: one thread submits and polls. Linux and macOS.
"""

import os
import pickle
import time
import weakref
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from types import TracebackType
from typing import Any

from reroll.config import GradingSection, TaskSection
from reroll.errors import UserError
from reroll.tasks.grade import GraderSpec
from reroll.tasks.process import GraderProcess, Parcel
from reroll.tasks.timeouts import Timeouts
from reroll.tasks.worker import Answer

START_SECONDS = 120.0
"""for a process to import its graders"""
MAX_BAD_STARTS = 3
"""in a row, once one has started well"""
POLITE_SECONDS = 1.0
"""for idle processes to end by themselves"""
LOOK_SECONDS = 0.1
"""between two looks at the clock while waiting for grades"""


@dataclass(frozen=True, slots=True)
class GradeJob:
    """One completion to grade."""

    id: int
    name: str
    """identity of the rollout across runs: "train/7/0/1/2f0cc9ab" (purpose, row, sample, visit,
    checksum of the text)"""
    prompt: str
    completion: str
    answer: str | None = None
    columns: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Grade:
    """What became of a job."""

    id: int
    rewards: dict[str, float] | None
    """each grader's number; None: ungraded"""
    reward: float | None
    """weighted sum; None: ungraded"""
    failure: str = ""
    """why it is ungraded: a traceback, "timed out after 10 s", "killed: ...", "died: ..." """
    seconds: float = 0.0


class GraderPool:
    """`grading.workers` processes that run the graders. A context manager; see the module.

    The first process has resolved every grader when the constructor returns. It raises UserError
    if that fails; `poll` does if processes no longer start later on.
    """

    def __init__(
        self,
        graders: list[GraderSpec],
        task: TaskSection,
        grading: GradingSection,
        timeouts_path: Path | None = None,
    ) -> None:
        """Start the processes and wait for the first."""
        self.pending = 0
        """jobs submitted whose grade `poll` has not returned"""
        self._weights = {spec.name: spec.weight for spec in graders}
        self._grading = grading
        self._timeouts = Timeouts(timeouts_path)
        self._queue: deque[Parcel] = deque()
        self._done: list[Grade] = []
        self._bad_starts = MAX_BAD_STARTS - 1  # the first bad start is one too many
        self._setup = pickle.dumps((graders, task, grading.memory_gb, os.getpid()))
        self._processes: list[GraderProcess] = []
        self._end = weakref.finalize(self, _end_all, self._processes)  # also at exit
        try:
            for _ in range(grading.workers):
                self._processes.append(GraderProcess(self._setup))
            while not any(process.ready for process in self._processes):
                self._look(LOOK_SECONDS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "GraderPool":
        """The pool itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def submit(self, job: GradeJob) -> None:
        """Queue a job. A replayed time-out, or a job that cannot be pickled, has failed already."""
        assert self._end.alive, "submit to a closed GraderPool"
        self.pending += 1
        if job.name in self._timeouts:
            self._fail(job.id, self._over_time(), self._grading.seconds)
            return
        try:
            payload = pickle.dumps((job.prompt, job.completion, job.answer, job.columns or {}))
        except Exception as error:  # a column's own __reduce__ may raise anything
            self._fail(job.id, f"the job cannot be pickled: {type(error).__name__}: {error}", 0.0)
            return
        self._queue.append(Parcel(job.id, job.name, payload))
        self._hand_out()

    def poll(self, wait: bool = False) -> list[Grade]:
        """Grades that are done; with `wait` at least one, unless none is pending."""
        if self._end.alive:
            self._look(0.0)
            while wait and self.pending and not self._done:
                self._look(LOOK_SECONDS)
        done, self._done = self._done, []
        self.pending -= len(done)
        return done

    def close(self) -> None:
        """End all processes, whatever they do, and forget pending jobs. May be called again."""
        self._end()
        self._queue.clear()
        self._done.clear()
        self.pending = 0

    def _look(self, patience: float) -> None:
        """Hear every process, replace those that are dead or late, hand out queued jobs."""
        wait_for([process.connection for process in self._processes], patience)
        for process in list(self._processes):
            started = process.ready
            for job, answer in process.hear():
                self._take(job, answer)
            if process.ready and not started:
                self._bad_starts = 0
            late = time.monotonic() - process.since
            if not process.ready and (not process.alive() or late > START_SECONDS):
                self._restart(process)
            elif not process.alive():
                self._replace(process)
            elif process.jobs and late > self._grading.seconds:
                self._replace(process, timed_out=True)
        self._hand_out()

    def _take(self, job: Parcel, answer: Answer) -> None:
        if answer.rewards is None:
            self._fail(job.id, answer.failure, answer.seconds)
            return
        reward = sum(self._weights[name] * number for name, number in answer.rewards.items())
        self._done.append(Grade(job.id, answer.rewards, reward, "", answer.seconds))

    def _replace(self, process: GraderProcess, timed_out: bool = False) -> None:
        """Another process in its place. Its current job has failed; the others are queued again."""
        late = time.monotonic() - process.since
        ending = process.kill()
        if process.jobs and not process.left:
            job = process.jobs.popleft()
            if timed_out:
                self._timeouts.add(job.name)
            self._fail(job.id, self._over_time() if timed_out else ending, late)
        self._queue.extendleft(reversed(process.jobs))
        self._processes[self._processes.index(process)] = GraderProcess(self._setup)

    def _restart(self, process: GraderProcess) -> None:
        """Another process in place of one that did not start; raises UserError after a few."""
        ending = process.kill()
        if ending == "killed":
            ending = f"took over {START_SECONDS:g} s"
        self._bad_starts += 1
        if self._bad_starts >= MAX_BAD_STARTS:
            raise UserError(
                process.broken
                or f"task.graders: a grader process {ending} while it started; "
                f"is grading.memory_gb = {self._grading.memory_gb:g} enough to import the graders?"
            )
        self._processes[self._processes.index(process)] = GraderProcess(self._setup)

    def _hand_out(self) -> None:
        while self._queue:
            process = min(
                self._processes, key=lambda process: (not process.ready, len(process.jobs))
            )
            if not process.has_room(self._queue[0]):
                return
            process.give(self._queue.popleft())

    def _fail(self, id_: int, failure: str, seconds: float) -> None:
        self._done.append(Grade(id_, None, None, failure, seconds))

    def _over_time(self) -> str:
        return f"timed out after {self._grading.seconds:g} s"


def _end_all(processes: list[GraderProcess]) -> None:
    """Let idle processes run their exit handlers, kill the others."""
    for process in processes:
        process.hang_up()
    deadline = time.monotonic() + POLITE_SECONDS
    for process in processes:
        process.leave(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
    processes.clear()
