"""The file of traces: nothing is lost, nothing is mixed up, and errors say what to do."""

import sqlite3
from pathlib import Path

import pytest

from reroll.errors import UserError
from reroll.rollout.traces import TraceStore, Tried, problem_hash, trace_id
from reroll.types import Prompt
from tests.rollout.test_prefix import trace


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    path = tmp_path / "traces.sqlite"
    traces = [trace(7, row=2), trace(5, answer_at=3, row=1)]
    tried = [Tried(1, "1", 16, 1, 9), Tried(2, "2", 8, 2, 0), Tried(5, "5", 40)]
    with TraceStore(path) as store:
        store.claim({"run.seed": 3})
        store.add(traces, tried, {"tokens": 10.0, "flops": 2.5})
        store.add([], [Tried(5, "5", 48)], {"tokens": 1.0})
    with TraceStore(path, read_only=True) as store:
        assert store.traces() == [traces[1], traces[0]]
        assert store.tried() == {1: tried[0], 2: tried[1], 5: Tried(5, "5", 48)}
        assert store.ledger() == {"tokens": 11.0, "flops": 2.5}
        assert store.meta() == {"run.seed": 3}
    rows = sqlite3.connect(path).execute("SELECT row, length FROM overview").fetchall()
    assert rows == [(1, 5), (2, 7)]


def test_a_wave_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    class Broken(dict[str, float]):
        def items(self):
            raise RuntimeError("killed")

    with TraceStore(tmp_path / "traces.sqlite") as store:
        with pytest.raises(RuntimeError, match="killed"):
            store.add([trace()], [Tried(3, "3", 8, 1, 0)], Broken(tokens=1.0))
        assert (store.traces(), store.tried(), store.ledger()) == ([], {}, {})


def test_a_trace_is_what_it_says(tmp_path: Path) -> None:
    """The same text of the same problem is one trace, whoever finds it again."""
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.add([trace(), trace(), trace(8)])
        assert len(store.traces()) == 2
    ids = {trace_id("a", [1, 2]), trace_id("b", [1, 2]), trace_id("a", [1, 3]), trace_id("a", [])}
    assert len(ids) == 4
    assert all(0 < one < 2**62 for one in ids)
    prompt = Prompt(0, "x", (1, 2), "3")
    others = [Prompt(0, "x", (1, 2), "4"), Prompt(0, "x", (1, 3), "3")]
    assert problem_hash(prompt) == problem_hash(Prompt(9, "y", (1, 2), "3"))
    assert problem_hash(prompt) not in map(problem_hash, others)


def test_another_collection_s_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "traces.sqlite"
    with TraceStore(path) as store:
        store.claim({"run.seed": 3, "task.name": "chain_sum"})
        store.claim({"run.seed": 3, "task.name": "chain_sum"})
        with pytest.raises(UserError, match=r"run.seed = 3, not 4; collect into another file"):
            store.claim({"run.seed": 4, "task.name": "chain_sum"})


def test_files_of_others_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("these are my notes, and no database")
    with pytest.raises(UserError, match=r"text: cannot be used \(file is not a database\)"):
        TraceStore(text)
    assert text.read_text() == "these are my notes, and no database"
    other = tmp_path / "other.sqlite"
    sqlite3.connect(other).execute("CREATE TABLE t (a)").connection.commit()
    with pytest.raises(UserError, match="not a file of traces"):
        TraceStore(other)
    with pytest.raises(UserError, match="no such file; `reroll collect` writes it"):
        TraceStore(tmp_path / "none.sqlite", read_only=True)
    assert not (tmp_path / "none.sqlite").exists()
    newer = tmp_path / "newer.sqlite"
    TraceStore(newer).close()
    db = sqlite3.connect(newer)
    db.execute("PRAGMA user_version = 99")
    db.commit()
    db.close()
    with pytest.raises(UserError, match="of format 99"):
        TraceStore(newer)


def test_one_collection_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "traces.sqlite"
    with TraceStore(path), pytest.raises(UserError, match=r"locked.*wait for whoever uses it"):
        TraceStore(path)
    with TraceStore(path, read_only=True), TraceStore(path, read_only=True):
        pass  # runs that start from them do not keep each other out
