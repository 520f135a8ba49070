"""Rollouts written by a test, token by token, and a collector that prunes them.

A script says what a rollout draws; its last token is its reward. `END` ends a step.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from reroll.config import PruneSection
from reroll.engine.base import Capabilities, Event, Finished, Probed, Span, Stats
from reroll.rollout.buffer import Buffer
from reroll.rollout.collect import Collector
from reroll.rollout.collected import Collected, CollectSpec
from reroll.rollout.decisions import NOTHING, Decisions
from reroll.rollout.policies import Schedule, sync
from reroll.rollout.prune import Pruner
from reroll.rollout.unit import Member, State, Unit
from reroll.types import Completion, Finish, Group, Prompt, Purpose, Request, Rollout, Sampling
from tests.rollout.stub import StubGraders, spell

END, TEXT, NOUGHT, REFUSED = 0, 1, 20, 60
"""tokens: the end of a step, any other; a last one for reward 0 (each one more: .1), or ungraded"""
LIMIT = 40


class Line(NamedTuple):
    """What a rollout draws."""

    tokens: list[int]
    logprobs: list[float]
    walked: int = 0
    """how many of these it finds on its drafts"""


def line(
    length: int,
    reward: float | None,
    logprob: float = -1.0,
    steps: Sequence[int] = (),
    walked: int = 0,
) -> Line:
    """So many tokens, of which these (counted from 1) end a step."""
    tokens = [END if i + 1 in steps else TEXT for i in range(length - 1)]
    last = REFUSED if reward is None else NOUGHT + round(10 * reward)
    return Line([*tokens, last], [logprob] * length, walked)


def earned(text: str) -> float | str:
    """The judge of such rollouts; whoever was cut off at the limit earned 1."""
    token = ord(text[-1]) - ord("0")
    if token in (END, TEXT):
        return 1.0
    return "no grade" if token == REFUSED else (token - NOUGHT) / 10


class ScriptedEngine:
    """One token a tick in each slot, first come first served; probes as the contract has them."""

    def __init__(self, write: Callable[[Request], Line], slots: int) -> None:
        self.write, self.slots = write, slots
        self.policy_version, self.tick = 0, 0
        self.spans: list[Span] | None = None
        self.log: list[tuple[int, str, int]] = []
        """(tick, "start", "end" or the reason of an abort, request id)"""
        self._waiting: deque[tuple[Request, Completion]] = deque()
        self._running: list[tuple[Request, Completion]] = []
        self._stats = Stats(capacity=slots)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(hidden_states=True)

    def submit(self, request: Request) -> None:
        assert request.id not in {r.id for r, _ in (*self._waiting, *self._running)}
        done = Completion(request.id)
        if (partial := request.partial) is not None:
            streams = ("token_ids", "logprobs", "behaviour_logprobs", "versions", "loss_mask")
            copies = {name: list(getattr(partial, name)) for name in (*streams, "entropies")}
            done = replace(partial, request_id=request.id, abort_reason="", **copies)
        self._waiting.append((request, done))

    def step(self) -> list[Event]:
        self.tick += 1
        while self._waiting and len(self._running) < self.slots:
            self._running.append(self._waiting.popleft())
            self.log.append((self.tick, "start", self._running[-1][0].id))
        events: list[Event] = []
        for request, done in self._running:
            events += self._draw(request, done)
        ended = [done for _, done in self._running if done.finish is not Finish.ABORT]
        self._running = [x for x in self._running if x[1].finish is Finish.ABORT]
        self.log += [(self.tick, "end", done.request_id) for done in ended]
        self._stats.ticks += 1
        return [*events, *(Finished(done) for done in ended)]

    def _draw(self, request: Request, done: Completion) -> Iterator[Event]:
        text, begin, watch = self.write(request), len(done.token_ids), request.watch
        end = begin + 1
        if not begin and text.walked:
            end, done.walked = min(text.walked + 1, len(text.tokens)), text.walked
        for i in range(begin, end):
            done.token_ids.append(text.tokens[i])
            done.logprobs.append(text.logprobs[i])
            done.behaviour_logprobs.append(text.logprobs[i])
            done.versions.append(self.policy_version)
            done.loss_mask.append(True)
            if watch is not None and watch.entropy:
                done.entropies.append(0.5)
        self._stats.tokens_drawn += end - begin
        if end == len(text.tokens):
            done.finish = Finish.STOP
        if end == request.sampling.max_tokens:
            done.finish = Finish.LENGTH
        for read in range(begin, end) if watch is not None else ():
            assert watch is not None
            places = [i for i, at in enumerate(watch.at) if at == read]
            steps = sum(token in watch.step_ids for token in done.token_ids[:read])
            if read and done.token_ids[read - 1] in watch.step_ids:
                places += [len(watch.at) + i for i, n in enumerate(watch.steps) if n == steps]
            yield from (self._probed(done, read, read, place) for place in places)
        if watch is not None and watch.last and done.finish is not Finish.ABORT:
            yield self._probed(done, end - 1, end, -1, last=True)

    def _probed(
        self, done: Completion, position: int, read: int, place: int, last: bool = False
    ) -> Probed:
        streams = done.token_ids[:read], done.logprobs[:read], done.entropies[:read]
        hidden = torch.tensor([done.logprobs[position], float(position), 1.0])
        return Probed(done.request_id, position, hidden, *streams, place, last)

    def abort(self, ids: Iterable[int] | None, reason: str) -> list[Completion]:
        every = [*self._running, *self._waiting]
        chosen = {r.id for r, _ in every} if ids is None else set(ids)
        gone = [done for r, done in every if r.id in chosen]
        self._running = [x for x in self._running if x[0].id not in chosen]
        self._waiting = deque(x for x in self._waiting if x[0].id not in chosen)
        for done in gone:
            done.abort_reason = reason
            self.log.append((self.tick, reason, done.request_id))
        return gone

    def score(self, sequences: Any, temperature: float = 1.0) -> list[list[float]]:
        raise NotImplementedError

    def load_weights(self, version: int, keep: bool = False) -> None:
        assert keep or not (self._running or self._waiting)
        self.policy_version = version

    def stats(self) -> Stats:
        self._stats.running, self._stats.waiting = len(self._running), len(self._waiting)
        return self._stats


class Judged(NamedTuple):
    """A decision as it was made."""

    tick: int
    row: int
    stage: int
    tokens: dict[int, int]
    """completion tokens of each sample then; of one in the engine, those at its last event"""
    states: dict[int, State]
    """before it"""
    out: list[int]
    """samples left out"""


class Pruned:
    """A collector on such an engine. script: a rollout -> what it draws. settings: of prune.

    Prompts come round after `prompts`. `plain`: nothing is pruned.
    """

    def __init__(
        self,
        script: Callable[[Rollout], Line],
        schedule: Schedule | None = None,
        *,
        batch: int = 2,
        samples: int = 8,
        slots: int = 64,
        seed: int = 3,
        limit: int = LIMIT,
        prompts: int = 1 << 30,
        bound: float | None = None,
        held: bool = False,
        truncated: str = "keep",
        behind: int = 1,
        plain: bool = False,
        decisions: Decisions = NOTHING,
        **settings: Any,
    ) -> None:
        self.script, self.prompts = script, prompts
        schedule = schedule or sync()
        self.engine = ScriptedEngine(self.write, slots)
        self.graders = StubGraders(earned, behind=behind)
        self.buffer = Buffer(batch, samples, slots, bound, schedule.patience)
        spec = CollectSpec(
            Purpose.TRAIN, seed, samples, Sampling(limit), truncated, 1.0, held=held
        )  # fmt: skip
        self.section = PruneSection(on=True, **settings)
        self.pruner = Pruner(
            self.section, max_tokens=limit, seed=seed, step_ids=frozenset({END})
        )  # fmt: skip
        self.collector = Collector(
            self.engine, self.graders, spell, self.source, spec, schedule, self.buffer,
            replace(decisions, prune=None if plain else self.pruner),
        )  # fmt: skip
        self.judged: list[Judged] = []
        self.batches: list[Collected] = []
        self.said: list[list[str]] = []
        """lines of each batch"""
        self.keep = schedule.fate == "go on"
        decide, more = self.pruner.decide, self.pruner.more
        self.extra: list[tuple[int, int]] = []
        """(row, samples) started in place of pruned ones"""

        def watched(unit: Unit, *rest: Any) -> list[Member]:
            now = Judged(
                self.engine.tick, unit.prompt.row, unit.stage,
                {m.rollout.sample: len(self.tokens_of(m)) for m in unit.members},
                {m.rollout.sample: m.state for m in unit.members}, [],
            )  # fmt: skip
            out = decide(unit, *rest)
            self.judged.append(now._replace(out=[m.rollout.sample for m in out]))
            return out

        def counted(unit: Unit, dropped: int) -> int:
            self.extra.append((unit.prompt.row, more(unit, dropped)))
            return self.extra[-1][1]

        self.pruner.decide = watched  # type: ignore[method-assign]
        self.pruner.more = counted  # type: ignore[method-assign]

    def write(self, request: Request) -> Line:
        return self.script(self.buffer.running[request.id].rollout)

    def tokens_of(self, member: Member) -> list[int]:
        inside = {r.id: done for r, done in self.engine._running}
        done = inside.get(member.request.id, member.rollout.completion)
        return done.token_ids

    def source(self, start: int, count: int) -> tuple[list[Prompt], list[int]]:
        places = range(start, start + count)
        prompts = [Prompt(i % self.prompts, "", (i % self.prompts,)) for i in places]
        return prompts, [i // self.prompts for i in places]

    def run(self, updates: int) -> "Pruned":
        for _ in range(updates):
            self.batches.append(self.collector.next())
            self.said.append(self.pruner.said())
            self.engine.load_weights(self.engine.policy_version + 1, keep=self.keep)
        return self

    def groups(self) -> list[Group]:
        return [group for one in self.batches for group in one.groups]


def samples_of(rollouts: Iterable[Rollout]) -> list[int]:
    return [r.sample for r in rollouts]
