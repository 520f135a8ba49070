"""What ticks cost on a virtual clock, in numbers worked out by hand."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reroll.engine.clock import Cost, Linear, Roofline, Table, steps_within, stretch

MEASURED = Table((1, 4, 8), (2.0, 2.75, 5.75), per_prefill=0.5)
MACHINE = Roofline(bandwidth=1000, flops=4000, parameters=100, kv_bytes=5, overhead=0.25)
COSTS = [Linear(1, 1 / 8), Linear(0.3, 0.01, 1e-5), Linear(0, 1, 1), MEASURED, MACHINE]


def test_a_linear_tick() -> None:
    assert Linear(1, 1 / 4).tick(4, 999) == 2 and Linear(1, 1 / 4).prefill(999) == 0
    cost = Linear(1, 0.5, 0.25, per_prefill=2)
    assert cost.tick(3, 10) == 1 + 1.5 + 2.5 and cost.prefill(7) == 14


def test_a_table_is_interpolated_and_its_last_slope_goes_on() -> None:
    ticks = {1: 2.0, 2: 2.25, 3: 2.5, 4: 2.75, 6: 4.25, 8: 5.75, 9: 6.5, 12: 8.75, 0: 2.0}
    assert {batch: MEASURED.tick(batch, 7) for batch in ticks} == ticks
    assert MEASURED.prefill(3) == 1.5
    one = Table((4,), (3.0,))
    assert [one.tick(batch, 0) for batch in (1, 4, 9)] == [3, 3, 3]
    falling = Table((1, 2, 4), (1.0, 3.0, 2.0))  # noise; going on it would end below 0
    assert [falling.tick(batch, 0) for batch in (2, 3, 4, 99)] == [3, 2.5, 2, 2]


@pytest.mark.parametrize(
    ("batches", "seconds"),
    [((), ()), ((1, 2), (1.0,)), ((2, 1), (1.0, 2.0)), ((1, 1), (1.0, 2.0)), ((1,), (0.0,))],
)
def test_what_is_no_table_is_refused(batches, seconds) -> None:
    with pytest.raises(ValueError, match="not a table"):
        Table(batches, seconds)


def test_a_roofline_waits_for_memory_or_for_arithmetic() -> None:
    # weights: 200 bytes; a request's arithmetic: 200 flops, .05 s
    assert MACHINE.tick(1, 0) == 0.25 + 0.2
    assert MACHINE.tick(1, 100) == pytest.approx(0.25 + 0.7)  # + 500 bytes
    assert MACHINE.tick(4, 0) == 0.25 + 0.2  # the corner: 4 * .05
    assert MACHINE.tick(8, 0) == 0.25 + 0.4
    assert MACHINE.tick(8, 100) == pytest.approx(0.25 + 0.7)
    assert MACHINE.prefill(10) == 0.5
    assert Roofline(1000, 4000, 100, 5, weight_bytes=4).tick(1, 0) == 0.4


@pytest.mark.parametrize("cost", [COSTS[0], COSTS[1], COSTS[2], MEASURED, MACHINE])
def test_a_stretch_is_the_sum_of_its_ticks(cost: Cost) -> None:
    rng = random.Random(0)
    for _ in range(50):
        steps, batch, context = rng.randrange(40), rng.randrange(1, 12), 300 + rng.randrange(500)
        ticks = math.fsum(cost.tick(batch, context + batch * i) for i in range(steps))
        assert stretch(cost, steps, batch, context) == pytest.approx(ticks, rel=1e-12)


def test_over_a_corner_a_stretch_is_a_little_too_short() -> None:
    # ticks of .65 up to context 40, then .005 more a token
    ticks = [MACHINE.tick(8, 8 * i) for i in range(11)]
    assert ticks[:6] == [0.65] * 6
    assert ticks[6:] == pytest.approx([0.69, 0.73, 0.77, 0.81, 0.85])
    short = stretch(MACHINE, 11, 8, 0)
    assert short == pytest.approx(11 * 0.65) and short < sum(ticks)


@pytest.mark.parametrize("cost", COSTS)
@settings(max_examples=200)
@given(
    steps=st.integers(0, 10**6),
    batch=st.integers(1, 300),
    context=st.integers(0, 10**6),
    start=st.sampled_from([0.0, 0.1, 1234.5678]),
)
def test_steps_within_is_the_inverse_of_stretch(cost, steps, batch, context, start) -> None:
    seconds = stretch(cost, steps, batch, context)
    # the clock adds and subtracts: a rounding error is no tick less
    for same in (seconds, (start + seconds) - start):
        assert steps_within(cost, same, batch, context) == steps
    tick = stretch(cost, steps + 1, batch, context) - seconds
    for part in (0.01, 0.5, 0.99):
        assert steps_within(cost, seconds + part * tick, batch, context) == steps


def test_no_time_is_no_tick() -> None:
    assert steps_within(Linear(1, 1), 0.0, 3, 5) == 0 == steps_within(Linear(1, 1), 1.5, 1, 0)
    assert steps_within(Linear(1, 1), -5.0, 3, 5) == 0
