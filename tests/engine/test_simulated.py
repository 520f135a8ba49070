"""The engine on a virtual clock: by hand, and against a simulator that runs every single tick.

All costs are small sums of powers of 2, so that times are exact whatever the order of the sums.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import pytest

from reroll.engine.base import Capabilities, Engine, Finished
from reroll.engine.clock import Cost, Linear, Roofline, Table
from reroll.engine.simulated import SimulatedEngine
from reroll.errors import UserError
from reroll.types import Completion, Finish, Request, Sampling
from reroll.versions import Runs, runs

LENGTHS = [2, 9, 4, 1, 6, 3, 12, 5]
TOY = Linear(1, 1 / 4)


def by_id(lengths: list[int]) -> Callable[[Request], int]:
    return lambda request: lengths[request.id]


def ask(request_id: int, prompt=(1,), limit=1000, partial=None, prefix=()) -> Request:
    return Request(
        request_id, prompt, request_id, Sampling(limit), prefix_ids=prefix, partial=partial
    )


def submit_all(engine: Engine, ids) -> None:
    for i in ids:
        engine.submit(ask(i))


def drain(engine: Engine) -> list[list[int]]:
    """Ids of each step's events, to the end."""
    steps = []
    while events := engine.step():
        steps.append([e.completion.request_id for e in events if isinstance(e, Finished)])
    return steps


def finished(engine: Engine) -> list[Completion]:
    return [event.completion for event in engine.step() if isinstance(event, Finished)]


# --- by hand ------------------------------------------------------------------------------------


def test_eight_requests_in_four_slots() -> None:
    engine = SimulatedEngine(by_id(LENGTHS), TOY, slots=4)
    assert engine.step() == [] and engine.stats().capacity == 4
    submit_all(engine, range(8))
    assert (engine.stats().running, engine.stats().waiting) == (0, 8)
    clocks = []
    ids = []
    while events := engine.step():
        clocks.append(engine.clock)
        ids.append([event.completion.request_id for event in events])
    # ends at ticks 1, 2, 4, 5, 7, 9, 10, 16: four run up to tick 9
    assert ids == [[3], [0], [2], [5], [4], [1], [7], [6]]
    assert clocks == [2, 4, 8, 10, 14, 17.5, 19, 26.5]
    stats = engine.stats()
    assert (stats.ticks, stats.tokens_drawn, stats.tokens_decoded) == (16, 42, 42)
    assert stats.seconds["decode"] == engine.clock == 26.5
    assert 1 - stats.slot_seconds / (4 * 26.5) == pytest.approx(0.2736, abs=5e-5)
    assert (stats.running, stats.waiting) == (0, 0)


def test_two_rounds_of_four() -> None:
    engine = SimulatedEngine(by_id(LENGTHS), TOY, slots=4)
    ends = []
    for start in (0, 4):
        submit_all(engine, range(start, start + 4))
        drain(engine)
        ends.append(engine.clock)
    assert ends == [13.0, 31.5]
    slot_seconds = engine.stats().slot_seconds
    assert 1 - slot_seconds / (4 * 31.5) == pytest.approx(0.4405, abs=5e-5)


@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_the_toy_law_is_ticks_plus_tokens_over_b0(slots: int) -> None:
    rng = random.Random(slots)
    lengths = [rng.randrange(1, 200) for _ in range(100)]
    engine = SimulatedEngine(by_id(lengths), Linear(1, 1 / 16), slots=slots)
    submit_all(engine, range(100))
    drain(engine)
    stats = engine.stats()
    assert stats.tokens_drawn == sum(lengths)
    assert engine.clock == stats.ticks + sum(lengths) / 16
    assert stats.ticks >= max(sum(lengths) / slots, *lengths)
    if slots == 1:
        assert stats.ticks == sum(lengths)


def test_replicas_share_the_queue_and_fill_evenly() -> None:
    engine = SimulatedEngine(by_id([4, 8, 4, 9, 1, 1]), Linear(1, 1), slots=2, replicas=2)
    submit_all(engine, range(6))
    # 0 and 2 in the first replica, 1 and 3 in the second; ticks of 3 seconds
    assert drain(engine) == [[0, 2], [4, 5], [1], [3]]
    # the first goes on with 4 and 5 for a tick, the second ends with a tick of 3 alone
    assert engine.clock == 8 * 3 + 2
    assert engine.stats().ticks == 4 + 1 + 9


def test_ends_of_one_moment_come_in_the_order_of_their_starts() -> None:
    engine = SimulatedEngine(by_id([3, 2, 1, 1, 2, 3]), TOY, slots=3, replicas=2)
    for i in (5, 4, 3, 2, 1, 0):
        engine.submit(ask(i))
    # 5, 3, 1 in one replica, 4, 2, 0 in the other
    assert drain(engine) == [[3, 2], [4, 1], [5, 0]]


def test_a_prompt_is_read_once_by_those_who_start_one_after_another() -> None:
    engine = SimulatedEngine(by_id([1] * 6), Linear(1, 0, per_prefill=1), slots=2)
    for i, prompt in enumerate([(1, 2, 3), (1, 2, 3), (1, 2, 3), (4, 5), (1, 2, 3)]):
        engine.submit(ask(i, prompt))
    assert drain(engine) == [[0, 1], [2, 3], [4]]
    assert engine.stats().tokens_prefilled == 3 + 2 + 3 and engine.clock == 3 + 8
    assert engine.stats().seconds["decode"] == 11
    engine.load_weights(1)
    engine.submit(ask(5, (1, 2, 3)))  # read last, but by other weights
    drain(engine)
    assert engine.stats().tokens_prefilled == 11


def test_reading_holds_up_the_whole_replica_and_no_other() -> None:
    cost = Linear(1, 0, per_prefill=1)
    engine = SimulatedEngine(by_id([9, 9, 2, 1]), cost, slots=2, replicas=2)
    for i, prompt in enumerate([(1,) * 2, (2,) * 3, (3,) * 4, (4,) * 5]):
        engine.submit(ask(i, prompt))
    # 0 and 2: 6 seconds of reading; 1 and 3: 8
    assert drain(engine) == [[2], [3], [0], [1]]
    assert engine.clock == 8 + 9 and engine.stats().tokens_prefilled == 14


def test_a_request_with_a_prefix_or_a_limit() -> None:
    engine = SimulatedEngine(by_id([5, 5, 5, 9]), Linear(1, 0, per_prefill=1), slots=4)
    engine.submit(ask(0, limit=5))
    engine.submit(ask(1, limit=6))
    engine.submit(ask(2, limit=4, prefix=(7, 8)))
    engine.submit(ask(3, prefix=(7, 8)))
    done = {c.request_id: c for _ in range(3) for c in finished(engine)}
    assert {i: c.finish for i, c in done.items()} == {
        0: Finish.LENGTH, 1: Finish.STOP, 2: Finish.LENGTH, 3: Finish.STOP,
    }  # fmt: skip
    assert [len(done[i].token_ids) for i in range(4)] == [5, 5, 2 + 4, 2 + 9]
    assert done[3].versions == [-1, -1] + [0] * 9 and done[2].versions == [-1] * 2 + [0] * 4
    assert engine.stats().tokens_drawn == 5 + 5 + 4 + 9
    assert engine.stats().tokens_prefilled == 1 + 2 + 2 and engine.stats().tokens_resumed == 0
    assert engine.clock == 5 + 9


def test_completions_carry_lengths_alone() -> None:
    engine = SimulatedEngine(by_id([3, 2]), TOY, slots=2)
    submit_all(engine, range(2))
    (one,), (other,) = finished(engine), finished(engine)
    assert (one.request_id, one.token_ids, one.finish) == (1, range(2), Finish.STOP)
    assert one.versions == [0, 0] and isinstance(one.versions, Runs)
    assert one.logprobs == one.behaviour_logprobs == one.loss_mask == [] and not one.abort_reason
    one.logprobs.append(1.0)
    assert other.logprobs == []


# --- aborting and resuming ----------------------------------------------------------------------


def test_who_is_aborted_keeps_whole_tokens() -> None:
    lengths = [10, 100, 100, 100, 50]
    cost = Table((1, 2, 3), (1.0, 1.0, 4.0), per_prefill=0)
    engine = SimulatedEngine(by_id(lengths), cost, slots=3, replicas=2)
    # 0, 2 and 4 in the first replica, ticks of 4; 1 and 3 in the second, ticks of 1
    submit_all(engine, range(5))
    assert [c.request_id for c in finished(engine)] == [0] and engine.clock == 40
    submit_all(engine, [0])
    aborted = engine.abort([3, 2, 77], "why")  # unknown ids are passed over
    assert [(c.request_id, len(c.token_ids)) for c in aborted] == [(2, 10), (3, 40)]
    assert {(c.finish, c.abort_reason) for c in aborted} == {(Finish.ABORT, "why")}
    assert engine.abort([3, 2], "why") == [] == engine.abort([], "why")
    rest = engine.abort(None, "all")
    assert [(c.request_id, len(c.token_ids)) for c in rest] == [(1, 40), (4, 10), (0, 0)]
    assert engine.abort(None, "all") == [] == engine.step() and engine.clock == 40
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    assert engine.stats().tokens_drawn == 10 + 10 + 40 + 40 + 10
    assert engine.stats().ticks == 10 + 40
    assert engine.stats().slot_seconds == 5 * 40


def test_a_tick_that_is_going_on_is_lost_to_who_is_aborted_alone() -> None:
    cost = Linear(0, 2)
    engine = SimulatedEngine(by_id([1, 9, 9, 9, 3]), cost, slots=3, replicas=2)
    submit_all(engine, range(4))
    # 0 and 2 in ticks of 4, 1 and 3 too
    engine.submit(ask(4))  # and 4 in the first: ticks of 6
    assert [c.request_id for c in finished(engine)] == [0] and engine.clock == 6
    (gone,) = engine.abort([3], "now")  # its second tick has 2 of 4 seconds to go
    assert len(gone.token_ids) == 1
    # 2 and 4 end their second and third tick at 10 and 14
    assert [c.request_id for c in finished(engine)] == [4] and engine.clock == 14
    # 1 had its second token at 8, and is alone since: 9 tokens at 8 + 7 * 2
    assert [len(c.token_ids) for c in engine.abort([1], "later")] == [2 + 3]
    assert engine.stats().ticks == 3 + 5
    assert drain(engine) == [[2]] and engine.clock == 14 + 6 * 2


def test_who_joins_in_mid_tick_starts_with_the_next() -> None:
    cost = Linear(0, 2, per_prefill=1)
    engine = SimulatedEngine(by_id([1, 9, 2, 2, 8]), cost, slots=2, replicas=2)
    engine.spans = []
    for i, prompt in enumerate([(), (5,), ()]):
        engine.submit(ask(i, prompt))
    # 0 and 2 in a tick of 4 seconds; 1 is read until 1, then ticks of 2
    assert [c.request_id for c in finished(engine)] == [0] and engine.clock == 4
    engine.submit(ask(3, (7, 7)))  # next to 2: read until 6, draws from then on
    engine.submit(ask(4, (8, 8, 8)))  # next to 1: the tick there ends at 5; read until 8
    assert [c.request_id for c in finished(engine)] == [2] and engine.clock == 4 + 2 + 4
    # the first tick of 1 and 4, from 8 to 12, is lost
    gone = engine.abort(None, "")
    assert [(c.request_id, len(c.token_ids)) for c in gone] == [(1, 2), (3, 1), (4, 0)]
    assert [tuple(span) for span in engine.spans] == [
        (0, 0, 4), (2, 0, 10), (1, 0, 10), (3, 4, 10), (4, 4, 10),
    ]  # fmt: skip
    assert engine.stats().ticks == 2 + 2 and engine.stats().tokens_drawn == 1 + 2 + 2 + 1


def test_a_resumed_request_goes_on_where_it_was() -> None:
    cost = Linear(1, 0, per_prefill=1)
    engine = SimulatedEngine(by_id([9, 3, 9]), cost, slots=2)
    for i in range(3):
        engine.submit(ask(i, (1, 2)))
    finished(engine)  # 1 has ended after 3 ticks
    partial, queued = engine.abort(None, "weights")
    assert [len(c.token_ids) for c in (partial, queued)] == [3, 0] and engine.clock == 5
    engine.load_weights(4)
    engine.submit(ask(0, (1, 2), partial=partial))
    engine.submit(ask(2, (1, 2), partial=queued))
    assert [len(c.token_ids) for c in engine.abort([0, 2], "again")] == [3, 0]
    engine.submit(ask(0, (1, 2), partial=partial))
    engine.submit(ask(2, (1, 2), partial=queued))
    (done,) = finished(engine)
    assert done.token_ids == range(9) and done.finish is Finish.STOP and not done.abort_reason
    assert done.versions == [0] * 3 + [4] * 6
    assert runs(finished(engine)[0].versions) == [(4, 9)]
    # the prompt again, for other weights, and the 3 tokens
    assert engine.clock == 5 + 5 + 9
    stats = engine.stats()
    assert (stats.tokens_prefilled, stats.tokens_resumed) == (2 + 2 + 3, 3)
    assert stats.tokens_drawn == 9 + 3 + 9
    assert partial.versions == [0] * 3 and len(partial.token_ids) == 3  # left as it was


def test_a_limit_counts_across_interruptions() -> None:
    engine = SimulatedEngine(by_id([50, 2]), TOY, slots=2)
    engine.submit(ask(0, limit=5, prefix=(8,)))
    engine.submit(ask(1))
    finished(engine)
    (partial,) = engine.abort(None, "")
    assert partial.token_ids == range(3) and partial.versions == [-1, 0, 0]
    engine.submit(ask(0, limit=5, prefix=(8,), partial=partial))
    (done,) = finished(engine)
    assert done.token_ids == range(6) and done.finish is Finish.LENGTH
    assert done.versions == [-1] + [0] * 5 and engine.stats().tokens_resumed == 2


# --- weights, time, refusals --------------------------------------------------------------------


def test_weights_change_in_an_empty_engine_or_with_leave() -> None:
    engine = SimulatedEngine(by_id([2, 3, 7, 4]), TOY, slots=2)
    engine.load_weights(3)
    submit_all(engine, range(4))
    for _ in range(2):  # queued alone, then running
        with pytest.raises(ValueError, match="abort or keep"):
            engine.load_weights(4)
        assert engine.policy_version == 3
        (done,) = finished(engine)
        engine.load_weights(3, keep=True)
    assert done.versions == [3] * 3
    engine.load_weights(4, keep=True)
    engine.load_weights(5, keep=True)  # 4 has drawn nothing
    assert engine.policy_version == 5
    (after,), (across,) = finished(engine), finished(engine)
    # now is tick 3: one starts here, the other did at tick 2
    assert (after.request_id, runs(after.versions)) == (3, [(5, 4)])
    assert (across.request_id, runs(across.versions)) == (2, [(3, 1), (5, 6)])
    engine.load_weights(6)
    assert engine.policy_version == 6


def test_each_token_is_of_the_version_at_its_draw() -> None:
    engine = SimulatedEngine(by_id([2, 9, 3, 1]), Linear(0, 1), slots=2, replicas=2)
    engine.submit(ask(0))
    engine.submit(ask(1))
    engine.submit(ask(2))
    # 0 and 2 in ticks of 2 seconds, 1 in ticks of 1
    assert finished(engine)[0].versions == [0, 0] and engine.clock == 4
    engine.load_weights(1, keep=True)
    engine.submit(ask(3))  # to the first replica, next to 2: both end at 6
    two, three = finished(engine)
    assert runs(two.versions) == [(0, 2), (1, 1)] and runs(three.versions) == [(1, 1)]
    engine.load_weights(2, keep=True)
    (one,) = finished(engine)
    assert runs(one.versions) == [(0, 4), (1, 2), (2, 3)] and engine.clock == 9


def test_a_token_that_is_being_drawn_is_of_the_new_version() -> None:
    engine = SimulatedEngine(by_id([1, 4]), Table((1,), (4.0,), 1), slots=1, replicas=2)
    engine.submit(ask(0, ()))
    engine.submit(ask(1, (1, 2)))  # ticks end at 6, 10, ...
    finished(engine)
    assert engine.clock == 4
    engine.load_weights(7, keep=True)
    assert runs(finished(engine)[0].versions) == [(7, 4)]


def test_time_passes_while_nothing_runs() -> None:
    engine = SimulatedEngine(by_id([2, 2, 2]), TOY, slots=1)
    engine.advance(3.5)
    submit_all(engine, range(2))
    engine.advance(1)  # nothing has started yet
    assert drain(engine) == [[0], [1]] and engine.clock == 4.5 + 5
    engine.advance(10)
    submit_all(engine, [2])
    drain(engine)
    assert engine.clock == 9.5 + 10 + 2.5
    stats = engine.stats()
    assert stats.seconds["decode"] == stats.slot_seconds == 7.5
    with pytest.raises(ValueError, match="cannot pass"):
        engine.advance(-1)


def test_time_cannot_pass_by_what_runs() -> None:
    engine = SimulatedEngine(by_id([2, 3]), TOY, slots=2)
    submit_all(engine, range(2))
    finished(engine)
    with pytest.raises(ValueError, match="1 requests run"):
        engine.advance(1)
    engine.abort(None, "")
    engine.advance(1)
    submit_all(engine, [1])
    drain(engine)
    assert engine.clock == 3 + 1 + 3.75


def test_what_makes_no_sense_is_refused() -> None:
    engine = SimulatedEngine(by_id([2, 0]), TOY, slots=1)
    submit_all(engine, [0])
    with pytest.raises(ValueError, match="in the engine already"):
        engine.submit(ask(0))
    with pytest.raises(ValueError, match="request 1: 0 tokens"):
        engine.submit(ask(1))
    engine.abort([0], "")
    partial = Completion(0, [5, 5], versions=[0, 0])
    with pytest.raises(ValueError, match="request 0: 2 tokens in all, but 2"):
        engine.submit(ask(0, partial=partial))
    assert engine.step() == []
    with pytest.raises(UserError, match="no model"):
        engine.score([((1,), (2,))])
    assert engine.capabilities == Capabilities()


def test_the_length_is_asked_once_a_submit() -> None:
    asked = []
    engine = SimulatedEngine(lambda r: asked.append(r.id) or 3, TOY, slots=1)
    submit_all(engine, range(3))
    drain(engine)
    assert asked == [0, 1, 2]


# --- against every single tick ------------------------------------------------------------------


@dataclass(eq=False)
class One:
    """A request of the simulator below."""

    request: Request
    total: int
    versions: list[int]
    given: int
    place: int = -1
    begin: float = 0.0


@dataclass(eq=False)
class Machine:
    """`inside` hold slots; `drawing` are in the tick that lasts until `until`."""

    inside: list[One] = field(default_factory=list)
    drawing: list[One] = field(default_factory=list)
    until: float | None = None
    ticking: bool = False
    reading: float = 0.0
    prompt: tuple[int, ...] | None = None


class EveryTick:
    """The rules, one tick after another, on plain lists."""

    def __init__(self, lengths: list[int], cost: Cost, slots: int, replicas: int) -> None:
        self.lengths, self.cost, self.slots = lengths, cost, slots
        self.machines = [Machine() for _ in range(replicas)]
        self.queue: list[One] = []
        self.clock, self.version = 0.0, 0
        self.ticks = self.drawn = self.prefilled = self.resumed = 0
        self.busy = 0.0
        self.spans: list[tuple[int, float, float]] = []
        self.places = count()

    def submit(self, request: Request) -> None:
        partial = request.partial
        versions = list(partial.versions) if partial else [-1] * len(request.prefix_ids)
        length = min(self.lengths[request.id], request.sampling.max_tokens)
        one = One(request, len(request.prefix_ids) + length, versions, len(versions))
        self.queue.append(one)

    def fill(self) -> None:
        while self.queue:
            machine = min(self.machines, key=lambda m: len(m.inside))
            if len(machine.inside) == self.slots:
                return
            one = self.queue.pop(0)
            request = one.request
            one.place, one.begin = next(self.places), self.clock
            tokens = one.given
            if machine.prompt != request.prompt_ids:
                tokens += len(request.prompt_ids)
            machine.prompt = request.prompt_ids
            machine.inside.append(one)
            machine.reading += self.cost.prefill(tokens)
            self.prefilled += tokens
            self.resumed += one.given - len(request.prefix_ids)

    def step(self) -> list[tuple]:
        self.fill()
        ended: list[One] = []
        while not ended:
            for machine in self.machines:
                if machine.inside and machine.until is not None and not machine.ticking:
                    machine.until += machine.reading  # still reading, and now more
                    machine.reading = 0.0
                elif machine.inside and machine.until is None and machine.reading:
                    machine.until, machine.ticking = self.clock + machine.reading, False
                    machine.reading = 0.0
                elif machine.inside and machine.until is None:
                    self.tick(machine)
            times = [m.until for m in self.machines if m.until is not None]
            if not times:
                return []
            seconds, self.clock = min(times) - self.clock, min(times)
            self.busy += seconds * sum(len(m.inside) for m in self.machines)
            for machine in self.machines:
                if machine.until == self.clock:
                    ended += self.over(machine)
        ended.sort(key=lambda one: one.place)
        for one in ended:
            machine = next(m for m in self.machines if one in m.inside)
            machine.inside.remove(one)
            self.spans.append((one.request.id, one.begin, self.clock))
            if not machine.inside:
                machine.reading = 0.0
        return [self.seen(one, "") for one in ended]

    def tick(self, machine: Machine) -> None:
        machine.drawing, machine.ticking = list(machine.inside), True
        context = sum(len(o.request.prompt_ids) + len(o.versions) for o in machine.drawing)
        machine.until = self.clock + self.cost.tick(len(machine.drawing), context)

    def over(self, machine: Machine) -> list[One]:
        machine.until = None
        if not machine.ticking:
            return []
        self.ticks += 1
        for one in machine.drawing:
            one.versions.append(self.version)
            self.drawn += 1
        return [one for one in machine.drawing if len(one.versions) == one.total]

    def abort(self, ids, reason: str) -> list[tuple]:
        gone = []
        for machine in self.machines:
            out = [o for o in machine.inside if ids is None or o.request.id in ids]
            gone += out
            self.spans += [(o.request.id, o.begin, self.clock) for o in out]
            machine.inside = [o for o in machine.inside if o not in out]
            machine.drawing = [o for o in machine.drawing if o not in out]
            if out and not machine.inside:
                machine.until, machine.reading = None, 0.0
        gone.sort(key=lambda one: one.place)
        out = [o for o in self.queue if ids is None or o.request.id in ids]
        self.queue = [o for o in self.queue if o not in out]
        return [self.seen(one, reason) for one in gone + out]

    def seen(self, one: One, reason: str) -> tuple:
        """id, tokens, versions, finish, reason."""
        length = len(one.versions) - len(one.request.prefix_ids)
        finish = Finish.LENGTH if length >= one.request.sampling.max_tokens else Finish.STOP
        if length + len(one.request.prefix_ids) < one.total:
            finish = Finish.ABORT
        return one.request.id, len(one.versions), one.versions, finish, reason


def seen(completion: Completion) -> tuple:
    c = completion
    assert c.token_ids == range(len(c.versions))
    return c.request_id, len(c.token_ids), list(c.versions), c.finish, c.abort_reason


def some_cost(rng: random.Random) -> Cost:
    prefill = rng.choice([0.0, 0.0, 1 / 64, 1 / 2])
    context = rng.choice([0.0, 1 / 256, 1 / 16])
    if rng.random() < 0.2:
        return Table((1, 2, 4), (0.5, 1.0, 1.25), prefill)
    return Linear(rng.choice([1.0, 0.25, 0.0]), rng.choice([0.25, 1 / 16]), context, prefill)


class Both:
    """The engine and the simulator side by side: every answer of one is the other's."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.lengths = [rng.randrange(1, rng.choice([4, 40])) for _ in range(rng.randrange(1, 60))]
        cost, slots, replicas = some_cost(rng), rng.randrange(1, 6), rng.randrange(1, 5)
        self.engine = SimulatedEngine(by_id(self.lengths), cost, slots=slots, replicas=replicas)
        self.engine.spans = []
        self.ticks = EveryTick(self.lengths, cost, slots, replicas)
        self.limit = rng.choice([1000, 20])
        self.left = list(range(len(self.lengths)))
        self.partials: list[Request] = []
        self.requests: dict[int, Request] = {}

    def submit(self, request: Request) -> None:
        self.requests[request.id] = request
        self.engine.submit(request)
        self.ticks.submit(request)

    def some(self, most: int) -> None:
        """Submit the next few."""
        for _ in range(self.rng.randrange(most + 1)):
            if self.left:
                i = self.left.pop(0)
                prompt = (i // 3 % 4,) * self.rng.choice([2, 2, 3])
                prefix = (1,) * self.rng.choice([0, 0, 0, 2])
                self.submit(ask(i, prompt, self.limit, prefix=prefix))

    def resume(self) -> None:
        """Some of those aborted go on, in any order."""
        self.rng.shuffle(self.partials)
        for _ in range(self.rng.randrange(len(self.partials) + 1)):
            self.submit(self.partials.pop())

    def step(self) -> bool:
        done = [event.completion for event in self.engine.step() if isinstance(event, Finished)]
        assert [seen(c) for c in done] == self.ticks.step()
        assert self.engine.clock == self.ticks.clock
        self.compare()
        return bool(done)

    def abort(self, ids: list[int] | None) -> None:
        gone = self.engine.abort(ids, "r")
        assert [seen(c) for c in gone] == self.ticks.abort(ids, "r")
        for c in gone:
            r = self.requests[c.request_id]
            self.partials.append(ask(r.id, r.prompt_ids, self.limit, c, r.prefix_ids))
        self.compare()

    def weights(self) -> None:
        self.ticks.version += 1
        self.engine.load_weights(self.ticks.version, keep=True)
        for machine in self.ticks.machines:
            machine.prompt = None

    def advance(self) -> None:
        if not self.engine.stats().running:
            self.engine.advance(1.5)
            self.ticks.clock += 1.5

    def compare(self) -> None:
        stats, ticks = self.engine.stats(), self.ticks
        assert stats.running == sum(len(machine.inside) for machine in ticks.machines)
        assert stats.waiting == len(ticks.queue)
        assert stats.slot_seconds == ticks.busy
        assert (stats.tokens_prefilled, stats.tokens_resumed) == (ticks.prefilled, ticks.resumed)
        if not stats.running:
            assert (stats.ticks, stats.tokens_drawn) == (ticks.ticks, ticks.drawn)
            assert sorted(map(tuple, self.engine.spans or [])) == sorted(ticks.spans)
            assert sum(span.end - span.begin for span in self.engine.spans or []) == ticks.busy


@pytest.mark.parametrize("seed", range(0, 200, 20))
def test_every_tick_agrees_without_interruptions(seed: int) -> None:
    for more in range(20):
        both = Both(seed + more)
        both.some(60)
        while both.step():
            both.some(3)


@pytest.mark.parametrize("seed", range(1000, 1400, 40))
def test_every_tick_agrees_whatever_happens_between_events(seed: int) -> None:
    for more in range(40):
        both = Both(seed + more)
        rng = both.rng
        both.some(60)
        for _ in range(150):
            chance = rng.random()
            if chance < 0.1:
                both.abort([rng.randrange(70) for _ in range(rng.randrange(1, 6))])
            elif chance < 0.13:
                both.abort(None)
            elif chance < 0.25:
                both.weights()
            elif chance < 0.45:
                both.resume()
            elif chance < 0.6:
                both.some(4)
            elif chance < 0.65:
                both.advance()
            both.step()
        while both.left or both.partials:
            both.some(60)
            both.resume()
            while both.step():
                pass
        assert both.engine.stats().tokens_drawn == both.ticks.drawn
        at_least = sum(min(length, both.limit) for length in both.lengths)
        assert both.ticks.drawn == at_least  # nothing is drawn twice


def test_order_and_lengths_are_kept_where_times_are_not_exact() -> None:
    rng = random.Random(5)
    lengths = [rng.randrange(1, 500) for _ in range(400)]
    cost = Roofline(3.3e3, 7.1e3, 100, 0.77, overhead=0.013)
    engine = SimulatedEngine(by_id(lengths), cost, slots=7, replicas=6)
    engine.spans = []
    todo = {i: ask(i, (i // 5, 1, 1)) for i in range(400)}
    for request in todo.values():
        engine.submit(request)
    clock = 0.0
    while todo:
        for c in finished(engine):
            assert len(c.token_ids) == lengths[c.request_id] == len(c.versions)
            del todo[c.request_id]
        assert engine.clock >= clock
        clock = engine.clock
        for c in engine.abort(rng.sample(range(400), 5), "r"):
            assert len(c.token_ids) < lengths[c.request_id]
            engine.submit(ask(c.request_id, (c.request_id // 5, 1, 1), partial=c))
    stats = engine.stats()
    assert stats.tokens_drawn == sum(lengths) and (stats.running, stats.waiting) == (0, 0)
    stays = sum(span.end - span.begin for span in engine.spans)
    assert stays == pytest.approx(stats.slot_seconds)
    assert max(cost.tick(b, 0) for b in range(1, 8)) * stats.ticks < stays


@pytest.mark.parametrize("seed", range(20))
def test_rounding_errors_cost_nobody_a_tick(seed: int) -> None:
    """Replicas in step with one another, at clocks that no float holds."""
    rng = random.Random(seed)
    tick = rng.choice([0.1, 0.3, 1 / 7])
    lengths = [rng.randrange(1, 60) for _ in range(300)]
    engine = SimulatedEngine(by_id(lengths), Linear(tick, 0), slots=4, replicas=4)
    started: dict[int, int] = {}

    def submit(ids) -> None:
        for i in ids:  # never more than there are slots
            started[i] = round(engine.clock / tick)
            engine.submit(ask(i))

    todo = list(range(300))
    submit(todo.pop() for _ in range(12))
    while started:
        for c in finished(engine):
            assert round(engine.clock / tick) - started.pop(c.request_id) == len(c.versions)
            assert len(c.versions) == lengths[c.request_id]
        if rng.random() < 0.3 and started:
            for c in engine.abort(rng.sample(sorted(started), 1), "r"):
                drawn = round(engine.clock / tick) - started.pop(c.request_id)
                # who ends now may not have been reported yet: then its last token is lost
                assert len(c.versions) == min(drawn, lengths[c.request_id] - 1)
        submit(todo.pop() for _ in range(min(12 - len(started), len(todo))))


def test_slots_are_found_again_after_a_long_tail() -> None:
    engine = SimulatedEngine(lambda r: r.id % 300 + 1, TOY, slots=100, replicas=2)
    for start in (0, 300):
        submit_all(engine, range(start, start + 200))
        engine.step()
        assert engine.stats().running == 199
        drain(engine)
    assert engine.stats().slot_seconds == pytest.approx(
        2 * sum(engine_seconds(range(first, 200, 2)) for first in (0, 1))
    )


def engine_seconds(lengths: range) -> float:
    """Slot seconds of requests that start together in one replica, under the toy law."""
    running = [sum(length >= tick for length in (i + 1 for i in lengths)) for tick in range(1, 201)]
    return sum(b * TOY.tick(b, 0) for b in running if b)
