"""Pictures of slots over time: lanes, what is drawn, occupancy from cumulated slot time."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from reroll.engine.base import Span
from reroll.errors import UserError
from reroll.rollout.policies import Fate, april, sorted_by_length, tail_batch
from reroll.timeline import (
    OUTCOMES,
    Occupancy,
    batch_of,
    draw_occupancy,
    draw_timeline,
    lanes_of,
    read_timeline,
)
from tests.rollout.simulation import Simulation, cycle

PNG = b"\x89PNG\r\n\x1a\n"


def stays_of(seed: int, capacity: int, count: int) -> list[list[Any]]:
    """Stays that slots could have held, in random order."""
    draw = random.Random(seed)
    free, stays = [0.0] * capacity, []
    for _ in range(count):
        slot = draw.randrange(capacity)
        begin = free[slot] + draw.choice([0.0, 0.0, draw.random()])
        free[slot] = begin + draw.random()
        stays.append([begin, free[slot], draw.choice(list(OUTCOMES))])
    draw.shuffle(stays)
    return stays


@pytest.mark.parametrize("seed", range(5))
def test_lanes_never_overlap(seed: int) -> None:
    capacity = (1, 3, 8, 64, 500)[seed]
    stays = stays_of(seed, capacity, 1000)
    placed = lanes_of(stays, capacity)
    assert sorted([begin, end, what] for _, begin, end, what in placed) == sorted(stays)
    lanes: dict[int, float] = {}
    for lane, begin, end, _ in placed:
        assert 0 <= lane < capacity
        assert begin >= lanes.get(lane, 0.0)
        lanes[lane] = end


def test_one_stay_too_many_waits_for_a_lane() -> None:
    placed = lanes_of([[0.0, 1.0, "kept"], [0.0, 2.0, "kept"], [1 - 1e-12, 3.0, "kept"]], 2)
    assert placed == [(0, 0.0, 1.0, "kept"), (1, 0.0, 2.0, "kept"), (0, 1.0, 3.0, "kept")]


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure))
    return figures


def test_what_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    batches = [
        {"update": 1, "capacity": 2, "spans": [[0, 2, "finished"], [0, 3, "kept"]]},
        {"update": 2, "capacity": 2, "spans": []},
        {"update": 3, "capacity": 2, "spans": [[5, 6, "finished"], [5, 7, "finished"]]},
    ]
    figures = drawn(monkeypatch)
    draw_timeline(batches, tmp_path / "t.png")
    (axis,) = figures[0].axes
    boxes = {
        str(one.get_label()): [
            path.get_extents().extents.round(6).tolist() for path in one.get_paths()
        ]
        for one in axis.collections
        if isinstance(one, PolyCollection)
    }
    assert boxes == {
        "finished, trained on": [[0, 0, 2, 0.86], [5, 0, 6, 0.86], [5, 1, 7, 1.86]],
        "interrupted, resumed later": [[0, 1, 3, 1.86]],
    }
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("seconds", "slot")
    assert (axis.get_xlim(), axis.get_ylim()) == ((0, 7), (0, 2))
    assert [text.get_text() for text in axis.texts] == ["1", "3"]
    assert [line.get_xdata()[0] for line in axis.lines] == [3]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "finished, trained on", "interrupted, resumed later", "idle slot",
        "between batches: training, reading again",
    ]  # fmt: skip


@pytest.mark.parametrize(("capacity", "count"), [(4, 30), (512, 3000)])
def test_pictures_are_written(capacity: int, count: int, tmp_path: Path) -> None:
    spans = sorted(stays_of(0, capacity, count))
    parts = [spans[i::20] for i in range(20)]
    batches = [{"update": i, "capacity": capacity, "spans": part} for i, part in enumerate(parts)]
    lines = "".join(json.dumps(batch) + "\n" for batch in batches)
    (tmp_path / "timeline.jsonl").write_text(lines)
    again = read_timeline(tmp_path / "timeline.jsonl")
    assert again == batches
    draw_timeline(again, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(PNG)


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to draw"):
        draw_timeline([{"update": 1, "capacity": 2, "spans": []}], tmp_path / "t.png")
    batch = {"update": 1, "capacity": 2, "spans": [[0, 1, "kept"]]}
    for path in (tmp_path / "no" / "t.png", tmp_path / "t.mp3"):
        with pytest.raises(UserError, match="cannot write the picture"):
            draw_timeline([batch], path)


@pytest.mark.parametrize(
    "line", ["{", "{}", '{"update": 1, "capacity": 2, "spans": [[0, 1, "lost"]]}', "[1]"]
)
def test_files_that_are_no_timeline(line: str, tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    with pytest.raises(UserError, match="cannot read it"):
        read_timeline(path)
    path.write_text('{"update": 1, "capacity": 2, "spans": []}\n' + line)
    with pytest.raises(UserError, match="line 2 is no batch of a timeline"):
        read_timeline(path)


@pytest.mark.parametrize(
    "schedule",
    [
        sorted_by_length(2, keep=True, refill=False),
        sorted_by_length(2, keep=False, refill=False),
        april(2.0),
        tail_batch(1.5),
    ],
    ids=["partial", "on-policy", "april", "tail"],
)
def test_what_became_of_each_stay(schedule: Any) -> None:
    """What was finished and kept is trained on in the end; what was dropped is never."""
    run = Simulation(
        schedule, cycle((2, 9, 4, 1, 6, 3, 12, 5)), batch=4, samples=2, slots=6, b0=4.0
    )
    fates: dict[int, list[str]] = {}
    trained: set[int] = set()
    left: set[int] = set()
    run.engine.spans = spans = list[Span]()
    for update in range(12):
        run.run(1)
        batch = batch_of(update, spans, run.buffer, run.batches[-1])
        assert (batch["update"], batch["capacity"]) == (update, 6)
        assert [stay[:2] for stay in batch["spans"]] == [[s.begin, s.end] for s in spans]
        for span, (*_, outcome) in zip(spans, batch["spans"], strict=True):
            fates.setdefault(span.request_id, []).append(outcome)
        spans.clear()
        trained |= {r.completion.request_id for r in run.trained()[-1]}
    for unit in (*run.buffer.flying.values(), *run.buffer.ready):
        left |= {member.request.id for member in unit.members}
    for request, outcomes in fates.items():
        assert outcomes[:-1] == ["kept"] * (len(outcomes) - 1)
        last = {"finished": trained | left, "kept": left, "dropped": fates.keys() - trained - left}
        assert request in last[outcomes[-1]]
    seen = {outcome for outcomes in fates.values() for outcome in outcomes}
    assert seen == {"finished", "kept" if schedule.fate is Fate.KEEP else "dropped"}


def test_occupancy_of_known_slot_time() -> None:
    seen = Occupancy(capacity=4, begin=10.0, points=100)
    for clock, busy in ((10.0, 7.0), (11.0, 11.0), (12.0, 13.0), (14.0, 13.0), (15.0, 16.0)):
        seen.add(clock, busy)
    seen.pause(12.0, 2.0)
    edges, shares = seen.shares(5)
    assert edges.tolist() == [0, 1, 2, 3, 4, 5]
    assert shares.tolist() == [1.0, 0.5, 0.0, 0.0, 0.75]
    assert seen.pauses == [(2.0, 4.0)]


def test_occupancy_keeps_few_points_and_every_corner() -> None:
    exact, thin = Occupancy(2, 0.0, 1 << 30), Occupancy(2, 0.0, 64)
    clock = busy = 0.0
    draw = random.Random(0)
    for event in range(20_000):
        for seen in (exact, thin):
            seen.add(clock, busy, stay=event % 1000 in (0, 1))
        step = draw.random()
        clock += step
        busy += 0 if event % 1000 == 0 else step * draw.randrange(3)
    for seen in (exact, thin):
        seen.add(clock, busy, stay=True)
    assert len(thin.clocks) < 200 < len(exact.clocks)
    edges, shares = thin.shares(20)
    same, expected = exact.shares(20)
    assert edges.tolist() == same.tolist()
    assert abs(shares - expected).max() < 0.02
    assert set(exact.clocks) >= set(thin.clocks)


def test_occupancy_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = []
    for name, seconds in (("one", 4.0), ("two", 2.0)):
        seen = Occupancy(4, 0.0, 100)
        seen.add(0.0, 0.0)
        seen.add(seconds, 2 * seconds)
        seen.pause(seconds / 2, 1.0)
        rows.append((name, seen))
    draw_occupancy(rows, tmp_path / "simulate.png")
    assert (tmp_path / "simulate.png").read_bytes().startswith(PNG)
    figures = drawn(monkeypatch)
    draw_occupancy(rows, tmp_path / "simulate.png")
    axes = figures[0].axes
    assert [axis.get_title(loc="left") for axis in axes] == ["one", "two"]
    assert axes[1].get_xlabel() == "seconds"
    for axis, seconds in zip(axes, (4.0, 2.0), strict=True):
        values, edges, _ = axis.patches[0].get_data()
        assert edges[-1] == seconds and values.tolist() == [0.5] * len(values)
        assert axis.get_xlim() == (0, 4.0 * 1.005)
