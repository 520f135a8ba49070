import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reroll.errors import UserError
from reroll.rollout import storefile as module
from reroll.rollout.past import COLUMNS, Past
from reroll.rollout.store import Store, prompt_hash
from reroll.rollout.storefile import APPLICATION_ID
from reroll.types import Finish

HASH = prompt_hash((1, 2, 3))
OTHER = prompt_hash((3, 2, 1))
EVERYTHING = dict(before_visit=1000, visits=1000)


def past(row: int = 0, sample: int = 0, visit: int = 0, step: int = 1, **other: Any) -> Past:
    """A rollout of five tokens whose content is a function of its key and step."""
    seed = int(((row * 31 + sample) * 31 + visit) * 31 + step)
    length = other.pop("length", 5)
    made: dict[str, Any] = dict(
        row=row,
        sample=sample,
        visit=visit,
        step=step,
        noise_visit=visit,
        version=2 * step,
        token_ids=random.Random(seed).choices(range(151_936), k=length),
        logprobs=[-(seed % 97) / 64 - i for i in range(length)],
        versions=[2 * step] * length,
        reward=seed % 2,
        rewards={"exact": float(seed % 2), "short": 0.1},
        graders="abc",
        finish="stop",
        trained=bool(seed % 3),
        pruning=f'{{"saved": {seed}}}' if seed % 2 else "",
    )
    return Past(**made | other)


def group(row: int = 0, visit: int = 0, step: int = 1, samples: int = 4) -> list[Past]:
    return [past(row, sample, visit, step) for sample in range(samples)]


def named(rollouts: list[Past], name: bytes = HASH) -> list[tuple[bytes, Past]]:
    return [(name, rollout) for rollout in rollouts]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rollouts.sqlite"


def open_(path: Path, memory: bool = True, **other: Any) -> Store:
    return Store(path, **dict(memory_gb=0.01 if memory else 0) | other)


def on_disk(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}


# --- what a rollout is --------------------------------------------------------------------------


def test_hashes_tell_prompts_and_prefixes_apart() -> None:
    ids = (5, 6, 7)
    names = [
        prompt_hash(ids),
        prompt_hash((5, 6)),
        prompt_hash((7, 6, 5)),
        prompt_hash(()),
        prompt_hash(ids, trace=1),
        prompt_hash(ids, cut=1),
        prompt_hash(ids, trace=1, cut=1),
        prompt_hash((*ids, 1, 0, 1, 0)),
        prompt_hash((0, 0)),
    ]
    assert len(set(names)) == len(names)
    assert {len(name) for name in names} == {16}
    assert prompt_hash(list(ids)) == names[0] == prompt_hash(np.array(ids))  # type: ignore[arg-type]
    # stores outlive versions of this code
    assert prompt_hash(ids, 1, 2).hex() == "12eaaaf656c74e71fe453d73ec30438a"


def test_streams_are_made_into_read_only_arrays() -> None:
    one = past()
    for name, kind in (("token_ids", "int32"), ("logprobs", "float32"), ("versions", "int32")):
        stream = getattr(one, name)
        assert stream.dtype == kind and stream.shape == (5,)
        with pytest.raises(ValueError):
            stream[0] = 1
    ids = np.arange(5, dtype=np.int32)
    assert past(token_ids=ids).token_ids.base is ids  # no copy, and the caller's own stays writable
    ids[0] = 7


def test_rollouts_are_equal_field_by_field() -> None:
    one = past()
    assert one == past() and hash(one) == hash(past()) and one != "something else"
    changed: dict[str, Any] = dict(
        token_ids=[0] * 5, logprobs=[0.0] * 5, versions=[9] * 5, reward=None, rewards={},
        graders="", finish="length", trained=not one.trained, pruning="{}",
    )  # fmt: skip
    for field in fields(Past):
        value = changed.get(field.name, 77)
        assert replace(one, **{field.name: value}) != one, field.name


@pytest.mark.parametrize("name", ["token_ids", "logprobs", "versions"])
def test_streams_have_one_length(name: str) -> None:
    with pytest.raises(ValueError, match="not one for each token"):
        past(**{name: [1] * 4})
    with pytest.raises(ValueError, match="not one for each token"):
        past(**{name: [[1]] * 5})


# --- round trips --------------------------------------------------------------------------------

UNUSUAL = [
    past(),
    past(sample=1, reward=None, rewards={}, graders="", finish=Finish.LENGTH, trained=True),
    past(sample=2, length=0),
    past(sample=3, length=1),
    past(sample=4, versions=[-1, -1, 3, 4, 4], logprobs=[0.0, 0.0, -1.5, float("-inf"), -0.0]),
    past(sample=5, versions=[1, 2, 1, 2, 1], token_ids=[0, 2**31 - 1, 151_936, 1, 0]),
    past(sample=6, reward=-0.0, rewards={"a": -0.0, "b": float("inf"), "ü\n'": 1e-300}),
    past(sample=7, reward=-1e300, graders="Δ ' \" \0 end", noise_visit=-1, version=0),
    past(sample=8, reward=np.float32(0.1), row=np.int64(0), rewards={"a": 1}),
    past(sample=9, length=5000),
]


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "disk"])
def test_every_field_comes_back(path: Path, memory: bool) -> None:
    with open_(path, memory) as store:
        store.put(1, named(UNUSUAL))
        found = store.get(HASH, 0, **EVERYTHING)
        assert found == UNUSUAL
        assert [one.sample for one in found] == list(range(len(UNUSUAL)))
        assert type(found[1].finish) is str and type(found[0].trained) is bool
        assert found[1].reward is None and found[8].reward == float(np.float32(0.1))
        assert found[6].rewards == UNUSUAL[6].rewards
        assert (store.stats()["memory"] > 0) == memory
    with open_(path, memory) as store:
        assert store.get(HASH, 0, **EVERYTHING) == UNUSUAL


def test_what_comes_from_memory_cannot_be_changed_by_who_gave_or_got_it(path: Path) -> None:
    ids = np.arange(5, dtype=np.int32)
    rewards = {"exact": 1.0}
    with open_(path) as store:
        store.put(1, [(HASH, past(token_ids=ids, rewards=rewards))])
        ids[:], rewards["exact"] = 9, 9.0
        first = store.get(HASH, 0, **EVERYTHING)
        first[0].rewards["exact"] = 7.0
        first.clear()
        (again,) = store.get(HASH, 0, **EVERYTHING)
    assert again.token_ids.tolist() == [0, 1, 2, 3, 4] and again.rewards == {"exact": 1.0}


# --- keys and windows ---------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "disk"])
def test_visits_lie_side_by_side_and_the_same_key_is_replaced(path: Path, memory: bool) -> None:
    with open_(path, memory) as store:
        store.put(1, named(group()))
        store.put(2, named(group(visit=1, step=2)))
        store.put(3, named([past(sample=2, step=3, length=9)]))
        store.put(4, named([past(sample=7, step=4), past(sample=7, step=4, reward=0.5)]))
        assert len(store) == 9
        zero = group()
        zero[2] = past(sample=2, step=3, length=9)
        last = past(sample=7, step=4, reward=0.5)
        assert store.get(HASH, 0, before_visit=1, visits=1) == [*zero, last]
        assert store.get(HASH, 0, before_visit=2, visits=1) == group(visit=1, step=2)


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "disk"])
def test_a_key_is_prompt_row_sample_and_visit(path: Path, memory: bool) -> None:
    with open_(path, memory) as store:
        store.put(1, [(name, past(row)) for name in (HASH, OTHER) for row in (0, 1)])
        assert len(store) == 4
        assert store.get(OTHER, 1, **EVERYTHING) == [past(1)]
        assert store.get(prompt_hash((9,)), 0, **EVERYTHING) == []
        assert store.get(HASH, 2, **EVERYTHING) == []


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "disk"])
def test_the_window_and_its_order(path: Path, memory: bool) -> None:
    with open_(path, memory) as store:
        for step, visit in enumerate((3, 0, 5, 1), start=1):
            store.put(step, named(group(0, visit, step)[::-1]))

        def visits(before: int, count: int) -> list[int]:
            found = store.get(HASH, 0, before_visit=before, visits=count)
            samples = [one.sample for one in found]
            assert samples == [0, 1, 2, 3] * (len(found) // 4)
            return [one.visit for one in found[::4]]

        assert visits(6, 6) == visits(1000, 1000) == [5, 3, 1, 0]
        assert visits(5, 5) == visits(5, 99) == [3, 1, 0]
        assert visits(5, 2) == [3] and visits(3, 1) == [] and visits(3, 2) == [1]
        assert visits(0, 4) == visits(5, 0) == []


def test_what_cannot_be_put_is_refused_before_anything_is_written(path: Path) -> None:
    bad = [
        past(step=2),
        past(visit=-1),
        past(reward=float("nan")),
        past(rewards={"a": object()}),
        past(graders="\ud800"),
        past(sample=2**63),
    ]
    with open_(path) as store:
        store.put(1, named(group(row=5)))
        for one in bad:
            with pytest.raises((ValueError, TypeError, OverflowError)):
                store.put(1, [*named(group()), (HASH, one), *named(group(row=1))])
            assert len(store) == 4
            assert store.get(HASH, 0, **EVERYTHING) == store.get(HASH, 1, **EVERYTHING) == []
        with pytest.raises(ValueError, match="step 0"):
            store.put(0, named([past(step=0)]))
        store.put(1, [])
        store.put(2, named(group(step=2)))
        assert len(store) == 8


# --- memory equals disk -------------------------------------------------------------------------

Model = dict[tuple[bytes, int, int, int], Past]
NAMES = (HASH, OTHER)


def model_get(model: Model, name: bytes, row: int, before: int, visits: int) -> list[Past]:
    found = [
        one
        for (n, r, _, v), one in model.items()
        if (n, r) == (name, row) and before - visits <= v < before
    ]
    return sorted(found, key=lambda one: (-one.visit, one.sample))


def model_evict(model: Model, keep: int) -> None:
    newest: dict[tuple[bytes, int], int] = {}
    for name, row, _, visit in model:
        newest[name, row] = max(visit, newest.get((name, row), 0))
    for name, row, sample, visit in list(model):
        if visit <= newest[name, row] - keep:
            del model[name, row, sample, visit]


small = st.integers(0, 2)
putting = st.tuples(
    st.just("put"),
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(NAMES), small, small, st.integers(0, 4)), max_size=8),
)
getting = st.tuples(
    st.just("get"), st.sampled_from(NAMES), small, st.integers(0, 6), st.integers(0, 6)
)
others = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 4)),
    st.tuples(st.just("evict")),
    st.tuples(st.just("reopen")),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.one_of(putting, getting, getting, others), max_size=25),
    st.sampled_from([0, 4e3 / 2**30, 12e3 / 2**30, 1]),
)
def test_a_store_is_a_dictionary_however_much_memory_it_has(
    tmp_path: Path, operations: list[tuple[Any, ...]], memory: float
) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        path, model = Path(folder) / "s", {}
        limits = dict(memory_gb=memory, keep_visits=2)
        store = Store(path, **limits)
        for kind, *args in operations:
            if kind == "put":
                step, keys = args
                items = [(key[0], past(*key[1:], step=step)) for key in keys]
                store.put(step, items)
                model |= {key: one for key, (_, one) in zip(keys, items, strict=True)}
            elif kind == "get":
                found = store.get(*args[:2], before_visit=args[2], visits=args[3])
                assert found == model_get(model, *args)
            elif kind == "cut":
                store.cut_back(args[0])
                model = {key: one for key, one in model.items() if one.step <= args[0]}
            elif kind == "evict":
                before = len(model)
                model_evict(model, keep=2)
                assert store.evict() == before - len(model)
            else:
                store.close()
                store = Store(path, **limits)
            assert store.stats()["memory"] <= memory * 2**30
        for name in NAMES:
            for row in range(3):
                found = store.get(name, row, **EVERYTHING)
                assert found == model_get(model, name, row, 1000, 1000)
        assert len(store) == len(model)
        store.close()


def test_get_after_put_reads_no_disk(path: Path) -> None:
    statements: list[str] = []
    with open_(path) as store:
        store.put(1, named(group()))
        store._db.set_trace_callback(statements.append)
        assert store.get(HASH, 0, before_visit=1, visits=1) == group()
        assert statements == []
        store.get(HASH, 0, before_visit=2, visits=2)
        assert len(statements) == 1
        store.get(HASH, 0, before_visit=2, visits=2)
        assert len(statements) == 1  # that there is no visit 1 is remembered too


def test_a_long_window_costs_no_more_than_what_is_there(path: Path) -> None:
    with open_(path) as store:
        assert store.get(HASH, 0, before_visit=10**9, visits=10**9) == []
        store.put(1, named(group(visit=10**9)))
        held = store.stats()["memory"]
        assert store.get(HASH, 0, before_visit=10**9 + 1, visits=10**9 + 1)
        assert store.stats()["memory"] == held
    with open_(path) as store:
        assert len(store.get(HASH, 0, before_visit=10**9 + 1, visits=10**9 + 1)) == 4
        store.cut_back(0)
        assert store.get(HASH, 0, before_visit=10**9 + 1, visits=10**9 + 1) == []


def test_memory_is_bounded_and_the_least_recently_used_goes_first(path: Path) -> None:
    limit = 2**20
    with open_(path, memory_gb=limit / 2**30) as store:
        store.put(1, named(group(row=0)))
        tracemalloc.start()
        for row in range(1, 300):
            store.put(1, named([past(row, length=1000)]))
            store.get(HASH, 0, before_visit=1, visits=1)
            assert store.stats()["memory"] <= limit
        own = tracemalloc.Filter(True, "*/reroll/rollout/*")  # other threads of the tests apart
        taken = sum(one.size for one in tracemalloc.take_snapshot().filter_traces([own]).traces)
        tracemalloc.stop()
        assert limit / 2 < taken < 1.2 * limit
        statements: list[str] = []
        store._db.set_trace_callback(statements.append)
        store.get(HASH, 0, before_visit=1, visits=1)
        store.get(HASH, 299, before_visit=1, visits=1)
        assert statements == []
        store.get(HASH, 1, before_visit=1, visits=1)
        assert len(statements) == 1


# --- deleting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "disk"])
def test_cut_back(path: Path, memory: bool) -> None:
    with open_(path, memory) as store:
        for step in range(1, 5):
            store.put(step, named(group(visit=step, step=step)))
        store.cut_back(4)
        assert len(store) == 16
        store.cut_back(2)
        kept = group(visit=2, step=2) + group(visit=1, step=1)
        assert store.get(HASH, 0, **EVERYTHING) == kept
        store.put(3, named(group(visit=3, step=3)))
        assert store.get(HASH, 0, **EVERYTHING) == group(visit=3, step=3) + kept
        store.cut_back(0)
        assert len(store) == 0 and store.get(HASH, 0, **EVERYTHING) == []


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "disk"])
def test_evict_keeps_the_newest_visits_of_each_prompt(path: Path, memory: bool) -> None:
    with open_(path, memory, keep_visits=2) as store:
        for step in range(1, 6):
            store.put(step, named(group(0, visit=step, step=step)))
        store.put(6, named(group(1, visit=0, step=6)) + named(group(0, 0, 6), OTHER))
        assert store.evict() == 12
        assert {one.visit for one in store.get(HASH, 0, **EVERYTHING)} == {4, 5}
        assert len(store.get(HASH, 1, **EVERYTHING)) == 4
        assert len(store.get(OTHER, 0, **EVERYTHING)) == 4
        assert store.evict() == 0


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "disk"])
def test_evict_keeps_the_bound_oldest_steps_first(path: Path, memory: bool) -> None:
    with open_(path, memory) as store:
        for step in range(1, 6):
            store.put(step, named(group(visit=6 - step, step=step), OTHER if step % 2 else HASH))
        one = store.stats()["bytes"] / 20
    with open_(path, memory, max_gb=9.5 * one / 2**30, keep_visits=9) as store:
        store.get(HASH, 0, **EVERYTHING)
        store.get(OTHER, 0, **EVERYTHING)
        assert store.evict() == 11
        assert store.stats()["bytes"] <= 9.5 * one
        left = store.get(HASH, 0, **EVERYTHING) + store.get(OTHER, 0, **EVERYTHING)
        found = sorted((one.step, one.sample) for one in left)
        assert found == [(3, 3), *((step, i) for step in (4, 5) for i in range(4))]
        assert store.evict() == 0
    with open_(path, memory, max_gb=0) as store:
        assert store.evict() == 9 and len(store) == 0


def test_freed_pages_are_used_again(path: Path) -> None:
    rows = 20
    with open_(path, keep_visits=1) as store:
        sizes = []
        for step in range(1, 8):
            store.put(step, named([past(r, 0, step, step, length=2000) for r in range(rows)]))
            store.evict()
            sizes.append(path.stat().st_size)
        assert len(store) == rows
        booked = store.stats()["bytes"]
    assert path.stat().st_size <= 2.5 * booked
    assert sizes[-1] == sizes[2]


# --- the file -----------------------------------------------------------------------------------


def test_any_sqlite_reads_it(path: Path) -> None:
    with open_(path) as store:
        store.put(1, named([past(), past(sample=1, reward=None, finish="length", length=7)]))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    db = sqlite3.connect(path)
    rows = db.execute("SELECT * FROM overview").fetchall()
    name = HASH.hex().upper()
    reward = past().reward
    assert rows == [(name, 0, 0, 0, 1, 5, reward, "stop"), (name, 0, 1, 0, 1, 7, None, "length")]
    says = dict(db.execute("SELECT name, meaning FROM meta"))
    columns = [row[1] for row in db.execute("PRAGMA table_info(rollouts)")]
    assert set(columns) == {"id", *says} and len(says) == len(COLUMNS)
    blobs = db.execute("SELECT token_ids, logprobs, versions FROM rollouts").fetchone()
    assert np.frombuffer(blobs[0], "<i4").tolist() == past().token_ids.tolist()
    assert np.frombuffer(blobs[1], "<f4").tolist() == past().logprobs.tolist()
    assert np.frombuffer(blobs[2], "<i4").tolist() == [2, 5]
    assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert db.execute("PRAGMA user_version").fetchone() == (2,)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_sizes(path: Path) -> None:
    with open_(path) as store:
        store.put(1, named([past(length=50_000)]))
        assert store.size_bytes >= 400_000
        assert store.stats()["disk"] == store.size_bytes
        booked = store.stats()["bytes"]
        assert 400_000 < booked < 401_000 and store.stats()["rollouts"] == len(store) == 1
    assert path.stat().st_size == store.size_bytes
    with pytest.raises(sqlite3.ProgrammingError):  # ours, not the file's
        len(store)
    store.close()


def test_names_that_mean_something_to_sqlite(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (":memory:", "file:x?mode=ro", "a b%20#.db"):
        with Store(name) as store:
            store.put(1, named(group()))
        assert (tmp_path / name).stat().st_size > 0


# --- killed -------------------------------------------------------------------------------------

WRITER = """
import sys
from tests.rollout.test_store import HASH, open_, named, past
store = open_(sys.argv[1], keep_visits=3)
last = int(sys.argv[2])
print("ready", flush=True)
for step in range(last + 1, last + 1000):
    store.put(step, named([past(row, 0, step, step, length=300) for row in range(40)]))
    print(step, flush=True)
    if step % 5 == 0:
        store.evict()
"""


def kill_while_writing(path: Path, last: int, dice: random.Random) -> int:
    """The last step that a child said it had written before it was killed."""
    command = [sys.executable, "-c", WRITER, str(path), str(last)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "ready\n"
    said = [child.stdout.readline() for _ in range(dice.randrange(8))]
    time.sleep(dice.uniform(0, 0.02))
    child.kill()
    said += child.communicate()[0].split("\n")[:-1]
    assert child.returncode == -9
    return int(said[-1]) if said else last


def test_a_kill_leaves_steps_whole_or_absent(path: Path) -> None:
    last, dice = 0, random.Random(0)
    for _ in range(6):
        said = kill_while_writing(path, last, dice)
        copy = path.with_name("copy")  # what any sqlite makes of the file and its log
        copy.write_bytes(path.read_bytes())
        log = path.with_name(f"{path.name}-wal")
        if log.exists():
            copy.with_name("copy-wal").write_bytes(log.read_bytes())
        db = sqlite3.connect(copy)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        db.close()
        with open_(path, memory=False) as store:
            written = [store.get(HASH, row, **EVERYTHING) for row in range(40)]
            steps = [one.step for one in written[0]]
            assert steps == sorted(steps, reverse=True)
            assert not steps or steps[0] in (said, said + 1)  # killed between writing and saying
            assert steps or said == 0
            for row, found in enumerate(written):
                assert found == [past(row, 0, step, step, length=300) for step in steps]
            last = steps[0] if steps else 0
    assert last > 0


def test_a_kill_while_the_file_is_made_leaves_none(path: Path, monkeypatch: Any) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            Store(path)
    assert not path.exists()
    path.with_name(f"{path.name}.new").write_bytes(b"half a file")
    with open_(path) as store:
        store.put(1, named(group()))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_interrupted_put_leaves_nothing(path: Path) -> None:
    with open_(path) as store:
        store.put(1, named(group()))
        store._db.set_progress_handler(lambda: 1, 50)
        with pytest.raises(UserError, match="interrupted"):
            store.put(2, named([past(row, step=2) for row in range(50)]))
        store._db.set_progress_handler(None, 0)
        assert len(store) == 4 and store.get(HASH, 1, **EVERYTHING) == []
        store.put(2, named(group(1, step=2)))


# --- files that cannot be used ------------------------------------------------------------------


def refused(path: Path, *says: str) -> str:
    """The message with which it is refused; files stay as they are."""
    before = on_disk(path)
    with pytest.raises(UserError) as caught:
        Store(path)
    assert on_disk(path) == before
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    for words in says:
        assert words in message, message
    return message


def filled(path: Path, steps: int = 10) -> Path:
    with open_(path) as store:
        for step in range(1, steps + 1):
            rows = [past(row, 0, step, step, length=200) for row in range(10)]
            store.put(step, named(rows))
    return path


@pytest.mark.parametrize(
    "content",
    [b"", b"some notes\n", bytes(5000), b"SQLite format 3\0", random.Random(0).randbytes(8192)],
    ids=["empty", "text", "zeros", "short", "noise"],
)
def test_what_is_no_database_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    refused(path, "not a store of rollouts", "move it away or delete it", "without drafts")


@pytest.mark.parametrize("mode", ["delete", "wal"])
@pytest.mark.parametrize("application", [0, 7])
def test_another_programs_database_is_refused(path: Path, mode: str, application: int) -> None:
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA journal_mode = {mode}")
    db.execute(f"PRAGMA application_id = {application}")
    db.execute("CREATE TABLE rollouts (id INTEGER)")
    db.commit()
    refused(path, "a database of another program", "move it away or delete it")
    db.close()
    refused(path, "a database of another program")


def test_a_newer_format_is_refused(path: Path) -> None:
    filled(path)
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 3")
    db.close()
    refused(path, "of format 3", "this version of reroll reads 2", "move it away")


def test_a_store_without_its_tables_is_refused(path: Path) -> None:
    filled(path)
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode = delete")
    db.execute("DROP VIEW overview")
    db.execute("ALTER TABLE rollouts RENAME COLUMN checksum TO something")
    db.close()
    with pytest.raises(UserError, match=r"damaged .*move it away"):
        Store(path)


def test_a_directory_is_refused(path: Path) -> None:
    path.mkdir()
    refused(path, "a directory", "move it away or delete it")


def test_a_folder_that_is_not_there(path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/store: cannot be used .*start again"):
        Store(path.parent / "nowhere" / "store")


def test_a_log_without_its_store_is_refused(path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    log.write_bytes(b"steps of a store that was deleted")
    with pytest.raises(UserError, match=r"rollouts.sqlite-wal: left over .*delete it as well"):
        Store(path)
    assert on_disk(path) == {log.name: log.read_bytes()}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    whole = filled(path).read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(path, "damaged", "move it away or delete it", "without drafts until the next epoch")


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files as large ones: not read through at the start."""
    monkeypatch.setattr(module, "CHECK_BELOW", 0)


def test_a_damaged_file_is_refused(path: Path) -> None:
    whole = bytearray(filled(path).read_bytes())
    middle = len(whole) // 2 // 4096 * 4096
    whole[middle : middle + 64] = bytes(64)
    path.write_bytes(whole)
    refused(path, "damaged", "move it away or delete it", "without drafts until the next epoch")


def test_damage_after_a_kill_is_found_in_large_files_too(path: Path, unchecked: None) -> None:
    killed = path.with_name("killed.sqlite")
    with open_(filled(path)) as store:
        store.put(11, named(group(step=11)))
        whole = bytearray(path.read_bytes())
        middle = len(whole) // 2 // 4096 * 4096
        whole[middle : middle + 8] = b"\xff" * 8
        killed.write_bytes(whole)
        killed.with_name("killed.sqlite-wal").write_bytes(
            path.with_name(f"{path.name}-wal").read_bytes()
        )
    with pytest.raises(UserError, match=r"killed.sqlite: damaged .*move it away"):
        Store(killed)


def test_a_refused_store_is_let_go_of(path: Path, unchecked: None) -> None:
    whole = filled(path).read_bytes()
    db = sqlite3.connect(path)
    query = "SELECT rootpage FROM sqlite_schema WHERE name LIKE 'sqlite_autoindex_rollouts%'"
    at = (db.execute(query).fetchone()[0] - 1) * 4096
    db.close()
    path.write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
    with pytest.raises(UserError, match="damaged") as caught:
        Store(path)
    path.write_bytes(whole)
    assert len(all_of(path)) == 100, caught  # whoever holds the error holds no lock


def all_of(path: Path) -> list[Past]:
    with open_(path, memory=False) as store:
        return [one for row in range(10) for one in store.get(HASH, row, **EVERYTHING)]


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_byte_is_found_or_does_no_harm(path: Path, seed: int) -> None:
    """Anywhere in the file: what is read is what was written, or an error."""
    whole = bytearray(filled(path).read_bytes())
    right = all_of(path)
    assert len(right) == 100
    dice = random.Random(seed)
    for _ in range(5):
        at, bit = dice.randrange(len(whole)), 1 << dice.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            assert all_of(path) == right, at
        except UserError as error:
            said = str(error)
            assert said.startswith(str(path)) and "move it away" in said and "\n" not in said
        path.with_name(f"{path.name}-wal").unlink(missing_ok=True)


def test_damage_in_a_large_file_is_found_when_it_is_read(path: Path, unchecked: None) -> None:
    whole = bytearray(filled(path).read_bytes())
    needle = past(3, 0, 4, 4, length=200).token_ids[:32].tobytes()
    assert whole.count(needle) == 1
    whole[whole.index(needle)] ^= 64
    path.write_bytes(whole)
    with open_(path) as store:
        assert store.get(HASH, 3, before_visit=4, visits=4)  # other visits are as they were
        for _ in range(2):
            with pytest.raises(UserError, match=r"dataset row 3 is not as written.*move it away"):
                store.get(HASH, 3, before_visit=5, visits=1)
    assert path.read_bytes() == whole


def test_a_column_of_another_kind_is_damage(path: Path, unchecked: None) -> None:
    filled(path)
    for value in ("NULL", "7", "'text'", "zeroblob(800)"):
        db = sqlite3.connect(path)
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_schema SET sql = replace(sql, 'BLOB NOT NULL', 'BLOB')")
        db.commit()
        db.close()
        db = sqlite3.connect(path)
        db.execute(f"UPDATE rollouts SET token_ids = {value} WHERE row = 3")
        db.commit()
        db.close()
        with open_(path) as store, pytest.raises(UserError, match="not as written"):
            store.get(HASH, 3, **EVERYTHING)


OPENER = """
import sys
from reroll.errors import UserError
from reroll.rollout.store import Store
try:
    Store(sys.argv[1])
except UserError as error:
    print(error)
"""


def said_by(script: str, path: Path) -> str:
    command = [sys.executable, "-c", script, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_store_in_use_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.01)
    says = "another process is using it (database is locked): wait for it to end, or give each run"
    filled(path)  # opening an old file reads it, which must not cost the lock
    with open_(path) as store:
        assert said_by(OPENER, path).startswith(f"{path}: {says}")
        with pytest.raises(UserError) as caught:
            Store(path)
        assert says in str(caught.value)
        store.put(11, named(group(row=11, step=11)))
    with open_(path) as store:
        assert len(store) == 104


def test_a_full_disk_leaves_the_store_as_it_was(path: Path) -> None:
    with open_(path) as store:
        store.put(1, named(group()))
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(UserError, match=r"rollouts.sqlite: cannot be used .*full.*free space"):
            store.put(2, named([past(1, i, step=2, length=2000) for i in range(9)]))
        assert len(store) == 4 and store.get(HASH, 1, **EVERYTHING) == []
        store._db.execute("PRAGMA max_page_count = 100000")
        store.put(2, named([past(1, i, step=2, length=2000) for i in range(9)]))
    with open_(path) as store:
        assert len(store) == 13


LIMITED = """
import resource, signal, sys
from reroll.errors import UserError
from tests.rollout.test_store import named, open_, past
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = open_(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
for step in range(2, 100):
    try:
        store.put(step, named([past(row, step=step, length=500) for row in range(5)]))
    except UserError as error:
        print(step, error)
        break
"""


def test_a_file_that_may_not_grow(path: Path) -> None:
    with open_(path) as store:
        store.put(1, named(group()))
    step, message = said_by(LIMITED, path).split(" ", 1)
    assert int(step) > 2 and "cannot be used" in message and "start again" in message
    with open_(path) as store:
        assert {one.step for one in store.get(HASH, 4, **EVERYTHING)} == {int(step) - 1}


UNPRIVILEGED = """
import os
import reroll.rollout.store
if os.geteuid() == 0:
    os.seteuid(65534)
"""


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that other users may read: root may write whatever the permissions say."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "rollouts.sqlite"
        Path(folder).chmod(0o755)


@pytest.mark.parametrize("mode", [0o444, 0o000], ids=["read only", "unreadable"])
def test_a_file_without_permission(readable: Path, mode: int) -> None:
    whole = filled(readable).read_bytes()
    readable.chmod(mode)
    readable.parent.chmod(0o555)
    said = said_by(UNPRIVILEGED + OPENER, readable)
    assert said.startswith(f"{readable}: cannot be used") and "allow reading and writing" in said
    readable.chmod(0o644)
    assert readable.read_bytes() == whole
