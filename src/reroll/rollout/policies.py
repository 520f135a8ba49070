"""Schedules: when prompts come in, in what order rollouts run, when a batch is due, and what
becomes of what is unfinished then.

A schedule is three functions and a fate. They see the buffer (`rollout/buffer.py`), which counts
units and updates and never reads the clock, so a resumed run is scheduled as the uninterrupted one:

    admit    how many units to take in now
    order    a member's place in the queue, smallest first, no two the same
    harvest  the ready units that are the next batch, or None: not yet
    fate     what becomes of the units that are not in it

References: SortedRL, arXiv 2603.23414; APRIL, arXiv 2509.18521; RollPacker (tail batching), arXiv
2509.21009; Seer (length probes), arXiv 2511.14617; AReaL (bounded lag), arXiv 2505.24298.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Any

from reroll.config import ScheduleSection
from reroll.rollout.buffer import Buffer
from reroll.rollout.unit import Member, Unit


class Fate(StrEnum):
    """What becomes of a unit that was started and is not in the batch."""

    KEEP = "keep"
    """taken out of the engine with its tokens, and resumed first"""
    RESTART = "restart"
    """its tokens are dropped and its prompt is started anew, first"""
    DEFER = "defer"
    """its tokens are dropped and its prompt is put off, to a round of such prompts alone"""
    GO_ON = "go on"
    """left in the engine while the weights change, cache and all"""


@dataclass(frozen=True, slots=True)
class Schedule:
    """See the module."""

    admit: Callable[[Buffer], int]
    order: Callable[[Member], Any]
    harvest: Callable[[Buffer], list[Unit] | None]
    fate: Fate = Fate.KEEP
    patience: int | None = None
    """updates that a unit may wait from its start to its training: the lag bound; None: any"""
    by_sibling: bool = False
    """whether a member's place changes when another one of its unit ends"""
    ahead: int | None = None
    """members that wait in the engine; None: all, since their order is settled"""
    extra: float = 1.0
    """members started for each that a unit needs"""
    drains: bool = False
    """whether everything has ended when a batch is due, so that nothing is ever interrupted"""


def fifo(member: Member) -> tuple[int, int]:
    """In order of admission."""
    return member.unit.index, member.rollout.sample


def sample_by_sample(member: Member) -> tuple[int, int, int]:
    """Those with drafts first, in whole units; then one sample of each prompt after the other."""
    sample = member.rollout.sample
    return (-1 if member.request.drafts else sample, *fifo(member))


def longest_cut(member: Member) -> tuple[int, int, int]:
    """What was unfinished at the last cut first, by how far it had come: it will be long again."""
    return (-member.unit.cut, *fifo(member))


def make_schedule(config: ScheduleSection, slots: int) -> Schedule:
    """The schedule of a configuration, for an engine with so many slots."""
    schedule = _named(config)
    if schedule.order is fifo and schedule.drains:
        return schedule
    # some are read in one forward; of those that may be interrupted few, or much is read twice
    share = 1 if schedule.drains else 4
    return replace(schedule, ahead=max(1, slots // share))


def _named(config: ScheduleSection) -> Schedule:
    match config.kind:
        case "longest_first":
            return longest_first()
        case "sorted":
            keep = config.mode == "partial"
            return sorted_by_length(
                config.batches, keep=keep, refill=config.refill, patience=config.max_lag
            )
        case "april":
            return april(config.over, config.max_lag)
        case "tail_batch":
            return tail_batch(config.over)
        case "async":
            return asynchronous(config.max_lag, config.keep_cache)
        case "sync":
            return sync()


def sync() -> Schedule:
    """All that is started is finished; nothing is stale."""
    return Schedule(_whole_batch, fifo, _all_done, drains=True)


def longest_first() -> Schedule:
    """`sync` in the order of expected length, longest first: the same tokens, a shorter tail.

    A member is expected to be as long as the longest rollout of its prompt's last visit, where
    there was none as the longest of its finished siblings: what may be long comes first. Where
    neither is known one member probes its prompt before all else, and until it has ended the
    others count as long as can be (Seer, section 4).
    """

    def order(member: Member) -> tuple[float, int, int]:
        known, done = member.unit.expected, member.unit.done
        if known is None and done:
            known = max(m.tokens for m in done)
        if known is None:
            probe = member.rollout.sample == 0
            known = math.inf if probe else member.request.sampling.max_tokens
        return (-known, *fifo(member))

    return Schedule(_whole_batch, order, _all_done, drains=True, by_sibling=True, ahead=0)


def sorted_by_length(
    batches: int, *, keep: bool, refill: bool, patience: int | None = None
) -> Schedule:
    """SortedRL: prompts come in groups of `batches` updates; each batch is what ended first.

    No new prompts until the group is trained on. keep: interrupted rollouts keep their tokens
    ("partial"); else they are dropped and the prompt is started anew ("on-policy"). refill: the
    next group comes in as soon as a slot would be idle.
    """

    def admit(buffer: Buffer) -> int:
        idle = refill and buffer.active < buffer.slots
        wanted = batches * buffer.batch if idle or not buffer.under_way() else 0
        return min(wanted, buffer.allowed())

    def harvest(buffer: Buffer) -> list[Unit] | None:
        chosen = _first_ready(buffer, patience)
        return None if chosen is None else sorted(chosen, key=Unit.length)

    fate = Fate.KEEP if keep else Fate.RESTART
    return Schedule(admit, fifo, harvest, fate, patience)


def april(over: float, patience: int | None = None) -> Schedule:
    """APRIL: `over` times a batch is under way, what was left over before new prompts; a batch is
    what is ready first, and the rest keeps its tokens."""

    def admit(buffer: Buffer) -> int:
        wanted = math.floor(over * buffer.batch + 1e-9) - buffer.under_way()
        return max(0, min(wanted, buffer.allowed()))

    def harvest(buffer: Buffer) -> list[Unit] | None:
        return _first_ready(buffer, patience)

    return Schedule(admit, fifo, harvest, Fate.KEEP, patience)


def tail_batch(over: float) -> Schedule:
    """RollPacker's tail batching: rounds of `over` times the prompts with `over` times the samples,
    whose first to end are the batch. The other prompts lose their tokens and are put off until they
    are a batch, which runs to its end without more of anything, those first that were longest
    when they were cut."""

    def admit(buffer: Buffer) -> int:
        return 0 if buffer.under_way() else math.floor(over * buffer.batch + 1e-9)

    def harvest(buffer: Buffer) -> list[Unit] | None:
        return _first_ready(buffer, None)

    return Schedule(admit, longest_cut, harvest, Fate.DEFER, extra=over)


def asynchronous(patience: int, keep_cache: bool) -> Schedule:
    """AReaL's admission: the slots are kept full as long as no more units are under way than can be
    trained on within the lag bound; each token takes the version at its draw.

    keep_cache: rollouts go on in their slots under the new weights, with keys and values of the
    old; else these are computed anew.
    """

    def admit(buffer: Buffer) -> int:
        units = -(-(buffer.slots - buffer.active) // buffer.members)
        room = (patience + 1) * buffer.batch - buffer.under_way()
        return max(0, min(units, room, buffer.allowed()))

    def harvest(buffer: Buffer) -> list[Unit] | None:
        return _first_ready(buffer, patience)

    return Schedule(admit, fifo, harvest, Fate.GO_ON if keep_cache else Fate.KEEP, patience)


def _whole_batch(buffer: Buffer) -> int:
    """A batch once the last one is trained on, and what dynamic sampling lacks of it."""
    return 0 if buffer.flying else buffer.lacking()


def _all_done(buffer: Buffer) -> list[Unit] | None:
    """Everything once all has ended, in order of admission."""
    return None if buffer.flying else sorted(buffer.ready, key=lambda unit: unit.index)


def _first_ready(buffer: Buffer, patience: int | None) -> list[Unit] | None:
    """A batch of what was ready first, or all there is once nothing flies.

    Units that could not be trained on within `patience` otherwise are waited for and go first.
    """
    if buffer.flying and len(buffer.ready) < buffer.batch:
        return None
    first = {} if patience is None else _due(buffer, patience)
    if first is None:
        return None
    rest = (unit for unit in buffer.ready if unit.index not in first)
    return [*first.values(), *islice(rest, max(0, buffer.batch - len(first)))]


def _due(buffer: Buffer, patience: int) -> dict[int, Unit] | None:
    """Ready units that must be in this batch, or None: one of them is not ready yet.

    Of the units started `patience - k` updates ago or earlier, k more batches can take k batches'
    worth; the rest must be in this one. As long as no more than `patience + 1` batches are started
    and untrained (`Buffer.pop`), that is never more than a batch.
    """
    chosen: dict[int, Unit] = {}
    for later in range(patience + 1):
        oldest = buffer.update - patience + later
        old = sum(count for since, count in buffer.starts.items() if since <= oldest)
        lacking = old - later * buffer.batch - len(chosen)
        if lacking > 0:
            some = (u for u in buffer.ready if _since(u) <= oldest and u.index not in chosen)
            chosen |= {unit.index: unit for unit in islice(some, lacking)}
        if old - later * buffer.batch > len(chosen):
            return None
    return chosen


def _since(unit: Unit) -> int:
    assert unit.since is not None, "a ready unit was started"
    return unit.since
