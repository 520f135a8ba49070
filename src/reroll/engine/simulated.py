"""An engine without a model: requests end after given lengths, on a virtual clock.

`replicas` machines of `slots` slots each run side by side. All requests of a replica advance one
token a tick, and what a tick takes is a `Cost` (`engine/clock.py`). One queue, first come first
served: a free slot is filled the moment it is free. Reading a request's tokens stops its replica
before its next tick. Between two events nothing is computed, however many ticks lie there.

Times are seconds if the cost's are. A token attends to the prompt and the tokens before it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush, heapreplace
from typing import cast

from reroll.engine.base import Capabilities, Event, Finished, Span, Stats
from reroll.engine.clock import Cost, Replica
from reroll.errors import UserError
from reroll.types import Completion, Finish, Request
from reroll.versions import Runs, runs

PREFIX = -1
"""the version of a prefix token"""


class _Stay:
    """A request in the engine, with all that is needed of it: a million are in memory at a time."""

    __slots__ = (
        "begin", "done", "finish", "given", "id", "prefix", "prompt", "replica", "start", "total",
        "versions",
    )  # fmt: skip

    def __init__(self, request: Request, length: int) -> None:
        partial, prefix = request.partial, len(request.prefix_ids)
        limit = request.sampling.max_tokens
        self.id = request.id
        self.prompt, self.prefix = request.prompt_ids, prefix
        self.done = prefix if partial is None else len(partial.token_ids)
        """completion tokens there are before it starts"""
        self.total = prefix + min(length, limit)
        """and when it ends"""
        self.given = len(self.prompt) + self.done
        self.finish = Finish.LENGTH if length >= limit else Finish.STOP
        self.versions = runs(partial.versions) if partial else [(PREFIX, prefix)] if prefix else ()
        """of those, in stretches"""
        self.replica: Replica | None = None
        """where it runs, from clock `begin` and the replica's tick `start` on"""
        self.begin, self.start = 0.0, 0


class SimulatedEngine:
    """See the module. Completions carry lengths and versions; the other streams are empty.

    length: tokens of a request's completion after its prefix, at least 1; asked once a submit, cut
    at the request's limit. It should be a function of the key and the prompt: a resumed request is
    asked again.

    Of requests with one prompt that start in a replica one after another, under the same weights,
    the prompt is read once; prefix and resumed tokens are read always.
    """

    def __init__(
        self, length: Callable[[Request], int], cost: Cost, *, slots: int, replicas: int = 1
    ) -> None:
        self.policy_version = 0
        self.clock = 0.0
        """seconds"""
        self.spans: list[Span] | None = None
        """a list, if set, gets every request's stay in a slot when it leaves"""
        self._length, self._cost, self._slots = length, cost, slots
        self._inside: dict[int, _Stay] = {}
        """by number, in the order of submission: first those that run, then the queue"""
        self._numbers: dict[int, int] = {}
        """number of each request id"""
        self._last = self._next = self._running = 0
        """numbers given out; the first one that may be queued; requests in slots"""
        self._replicas = [Replica(index) for index in range(replicas)]
        self._free = [(0, index) for index in range(replicas)]
        """heap of (running, replica) with free slots; void where it runs another number by now"""
        self._events: list[tuple[float, int]] = []
        """heap of (clock, replica) of the next ends; void where the replica is due otherwise"""
        self._changed: list[Replica] = []
        self._stats = Stats(capacity=slots * replicas)

    @property
    def capabilities(self) -> Capabilities:
        """None: drafts and probes are passed over."""
        return Capabilities()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ValueError for an id that is in the engine, or if nothing is left
        to draw."""
        if request.id in self._numbers:
            raise ValueError(f"request {request.id} is in the engine already")
        stay = _Stay(request, self._length(request))
        if stay.total <= stay.done:
            raise ValueError(
                f"request {request.id}: {stay.total} tokens in all, but {stay.done} are there"
            )
        self._numbers[request.id] = self._last
        self._inside[self._last] = stay
        self._last += 1

    def step(self) -> list[Event]:
        """Fill free slots and go to the next moment at which requests end: those, by start."""
        self._fill()
        events, replicas = self._events, self._replicas
        while events and replicas[events[0][1]].due != events[0][0]:
            heappop(events)
        if not events:
            return []
        now = events[0][0]
        self._stats.seconds["decode"] += now - self.clock
        self._stats.slot_seconds += (now - self.clock) * self._running
        self.clock = now
        ended: list[int] = []
        while events and events[0][0] == now:
            replica = replicas[heappop(events)[1]]
            if replica.due == now:
                ended += self._end(replica)
        ended.sort()
        return [Finished(self._leave(number)) for number in ended]

    def abort(self, ids: Iterable[int] | None, reason: str) -> list[Completion]:
        """Take these requests (None: all) out: running ones by start, then queued ones in order.

        Each keeps its whole tokens; of a tick that is going on it keeps none.
        """
        if ids is None:
            numbers = list(self._inside)
        else:
            numbers = sorted(self._numbers[i] for i in set(ids) if i in self._numbers)
        ticks: dict[Replica, int] = {}
        for number in numbers:
            replica = self._inside[number].replica
            if replica is not None and replica not in ticks:
                self._touch(replica)
                ticks[replica] = replica.whole(self._cost, self.clock)
        aborted = []
        for number in numbers:
            stay = self._inside[number]
            drawn = max(ticks[stay.replica] - stay.start, 0) if stay.replica else 0
            # by a rounding error it may be about to end now: not reported, it has not ended
            drawn = min(drawn, stay.total - stay.done - 1)
            aborted.append(self._leave(number, drawn, reason))
        gone = set(numbers)
        for replica, whole in ticks.items():
            replica.remove(gone)
            if not replica.ends:  # nobody sees the tick that is going on through
                self._stats.ticks -= replica.tick - whole
        return aborted

    def score(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
    ) -> list[list[float]]:
        """Raises UserError: there is no model."""
        raise UserError("a simulated engine has no model to score with: use a real one")

    def load_weights(self, version: int, keep: bool = False) -> None:
        """Tokens drawn from now on are of policy `version`; one that is being drawn, too.

        Raises ValueError if requests are inside, unless `keep`: then they go on.
        """
        if self._inside and not keep:
            raise ValueError(
                "weights may not change while requests are in the engine: abort or keep them"
            )
        self.policy_version = version
        for replica in self._replicas:
            replica.reload(self._cost, self.clock, version)

    def advance(self, seconds: float) -> None:
        """Let time pass while nothing runs. Raises ValueError if something does."""
        if self._running or seconds < 0:
            raise ValueError(f"{seconds} seconds cannot pass while {self._running} requests run")
        self.clock += seconds

    def stats(self) -> Stats:
        """Live counters. Ticks and tokens are of each replica's last change, that is, when
        something last ended, started or was aborted there: exact when nothing runs."""
        stats = self._stats
        stats.running, stats.waiting = self._running, len(self._inside) - self._running
        stats.tokens_decoded = stats.tokens_drawn
        return stats

    # --- replicas -------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Start queued requests where slots are free; plan the next end where anything changed."""
        free, replicas = self._free, self._replicas
        for replica in self._changed:
            if len(replica.ends) < self._slots:
                heappush(free, (len(replica.ends), replica.index))
        if len(free) > 8 * len(replicas) + 64:  # most of them void
            counts = ((len(replica.ends), replica.index) for replica in replicas)
            free[:] = sorted(entry for entry in counts if entry[0] < self._slots)
        while self._running < len(self._inside) and free:
            running, index = free[0]
            if running != len(replicas[index].ends):
                heappop(free)
                continue
            self._start(replicas[index])
            if running + 1 < self._slots:
                heapreplace(free, (running + 1, index))
            else:
                heappop(free)
        for replica in self._changed:
            replica.changed = False
            if replica.ends:
                replica.plan(self._cost)
                heappush(self._events, (replica.due, replica.index))
        self._changed.clear()

    def _touch(self, replica: Replica) -> None:
        """To be called before a replica's requests change, to bring it up to the clock."""
        if not replica.changed:
            batch = len(replica.ends)
            self._count(replica, replica.settle(self._cost, self.clock), batch)

    def _count(self, replica: Replica, steps: int, batch: int) -> None:
        """Put so many ticks on the books; the replica is about to change."""
        self._stats.ticks += steps
        self._stats.tokens_drawn += steps * batch
        replica.due = math.inf
        replica.changed = True
        self._changed.append(replica)

    def _start(self, replica: Replica) -> None:
        """Give the first of the queue a slot."""
        while (stay := self._inside.get(self._next)) is None:  # aborted
            self._next += 1
        self._touch(replica)
        if not replica.ends:
            replica.begin(self.clock, self.policy_version)
        tokens = stay.done if stay.prompt == replica.prompt else stay.given
        replica.prompt = stay.prompt
        replica.at += self._cost.prefill(tokens)
        replica.context += stay.given
        replica.add(self._next, stay.total - stay.done)
        stay.replica, stay.begin, stay.start = replica, self.clock, replica.tick
        self._next += 1
        self._running += 1
        self._stats.tokens_prefilled += tokens
        self._stats.tokens_resumed += stay.done - stay.prefix

    def _end(self, replica: Replica) -> list[int]:
        """Take out what ends in the tick that is over by now."""
        steps = replica.left()
        if steps > 0:
            batch = len(replica.ends)
            replica.move(steps, self.clock)
            self._count(replica, steps, batch)
        else:
            self._count(replica, 0, 0)
        return replica.ended()

    def _leave(self, number: int, drawn: int | None = None, reason: str = "") -> Completion:
        """Let a request go, with so many tokens drawn now; without a number, it has ended."""
        stay = self._inside.pop(number)
        replica = stay.replica
        del self._numbers[stay.id]
        if drawn is None:
            drawn, finish = stay.total - stay.done, stay.finish
        else:
            finish = Finish.ABORT
        versions = stay.versions
        if replica is not None:
            self._running -= 1
            ticks = replica.tick - stay.start
            replica.context -= stay.given + ticks
            self._stats.tokens_drawn -= ticks - drawn
            versions = [*versions, *replica.versions(stay.start, drawn)]
            if self.spans is not None:
                self.spans.append(Span(stay.id, stay.begin, self.clock))
        return Completion(
            stay.id,
            cast("list[int]", range(stay.done + drawn)),
            versions=cast("list[int]", Runs(versions)),
            finish=finish,
            abort_reason=reason,
        )
