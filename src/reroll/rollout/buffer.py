"""What is under way: the rollouts started and not yet trained on, and the units they come in.

A unit (`rollout/unit.py`) is flying until as many of its members have ended as it needs, then
ready; a batch takes ready units, and what becomes of the others is the schedule's to say.

Everything here is counted in members and updates (batches handed out), never in seconds.
"""

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import chain
from typing import Any

from reroll.rollout.refill import missing
from reroll.rollout.unit import WAITING, Member, State, Unit
from reroll.types import Completion, Prompt


class Buffer:
    """Owns units and members; asks nobody anything.

    batch: units of an update. members: of a unit, as a rule. slots: the engine's. bound: units
    admitted for one batch at most, in batches, where some are set aside (dynamic sampling).
    patience: the schedule's; no more units are started than can be trained on within it.
    """

    def __init__(
        self,
        batch: int,
        members: int,
        slots: int,
        bound: float | None = None,
        patience: int | None = None,
    ) -> None:
        self.batch, self.members, self.slots = batch, members, slots
        self.bound = bound
        # what is started in one update can be trained on in this and `patience` more
        self._most = math.inf if patience is None else (patience + 1) * batch
        self.update = 0
        """batches handed out"""
        self.cursor = 0
        """place in the stream of prompts"""
        self.flying: dict[int, Unit] = {}
        """unfinished units by index"""
        self.ready: deque[Unit] = deque()
        """in the order in which they became ready"""
        self.aside: list[Unit] = []
        """ready units without signal, since the last batch"""
        self.deferred: deque[Unit] = deque()
        """put off to a later round, without tokens"""
        self.running: dict[int, Member] = {}
        """members that the engine has, by request id"""
        self.active = 0
        """members of flying units that have not ended"""
        self.admitted = 0
        """units admitted since the last batch"""
        self.starts: Counter[int] = Counter()
        """started units, flying or ready, by the updates that were before their start"""
        self.lengths: dict[tuple[int, int, int], int] = {}
        """tokens drawn for the longest rollout of each prompt's last visit, by its identity"""
        self.unknown = 0
        """flying units of whose prompt that is not known"""
        self._queue: list[tuple[Any, int, Member]] = []
        self._units = self._requests = 0

    @property
    def whole(self) -> int:
        """Members of a batch."""
        return self.batch * self.members

    # --- what schedules ask -----------------------------------------------------------------------

    def under_way(self) -> int:
        """Units admitted and not trained on, those put off left out."""
        return len(self.flying) + len(self.ready)

    def allowed(self) -> int:
        """Units that may still be admitted for this batch."""
        if self.bound is None:
            return 1 << 62
        return max(0, math.floor(self.bound * self.batch + 1e-9) - self.admitted)

    def lacking(self) -> int:
        """Units to admit for a whole batch, with nothing flying: at first all of it, then as many
        as the share with signal so far says are needed (`rollout/refill.py`)."""
        if not self.admitted:
            return self.batch
        if self.bound is None or len(self.ready) >= self.batch:
            return 0
        return min(missing(len(self.ready), self.admitted, self.batch), self.allowed())

    def units(self) -> Iterator[Unit]:
        """All that are not trained on."""
        return chain(self.flying.values(), self.ready, self.deferred)

    # --- a member's way ---------------------------------------------------------------------------

    def next_request(self) -> int:
        """A request id that no other member has."""
        self._requests += 1
        return self._requests - 1

    def open(self, prompt: Prompt, visit: int, need: int) -> Unit:
        """A new unit, still without members and on the ground."""
        expected = self.lengths.get(prompt.identity)
        unit = Unit(self._units, prompt, visit, need, self.update, expected=expected, wanted=need)
        self._units += 1
        self.admitted += 1
        return unit

    def fly(self, unit: Unit) -> None:
        """A unit has its members."""
        self.flying[unit.index] = unit
        self.unknown += unit.expected is None
        self.active += len(unit.members) - len(unit.done)

    def push(self, member: Member, place: Any) -> None:
        """Queue a member at its place; an earlier entry of its is void."""
        member.stamp += 1
        heappush(self._queue, (place, member.stamp, member))

    def pop(self) -> Member | None:
        """The first in the queue, from now on running; None: nobody may be started."""
        queue = self._queue
        while queue:
            _, stamp, member = queue[0]
            unit = member.unit
            void = stamp != member.stamp or unit.index not in self.flying
            if void or member.state not in WAITING:
                heappop(queue)
                continue
            if unit.since is None:
                if self.starts.total() >= self._most:
                    return None
                unit.since = self.update
                self.starts[self.update] += 1
            heappop(queue)
            member.state = State.RUNNING
            self.running[member.request.id] = member
            return member
        return None

    def finish(self, member: Member, completion: Completion) -> None:
        """A member ended by itself."""
        unit = member.unit
        member.rollout.completion = completion
        del self.running[member.request.id]
        if unit.index not in self.flying:
            member.state = State.DROPPED
            return
        member.state = State.DONE
        self.active -= 1
        unit.done.append(member)

    def prune(self, unit: Unit, members: Sequence[Member]) -> None:
        """Leave these members of a flying unit out, wherever they are but in the engine; it needs
        the same share of the others."""
        before, complete = len(unit.members), unit.complete
        for member in members:
            if member.state is State.DONE:
                unit.done.remove(member)
            else:
                self.active -= 1
            member.state = State.PRUNED
            member.stamp += 1
            unit.members.remove(member)
            unit.pruned.append(member)
        share = len(unit.members) / before
        unit.need = len(unit.done) if complete else max(1, round(unit.need * share))

    def add(self, unit: Unit, count: int) -> None:
        """So many members have joined a flying unit since it took off; it needs them too."""
        unit.need += count
        self.active += count

    def complete(self, unit: Unit) -> None:
        """A flying unit has all it needs: it is ready."""
        self._land(unit)
        self.ready.append(unit)
        self.lengths[unit.prompt.identity] = max(member.tokens for member in unit.done)

    # --- a unit's way -----------------------------------------------------------------------------

    def set_aside(self, unit: Unit) -> None:
        """A ready unit is not worth training on."""
        self.ready.remove(unit)
        self._forget(unit)
        self.aside.append(unit)

    def take(self, units: Sequence[Unit]) -> None:
        """These ready units are the next batch."""
        for unit in units:
            self._forget(unit)
        gone = {unit.index for unit in units}
        self.ready = deque(unit for unit in self.ready if unit.index not in gone)
        self.aside.clear()
        self.update += 1
        self.admitted = 0

    def reset(self, unit: Unit) -> None:
        """Drop a unit's tokens: it is flying and nothing of it has been started."""
        if unit.index in self.flying:
            self._land(unit)
        else:
            self.ready.remove(unit)
        unit.cut = max(member.tokens for member in unit.members)
        unit.done.clear()
        for member in unit.members:
            member.stamp += 1  # extra ones do not come again
        own = [member for member in unit.members if not member.extra]
        unit.members = sorted([*own, *unit.pruned], key=lambda member: member.rollout.sample)
        unit.pruned, unit.stage, unit.need = [], 0, unit.wanted
        self.fly(unit)
        for member in unit.members:
            member.state, member.seen = State.QUEUED, {}
            member.rollout.completion = Completion(member.request.id)
            rollout = member.rollout
            rollout.reward, rollout.rewards, rollout.failure = None, {}, ""
            rollout.looks, rollout.saved = [], 0.0

    def defer(self, unit: Unit) -> None:
        """Put a unit without tokens off."""
        self._forget(unit)
        unit.since = None
        for member in unit.members:
            member.stamp += 1
        self._land(unit)
        self.deferred.append(unit)

    def recall(self) -> Unit:
        """Bring back the unit put off longest, with no more members than it needs."""
        unit = self.deferred.popleft()
        del unit.members[unit.need :]
        self.fly(unit)
        self.admitted += 1
        return unit

    def _land(self, unit: Unit) -> None:
        del self.flying[unit.index]
        self.unknown -= unit.expected is None
        self.active -= len(unit.members) - len(unit.done)

    def _forget(self, unit: Unit) -> None:
        if unit.since is not None:
            self.starts[unit.since] -= 1
            self.starts += Counter()  # leaves the positive ones
