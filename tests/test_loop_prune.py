"""Pruning through the whole loop: what is trained on and kept, and a run started again."""

import json
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import reroll.loop
from reroll.cli import main
from reroll.engine.costs import Costs
from reroll.engine.local import LocalEngine
from reroll.errors import UserError
from reroll.loop import train
from reroll.pruning import ARMS
from reroll.rollout.prune import Pruner
from reroll.scheduling import make_pruner
from reroll.setup import prepare
from reroll.train.checkpoint import checkpoints
from reroll.types import Group, Rollout
from tests.project import (
    Project,
    Wholes,
    at_call,
    killed_and_gone_on,
    lines_of,
    records,
    state_of,
    steps_of,
    watch_groups,
    weights,
)

CHEAP = Costs((1, 64), ((1.0, 1.01, 1.02, 1.03), (1.0, 1.01, 1.02, 1.03)), 0.02)
SHORT = {
    "task__eval_size": 1, "eval__every": 0, "eval__samples": 1, "log__display": "off",
    "rollout__samples": 6, "rollout__max_tokens": 16, "checkpoint__keep_last": 9,
}  # fmt: skip
RANDOM = {
    "prune__on": "true", "prune__signal": "random", "prune__least": 2, "prune__when": "tokens",
    "prune__at": "[4]",
}  # fmt: skip
PODS = {
    "prune__on": "true", "prune__mode": "paper", "prune__rule": "pods", "prune__least": 2,
}  # fmt: skip
BOLD = {
    "prune__on": "true", "prune__least": 2, "prune__when": "tokens", "prune__at": "[4]",
    "prune__warmup": 1, "prune__audit": 0.2, "prune__adaptive": "false",
}  # fmt: skip
"""from the second step on, and never standing down"""
APRIL = {
    "schedule__kind": "april", "correct__mode": "tis", "engine__slots": 9,
    "rollout__max_tokens": 40, "task__train_size": 12,
}  # fmt: skip
REUSE = {"reuse__on": "true", "task__train_size": 4, "rollout__temperature": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "sync": BOLD | {"train__minibatches": 2},
    "april": BOLD | APRIL,
    "april, two probes": BOLD
    | APRIL
    | {"prune__at": "[3, 25]", "prune__keep": "[0.7, 0.5]", "prune__signal": "quality"},
    "april, more samples": RANDOM | APRIL | {"prune__refill": "samples", "prune__low": -1.0},
    "reuse": BOLD
    | REUSE
    | {
        "reuse__rule": "held",
        "reuse__refresh": 0.0,
        "reuse__audit": "off",
        "task__train_size": 3,
        "train__learning_rate": 1e-3,
    },
    "running": BOLD | {"algo__name": "rloo_running"},
    "adaptive": {"prune__on": "true", "prune__least": 2, "prune__warmup": 2},
}
TRAIN_KEYS = {"pruned", "pruned_running", "tokens_pruned_saved", "reward_survivors"}
HEAD_KEYS = {"head_version", "pruning", "within_auc", "within_auc_error", "calibration_error"}
RIVALS = {f"{name}_{arm}" for name in ("live", "variance", "drawn", "trained") for arm in ARMS}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture out: it takes longer than the training."""
    monkeypatch.setattr(reroll.loop, "plot_run", lambda run: None)
    monkeypatch.setattr(LocalEngine, "measure", lambda engine: CHEAP)


class Run(NamedTuple):
    """A run, and the groups of each of its steps."""

    path: Path
    steps: list[list[Group]]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return lines_of(self.path)

    def pruned(self) -> list[tuple[int, Rollout]]:
        return [(i, r) for i, gs in enumerate(self.steps, 1) for g in gs for r in g.pruned]

    def survivors(self) -> list[tuple[int, Rollout]]:
        return [(i, r) for i, gs in enumerate(self.steps, 1) for g in gs for r in g.rollouts]


@pytest.fixture
def run(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Trains a run of that name, and watches what it is trained on."""
    steps = watch_groups(monkeypatch)

    def run_(name: str = "run", **changes: Any) -> Run:
        steps.clear()
        path = train(project.config(name, **SHORT | changes)).path
        return Run(path, list(steps))

    return run_


def rows(path: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(path / "rollouts.sqlite") as db:
        db.row_factory = sqlite3.Row
        found = [dict(r) for r in db.execute("SELECT * FROM rollouts ORDER BY step, id")]
    db.close()
    return found


# --- started again --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_started_again_it_is_the_run_that_was_not_killed(
    kind: str, project: Project, whole: Wholes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, reference = killed_and_gone_on(project, whole, monkeypatch, **SHORT | KINDS[kind])
    assert steps_of(run) == [1, 2, 3, 4]
    assert state_of(run)["prune"] == state_of(reference)["prune"]
    assert rows(run) == rows(reference)


def test_what_the_runs_go_through(whole: Wholes) -> None:
    """The comparisons above would prove little about runs with nothing under way or learnt."""
    under_way: dict[str, bool] = {"judged": False, "between two probes": False, "seen": False}
    for kind, changes in KINDS.items():
        path = whole(**SHORT | changes)
        lines = lines_of(path)
        learns = "prune__signal" not in changes or changes["prune__signal"] != "random"
        heads = {name for name in weights(path) if name.startswith("head/")}
        assert bool(heads) is learns
        if learns:
            assert {name.split("/")[1].split(".")[0] for name in heads} == {"signal", "end"}
        if kind != "adaptive":
            assert sum(line["pruned"] for line in lines) > 0.5, kind
        if kind.startswith("april"):
            text = (path / "checkpoints" / "step-2" / "under_way.jsonl").read_text()
            units = [json.loads(one) for one in text.splitlines()]
            assert all(unit["watch"] for unit in units)
            for unit in units:
                under_way["judged"] |= bool(unit["stage"] and unit["pruned"])
                under_way["between two probes"] |= "two" in kind and unit["stage"] == 1
                under_way["seen"] |= any("0" in m["seen"] for m in unit["members"]) and (
                    not unit["stage"]
                )
    assert all(under_way.values()), under_way
    extra = [m["extra"] for m in members_under_way(whole(**SHORT | KINDS["april, more samples"]))]
    assert any(extra) and not all(extra)
    assert sum(line["tokens_reused"] for line in lines_of(whole(**SHORT | KINDS["reuse"]))) > 15


def members_under_way(path: Path) -> list[dict[str, Any]]:
    found = []
    for step in (2, 4):
        text = (path / "checkpoints" / f"step-{step}" / "under_way.jsonl").read_text()
        found += [m for line in text.splitlines() for m in json.loads(line)["members"]]
    return found


def test_an_interrupt_between_two_steps_loses_nothing(
    project: Project, whole: Wholes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the head learnt of a batch that was not trained on is forgotten with it."""
    changes = SHORT | KINDS["april"]
    config = project.config(**changes)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_call(patch, Pruner, "learn", 4, interrupt, after=True)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    run = project.out / "run"
    assert max(checkpoints(run / "checkpoints")) == 3
    assert state_of(run)["prune"]["batches"] == 3
    train(config)
    reference = whole(**changes)
    assert weights(run).keys() == weights(reference).keys()
    ours, theirs = weights(run), weights(reference)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert records(run) == records(reference)


def test_checkpoints_of_before_there_was_pruning_are_gone_on_from(
    project: Project, whole: Wholes
) -> None:
    """They have no word of it: neither the state of a head nor watches, looks, what was pruned."""
    changes: dict[str, Any] = SHORT | APRIL
    short: dict[str, Any] = changes | {"train__steps": 2}
    path = train(project.config(**short)).path
    folder = checkpoints(path / "checkpoints")[2]
    state = json.loads((folder / "state.json").read_text())
    del state["prune"]
    (folder / "state.json").write_text(json.dumps(state))
    units = [json.loads(text) for text in (folder / "under_way.jsonl").read_text().splitlines()]
    assert len(units) > 1
    for unit in units:
        for name in ("wanted", "stage", "watch", "pruned"):
            del unit[name]
        for member in unit["members"]:
            for name in ("extra", "looks", "seen"):
                del member[name]
            del member["completion"]["entropies"]
    (folder / "under_way.jsonl").write_text("".join(json.dumps(unit) + "\n" for unit in units))
    train(project.config(**changes))
    reference = whole(**changes)
    ours, theirs = weights(path), weights(reference)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert lines_of(path) == lines_of(reference)


# --- what it is, and what it leaves ---------------------------------------------------------------


def test_a_run_that_leaves_every_group_whole_is_the_plain_run(run: Callable[..., Run]) -> None:
    """Bit for bit, in what is sampled and in what is trained."""
    plain = run("plain")
    for name, changes in {
        "audit": BOLD | {"prune__audit": 1.0, "prune__mode": "paper"},
        "warm-up": BOLD | {"prune__warmup": 99, "prune__mode": "paper", "prune__signal": "quality"},
        "corrected": BOLD | {"prune__audit": 1.0},
    }.items():
        null = run(name, **changes)
        assert not null.pruned() and all(r.looks for _, r in null.survivors())
        for mine, its in zip(null.lines, plain.lines, strict=True):
            # of a judged group the mean reward is that of estimates: equal up to rounding
            assert mine["reward"] == pytest.approx(its["reward"], rel=1e-14)
            assert {k: v for k, v in mine.items() if k in its and k != "reward"} == {
                k: v for k, v in its.items() if k != "reward"
            }, name
        ours, theirs = weights(null.path), weights(plain.path)
        same = {n for n in theirs if torch.equal(ours[n], theirs[n])}
        assert same == theirs.keys(), name


def test_figures_of_a_step(run: Callable[..., Run]) -> None:
    found = run(train__steps=6, **BOLD | {"prune__audit": 0.4})
    assert any(not g.pruned for g in found.steps[-1]) or any(not g.pruned for g in found.steps[-2])
    for number, line in enumerate(found.lines):
        groups = found.steps[number]
        assert line.keys() >= TRAIN_KEYS and "reward_digits:share" in line
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
        pruned = [r for g in groups for r in g.pruned]
        stopped = [r for r in pruned if r.completion.finish == "abort"]
        assert line["pruned"] == len(pruned) / 18
        assert line["pruned_running"] == len(stopped) / 18
        assert line["tokens_pruned_saved"] == pytest.approx(sum(r.saved for r in pruned))
        assert line["head_version"] == number + 1
        assert line["pruning"] == 1.0
        if number:
            assert line.keys() >= HEAD_KEYS - {"within_auc_error"}
            assert 0 <= line["within_auc"] <= 1 and 0 <= line["calibration_error"] <= 1
        whole_groups = [g for g in groups if not g.pruned]
        assert line.get("whole_groups", 0) == len(whole_groups)
        if whole_groups:
            assert line.keys() >= RIVALS
            assert line["drawn_all"] >= line["drawn_pruned"] and line["drawn_fewer"] > 0
        survivors = [r.reward for g in groups for r in g.rollouts if r.reward is not None]
        assert line["reward_survivors"] == pytest.approx(sum(survivors) / len(survivors))
    assert found.lines[-1]["within_auc_error"] > 0  # of two groups at least
    assert sum(line["pruned_running"] for line in found.lines) > 1
    assert sum(line["tokens_pruned_saved"] for line in found.lines) > 50
    # decoded were the tokens of all, those left out as far as they had come
    for number, line in enumerate(found.lines):
        every = [r for g in found.steps[number] for r in (*g.rollouts, *g.pruned)]
        tokens = sum(len(r.completion.token_ids) for r in every)
        assert line["tokens_decode"] == tokens - 18
        assert line["tokens_trained"] < tokens or not any(g.pruned for g in found.steps[number])


def test_the_store_keeps_what_was_known_of_each(run: Callable[..., Run]) -> None:
    found = run(**BOLD, store__epochs=9)
    held = {(r["row"], r["sample"], r["visit"]): r for r in rows(found.path)}
    every = [(n, r, False) for n, r in found.survivors()]
    every += [(n, r, True) for n, r in found.pruned()]
    assert len(held) == len(every) == 4 * 18
    stopped = 0
    for number, r, out in every:
        row = held[r.prompt.row, r.sample, r.visit]
        told = json.loads(row["pruning"])
        (look,) = told["looks"]
        assert look.keys() == {
            "position", "score", "probability", "survival", "kept", "ended", "head",
        }  # fmt: skip
        assert look["kept"] is not out and row["step"] == number
        assert look["head"] == number - 1
        assert told["saved"] == r.saved and row["length"] == len(r.completion.token_ids)
        if r.completion.finish == "abort":
            stopped += 1
            assert (row["finish"], row["reward"], row["trained"]) == ("pruned", None, 0)
            assert look["score"] is not None and not look["ended"] and look["position"] == 4
            assert 0 < look["survival"] < 1 and row["length"] >= 5
        else:
            assert row["finish"] in ("stop", "length")
            assert not (out and row["trained"])
    assert stopped > 10
    assert any(json.loads(row["pruning"])["saved"] > 0 for row in held.values())


def test_with_reuse_pruned_rollouts_are_drafts_and_whole_ones_are_not_probed(
    run: Callable[..., Run],
) -> None:
    still = {"train__learning_rate": 1e-30, "reuse__rule": "held", "reuse__refresh": 0.0}
    found = run(
        train__steps=6, **BOLD | REUSE | still | {"task__train_size": 3, "reuse__audit": "off"}
    )
    # the second visit holds to the first one's noise, under the same weights
    every = [*found.survivors(), *found.pruned()]
    first = {(r.prompt.row, r.sample): r for n, r in every if n == 1}
    ended = through = 0
    for n, r in every:
        mine, its = r.completion, first[r.prompt.row, r.sample].completion
        size = min(len(mine.token_ids), len(its.token_ids))
        assert mine.token_ids[:size] == its.token_ids[:size]
        if n == 1 or mine.finish == "abort":
            continue
        if mine.walked >= len(mine.token_ids) - 1:
            ended += 1
            assert r.looks[0].ended and r.looks[0].position == len(mine.token_ids)
        elif mine.walked >= 4:
            through += 1
            assert not r.looks[0].ended and r.looks[0].position == 4
    assert ended > 20
    assert all(line["drafted"] == 1 for line in found.lines[1:])
    assert sum(line["tokens_reused"] for line in found.lines) > 100


def test_the_timeline_shows_what_was_stopped(run: Callable[..., Run]) -> None:
    done = run("timeline", **BOLD, log__timeline=9)
    batches = [json.loads(x) for x in (done.path / "timeline.jsonl").read_text().splitlines()]
    shown = [sum(what == "pruned" for *_, what in batch["spans"]) for batch in batches]
    pruned = [sum(step == i for step, _ in done.pruned()) for i in range(1, len(batches) + 1)]
    # one that ended when it was read never had a slot
    assert all(a <= b for a, b in zip(shown, pruned, strict=True))
    assert sum(shown) > sum(pruned) / 2 > 0


def test_the_paper_and_the_controls_train(run: Callable[..., Run]) -> None:
    weights_of = {}
    for name, changes in {
        "paper": BOLD | {"prune__mode": "paper"},
        "corrected": BOLD,
        "fixed": BOLD | {"prune__mode": "paper", "prune__rule": "fixed"},
        "random": RANDOM,
        "pods": PODS,
    }.items():
        found = run(name, train__steps=2, **changes)
        assert [line["skipped_steps"] for line in found.lines] == [0, 0]
        assert found.lines[-1]["grad_norm"] > 0 and found.lines[-1]["pruned"] > 0
        ours = weights(found.path)
        weights_of[name] = torch.cat([v.flatten() for k, v in ours.items() if "model/" in k])
        sizes = {len(g.rollouts) for g in found.steps[-1] if g.pruned}
        assert sizes == {3}
    named = list(weights_of.items())
    for i, (one, a) in enumerate(named):
        for other, b in named[:i]:
            assert not torch.equal(a, b), (one, other)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "rloo", "reinforce_pp", "rloo_running"])
def test_every_algorithm_trains_on_survivors(name: str, run: Callable[..., Run]) -> None:
    found = run(train__steps=2, algo__name=name, **BOLD)
    assert found.pruned()
    assert all(line["grad_norm"] > 0 and line["skipped_steps"] == 0 for line in found.lines)


def test_grading_is_booked_for_what_was_graded(run: Callable[..., Run]) -> None:
    """Those left out after their end were graded too."""
    found = run(train__steps=2, **PODS)
    for number, line in enumerate(found.lines):
        every = [r for g in found.steps[number] for r in (*g.rollouts, *g.pruned)]
        assert line["tokens_grade"] == sum(len(r.completion.token_ids) for r in every)


def test_grading_is_not_booked_for_what_was_known(run: Callable[..., Run]) -> None:
    still = {"train__learning_rate": 1e-30, "reuse__rule": "held", "reuse__refresh": 0.0}
    still |= {"task__train_size": 3, "reuse__audit": "off"}
    found = run(train__steps=2, **PODS | REUSE | still)
    assert found.lines[1]["full_reuse"] == 1
    every = [r for g in found.steps[1] for r in (*g.rollouts, *g.pruned)]
    # the limit's were graded again
    cut = sum(len(r.completion.token_ids) for r in every if r.completion.finish == "length")
    assert found.lines[1]["tokens_grade"] == cut


def test_a_boundary_that_no_token_holds_is_refused(project: Project) -> None:
    changes = SHORT | RANDOM | {"prune__when": "steps", "prune__at": "[2]"}
    with prepare(project.config(**changes), None, None) as parts:
        pruner = make_pruner(project.config(**changes), parts)
        assert pruner is not None
        texts = [parts.decode([i]) for i in sorted(pruner.step_ids)]
        assert texts and all("\n" in text for text in texts)
        config = project.config(**changes, prune__boundary="no such thing")
        with pytest.raises(UserError) as raised:
            make_pruner(config, parts)
    assert str(raised.value) == (
        "prune.boundary = 'no such thing': no token of this model's vocabulary has it; choose a "
        "text that one token holds"
    )


def test_lines_of_the_pruner_are_said(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    changes = SHORT | BOLD | {
        "prune__adaptive": "true", "log__display": "plain", "train__steps": 2,
        "task__graders": '[{name = "digits:dull"}]',
    }  # fmt: skip
    assert main(project.train(**changes)) == 0
    out = capsys.readouterr().out
    assert "step 1: prune: keeps everything: nothing is known of its signal yet" in out
