"""Prompts in: units opened, their members' requests made and queued."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from reroll.algo.noise import make_key
from reroll.rollout.buffer import Buffer
from reroll.rollout.collected import CollectSpec
from reroll.rollout.decisions import Decisions, Start
from reroll.rollout.unit import WAITING, Member, Unit
from reroll.types import Draft, Prompt, Request, Rollout

Source = Callable[[int, int], tuple[Sequence[Prompt], Sequence[int]]]
"""(place in the stream, count) -> (prompts, visits); fewer where the stream ends"""


class Launch:
    """How rollouts start. Writes to the buffer, owns nothing.

    source: the stream of prompts. order: a member's place in the queue. extra: members started for
    each that a unit needs.
    """

    def __init__(
        self,
        source: Source,
        spec: CollectSpec,
        buffer: Buffer,
        decisions: Decisions,
        order: Callable[[Member], Any],
        extra: float = 1.0,
    ) -> None:
        self.source, self.spec, self.buffer = source, spec, buffer
        self.start, self.pruner = decisions.start, decisions.prune
        self.order, self.extra = order, extra

    def admit(self, units: int) -> None:
        """Open units for the next prompts."""
        buffer, samples = self.buffer, self.spec.samples
        started = math.floor(self.extra * samples + 1e-9)
        count = -(-units // samples) if self.spec.apart else units
        prompts, visits = self.source(buffer.cursor, count)
        buffer.cursor += len(prompts)
        for prompt, visit in zip(prompts, visits, strict=True):
            starts = self.start(prompt, visit, started)
            if self.spec.apart:
                for sample, start in enumerate(starts):
                    self._launch(buffer.open(prompt, visit, 1), [(sample, start)])
                continue
            unit = buffer.open(prompt, visit, samples)
            unit.watch = self.pruner.watch(prompt) if self.pruner else None
            self._launch(unit, enumerate(starts))

    def _launch(self, unit: Unit, starts: Iterable[tuple[int, Start]]) -> None:
        for sample, start in starts:
            self.join(unit, sample, start)
        self.buffer.fly(unit)
        self.queue(unit)

    def join(self, unit: Unit, sample: int, start: Start, extra: bool = False) -> None:
        """One more member of a unit. extra: in place of one that was pruned, not to be judged."""
        rollout = Rollout(unit.prompt, sample, unit.visit, key_visit=start.key_visit)
        request = Request(
            self.buffer.next_request(),
            unit.prompt.token_ids,
            self._key(rollout),
            self.spec.sampling,
            prefix_ids=unit.prompt.prefix_ids,
            drafts=start.drafts,
            lenience=start.lenience,
            watch=unit.watch,
        )
        unit.members.append(Member(unit, rollout, request, extra=extra))

    def queue(self, unit: Unit) -> None:
        """Give its waiting members their places."""
        for member in unit.members:
            if member.state in WAITING:
                self.buffer.push(member, self.order(member))

    def renew(self, member: Member, request_id: int) -> None:
        """The request of a member that has another key visit now."""
        lost = (Draft(member.lost),) if member.lost else ()
        drafts = (*lost, *member.request.drafts[member.drafts_lost :])
        member.drafts_lost, key = len(lost), self._key(member.rollout)
        member.request = replace(member.request, id=request_id, key=key, drafts=drafts)

    def more(self, unit: Unit, count: int) -> None:
        """So many members for a flying unit, in place of those that were pruned."""
        before = unit.started + sum(member.extra for member in unit.members)
        starts = self.start(unit.prompt, unit.visit, before + count) if count else ()
        for sample in range(before, before + count):
            self.join(unit, sample, starts[sample], extra=True)
        self.buffer.add(unit, count)
        self.queue(unit)

    def _key(self, rollout: Rollout) -> int:
        spec = self.spec
        row, trace, cut = rollout.prompt.identity
        visit = rollout.key_visit
        return make_key(spec.seed, spec.purpose, row, rollout.sample, visit, trace, cut)
