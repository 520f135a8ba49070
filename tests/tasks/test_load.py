import json
from pathlib import Path
from typing import Any

import pytest

from reroll.config import GraderSection, TaskSection
from reroll.errors import UserError
from reroll.tasks.grade import GraderSpec
from reroll.tasks.load import Task, load_task
from tests.tasks.conftest import CharTokenizer


def load(tmp_path: Path, train: list[Any], held_out: list[Any], **settings: Any) -> Task:
    for name, rows in (("train", train), ("test", held_out)):
        lines = [json.dumps({"prompt": text, "answer": answer}) for text, answer in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    settings = {"name": str(tmp_path / "train.jsonl"), **settings}
    held = str(tmp_path / "test.jsonl")
    return load_task(TaskSection(source="jsonl", eval_name=held, **settings), CharTokenizer())


TRAIN = [("one", "1"), ("two", "2"), ("seventeen", "17")]


def test_reasoning_gym_end_to_end(tokenizer: CharTokenizer) -> None:
    config = TaskSection(train_size=6, eval_size=3, template="{question} ({num_terms} terms)")
    task = load_task(config, tokenizer)
    assert (len(task.train), len(task.held_out), task.notes) == (6, 3, [])
    assert task.graders == [GraderSpec("task", 1.0)]
    assert not {p.text for p in task.train} & {p.text for p in task.held_out}
    prompt = task.train[0]
    assert prompt.text.endswith(f"({prompt.columns['num_terms']} terms)")
    assert prompt.answer == prompt.columns["entry"]["answer"]


def test_graders_of_files(tmp_path: Path) -> None:
    assert load(tmp_path, TRAIN, [("six", "6")]).graders == [GraderSpec("math", 1.0)]
    graders = [GraderSection(name="mine:f", weight=0.5), GraderSection(name="math", weight=2)]
    task = load(tmp_path, TRAIN, [("six", "6")], graders=graders)
    assert task.graders == [GraderSpec("mine:f", 0.5), GraderSpec("math", 2.0)]


def test_held_out_problems_of_the_training_split_are_dropped(tmp_path: Path) -> None:
    task = load(tmp_path, TRAIN, [("six", "6"), ("two", "2"), ("one", "1")])
    assert [prompt.text for prompt in task.held_out] == ["six\n"]
    assert task.notes == ["dropped 2 held-out problems that also stand in the training split"]
    with pytest.raises(UserError, match=r"all 1 held-out problems also stand .*task\.eval_name"):
        load(tmp_path, TRAIN, [("two", "2")])


def test_long_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    task = load(tmp_path, TRAIN, [("six", "6"), ("seventy", "70")], max_prompt_tokens=6)
    assert [(prompt.row, prompt.text) for prompt in task.train] == [(0, "one\n"), (1, "two\n")]
    assert task.notes == [
        "dropped 1 of 3 training prompts longer than 6 tokens",
        "dropped 1 of 2 held-out prompts longer than 6 tokens",
    ]
    with pytest.raises(UserError, match=r"task.max_prompt_tokens = 4: all 3 training .* has 5 tok"):
        load(tmp_path, TRAIN, [("six", "6")], max_prompt_tokens=4)
    with pytest.raises(UserError, match=r"all 1 held-out prompts are longer; .* has 13 tokens"):
        load(tmp_path, TRAIN, [("seventy-two", "72")], max_prompt_tokens=12)


def test_system_without_chat_template_is_noted(tmp_path: Path) -> None:
    task = load(tmp_path, TRAIN, [("six", "6")], system="Be brief.")
    assert task.notes == ["task.system is not used: the tokenizer has no chat template"]
    task = load(tmp_path, TRAIN, [("six", "6")], system="Be brief.", chat="off")
    assert task.notes == ["task.system is not used: task.chat = 'off'"]


def test_math_needs_reference_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.jsonl: line 2: no reference answer.*answer_column"):
        load(tmp_path, [("one", "1"), ("two", None)], [("six", "6")])
    graders = [GraderSection(name="mine:f")]
    assert load(tmp_path, [("one", None)], [("six", "6")], graders=graders).train[0].answer is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graders": [GraderSection(name="mth")]}, "unknown grader 'mth'.*did you mean math?"),
        ({"graders": [GraderSection(name="task")]}, "'task' is the scorer of reasoning_gym"),
        ({"graders": [GraderSection(name="math")] * 2}, "task.graders: 'math' stands there twice"),
        ({"answer_pattern": "(a"}, "task.answer_pattern: not a regular expression"),
        ({"answer_pattern": "a+"}, "task.answer_pattern: needs a group"),
        ({"name": "absent.jsonl"}, "task.name = 'absent.jsonl': cannot read it"),
    ],
)
def test_errors(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, TRAIN, [("six", "6")], **settings)
