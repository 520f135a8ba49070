"""Schedules on the embedded engine: interruptions change when tokens are drawn, and never which."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from reroll.engine.local import LocalEngine
from reroll.order import Stream
from reroll.rollout.buffer import Buffer
from reroll.rollout.collect import Collector
from reroll.rollout.collected import Collected, CollectSpec
from reroll.rollout.policies import (
    Schedule,
    april,
    asynchronous,
    longest_first,
    sorted_by_length,
    sync,
    tail_batch,
)
from reroll.rollout.saved import restore, snapshot
from reroll.types import Finish, Prompt, Purpose, Rollout, Sampling
from tests.rollout.stub import StubGraders, spell
from tests.tiny import VOCABULARY, tiny, wide

STOPS = tuple(range(0, VOCABULARY, 9))
PROMPTS = [
    Prompt(row, f"p{row}", tuple((7 * row + i) % VOCABULARY for i in range(2 + row % 4)), f"a{row}")
    for row in range(12)
]
BATCH, SAMPLES, SLOTS, LIMIT = 2, 3, 4, 12
INTERRUPTING: dict[str, Callable[[], Schedule]] = {
    "sorted": lambda: sorted_by_length(3, keep=True, refill=False),
    "sorted, refill": lambda: sorted_by_length(3, keep=True, refill=True, patience=4),
    "april": lambda: april(3.0, 4),
    "async": lambda: asynchronous(2, keep_cache=False),
    "async, cache kept": lambda: asynchronous(2, keep_cache=True),
}


@pytest.fixture(autouse=True)
def _wide() -> Any:
    with wide():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    with wide():
        return tiny("qwen3")


class Run:
    """A collector on a model; an update changes what `learn` changes."""

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        *,
        apart: bool = False,
        held: bool = False,
        bound: float | None = None,
        judge: Callable[[str], float | str] = len,
    ) -> None:
        self.engine = LocalEngine(model, slots=SLOTS, capacity=20)
        self.graders = StubGraders(judge, behind=1)
        members = 1 if apart else SAMPLES
        whole = BATCH * SAMPLES // members
        self.buffer = Buffer(whole, members, SLOTS, bound, schedule.patience)
        sampling = Sampling(max_tokens=LIMIT, stop_ids=STOPS)
        spec = CollectSpec(Purpose.TRAIN, 3, SAMPLES, sampling, apart=apart, held=held)
        self.collector = Collector(
            self.engine, self.graders, spell, self.source, spec, schedule, self.buffer
        )
        self.keep = schedule.fate == "go on"
        self.batches: list[Collected] = []

    @staticmethod
    def source(start: int, count: int) -> tuple[list[Prompt], list[int]]:
        places = range(start, start + count)
        return [PROMPTS[i % 12] for i in places], [i // 12 for i in places]

    def run(self, updates: int, learn: Callable[[], None] = lambda: None) -> "Run":
        for _ in range(updates):
            self.batches.append(self.collector.next())
            self.engine.check()
            learn()
            self.engine.load_weights(self.engine.policy_version + 1, keep=self.keep)
        return self

    def rollouts(self) -> dict[tuple[int, int, int], Rollout]:
        """By (row, sample, visit)."""
        every = [r for one in self.batches for g in one.groups for r in g.rollouts]
        found = {(r.prompt.row, r.sample, r.visit): r for r in every}
        assert len(found) == len(every)
        return found


@pytest.fixture(scope="module")
def plain(model: Any) -> dict[tuple[int, int, int], Rollout]:
    """Two epochs and more, without interruptions."""
    with wide():
        return Run(model, sync()).run(14).rollouts()


def assert_drawn_alike(found: dict[Any, Rollout], plain: dict[Any, Rollout]) -> None:
    for key, rollout in found.items():
        mine, whole = rollout.completion, plain[key].completion
        assert mine.token_ids == whole.token_ids and mine.finish == whole.finish
        for stream in ("logprobs", "behaviour_logprobs"):
            pair = [torch.tensor(getattr(c, stream)) for c in (mine, whole)]
            assert (pair[0] - pair[1]).abs().max() < 1e-9
        assert rollout.reward == plain[key].reward == len(rollout.text)
        assert len(mine.versions) == len(mine.loss_mask) == len(mine.token_ids) <= LIMIT


@pytest.mark.parametrize("name", INTERRUPTING)
@pytest.mark.parametrize("apart", [False, True])
def test_interrupted_and_resumed_is_never_interrupted(
    name: str, apart: bool, model: Any, plain: dict[Any, Rollout]
) -> None:
    run = Run(model, INTERRUPTING[name](), apart=apart).run(8)
    found = run.rollouts()
    assert_drawn_alike(found, plain)
    parted = [r for r in found.values() if len(set(r.completion.versions)) > 1]
    assert parted
    assert all(r.completion.versions == sorted(r.completion.versions) for r in parted)
    resumed = run.engine.stats().tokens_resumed
    assert (resumed > 0) is (not run.keep)
    # each that ended was graded once, and nothing else
    assert all(job.completion == spell_of(job.id, run) for job in run.graders.jobs)
    assert len({job.id for job in run.graders.jobs}) == len(run.graders.jobs)
    ends = {r.completion.finish for r in found.values()}
    assert ends == {Finish.STOP, Finish.LENGTH}


def spell_of(request: int, run: Run) -> str:
    """The text of a rollout that ended, by its request."""
    ended = [r for one in run.batches for g in one.groups for r in g.rollouts]
    ended += [m.rollout for u in run.buffer.flying.values() for m in u.done]
    ended += [m.rollout for u in run.buffer.ready for m in u.done]
    (text,) = [r.text for r in ended if r.completion.request_id == request]
    return text


def test_longest_first_draws_the_same(model: Any, plain: dict[Any, Rollout]) -> None:
    run = Run(model, longest_first()).run(14)
    assert_drawn_alike(run.rollouts(), plain)
    whole = Run(model, sync()).run(14)
    for one, other in zip(run.batches, whole.batches, strict=True):
        assert [g.prompt.row for g in one.groups] == [g.prompt.row for g in other.groups]
        assert all(len({*r.completion.versions}) == 1 for g in one.groups for r in g.rollouts)
    for row in range(4, 12):  # whose third visit has not begun
        seen = [
            r.completion.token_ids for r in plain.values() if (r.prompt.row, r.visit) == (row, 1)
        ]
        assert run.buffer.lengths[row, 0, 0] == max(map(len, seen))


def test_started_anew_on_policy(model: Any, plain: dict[Any, Rollout]) -> None:
    schedule = sorted_by_length(3, keep=False, refill=False)
    fresh, held = (Run(model, schedule, held=held).run(9) for held in (False, True))
    for run in (fresh, held):
        for update, one in enumerate(run.batches):
            for group in one.groups:
                assert {v for r in group.rollouts for v in r.completion.versions} == {update}
        assert sum(one.tokens_dropped for one in run.batches) > 0
        rows = [
            sorted(g.prompt.row for b in run.batches[i : i + 3] for g in b.groups) for i in (0, 3)
        ]
        assert rows == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    # the same noise under the same weights: the same tokens, taken over from their own drafts
    assert_drawn_alike(held.rollouts(), plain)
    assert held.engine.stats().tokens_reused > 0
    other = [
        key for key, rollout in fresh.rollouts().items()
        if rollout.completion.token_ids != plain[key].completion.token_ids
    ]  # fmt: skip
    anew = [key for key, rollout in fresh.rollouts().items() if rollout.key_visit != rollout.visit]
    assert other and set(other) <= set(anew)


def test_races_of_samples(model: Any) -> None:
    run = Run(model, tail_batch(1.5)).run(6)
    for one in run.batches:
        assert [len(group.rollouts) for group in one.groups] == [SAMPLES] * BATCH
    assert any(r.sample >= SAMPLES for r in run.rollouts().values())
    late = [wait > 0 for one in run.batches for wait in one.waits]
    assert any(late) and not all(late)


def test_groups_without_signal_are_set_aside(model: Any) -> None:
    run = Run(model, april(2.0, 4), bound=4.0, judge=lambda text: float(len(text) > 5)).run(5)
    dull = 0
    for one in run.batches:
        assert len(one.trained()) == BATCH
        assert all(len({r.reward for r in g.rollouts}) == 2 for g in one.trained())
        rest = [g for g in one.groups if g not in one.trained()]
        assert all(len({r.reward for r in g.rollouts}) == 1 for g in rest)
        dull += len(rest)
    assert dull > 0


@pytest.mark.parametrize("name", [*INTERRUPTING, "sorted, on-policy"])
def test_killed_and_gone_on_with_it_is_the_same_run(name: str) -> None:
    """With a full buffer and weights that change: nothing is lost, and nothing trained twice."""
    make = INTERRUPTING.get(name, lambda: sorted_by_length(3, keep=False, refill=True, patience=4))

    def learner(model: Any) -> Callable[[], None]:
        lot = torch.Generator().manual_seed(1)

        def learn() -> None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.02 * torch.randn(parameter.shape, generator=lot)

        return learn

    first = tiny("qwen3")
    whole = Run(first, make()).run(4, learner(first))
    second = tiny("qwen3")
    learn = learner(second)
    part = Run(second, make()).run(2, learn)
    saved = json.dumps(snapshot(part.buffer))
    # killed in the middle of the next batch: a step or two more leaves no trace
    other = Run(second, make())
    other.engine.load_weights(part.engine.policy_version)
    restore(other.collector, json.loads(saved), Stream(PROMPTS, 0).find)
    other.run(2, learn)
    joined = {**part.rollouts(), **other.rollouts()}
    assert len(joined) == len(part.rollouts()) + len(other.rollouts())
    if part.keep:  # what was in the engine is drawn anew, so it is another run
        return
    expected = whole.rollouts()
    assert joined.keys() == expected.keys()
    for key, rollout in joined.items():
        mine, theirs = rollout.completion, expected[key].completion
        assert (mine.token_ids, mine.versions) == (theirs.token_ids, theirs.versions)
        assert torch.tensor(mine.logprobs).sub(torch.tensor(theirs.logprobs)).abs().max() < 1e-9


def test_an_interrupt_leaves_the_engine_empty(model: Any) -> None:
    run = Run(model, april(3.0, 4)).run(1)
    step, steps = run.engine.step, []

    def interrupted() -> Any:
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(1)
        return step()

    run.engine.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.collector.next()
    assert (run.engine.stats().running, run.engine.stats().waiting) == (0, 0)
