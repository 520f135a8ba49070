"""The table of costs: reading it, keeping it, and the length of a tick that it leads to."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reroll.engine.costs import CHUNKS, TYPICAL, Costs, Pace, best_chunk, load_costs
from reroll.engine.local import LocalEngine, Speculation
from reroll.errors import UserError
from reroll.types import Request, Sampling
from tests.engine.helpers import finish, tokens
from tests.tiny import tiny

TABLE = Costs(
    (1, 4, 16), ((1.0, 1.5, 2.5, 4.0), (2.0, 2.5, 4.5, 8.0), (5.0, 9.0, 17.0, 33.0)), 0.02
)


def test_ticks_are_interpolated_between_the_measured_batches():
    assert [TABLE.tick(batch) for batch in (1, 4, 16)] == [1, 2, 5]
    assert TABLE.tick(10) == pytest.approx(3.5) and TABLE.tick(2) == pytest.approx(4 / 3)
    assert TABLE.tick(99) == 5  # beyond what was measured: the last
    assert [TABLE.tick(4, chunk) for chunk in CHUNKS] == [2, 2.5, 4.5, 8]
    assert TABLE.tick(10, 8) == pytest.approx(20.5)


def test_a_decoded_token_costs_its_share_of_a_tick():
    assert TABLE.token(4) == pytest.approx(0.5) and TABLE.token(16) == pytest.approx(5 / 16)
    assert TABLE.token(0) == TABLE.token(1) == 1


def test_pace_is_what_decoded_tokens_have_cost_lately():
    pace = Pace()
    assert pace.token(TABLE, 4) == TABLE.token(4)  # nothing is known yet
    pace.observe(2.0, 4)
    pace.observe(1.5, 10)
    assert pace.token(TABLE, 4) == pace.token(TABLE, 16) == 3.5 / 14
    pace.decay()  # the rate stays, its weight halves
    assert pace.token(TABLE, 4) == 3.5 / 14
    pace.observe(1.0, 1)
    assert pace.token(TABLE, 4) == pytest.approx((1.75 + 1) / (7 + 1))
    other = Pace()
    other.load_state(json.loads(json.dumps(pace.state())))
    assert (other.seconds, other.tokens) == (pace.seconds, pace.tokens)


def brute_chunk(costs: Costs, running: int, lengths, rates, chunks) -> int:
    """The chunk of most expected tokens a second; the smaller one of equals."""
    speeds = []
    for chunk in chunks:
        expected = float(running)
        for length, rate in zip(lengths, rates, strict=True):
            # token j is accepted if it and all before it are
            expected += sum(rate**j for j in range(1, min(length, chunk - 1) + 1))
        speeds.append(expected / costs.tick(running, chunk))
    most = max(speeds)
    return next(c for c, speed in zip(chunks, speeds, strict=True) if speed > most * (1 - 1e-12))


STEP = st.floats(0.01, 1.0)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(STEP, STEP, STEP, STEP), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(1, 9), st.floats(0.0, 0.99)), min_size=1, max_size=5),
    st.integers(0, 14),
    st.sampled_from([(1, 2), (1, 2, 4), (1, 2, 4, 8)]),
)
def test_best_chunk_against_enumeration(steps, offers, more, chunks):
    rows = tuple((a, a + b, a + b + c, a + b + c + d) for a, b, c, d in steps)
    costs = Costs((1, 4, 16), rows, 0.1)
    lengths, rates = zip(*offers, strict=True)
    running = len(offers) + more
    expected = brute_chunk(costs, running, lengths, rates, chunks)
    assert best_chunk(costs, running, lengths, rates, chunks) == expected


def test_best_chunk_by_hand():
    flat = Costs((1,), ((1.0, 1.0, 1.0, 1.0),), 0.1)
    assert best_chunk(flat, 1, [7], [0.9]) == 8  # more tokens at no cost
    assert best_chunk(flat, 1, [1], [0.9]) == 2  # nothing is offered behind the first
    steep = Costs((1,), ((1.0, 2.0, 4.0, 8.0),), 0.1)
    assert best_chunk(steep, 1, [7], [0.99]) == 1  # c tokens at c times the cost never pay
    # 1 + .5 for 1.4, 1 + .5 + .25 + .125 for 1.5; 8 gives 1.992 for 3
    some = Costs((1,), ((1.0, 1.4, 1.5, 3.0),), 0.1)
    assert best_chunk(some, 1, [7], [0.5]) == 4
    # four sequences, one of which has an offer: the others pay for it
    assert best_chunk(replace(some, ticks=((1.0, 1.3, 1.5, 3.0),)), 4, [7], [0.5]) == 1


def test_save_and_load(tmp_path):
    path = tmp_path / "costs.json"
    assert load_costs(path) is None
    for costs in (TABLE, TYPICAL, replace(TABLE, rounded=True)):
        costs.save(path)
        assert load_costs(path) == costs
    assert path.read_text().endswith("}\n")


GOOD = {"batches": [1, 2], "ticks": [[1, 2, 3, 4], [2, 3, 4, 5]], "prefill": 0.1, "rounded": False}


def bad(**changes) -> str:
    return json.dumps(GOOD | changes)


BAD = {
    "empty": "",
    "no JSON": "batches = [1]",
    "cut off": json.dumps(GOOD)[:-9],
    "null": "null",
    "a list": "[1, 2]",
    "a missing key": json.dumps({name: GOOD[name] for name in ("batches", "ticks", "rounded")}),
    "a word for a number": bad(prefill="x"),
    "a number for a table": bad(ticks=3),
    "a flat table": bad(ticks=[1, 2, 3, 4]),
    "a missing row": bad(ticks=[[1, 2, 3, 4]]),
    "a short row": bad(ticks=[[1, 2, 3, 4], [1, 2]]),
    "no rows": bad(batches=[], ticks=[]),
}


def test_the_good_file_is_one(tmp_path):
    """Else the bad ones would be refused for something else."""
    path = tmp_path / "costs.json"
    path.write_text(bad())
    assert load_costs(path) == Costs((1, 2), ((1.0, 2, 3, 4), (2.0, 3, 4, 5)), 0.1)


@pytest.mark.parametrize("kind", BAD)
def test_another_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "costs.json"
    path.write_text(BAD[kind])
    with pytest.raises(UserError) as refused:
        load_costs(path)
    assert str(refused.value).startswith(f"{path}: not the table of costs")
    assert "delete it" in str(refused.value)


@pytest.mark.parametrize("redraft", [1, 8])
def test_measuring_fills_the_table_and_leaves_the_engine_as_it_was(redraft):
    model = tiny("llama")
    requests = [Request(i, (1, 2, 3), i, Sampling(9)) for i in range(5)]
    plain = finish(LocalEngine(model, slots=6, capacity=16), requests)
    speculation = Speculation(redraft=redraft)
    engine = LocalEngine(model, slots=6, capacity=16, prefill_tokens=600, speculation=speculation)
    costs = engine.measure()
    assert costs.batches == (1, 4, 6)
    assert len(costs.ticks) == 3 and all(len(row) == len(CHUNKS) for row in costs.ticks)
    # more work takes no less time
    assert all(list(row) == sorted(row) for row in [*costs.ticks, *zip(*costs.ticks, strict=True)])
    assert not costs.rounded
    assert all(seconds > 0 for row in costs.ticks for seconds in row) and costs.prefill > 0
    stats = engine.stats()
    assert stats.ticks == stats.tokens_decoded == stats.tokens_prefilled == 0
    assert tokens(finish(engine, requests)) == tokens(plain)
