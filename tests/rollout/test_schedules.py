"""What every schedule keeps to, whatever the lengths: nothing is lost, trained twice or starved."""

import json
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reroll.order import Stream
from reroll.rollout.buffer import Buffer
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
from reroll.rollout.unit import State
from reroll.types import Prompt, Request
from reroll.versions import runs
from tests.rollout.simulation import Simulation

PATIENCE = 3
SCHEDULES: dict[str, Schedule] = {
    "sync": sync(),
    "longest_first": longest_first(),
    "sorted": sorted_by_length(3, keep=True, refill=False),
    "sorted, refill": sorted_by_length(3, keep=True, refill=True, patience=PATIENCE),
    "sorted, on-policy": sorted_by_length(3, keep=False, refill=False),
    "sorted, on-policy, refill": sorted_by_length(2, keep=False, refill=True, patience=PATIENCE),
    "april": april(2.0, PATIENCE),
    "april, much": april(4.0, PATIENCE),
    "tail_batch": tail_batch(1.5),
    "async": asynchronous(PATIENCE, keep_cache=False),
    "async, cache kept": asynchronous(PATIENCE, keep_cache=True),
    "async, one step": asynchronous(1, keep_cache=False),
}
ON_POLICY = (
    "sync",
    "longest_first",
    "tail_batch",
    "sorted, on-policy",
    "sorted, on-policy, refill",
)


def tailed(seed: int, spread: float) -> Any:
    """Lengths with a long tail, a function of the key."""

    def length(request: Request) -> int:
        return 1 + int(random.Random(request.key ^ seed).lognormvariate(2, spread))

    return length


def check(buffer: Buffer) -> None:
    """The counts are those of what is there."""
    flying, ready = list(buffer.flying.values()), list(buffer.ready)
    unfinished = [m for u in flying for m in u.members if m.state is not State.DONE]
    assert buffer.active == len(unfinished)
    assert all(len(u.done) < u.need for u in flying)
    assert all(len(u.done) == u.need for u in ready)
    starts = Counter(u.since for u in [*flying, *ready] if u.since is not None)
    assert buffer.starts == starts
    inside = [m for m in unfinished if m.state is State.RUNNING]
    assert {m.request.id for m in inside} <= buffer.running.keys()
    for unit in [*flying, *ready, *buffer.deferred]:
        assert all((m.state is State.DONE) == (m in unit.done) for m in unit.members) or ready
        assert len({m.rollout.sample for m in unit.members}) == len(unit.members)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(SCHEDULES)),
    ahead=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 6),
    samples=st.integers(1, 4),
    slots=st.integers(1, 16),
    spread=st.sampled_from([0.0, 0.5, 1.5]),
    apart=st.booleans(),
)
def test_nothing_is_lost_trained_twice_or_starved(
    name: str,
    ahead: int | None,
    seed: int,
    batch: int,
    samples: int,
    slots: int,
    spread: float,
    apart: bool,
) -> None:
    schedule = replace(SCHEDULES[name], ahead=ahead)
    apart = apart and name != "tail_batch" and not schedule.drains
    batch *= samples if apart else 1
    run = Simulation(
        schedule, tailed(seed, spread), batch=batch, samples=samples, slots=slots, b0=4.0,
        apart=apart,
    )  # fmt: skip
    seen: set[tuple[int, int]] = set()
    trained = dropped = 0
    for update in range(12):
        (collected,) = run.run(1).batches[-1:]
        check(run.buffer)
        rollouts = [r for group in collected.groups for r in group.rollouts]
        units = len(rollouts) if apart else len(collected.groups)
        assert units == batch
        if not apart:
            assert all(len(group.rollouts) == samples for group in collected.groups)
        for rollout in rollouts:
            assert (rollout.prompt.row, rollout.sample) not in seen
            seen.add((rollout.prompt.row, rollout.sample))
            assert rollout.reward == 0.0
            versions = [v for v, _ in runs(rollout.completion.versions)]
            assert sum(n for _, n in runs(rollout.completion.versions)) == len(
                rollout.completion.token_ids
            )
            assert versions == sorted(set(versions)) and versions[-1] <= update
            if schedule.patience is not None:
                assert versions[0] >= update - schedule.patience
            if name in ON_POLICY:
                assert versions == [update]
        if schedule.patience is not None:
            assert all(
                unit.since is None or run.buffer.update - unit.since <= schedule.patience
                for unit in [*run.buffer.flying.values(), *run.buffer.ready]
            )
        trained += sum(len(r.completion.token_ids) for r in rollouts)
        dropped += collected.tokens_dropped
    run.collector.park()
    kept = [m for unit in run.buffer.flying.values() for m in unit.members]
    kept += [m for unit in run.buffer.ready for m in unit.done]
    rest = sum(m.tokens for m in kept)
    lost = run.collector._collected.tokens_dropped - run.batches[-1].tokens_dropped
    assert run.engine.stats().tokens_drawn == trained + dropped + lost + rest


@pytest.mark.parametrize("name", ["sync", "longest_first", "sorted", "sorted, on-policy"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), samples=st.integers(1, 3), slots=st.integers(1, 20))
def test_every_prompt_is_trained_on_once_a_cycle(
    name: str, seed: int, samples: int, slots: int
) -> None:
    batches = 3 if name.startswith("sorted") else 1
    run = Simulation(
        SCHEDULES[name], tailed(seed, 1.0), batch=4, samples=samples, slots=slots, b0=4.0
    ).run(4 * batches)
    for cycle in range(4):
        some = run.batches[cycle * batches : (cycle + 1) * batches]
        rows = sorted(group.prompt.row for one in some for group in one.groups)
        assert rows == list(range(cycle * 4 * batches, (cycle + 1) * 4 * batches))


def test_put_off_prompts_have_a_round_of_their_own() -> None:
    run = Simulation(tail_batch(1.5), tailed(1, 1.5), batch=4, samples=2, slots=6, b0=4.0).run(9)
    sizes = [len(one.groups) for one in run.batches]
    rows = [group.prompt.row for one in run.batches for group in one.groups]
    assert sizes == [4] * 9 and len(set(rows)) == 36
    # 6 prompts a round, 2 of them put off: after two rounds they are a batch, the third
    assert [one.waits.count(0) for one in run.batches] == [4, 4, 0] * 3
    assert [run.batches[i].tokens_dropped > 0 for i in range(3)] == [True, True, False]
    assert len(run.buffer.deferred) == 0 and run.buffer.cursor == 36


def test_in_such_a_round_those_start_first_that_had_come_farthest() -> None:
    run = Simulation(tail_batch(1.5), tailed(1, 1.5), batch=4, samples=2, slots=12, b0=4.0)
    while len(run.buffer.deferred) < 4:
        run.run(1)
    cuts = {unit.index: unit.cut for unit in run.buffer.deferred}
    expected = sorted(cuts, key=lambda i: (-cuts[i], i))
    assert expected != sorted(cuts)
    started: list[int] = []
    submit, running = run.engine.submit, run.buffer.running
    run.engine.submit = lambda request: (
        started.append(running[request.id].unit.index) or submit(request)
    )
    run.run(1)
    assert started == [i for i in expected for _ in range(2)]


def again(run: Simulation, schedule: Schedule, **how: Any) -> Simulation:
    """Another process that goes on from what was saved."""
    text = json.dumps(snapshot_of_lengths(run.buffer))
    other = Simulation(schedule, **how)
    other.engine.load_weights(run.engine.policy_version)
    prompts = [Prompt(row, "", (row,)) for row in range(10_000)]
    restore(other.collector, json.loads(text), Stream(prompts, 0).find)
    return other


def snapshot_of_lengths(buffer: Buffer) -> dict[str, Any]:
    """With token lists in place of ranges, and versions of each token."""
    found = snapshot(buffer)
    for unit in found["units"]:
        for member in unit["members"]:
            told = member["completion"]
            told["token_ids"], told["versions"] = list(told["token_ids"]), list(told["versions"])
    return found


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "async, cache kept"])
@pytest.mark.parametrize("apart", [False, True])
def test_saved_and_gone_on_with_it_is_the_same_run(name: str, apart: bool) -> None:
    schedule = replace(SCHEDULES[name], ahead=2)
    apart = apart and name != "tail_batch" and not schedule.drains
    how: Any = dict(
        length=tailed(5, 1.2), batch=3, samples=3, slots=7, b0=4.0, apart=apart,
    )  # fmt: skip
    whole, part = Simulation(schedule, **how).run(12), Simulation(schedule, **how)
    said = [told(one) for one in whole.batches]
    assert len(set(map(str, said))) == 12
    under_way = 0
    for update in range(12):
        part.run(1)
        assert told(part.batches[-1]) == said[update]
        under_way += len(snapshot(part.buffer)["units"])
        part = again(part, schedule, **how)
    assert (under_way > 0) is (not schedule.drains)


def told(collected: Any) -> list[Any]:
    return [
        (r.prompt.row, r.sample, r.visit, r.key_visit, r.reward, len(r.completion.token_ids),
         runs(r.completion.versions))
        for group in collected.groups for r in group.rollouts
    ]  # fmt: skip
