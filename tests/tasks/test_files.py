import json
import sys
from pathlib import Path
from typing import Any

import pytest

from reroll.config import TaskSection
from reroll.errors import UserError
from reroll.tasks.files import read_problems
from reroll.tasks.problem import Problem


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} + 1 =", "answer": str(n + 1), "level": n % 3} for n in range(count)]


def jsonl(path: Path, **settings: Any) -> TaskSection:
    return TaskSection(source="jsonl", name=str(path), **settings)


def rows(problems: list[Problem]) -> list[int]:
    return [problem.row for problem in problems]


def test_split_off_held_out_rows(tmp_path: Path) -> None:
    write(tmp_path / "sums.jsonl", sums(40))
    config = jsonl(tmp_path / "sums.jsonl", train_size=20, eval_size=8)
    problems = read_problems(config)
    train, held_out = rows(problems.train), rows(problems.held_out)
    assert (len(train), len(held_out)) == (20, 8)
    assert not set(train) & set(held_out)
    assert train == sorted(train) and held_out == sorted(held_out)
    for problem in problems.train + problems.held_out:
        n = problem.row
        assert (problem.text, problem.answer) == (f"{n} + 1 =", str(n + 1))
        assert problem.columns == {"level": n % 3}
        assert problem.where == f"{tmp_path / 'sums.jsonl'}: line {n + 1}"
    assert problems.notes == ["took 20 of 32 training problems (task.train_size)"]
    assert read_problems(config) == problems
    assert read_problems(config.model_copy(update={"seed": 1})) != problems


def test_split_is_fixed_for_ever(tmp_path: Path) -> None:
    write(tmp_path / "sums.jsonl", sums(12))
    assert rows(read_problems(jsonl(tmp_path / "sums.jsonl")).held_out) == [0, 6, 11]


def test_a_small_file_gives_a_quarter(tmp_path: Path) -> None:
    write(tmp_path / "sums.jsonl", sums(10))
    problems = read_problems(jsonl(tmp_path / "sums.jsonl"))
    assert (len(problems.train), len(problems.held_out)) == (8, 2)
    (note,) = problems.notes
    assert "held out 2 of 10 rows" in note and "task.eval_size = 128" in note


def test_separate_held_out_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", sums(6))
    other = write(tmp_path / "test.jsonl", sums(9))
    problems = read_problems(jsonl(tmp_path / "train.jsonl", eval_name=other, eval_size=4))
    assert rows(problems.train) == [0, 1, 2, 3, 4, 5]
    assert len(problems.held_out) == 4
    assert problems.notes == ["took 4 of 9 held-out problems (task.eval_size)"]


def test_columns_blank_lines_and_answers_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    answers: list[Any] = [5, 2.5, True, [1, "a"], None]
    lines = [json.dumps({"q": "?", "a": answer, "prompt": "kept"}) for answer in answers]
    path.write_text("\ufeff" + "\n\n".join(lines) + "\r\n", encoding="utf-8")
    config = jsonl(path, prompt_column="q", answer_column="a", eval_name=str(path))
    problems = read_problems(config).train
    assert rows(problems) == [0, 2, 4, 6, 8]
    assert [problem.answer for problem in problems] == ["5", "2.5", "true", '[1, "a"]', None]
    assert problems[0].columns == {"prompt": "kept"}
    unanswered = read_problems(config.model_copy(update={"answer_column": ""})).train[0]
    assert unanswered.answer is None and unanswered.columns == {"a": 5, "prompt": "kept"}


ROW = {"question": "1 + 1 =", "answer": "2"}


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (
            None,
            {},
            r"task.name = '.*sums.jsonl': cannot read it: No such file.*did you mean sum.js",
        ),
        ([ROW, "{oops"], {}, r"sums.jsonl: line 2 is not valid JSON \(task.name\)"),
        ([ROW, [1]], {}, r"sums.jsonl: line 2 holds a JSON list \(task.name\)"),
        ([], {}, r"task.name = '.*sums.jsonl': the file has no rows"),
        (
            [ROW] * 2,
            {"prompt_column": "questions"},
            r"sums.jsonl: line \d: task.prompt_column = 'questions': no such column; "
            r"there are: question, answer; did you mean question\?",
        ),
        (
            [ROW] * 2,
            {"prompt_column": "question", "answer_column": "anser"},
            r"sums.jsonl: line \d: task.answer_column = 'anser': .* did you mean answer\?",
        ),
        ([ROW], {}, r"sums.jsonl: too few rows to split off .*: 1; .*task.eval_name"),
        ([{"prompt": "  ", "answer": "1"}] * 2, {}, r"line \d: task.prompt_column = 'prompt' is e"),
        ([{"prompt": ["1"], "answer": "1"}] * 2, {}, r"line \d: task.prompt_column .*holds list"),
        ([ROW] * 2, {"eval_name": "absent.jsonl"}, r"task.eval_name = 'absent.jsonl': cannot read"),
        ([ROW] * 2, {"eval_split": "test"}, r"task.eval_split: a jsonl source has no splits"),
        ([ROW] * 2, {"params": {"a": 1}}, r"task.params: a jsonl source takes none"),
    ],
)
def test_jsonl_errors(
    tmp_path: Path, content: list[Any] | None, settings: dict[str, Any], message: str
) -> None:
    path = tmp_path / "sums.jsonl"
    if content is None:
        (tmp_path / "sum.jsonl").touch()
    else:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in content]
        path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(UserError, match=message) as error:
        read_problems(jsonl(path, **settings))
    assert "\n" not in str(error.value)


def test_jsonl_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl: line 1 is not valid JSON.*utf-8"):
        read_problems(jsonl(tmp_path / "latin.jsonl"))
    with pytest.raises(UserError, match=r"cannot read it: Is a directory"):
        read_problems(jsonl(tmp_path))


def test_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        read_problems(TaskSection(source="datasets", name="anything"))


def test_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(sums(20))
    splits = datasets.DatasetDict({"train": table, "test": table.select(range(5))})
    splits.save_to_disk(str(tmp_path / "splits"))
    table.save_to_disk(str(tmp_path / "bare"))

    config = TaskSection(source="datasets", name=str(tmp_path / "splits"), eval_split="test")
    problems = read_problems(config)
    assert rows(problems.train) == list(range(20)) and rows(problems.held_out) == list(range(5))
    assert problems.train[4].text == "4 + 1 =" and problems.train[4].columns == {"level": 1}
    assert problems.train[4].where == f"{tmp_path / 'splits'}[train]: row 5"

    bare = TaskSection(source="datasets", name=str(tmp_path / "bare"), eval_size=5)
    problems = read_problems(bare)
    assert (len(problems.train), len(problems.held_out)) == (15, 5)

    with pytest.raises(UserError, match=r"task.eval_split = 'tst': .*train, test; did you mean te"):
        read_problems(config.model_copy(update={"eval_split": "tst"}))
    with pytest.raises(UserError, match=r"task.eval_split = 'test': .*saved without splits"):
        read_problems(bare.model_copy(update={"eval_split": "test"}))
    with pytest.raises(
        UserError, match=r"\[train\]: row 1: task.prompt_column = 'prompts'.*mean p"
    ):
        read_problems(config.model_copy(update={"prompt_column": "prompts"}))


def test_loaded_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    name = write(tmp_path / "sums.jsonl", sums(10))
    params = {"data_files": {"train": name}, "cache_dir": str(tmp_path / "cache")}
    config = TaskSection(source="datasets", name="json", params=params)
    problems = read_problems(config)
    assert sorted(rows(problems.train) + rows(problems.held_out)) == list(range(10))
    with pytest.raises(UserError, match=r"task.name = 'json' \(task.train_split = 'dev'\): cannot"):
        read_problems(config.model_copy(update={"train_split": "dev"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "no-one/nothing"}, r"task.name = 'no-one/nothing' .*cannot load it: \w"),
        ({"params": {"trust_remote_code": True}}, "task.params.trust_remote_code: not taken"),
        ({"params": {"streaming": True}}, "task.params.streaming: not taken"),
        ({"params": {"split": "test"}}, "task.params.split: not taken; .*task.eval_split"),
        ({"eval_name": "other"}, "task.eval_name: only for jsonl sources; .*task.eval_split"),
    ],
)
def test_datasets_errors(settings: dict[str, Any], message: str) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=message) as error:
        read_problems(TaskSection(source="datasets", **settings))
    assert "\n" not in str(error.value)
