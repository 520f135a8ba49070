"""Collecting traces: what is kept, what it cost, and a collection that was killed."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reroll.collection
from reroll.algo.noise import make_key
from reroll.cli import main
from reroll.collection import gather
from reroll.config import Config
from reroll.errors import UserError
from reroll.gathering import _verdict, judge
from reroll.rollout.harvest import answer_place
from reroll.rollout.traces import Trace, TraceStore, Tried
from reroll.setup import Parts, prepare
from reroll.types import Purpose
from tests.project import Killed, Project

RARE = {
    "task__graders": '[{name = "digits:three"}]', "collect__screen": 4, "collect__cap": 24,
    "collect__wave": 4, "log__display": "off",
}  # fmt: skip


MORE = {"prefix__least": 1, "rollout__prompts": 4}


def collected(path: Path) -> tuple[list[Trace], dict[int, Tried], dict[str, float]]:
    """What a file holds, without what the clock measured."""
    with TraceStore(path, read_only=True) as store:
        spent = {k: v for k, v in store.ledger().items() if k != "seconds"}
        return store.traces(), store.tried(), spent


def collect(project: Project, name: str = "traces.sqlite", **changes: Any) -> Path:
    with contextlib.chdir(project.folder):
        config = project.config(**RARE | changes)
        with prepare(config, None, None) as parts, TraceStore(project.out / name) as store:
            gather(config, parts, store, lambda *told: None)
    return project.out / name


@pytest.fixture(scope="module")
def whole(project_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection that was not interrupted."""
    return collect(Project(project_folder, tmp_path_factory.mktemp("whole")))


def test_every_problem_is_solved_once_or_given_up(whole: Path) -> None:
    traces, tried, spent = collected(whole)
    assert len(tried) == 10
    solved = {row: one.solved_at for row, one in tried.items() if one.solved_at is not None}
    assert 0 < len(solved) <= 10
    assert {trace.row: trace.attempt for trace in traces} == solved
    for one in tried.values():
        assert one.attempts % 4 == 0
        assert one.attempts == 24 if one.solved_at is None else one.attempts > one.solved_at
        assert (one.successes > 0) == (one.solved_at is not None)
    assert spent["rollouts"] == sum(one.attempts for one in tried.values())
    for trace in traces:
        assert sum(c.isdigit() for c in trace.text) >= 3
        assert (trace.reward, trace.source, trace.attempts) == (1.0, "collected", trace.attempt + 1)
        assert trace.model and trace.tokenizer and trace.graders
        assert json.loads(trace.sampling) == {"temperature": 1.0, "max_tokens": 10}


def test_an_attempt_is_a_function_of_problem_and_number(whole: Path, project: Project) -> None:
    """Whatever the waves: other slots, other numbers of problems at once."""
    traces, tried, _ = collected(whole)
    other, again, _ = collected(collect(project, engine__slots=3))
    assert [replace(t, model="") for t in other] == [replace(t, model="") for t in traces]
    assert {r: t.solved_at for r, t in again.items()} == {r: t.solved_at for r, t in tried.items()}
    keys = {make_key(0, Purpose.COLLECT, 1, a % 4, a // 4) for a in range(24)}
    assert len(keys) == 24


def test_the_first_success_counts_not_the_first_to_end(project: Project) -> None:
    """The lowest number of its wave that succeeded, whichever was found first."""
    wide = RARE | {"collect__wave": 24}
    traces, several = collected(collect(project, **wide))[0], 0
    with contextlib.chdir(project.folder):
        config = project.config(**wide)
        with prepare(config, None, None) as parts:
            prompts = {prompt.row: prompt for prompt in parts.task.train}
            for trace in traces:
                wave, index = divmod(trace.attempt, 24)
                (group,), _ = reroll.collection._sample(config, parts, [prompts[trace.row]], [wave])
                right = [r.sample for r in group.rollouts if r.reward == 1.0]
                assert right[0] == index
                assert tuple(group.rollouts[index].completion.token_ids) == trace.token_ids
                several += len(right) > 1
    assert several  # else this shows little


@pytest.mark.parametrize("wave", [1, 2, 3])
def test_killed_and_started_again(
    wave: int, whole: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same traces, the same attempts, the same cost."""
    monkeypatch.setattr(reroll.collection, "AT_ONCE", 1)
    monkeypatch.setattr(reroll.collection, "ROUNDS", 1)
    uncut = collected(collect(project, "uncut.sqlite"))
    real, waves = reroll.collection._sample, iter(range(99))

    def killed(*arguments: Any) -> Any:
        found = real(*arguments)
        if next(waves) == wave:
            raise Killed
        return found

    monkeypatch.setattr(reroll.collection, "_sample", killed)
    with pytest.raises(Killed):
        collect(project)
    before = collected(project.out / "traces.sqlite")
    assert 0 < len(before[1]) < 10 or before[2]["rollouts"] < uncut[2]["rollouts"]
    assert collected(collect(project)) == uncut
    assert uncut[0] == collected(whole)[0]


def test_waves_are_whole(project: Project) -> None:
    _, tried, _ = collected(collect(project, collect__cap=6))
    assert {one.attempts for one in tried.values() if one.solved_at is None} == {8}


def test_enough_traces_end_it_and_more_can_be_asked_for(whole: Path, project: Project) -> None:
    some = collected(collect(project, collect__traces=2, engine__slots=1, collect__wave=4))
    all_of_them = collected(whole)
    hard = [trace for trace in some[0] if trace.attempt >= 4]
    assert 2 <= len(hard) < sum(trace.attempt >= 4 for trace in all_of_them[0])
    assert some[2]["rollouts"] < all_of_them[2]["rollouts"]
    assert some[0] == [t for t in all_of_them[0] if t.row in {trace.row for trace in some[0]}]
    again = collected(collect(project, collect__traces=0))
    assert (again[0], set(again[1])) == (all_of_them[0], set(all_of_them[1]))


def test_more_attempts_can_be_asked_for_later(whole: Path, project: Project) -> None:
    short = collect(project, collect__cap=8)
    some = collected(short)
    assert len(some[0]) < len(collected(whole)[0])
    assert collected(collect(project, collect__cap=24))[0] == collected(whole)[0]
    with pytest.raises(UserError, match=r"collected with run.seed = 0, not 1; collect into anot"):
        collect(project, run__seed=1)


@pytest.fixture
def parts(project: Project) -> Iterator[Parts]:
    with contextlib.chdir(project.folder), prepare(project.config(**RARE), None, None) as parts:
        yield parts


@pytest.mark.parametrize(
    ("text", "answer", "before"),
    [
        ("12-5=7; 7+33=40; so 40", "40", "12-5=7; 7+33="),
        ("402-1=401; 401-361=40; so 40", "40", "402-1=401; 401-361="),
        ("5-12=-7; so -7", "7", "5-12=-7; so -7"),
        ("7-14=-7; so -7", "-7", "7-14="),
        ("nothing here", "40", "nothing here"),
        ("40 it is", "40", ""),
        ("a #### 40", "says #### 40", "a #### "),
        ("free", None, "free"),
    ],
)
def test_the_answer_s_place(parts: Parts, text: str, answer: str | None, before: str) -> None:
    ids = parts.tokenizer.encode(text, add_special_tokens=False)
    assert parts.decode(ids[: answer_place(ids, answer, parts.decode)]) == before


def test_the_command(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.chdir(project.folder):
        out = project.out / "t.sqlite"
        empty = project.out / "empty.toml"
        empty.touch()
        words = ["collect", str(empty), *project.flags(**RARE, **MORE), "--out", str(out)]
        assert main([*words, "--probe", "4"]) == 0
        said, _ = capsys.readouterr()
        report = json.loads(said.splitlines()[-1])
        traces, tried, _ = collected(out)
        assert report["problems"] == report["easy"] + report["hard"] + report["unsolved"] == 10
        hard = [one for one in tried.values() if one.solved_at is not None and one.solved_at >= 4]
        assert report["hard"] == len(hard) > 0
        assert report["problems_probed"] == min(4, len(hard))
        assert 0 <= report["live_original"] <= 1
        assert "a live group costs" in said
        assert report["open"] == 0 < report["worth"] <= report["attempts"]
        assert str(out) in said
        assert len(traces) == report["easy"] + report["hard"]
        # again: nothing is left to do
        rollouts = report["rollouts"]
        assert main([*words, "--probe", "0"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["rollouts"] == rollouts
        assert main(["collect", str(empty), "--out", "nowhere/t.sqlite"]) == 2
        assert "no folder 'nowhere'" in capsys.readouterr().err
    assert sqlite3.connect(out).execute("SELECT count(*) FROM overview").fetchone()[0] == len(
        traces
    )


@pytest.mark.parametrize(
    ("attempts", "live", "share", "worth"),
    [
        (4000, 0.0, 1 - (1 - 4 / 4000) ** 8, 4000 * (1 - (1 - 4 / 4000) ** 8) / 8),
        (4000, 0.25, 0.25, 4000 * 0.25 / 8),  # what was seen counts first
        (0, 0.0, 1 / 17, 0.0),  # imported: nothing was tried, the next group may be live
    ],
)
def test_the_verdict(attempts: int, live: float, share: float, worth: float) -> None:
    report = {
        "problems_probed": 16, "hard": 4, "attempts": attempts, "problems": 20, "easy": 0,
        "live_original": live, "live_prefixed": 0.5, "length_original": 100.0,
        "length_prefixed": 50.0,
    }  # fmt: skip
    judge(report, 8)
    assert report["factor"] == pytest.approx(100 * (1 / share + 3) / (50 * (1 / 0.5 + 3)))
    assert report["worth"] == pytest.approx(worth)
    said = _verdict(report, Config())
    assert (f"as sampling {worth:.0f} such groups" in said) == (attempts > 0)
    assert "Prefixes can pay where" in said
    hardly = _verdict(report | {"factor": 1.9}, Config())
    assert "can hardly pay" in hardly and "such groups" not in hardly
