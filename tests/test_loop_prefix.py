"""Prefixes through the whole loop: traces collected, trained from, and a run started again."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import reroll.loop
from reroll.cli import main
from reroll.errors import UserError
from reroll.loop import train
from reroll.model.load import load_tokenizer
from reroll.rollout.traces import Trace, TraceStore, problem_hash
from reroll.tasks.load import load_task
from reroll.types import Group
from tests.project import (
    Killed,
    Project,
    Wholes,
    at_call,
    kill,
    killed_and_gone_on,
    lines_of,
    state_of,
    steps_of,
    watch_groups,
)

HARD = {
    "task__graders": '[{name = "digits:three"}]', "collect__screen": 4, "collect__cap": 48,
    "collect__wave": 4, "log__display": "off", "prefix__on": "true", "prefix__least": 1,
    "rollout__prompts": 4, "task__eval_size": 2, "eval__every": 0, "eval__samples": 2,
    "prefix__ladder_problems": 3, "checkpoint__keep_last": 9,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "target": {"prefix__cut": "target", "train__steps": 6},
    "on failure": {"prefix__mode": "on_failure", "prefix__cut": "resample"},
    "longest first": {"schedule__kind": "longest_first"},
    "reuse": {"reuse__on": "true", "train__steps": 8},
    "prune": {
        "prune__on": "true", "prune__least": 2, "prune__when": "tokens", "prune__at": "[2]",
        "prune__warmup": 1, "prune__adaptive": "false", "rollout__samples": 6,
    },
    "sft": {"sft__epochs": 2, "prefix__prefixed": 0},
    "hint": {"prefix__placement": "hint", "prefix__hint": "({fragment})"},
    "untraced": {
        "prefix__untraced": "true", "collect__traces": 2, "prefix__refresh": "true",
        "collect__wave": 1, "engine__slots": 1, "prefix__prefixed": 1, "train__steps": 8,
    },
    "refresh": {"prefix__refresh": "true", "rollout__samples": 8, "task__train_size": 6},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture out: it takes longer than the training."""
    monkeypatch.setattr(reroll.loop, "plot_run", lambda run: None)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[Group]]:
    """The groups of each step of what is trained."""
    return watch_groups(monkeypatch)


def traces_of(path: Path) -> list[Trace]:
    with TraceStore(path, read_only=True) as store:
        return store.traces()


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_started_again_it_is_the_run_that_was_not_killed(
    kind: str, project: Project, whole: Wholes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, reference = killed_and_gone_on(project, whole, monkeypatch, **HARD | KINDS[kind])
    assert state_of(run)["mix"] == state_of(reference)["mix"]
    assert traces_of(run / "traces.sqlite") == traces_of(reference / "traces.sqlite")


def test_groups_start_from_their_traces(project: Project, steps: list[list[Group]]) -> None:
    run = train(project.config(**HARD)).path
    traces = {trace.id: trace for trace in traces_of(run / "traces.sqlite")}
    assert len(steps) == 4
    for groups in steps:
        assert [bool(group.prompt.trace) for group in groups].count(True) == 3
        for group in groups:
            prompt, given = group.prompt, len(group.prompt.prefix_ids)
            if prompt.trace:
                assert traces[prompt.trace].row == prompt.row
                assert prompt.prefix_ids == traces[prompt.trace].token_ids[: prompt.cut]
            for rollout in group.rollouts:
                done = rollout.completion
                assert tuple(done.token_ids[:given]) == prompt.prefix_ids
                assert done.versions[:given] == [-1] * given
                assert done.loss_mask == [False] * given + [True] * rollout.drawn
                assert 0 < rollout.drawn <= 10
                # the graders have read both
                assert rollout.reward == float(sum(c.isdigit() for c in rollout.text) >= 3)
    keys = {
        (g.prompt.identity, r.sample, r.key_visit) for gs in steps for g in gs for r in g.rollouts
    }
    assert len(keys) == 16 * 4


def test_hints_stand_at_the_end_of_the_problem(project: Project, steps: list[list[Group]]) -> None:
    run = train(project.config(**HARD | KINDS["hint"])).path
    traces = {trace.id: trace for trace in traces_of(run / "traces.sqlite")}
    tokenizer = load_tokenizer(project.config().model)
    hinted = [g for groups in steps for g in groups if g.prompt.trace]
    assert len(hinted) == 12
    for group in hinted:
        prompt, trace = group.prompt, traces[group.prompt.trace]
        fragment = tokenizer.decode(trace.token_ids[: prompt.cut], skip_special_tokens=True)
        assert prompt.text.endswith(f"({fragment})")
        assert prompt.prefix_ids == () and len(prompt.token_ids) == len(prompt.text)
        for rollout in group.rollouts:
            assert all(rollout.completion.loss_mask)
            assert rollout.reward == float(sum(c.isdigit() for c in rollout.text) >= 3)


def test_metrics_and_ledger(whole: Wholes) -> None:
    run = whole(**HARD)
    lines = lines_of(run)
    for line in lines:
        assert (line["groups_prefixed"], line["groups_original"]) == (3.0, 1.0)
        assert 0.4 <= line["prefix_share"] <= 0.8
    with TraceStore(run / "traces.sqlite", read_only=True) as store:
        spent = store.ledger()
    before = spent["flops"]
    for line in lines:  # from the first collected token on
        done = sum(
            value for key, value in line.items() if key.startswith("flops_") and "total" not in key
        )
        assert line["flops_total"] >= before + done * (1 - 1e-9)
        before = line["flops_total"]
    assert lines[0]["flops_total_paper"] > spent["flops_paper"] > 0
    first, last = lines_of(run, "eval")
    for record in (first, last):
        for share in ("0", "0.2", "0.4", "0.6", "0.8"):
            low, high = record[f"ladder@{share}_low"], record[f"ladder@{share}_high"]
            assert 0 <= low <= record[f"ladder@{share}"] <= high <= 1
        assert record["hard_pass@2"] >= record["hard_pass@1"] == record["ladder@0"]
        assert 0 <= record["hard_copied"] <= 1
    assert first["ladder@0.8"] > first["ladder@0"]


def test_traces_of_a_file(
    project: Project, whole: Wholes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = whole(**HARD) / "traces.sqlite"
    run = train(project.config(**HARD, prefix__traces=path)).path
    assert not (run / "traces.sqlite").exists()
    assert steps_of(run) == [1, 2, 3, 4]
    with pytest.raises(UserError, match="no such file; `reroll collect` writes it"):
        train(project.config("b", **HARD, prefix__traces=project.out / "none"))


def copied(path: Path, to: Path, *changes: str) -> Path:
    to.write_bytes(path.read_bytes())
    with sqlite3.connect(to) as db:
        for change in changes:
            db.execute(change)
    db.close()
    return to


def test_traces_that_cannot_be_trusted_are_refused(project: Project, whole: Wholes) -> None:
    path, out = whole(**HARD) / "traces.sqlite", project.out

    def start(name: str, *changes: str, **settings: Any) -> None:
        file = copied(path, out / f"{name}.sqlite", *changes)
        train(project.config(name, **HARD | {"train__steps": 1, "prefix__traces": file} | settings))

    with pytest.raises(UserError, match="another tokenizer or prompt template"):
        start("a", "UPDATE traces SET tokenizer = 'x'")
    with pytest.raises(UserError, match="given whole, are no success to the graders that found"):
        start("b", "UPDATE traces SET text = 'no digits'")
    with pytest.raises(UserError, match="no trace is a success to the graders of this run"):
        start("c", "UPDATE traces SET text = 'no digits', graders = 'others'")
    with pytest.raises(UserError, match="no trace of a hard problem"):
        start("d", "UPDATE problems SET solved_at = 0 WHERE solved_at IS NOT NULL")
    with pytest.raises(UserError, match="no trace of a hard problem"):
        start("e", prefix__least=10)
    with pytest.raises(UserError, match=r"prefix.easy = 4: .* has no problem that was solved"):
        solved = "UPDATE problems SET solved_at = 9 WHERE solved_at IS NOT NULL"
        start("g", solved, prefix__easy=4, rollout__prompts=8)
    start("f", "UPDATE traces SET graders = 'others'")  # they still succeed


def test_held_out_problems_are_never_trained_from(project: Project, whole: Wholes) -> None:
    """A trace whose problem is evaluated on: by what the problem says, whatever its row."""
    config = project.config(**HARD)
    held = load_task(config.task, load_tokenizer(config.model)).held_out[0]
    change = f"UPDATE traces SET problem = '{problem_hash(held)}'"
    file = copied(whole(**HARD) / "traces.sqlite", project.out / "leaked.sqlite", change)
    with pytest.raises(UserError, match="are of held-out problems"):
        train(project.config(**HARD, prefix__traces=file))


def test_a_collection_at_the_start_that_was_killed_goes_on(
    project: Project, whole: Wholes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = project.config(**HARD)
    with monkeypatch.context() as patch:
        patch.setattr(reroll.collection, "AT_ONCE", 1)
        patch.setattr(reroll.collection, "ROUNDS", 1)
        at_call(patch, reroll.collection, "_sample", 2, kill, after=True)
        with pytest.raises(Killed):
            train(config)
    run = train(config).path
    reference = whole(**HARD)
    assert traces_of(run / "traces.sqlite") == traces_of(reference / "traces.sqlite")
    ours, theirs = (
        [json.dumps(r["ladder@0.4"]) for r in lines_of(p, "eval")] for p in (run, reference)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout__prompts": 6}, "rollout.prompts = 6: the mix 3 : 1 : 0"),
        ({"prefix__on": "false"}, "prefix.least = 1: has no effect with prefix.on = False"),
        ({"prefix__low": 0.9}, "prefix.low = 0.9: above prefix.high = 0.8"),
        ({"prefix__gain": 0.1}, "prefix.gain = 0.1: has no effect with prefix.cut = 'uniform'"),
        ({"prefix__ladder": "[1.0]"}, "prefix.ladder = [1.0]: shares of a trace"),
        ({"collect__screen": 64}, "collect.screen = 64: more attempts than collect.cap"),
        ({"schedule__kind": "april", "correct__mode": "tis"}, "schedule.kind = 'april'"),
        ({"algo__name": "dapo"}, "algo.dynamic_sampling = true: groups without signal"),
        ({"prefix__mode": "on_failure", "prefix__original": 0, "rollout__prompts": 3},
         "prefix.original = 0: with"),
        ({"prefix__untraced": "true", "prefix__original": 0, "rollout__prompts": 3},
         "prefix.untraced = true: problems without"),
        ({"prefix__on": "false", "sft__epochs": 1}, "sft.epochs = 1: trains on"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(
    changes: dict[str, Any], said: str, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(project.train(**HARD | changes)) == 2
    assert said in capsys.readouterr().err


def test_a_mistake_put_right_is_no_other_run(project: Project) -> None:
    """The collection of a run that then would not start is there for the next try."""
    with pytest.raises(UserError, match="no trace of a hard problem"):
        train(project.config(**HARD | {"prefix__least": 10}))
    assert (project.out / "run" / "traces.sqlite").exists()
    train(project.config(**HARD))
