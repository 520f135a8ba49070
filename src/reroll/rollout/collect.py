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
from collections.abc import Callable, Sequence
from dataclasses import replace

from reroll.engine.base import Engine, Finished
from reroll.rollout.buffer import Buffer
from reroll.rollout.collected import (
    Collected,
    CollectSpec,
    Graders,
    Progress,
    earned,
    finish,
    groups_of,
)
from reroll.rollout.decisions import NOTHING, RESTART, Decisions
from reroll.rollout.grading import Grading
from reroll.rollout.launch import Launch, Source
from reroll.rollout.policies import Fate, Schedule, fifo, sample_by_sample, sync
from reroll.rollout.refill import has_signal
from reroll.rollout.unit import Member, State, Unit
from reroll.types import Completion, Prompt


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
        self.engine = engine
        self.grading = Grading(graders, decode, spec, decisions.grade)
        self.spec, self.schedule, self.buffer = spec, schedule, buffer
        # what is interrupted has to come before what was never started
        staggers = decisions.stagger and schedule.order is fifo and schedule.drains
        order = sample_by_sample if staggers else schedule.order
        self.launch = Launch(source, spec, buffer, decisions, order, schedule.extra)
        self.pruner = decisions.prune
        self._touched: dict[int, Unit] = {}
        """units that may have to be judged or may be ready, by index"""
        self._collected = Collected([])
        self._ended = 0

    def next(self, progress: Progress | None = None) -> Collected:
        """The next batch. What it left over is out of the engine, so weights may change, unless
        the schedule leaves it in.

        Ungraded rollouts are counted; `check_failures` says when there are too many.
        """
        assert not self.grading.graders.pending, "the graders still work for another collect"
        self._collected, self._ended = Collected([], update=self.buffer.update), 0
        try:
            while (units := self._due()) is None:
                ended = self._ended
                while ended == self._ended:
                    assert self.buffer.running, "nothing runs and no batch is due"
                    self._step()
                    self.grading.take()
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
                self.launch.queue(buffer.recall())
        if buffer.bound is not None and schedule.drains and not buffer.flying:
            self._judge()
        if count := schedule.admit(buffer):
            self.launch.admit(count)
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

    # --- out --------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Let the engine do a tick, and take what came of it."""
        for event in self.engine.step():
            if isinstance(event, Finished):
                self._end(event.completion)
            elif self.pruner is not None:
                member = self.buffer.running[event.request_id]
                self.pruner.see(member, event)
                self._touched[member.unit.index] = member.unit
        for unit in self._touched.values():
            while self.pruner is not None and self.pruner.due(unit):
                self._prune(unit)
            if unit.complete and unit.index in self.buffer.flying:
                self._complete(unit)
        self._touched.clear()

    def _end(self, completion: Completion) -> None:
        """A rollout ended by itself: graded, unless its unit needs it no more."""
        member = self.buffer.running[completion.request_id]
        unit, self._ended = member.unit, self._ended + 1
        self.buffer.finish(member, completion)
        if member.state is State.DROPPED:
            self._drop(member, ended=True)
            return
        self._collected.tokens_known += self.grading.ask(member.rollout)
        if self.pruner is not None:  # judged once all of the tick is known
            self.pruner.ended(member)
            self._touched[unit.index] = unit
        elif unit.complete:
            self._complete(unit)
        if self.schedule.by_sibling and not unit.complete:
            self.launch.queue(unit)

    def _complete(self, unit: Unit) -> None:
        self.buffer.complete(unit)
        if self.buffer.bound is not None and not self.schedule.drains:
            self._judge()

    def _prune(self, unit: Unit) -> None:
        """Judge a unit; those of its members that are left out leave the engine at once."""
        assert self.pruner is not None
        if any(member.state is State.DONE for member in unit.members):
            self.grading.wait()
        out, buffer = self.pruner.decide(unit, lambda r: earned(r, self.spec)), self.buffer
        running = {m.request.id: m for m in out if m.state is State.RUNNING}
        for completion in self.engine.abort(running, "pruned") if running else ():
            member = running[completion.request_id]
            del buffer.running[completion.request_id]
            member.rollout.completion = completion
        stopped = [member for member in out if member.state is not State.DONE]
        buffer.prune(unit, out)
        self._ended += len(stopped)
        for member in stopped:
            member.rollout.completion.abort_reason = "pruned"
        for member in out:
            self._drop(member, ended=member not in stopped)
        self.launch.more(unit, self.pruner.more(unit, len(stopped)))

    def _judge(self) -> None:
        """Set aside ready units without signal, once every grade that is due is there."""
        self.grading.wait()
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
        self.grading.wait()
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
        finish(collected, self.spec)
        if self.pruner is not None:
            self.pruner.learn([*units, *aside])
        return collected

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
                buffer.push(member, self.launch.order(member))

    def _start_anew(self, unit: Unit) -> None:
        """Drop what a unit has; its members get other noise, unless that is held."""
        for member in unit.members:
            if member.tokens and member.state is not State.DROPPED:
                self._drop(member, ended=member.state is State.DONE)
                self._collected.restarts += 1
            if self.spec.held and member.tokens and not member.request.lenience:
                given = len(member.rollout.prompt.prefix_ids)
                member.lost = member.rollout.completion.token_ids[given:]
        self.buffer.reset(unit)
        for member in unit.members:
            member.rollout.key_visit += 0 if self.spec.held else RESTART
            self.launch.renew(member, self.buffer.next_request())
        if self.schedule.fate is Fate.RESTART:
            self.launch.queue(unit)


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
