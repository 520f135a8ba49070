"""Collect: prompts in, graded groups out. Read this file first.

A `Collector` takes prompts in, steps the engine, hands each rollout to the graders the moment it
ends (they work in other processes, the engine never waits for them) and gives back a batch when its
schedule says that one is due. It owns what is under way: what a batch leaves unfinished is kept,
with its tokens or without, for the next one (`rollout/buffer.py`). When prompts come in, in what
order rollouts run, when a batch is due and what becomes of the rest the schedule says
(`rollout/policies.py`); under the null schedule everything started is finished and nothing is
stale. What changes which tokens are sampled or trained never reads the clock, so a run can be
repeated and resumed.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from reroll.algo.noise import make_key
from reroll.engine.base import Engine, Finished
from reroll.rollout.buffer import Buffer, Member, State, Unit
from reroll.rollout.collected import (
    Collected,
    CollectSpec,
    Graders,
    Progress,
    finish,
    grade_job,
    groups_of,
)
from reroll.rollout.decisions import NOTHING, RESTART, Decisions, Start
from reroll.rollout.policies import Fate, Schedule, fifo, sample_by_sample, sync
from reroll.rollout.refill import has_signal
from reroll.tasks.pool import Grade
from reroll.types import (
    Completion,
    Draft,
    Prompt,
    Request,
    Rollout,
)

Source = Callable[[int, int], tuple[Sequence[Prompt], Sequence[int]]]
"""(place in the stream, count) -> (prompts, visits); fewer where the stream ends"""


class Collector:
    """Owns the rollouts under way; shares engine and graders with nobody while it collects.

    source: the stream of prompts. decode: token ids to text, special tokens left out. decisions: of
    the techniques.
    """

    def __init__(
        self,
        engine: Engine,
        graders: Graders,
        decode: Callable[[list[int]], str],
        source: Source,
        spec: CollectSpec,
        schedule: Schedule,
        buffer: Buffer,
        decisions: Decisions = NOTHING,
    ) -> None:
        self.engine, self.graders, self.decode, self.source = engine, graders, decode, source
        self.spec, self.schedule, self.buffer, self.decisions = spec, schedule, buffer, decisions
        # what is interrupted has to come before what was never started
        staggers = decisions.stagger and schedule.order is fifo and schedule.drains
        self.order = sample_by_sample if staggers else schedule.order
        self._graded: dict[int, Rollout] = {}
        """rollouts whose grades have been asked for, by request id"""
        self._collected = Collected([])
        self._ended = 0

    def next(self, progress: Progress | None = None) -> Collected:
        """The next batch. What it left over is out of the engine, so weights may change, unless
        the schedule leaves it in.

        Ungraded rollouts are counted; `check_failures` says when there are too many.
        """
        assert not self.graders.pending, "the graders still work for another collect"
        self._collected, self._ended = Collected([], update=self.buffer.update), 0
        try:
            while (units := self._due()) is None:
                ended = self._ended
                while ended == self._ended:
                    assert self.buffer.running, "nothing runs and no batch is due"
                    for event in self.engine.step():
                        if isinstance(event, Finished):
                            self._end(event.completion)
                    self._take_grades(self.graders.poll())
                if progress is not None:
                    rest = self.buffer.active if self.schedule.drains else 0
                    progress(self._ended, max(self._ended + rest, self.buffer.whole))
            return self._hand_over(units)
        except BaseException:
            # an interrupted collect leaves the engine empty: weights can be saved or changed
            self.engine.abort(None, "collect interrupted")
            raise

    def park(self) -> None:
        """Take out what a schedule left in the engine; it keeps its tokens."""
        self._interrupt(Fate.KEEP)

    # --- in ---------------------------------------------------------------------------------------

    def _due(self) -> list[Unit] | None:
        """Take in and submit what is to be; then ask whether a batch is due."""
        buffer, schedule = self.buffer, self.schedule
        if not buffer.under_way() and len(buffer.deferred) >= buffer.batch:
            for _ in range(buffer.batch):
                self.queue(buffer.recall())
        if buffer.bound is not None and schedule.drains and not buffer.flying:
            self._judge()
        if count := schedule.admit(buffer):
            self._admit(count)
        room = math.inf if schedule.ahead is None else buffer.slots + schedule.ahead
        if schedule.by_sibling and not buffer.unknown:
            room = math.inf  # no order changes any more
        if len(buffer.running) > buffer.slots < room < math.inf:
            room = 0  # those that wait there are enough for now; a few at a time share a prefill
        while len(buffer.running) < room and (member := buffer.pop()) is not None:
            request = member.request
            if member.tokens:
                request = replace(request, partial=member.rollout.completion)
            self.engine.submit(request)
        return schedule.harvest(buffer)

    def _admit(self, units: int) -> None:
        """Open units for the next prompts."""
        buffer, samples = self.buffer, self.spec.samples
        started = math.floor(self.schedule.extra * samples + 1e-9)
        count = -(-units // samples) if self.spec.apart else units
        prompts, visits = self.source(buffer.cursor, count)
        buffer.cursor += len(prompts)
        for prompt, visit in zip(prompts, visits, strict=True):
            starts = self.decisions.start(prompt, visit, started)
            if self.spec.apart:
                for sample, start in enumerate(starts):
                    self._launch(buffer.open(prompt, visit, 1), [(sample, start)])
            else:
                self._launch(buffer.open(prompt, visit, samples), enumerate(starts))

    def _launch(self, unit: Unit, starts: Iterable[tuple[int, Start]]) -> None:
        for sample, start in starts:
            self.join(unit, sample, start)
        self.buffer.fly(unit)
        self.queue(unit)

    def join(self, unit: Unit, sample: int, start: Start) -> None:
        """One more member of a unit."""
        rollout = Rollout(unit.prompt, sample, unit.visit, key_visit=start.key_visit)
        request = Request(
            self.buffer.next_request(),
            unit.prompt.token_ids,
            self._key(rollout),
            self.spec.sampling,
            drafts=start.drafts,
            lenience=start.lenience,
        )
        unit.members.append(Member(unit, rollout, request))

    def queue(self, unit: Unit) -> None:
        """Give its waiting members their places."""
        for member in unit.members:
            if member.state in (State.QUEUED, State.PARTIAL):
                self.buffer.push(member, self.order(member))

    def renew(self, member: Member, request_id: int) -> None:
        """The request of a member that has another key visit now."""
        lost = (Draft(member.lost),) if member.lost else ()
        drafts = (*lost, *member.request.drafts[member.drafts_lost :])
        member.drafts_lost, key = len(lost), self._key(member.rollout)
        member.request = replace(member.request, id=request_id, key=key, drafts=drafts)

    def _key(self, rollout: Rollout) -> int:
        spec = self.spec
        row, sample = rollout.prompt.row, rollout.sample
        return make_key(spec.seed, spec.purpose, row, sample, rollout.key_visit)

    # --- out --------------------------------------------------------------------------------------

    def _end(self, completion: Completion) -> None:
        """A rollout ended by itself: graded, unless its unit needs it no more."""
        member = self.buffer.running[completion.request_id]
        ready = self.buffer.finish(member, completion)
        self._ended += 1
        if member.state is State.DROPPED:
            self._drop(member, ended=True)
            return
        rollout, unit = member.rollout, member.unit
        rollout.text = self.decode(completion.token_ids)
        if (known := self.decisions.grade(rollout)) is None:
            self._graded[completion.request_id] = rollout
            self.graders.submit(grade_job(rollout, completion.request_id, self.spec))
        else:
            rollout.reward, rollout.rewards = known
            self._collected.tokens_known += member.tokens
        if ready and self.buffer.bound is not None and not self.schedule.drains:
            self._judge()
        elif self.schedule.by_sibling and not ready:
            self.queue(unit)

    def _judge(self) -> None:
        """Set aside ready units without signal, once every grade that is due is there."""
        self._wait_for_grades()
        for unit in [u for u in self.buffer.ready if not has_signal(u.group())]:
            self.buffer.set_aside(unit)

    def _drop(self, member: Member, ended: bool) -> None:
        self._collected.tokens_dropped += member.tokens
        (self._collected.lost if ended else self._collected.cut).append(member.tokens)

    def _hand_over(self, units: list[Unit]) -> Collected:
        """Clear the engine as the schedule wants it, and settle the batch."""
        buffer, fate, collected = self.buffer, self.schedule.fate, self._collected
        aside = list(buffer.aside)
        buffer.take(units)
        self._wait_for_grades()
        if fate is not Fate.GO_ON:
            self._interrupt(fate)
        if fate in (Fate.RESTART, Fate.DEFER):
            begun = [unit for unit in buffer.flying.values() if unit.since is not None]
            for unit in [*begun, *buffer.ready]:
                self._start_anew(unit)
            if fate is Fate.DEFER:
                for unit in list(buffer.flying.values()):
                    buffer.defer(unit)
        collected.groups = groups_of(units)
        if buffer.bound is not None:
            collected.live = collected.groups
            every = sorted([*units, *aside], key=lambda unit: unit.index)
            collected.groups = groups_of(every)
        collected.waits = [collected.update - unit.admitted for unit in units]
        return finish(collected, self.spec)

    def _interrupt(self, fate: Fate) -> None:
        """Take everything out of the engine; what it has goes back to its unit."""
        buffer = self.buffer
        for completion in self.engine.abort(None, "a batch was due"):
            member = buffer.running.pop(completion.request_id)
            member.rollout.completion = completion
            if member.unit.index not in buffer.flying:
                member.state = State.DROPPED
                self._drop(member, ended=False)
                continue
            member.state = State.PARTIAL if member.tokens else State.QUEUED
            if fate is Fate.KEEP:
                buffer.push(member, self.order(member))

    def _start_anew(self, unit: Unit) -> None:
        """Drop what a unit has; its members get other noise, unless that is held."""
        for member in unit.members:
            if member.tokens and member.state is not State.DROPPED:
                self._drop(member, ended=member.state is State.DONE)
                self._collected.restarts += 1
            if self.spec.held and member.tokens and not member.request.lenience:
                member.lost = member.rollout.completion.token_ids
        self.buffer.reset(unit)
        for member in unit.members:
            member.rollout.key_visit += 0 if self.spec.held else RESTART
            self.renew(member, self.buffer.next_request())
        if self.schedule.fate is Fate.RESTART:
            self.queue(unit)

    # --- grades -----------------------------------------------------------------------------------

    def _wait_for_grades(self) -> None:
        while self.graders.pending:
            self._take_grades(self.graders.poll(wait=True))

    def _take_grades(self, grades: Sequence[Grade]) -> None:
        for grade in grades:
            rollout = self._graded.pop(grade.id)
            rollout.reward, rollout.rewards = grade.reward, grade.rewards or {}
            rollout.failure, rollout.seconds_grading = grade.failure, grade.seconds


def collect(
    engine: Engine,
    graders: Graders,
    decode: Callable[[list[int]], str],
    prompts: Sequence[Prompt],
    visits: Sequence[int],
    spec: CollectSpec,
    progress: Progress | None = None,
    decisions: Decisions = NOTHING,
) -> Collected:
    """Sample, grade and group `spec.samples` rollouts of each of these prompts, in their order.

    visits: how often each prompt had been started before, for this purpose; part of the key.
    """
    if not prompts:
        return Collected([])
    buffer = Buffer(len(prompts), spec.samples, engine.stats().capacity)

    def source(start: int, count: int) -> tuple[Sequence[Prompt], Sequence[int]]:
        return prompts[start : start + count], visits[start : start + count]

    whole = replace(spec, apart=False)
    collector = Collector(engine, graders, decode, source, whole, sync(), buffer, decisions)
    return collector.next(progress)
