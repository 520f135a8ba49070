"""Schedules on a virtual clock: a fixture checked by hand, and what each one promises."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from reroll.rollout.policies import Schedule, april, sorted_by_length, sync
from reroll.versions import runs
from tests.rollout.simulation import Simulation, cycle

LENGTHS = (2, 9, 4, 1, 6, 3, 12, 5)
"""of requests 0 to 7, and so on round and round; 4 slots, a tick takes 1 + running / 4"""


def fixture(schedule: Schedule, updates: int, **how: int) -> Simulation:
    settings = dict(batch=4, slots=4) | how
    return Simulation(schedule, cycle(LENGTHS), b0=4.0, **settings).run(updates)


def bubble(run: Simulation) -> float:
    stats = run.engine.stats()
    return round(1 - stats.slot_seconds / (stats.capacity * run.engine.clock), 4)


def lags(run: Simulation) -> dict[int, int]:
    """Trained tokens by lag in updates."""
    found: Counter[int] = Counter()
    for update, rollouts in enumerate(run.trained()):
        for rollout in rollouts:
            for version, count in runs(rollout.completion.versions):
                found[update - version] += count
    return dict(found)


def rows(run: Simulation) -> list[list[int]]:
    return [[rollout.prompt.row for rollout in batch] for batch in run.trained()]


def check(
    run: Simulation, ticks: int, drawn: int, times: Sequence[float], empty: float, again: int = 0
) -> None:
    stats = run.engine.stats()
    assert (stats.ticks, stats.tokens_drawn, run.times) == (ticks, drawn, list(times))
    assert run.engine.clock == ticks + Fraction(drawn, 4)
    assert bubble(run) == empty
    assert stats.tokens_resumed == again


def test_sync_in_two_rounds() -> None:
    run = fixture(sync(), 2)
    check(run, 21, 42, [13.0, 31.5], 0.4405)
    assert rows(run) == [[0, 1, 2, 3], [4, 5, 6, 7]] and lags(run) == {0: 42}


def test_sync_in_one_round() -> None:
    check(fixture(sync(), 1, batch=8), 16, 42, [26.5], 0.2736)


def partial(batches: int = 2, refill: bool = False, patience: int | None = None) -> Schedule:
    return sorted_by_length(batches, keep=True, refill=refill, patience=patience)


def test_sorted_partial() -> None:
    run = fixture(partial(), 2)
    check(run, 16, 42, [10.0, 26.5], 0.2736, again=10)
    assert rows(run) == [[3, 0, 5, 2], [7, 4, 1, 6]]  # by length; 3, 0, 2, 5 as they ended
    assert lags(run) == {0: 32, 1: 10}
    second = {r.prompt.row: runs(r.completion.versions) for r in run.trained()[1]}
    assert second == {
        4: [(0, 4), (1, 2)],
        1: [(0, 5), (1, 4)],
        7: [(1, 5)],
        6: [(0, 1), (1, 11)],
    }


def test_sorted_on_policy() -> None:
    run = fixture(sorted_by_length(2, keep=False, refill=False), 2)
    check(run, 17, 52, [10.0, 30.0], 0.1833)
    assert [sorted(batch) for batch in rows(run)] == [[0, 2, 3, 5], [1, 4, 6, 7]]
    assert lags(run) == {0: 42}
    assert run.batches[0].tokens_dropped == 10 and run.batches[0].restarts == 3


def test_sorted_partial_with_refill() -> None:
    run = fixture(partial(refill=True), 4, prompts=16)
    check(run, 28, 84, [10.0, 20.0, 32.0, 49.0], 0.1888, again=30)
    assert lags(run) == {0: 56, 1: 26, 2: 2}


def test_sorted_partial_of_two_groups() -> None:
    run = fixture(partial(), 4)
    check(run, 32, 84, [10.0, 26.5, 36.5, 53.0], 0.2736, again=20)
    assert lags(run) == {0: 64, 1: 20}


def test_april() -> None:
    # groups of two: their members' lengths are 2 9, 4 1, 6 3, 12 5 and round again
    lengths = {
        (row, sample): LENGTHS[(2 * row + sample) % 8] for row in range(8) for sample in (0, 1)
    }
    run = Simulation(april(2.0), lambda request: 1, batch=2, samples=2, slots=4, b0=4.0)
    by_id = run.collector.buffer.running
    run.engine._length = lambda request: lengths[
        request.prompt_ids[0], by_id[request.id].rollout.sample
    ]
    run.run(2)
    check(run, 13, 50, [14.0, 25.5], 0.0343, again=12)
    assert [[len(r.completion.token_ids) for r in batch] for batch in run.trained()] == [
        [4, 1, 6, 3],
        [2, 9, 4, 1],
    ]
    assert lags(run) == {0: 21, 1: 9}
