"""Traces from texts and from the stores of other runs."""

import json
from pathlib import Path

import pytest

from reroll.cli import main
from reroll.loop import train
from reroll.model.load import load_tokenizer
from reroll.rollout.traces import TraceStore
from reroll.tasks.load import load_task
from tests.project import Project

FLAGS = {
    "task__graders": '[{name = "digits:three"}]', "log__display": "off", "prefix__least": 1,
    "rollout__prompts": 4, "collect__screen": 4, "collect__cap": 8, "collect__wave": 4,
}  # fmt: skip


def collect(project: Project, *more: str) -> int:
    empty = project.out / "empty.toml"
    empty.touch()
    out = str(project.out / "t.sqlite")
    return main(["collect", str(empty), *project.flags(**FLAGS), "--out", out, *more])


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_texts_are_graded_tokenised_and_trained_from(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    config = project.config(**FLAGS, prefix__on="true")
    prompts = load_task(config.task, load_tokenizer(config.model)).train
    rows = [prompt.row for prompt in prompts]
    good = [{"row": row, "text": f"1 2 then {row}3"} for row in rows[:6]]
    good += [{"prompt": p.text, "text": f"1 2 then {p.row}3"} for p in prompts[6:]]
    texts = lines(project.out / "texts.jsonl", *good, {"row": rows[0], "text": "no"})
    assert collect(project, "--texts", texts, "--probe", "0") == 0
    said = capsys.readouterr().out
    with TraceStore(project.out / "t.sqlite", read_only=True) as store:
        traces = store.traces()
    assert "Of 11 solutions 10 are successes" in said
    assert json.loads(said.splitlines()[-1])["imported"] == len(traces) == 10
    assert [trace.row for trace in traces] == sorted(rows)
    for trace in traces:
        assert trace.source == "imported, retokenized"
        assert trace.text == f"1 2 then {trace.row}3"
        assert len(trace.token_ids) == len(trace.text) + 1  # the end of text
        assert (trace.model, trace.reward) == ("", 1.0)
    changes = FLAGS | {"prefix__on": "true", "prefix__traces": project.out / "t.sqlite"}
    train(project.config(**changes, eval__every=0, train__steps=1))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "texts.jsonl: line 2: not JSON"),
        ('{"row": 2}', "texts.jsonl: line 2: needs 'text'"),
        ('{"row": 2, "text": ""}', "texts.jsonl: line 2: needs 'text'"),
        ('{"row": 999, "text": "a"}', "texts.jsonl: line 2: of no training problem"),
        ("[1]", "texts.jsonl: line 2: needs 'text'"),
    ],
)
def test_lines_that_cannot_be_used_are_named(
    line: str, said: str, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project.out / "texts.jsonl"
    path.write_text(f"\n{line}\n")
    assert collect(project, "--texts", str(path)) == 2
    assert said in capsys.readouterr().err


def test_successes_of_a_run_s_store(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    changes = FLAGS | {
        "reuse__on": "true",
        "train__steps": 8,
        "eval__every": 0,
        "rollout__max_tokens": 50,
    }
    del changes["prefix__least"]
    run = train(project.config(**changes)).path
    assert collect(project, "--run", str(run), "--probe", "0") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    with TraceStore(project.out / "t.sqlite", read_only=True) as store:
        traces = store.traces()
    assert report["imported"] == len(traces) > 0
    assert len({trace.row for trace in traces}) == len(traces)
    assert {trace.source for trace in traces} == {"training"}
    assert all(sum(c.isdigit() for c in trace.text) >= 3 for trace in traces)
    assert collect(project, "--run", str(project.out / "nothing")) == 2
    assert "has no rollouts.sqlite" in capsys.readouterr().err
