"""Dynamic sampling with a stub in place of the engine: what is asked for, what is kept."""

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroll.rollout.buffer import Buffer
from reroll.rollout.collected import Collected
from reroll.rollout.policies import sync
from reroll.rollout.refill import has_signal
from reroll.types import Group, Prompt, Rollout

Rewards = Sequence[float | None]
LIVE: Rewards = (1.0, 0.0)
DEAD: Rewards = (0.0, 0.0)


def group(row: int, rewards: Rewards) -> Group:
    prompt = Prompt(row, f"p{row}", (row,))
    return Group(prompt, [Rollout(prompt, i, 0, reward=r) for i, r in enumerate(rewards)])


class Prompts:
    """Groups in order, with these rewards; afterwards all of them `beyond`."""

    def __init__(self, *rewards: Rewards, beyond: Rewards = DEAD) -> None:
        self.rewards, self.beyond = rewards, beyond
        self.asked: list[int] = []

    def __call__(self, count: int) -> Collected:
        start = sum(self.asked)
        self.asked.append(count)
        rows = range(start, start + count)
        known = len(self.rewards)
        groups = [group(r, self.rewards[r] if r < known else self.beyond) for r in rows]
        ungraded = sum(r.reward is None for g in groups for r in g.rollouts)
        return Collected(
            groups,
            ungraded=ungraded,
            truncated=count,
            first_failure=f"in draw {len(self.asked)}" if ungraded else "",
            seconds_grading=0.5 * count,
        )


def refill(draw: Prompts, wanted: int, bound: float) -> tuple[Collected, list[Group]]:
    """A batch under `sync`, with everything drawn ended at once."""
    buffer, schedule = Buffer(wanted, 1, 1, bound), sync()
    every: list[Collected] = []
    while True:
        if count := schedule.admit(buffer):
            every.append(draw(count))
            for found in every[-1].groups:
                unit = buffer.open(found.prompt, 0, 1)
                buffer.ready.append(unit)
                if not has_signal(found):
                    buffer.set_aside(unit)
        elif (units := schedule.harvest(buffer)) is not None:
            groups = [group for one in every for group in one.groups]
            live = {unit.prompt.row for unit in units}
            return Collected(groups), [g for g in groups if g.prompt.row in live]


def rows(groups: Sequence[Group]) -> list[int]:
    return [g.prompt.row for g in groups]


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [
        ((1.0, 0.0), True),
        ((0.25, 0.25, 0.25, 0.5), True),
        ((0.0, 0.0, 0.0), False),
        ((1.0, 1.0), False),
        ((1.0, None), False),
        ((None, 0.0), False),
        ((1.0, None, 0.0), True),
        ((1.0, None, 1.0), False),
        ((None, None), False),
        ((-1.0, 1.0), True),
        ((0.5,), False),
        ((), False),
    ],
)
def test_signal_is_a_difference_between_graded_rewards(rewards: Rewards, signal: bool) -> None:
    assert has_signal(group(0, rewards)) is signal


def test_with_signal_everywhere_nothing_is_refilled() -> None:
    draw = Prompts(beyond=LIVE)
    every, live = refill(draw, 4, 3.0)
    assert draw.asked == [4]
    assert rows(every.groups) == rows(live) == [0, 1, 2, 3]


def test_it_asks_for_what_the_live_share_says() -> None:
    # 2 of 4 are live: 2 more take 4; all 4 live: enough, and more
    draw = Prompts(LIVE, DEAD, LIVE, DEAD, beyond=LIVE)
    every, live = refill(draw, 4, 10.0)
    assert draw.asked == [4, 4]
    assert rows(every.groups) == list(range(8))
    assert rows(live) == [0, 2, 4, 5, 6, 7]  # the surplus is kept, in order
    # 1 of 3: 2 more take 6, of which none is live: now 1 of 9, so 2 more take 18, which are
    draw = Prompts(LIVE, *[DEAD] * 8, beyond=LIVE)
    every, live = refill(draw, 3, 100.0)
    assert draw.asked == [3, 6, 18]
    assert rows(live) == [0, *range(9, 27)]
    # 3 of 5: 2 more take 3.33, rounded up
    draw = Prompts(LIVE, LIVE, DEAD, DEAD, LIVE, beyond=LIVE)
    refill(draw, 5, 10.0)
    assert draw.asked == [5, 4]


def test_the_share_counts_all_draws_so_far() -> None:
    # 2 of 4; then 1 of 4 more, so 3 of 8: 1 more takes 2.67, rounded up
    draw = Prompts(LIVE, LIVE, DEAD, DEAD, DEAD, DEAD, DEAD, LIVE, beyond=LIVE)
    _, live = refill(draw, 4, 10.0)
    assert draw.asked == [4, 4, 3]
    assert rows(live) == [0, 1, 7, 8, 9, 10]


def test_without_a_live_group_so_far_one_is_assumed() -> None:
    draw = Prompts(*[DEAD] * 3, beyond=LIVE)
    _, live = refill(draw, 3, 100.0)
    assert draw.asked == [3, 9]  # as if 1 of 3 were live
    assert rows(live) == list(range(3, 12))


@pytest.mark.parametrize(
    ("bound", "asked"), [(1.0, [3]), (1.5, [3, 1]), (2.0, [3, 3]), (4.0, [3, 9]), (5.0, [3, 9, 3])]
)
def test_without_any_signal_it_stops_at_the_bound(bound: float, asked: list[int]) -> None:
    draw = Prompts()
    every, live = refill(draw, 3, bound)
    assert draw.asked == asked
    assert rows(every.groups) == list(range(sum(asked)))
    assert live == []


def test_at_the_bound_the_batch_is_what_there_is() -> None:
    draw = Prompts(DEAD, LIVE, DEAD, DEAD, LIVE)
    every, live = refill(draw, 4, 2.0)
    assert draw.asked == [4, 4]
    assert len(every.groups) == 8
    assert rows(live) == [1, 4]


REWARDS = st.lists(st.sampled_from([None, 0.0, 0.5, 1.0]), min_size=1, max_size=4)


@given(
    rewards=st.lists(REWARDS, max_size=60),
    beyond=st.sampled_from([LIVE, DEAD]),
    wanted=st.integers(1, 12),
    bound=st.one_of(st.integers(1, 6).map(float), st.floats(1, 6)),
)
def test_invariants(rewards: list[Rewards], beyond: Rewards, wanted: int, bound: float) -> None:
    draw = Prompts(*rewards, beyond=beyond)
    every, live = refill(draw, wanted, bound)
    started = len(every.groups)
    assert draw.asked[0] == wanted
    assert min(draw.asked) >= 1
    assert rows(every.groups) == list(range(sum(draw.asked)))
    assert started <= bound * wanted
    unequal = [g for g in every.groups if len({r.reward for r in g.rollouts} - {None}) > 1]
    assert live == unequal
    assert len(live) >= wanted or started > bound * wanted - 1  # enough, or no more to be had
    before = wanted
    for asked in draw.asked[1:]:
        found = sum(row < before for row in rows(live))
        assert found < wanted  # it would have stopped
        exactly = math.ceil(Fraction((wanted - found) * before, max(found, 1)))
        # at most one more by the rounding of the share; the last may be cut short by the bound
        assert asked in (exactly, exactly + 1) or before + asked == started < before + exactly
        before += asked
