import contextlib
import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import reroll.loop
from reroll.cli import main
from reroll.config import load_config
from reroll.engine.local import LocalEngine
from reroll.ledger import CATEGORIES
from reroll.log import Display
from reroll.loop import train
from reroll.rundir import RunDir
from reroll.summary import print_summary
from reroll.tasks.pool import GraderPool
from reroll.train import checkpoint
from reroll.train.checkpoint import checkpoints
from reroll.train.policy import PolicyLoss
from reroll.train.trainer import Trainer
from tests.project import (
    Killed,
    Project,
    Wholes,
    assert_same,
    at_call,
    kill,
    lines_of,
    records,
    state_of,
    steps_of,
    weights,
)

RICH = {
    "train__steps": 5, "train__minibatches": 2, "train__warmup": 1, "train__decay": "cosine",
    "train__weight_decay": 0.1, "algo__kl_coef": 0.1, "algo__entropy_coef": 0.01,
    "rollout__truncated": "penalty", "rollout__max_tokens": 6, "checkpoint__keep_last": 1,
}  # fmt: skip
"""settings with as much state as there is: schedules by step, a reference, optimizer moments"""


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture out: it takes longer than the training."""
    monkeypatch.setattr(reroll.loop, "plot_run", lambda run: None)


@pytest.fixture(scope="module")
def whole(project_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """Runs that were not interrupted."""
    return Wholes(project_folder, lambda: tmp_path_factory.mktemp("whole"))


# --- what a run leaves behind ---------------------------------------------------------------------


def test_a_run_writes_what_it_promises(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    gym = {
        "task__source": "reasoning_gym", "task__name": "chain_sum",
        "task__params": "{min_terms = 2, max_terms = 3}", "task__template": "{expression} =\n",
    }  # fmt: skip
    assert main(project.train(**gym)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    run = project.out / "run"
    assert load_config(run / "config.toml") == project.config(**gym)

    lines = [
        json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("eval", 0), ("train", 1), ("train", 2), ("train", 3), ("eval", 3), ("train", 4),
        ("eval", 4),
    ]  # fmt: skip
    training = [line for line in lines if line["kind"] == "train"]
    expected = {
        "kind", "step", "epoch", "version", "reward", "reward_digits:share", "length", "length_max",
        "truncated", "stopped", "ungraded", "entropy", "loss", "grad_norm", "clip_fraction",
        "flops_total", "flops_total_paper",
        "approx_kl", "skipped_steps", "live_groups", "small_groups", "offpolicy_tokens",
        "tokens_trained", "tree_tokens_ratio", "learning_rate",
        "seconds_rollout", "tokens_per_second", "goodput", "bubble", "waste", "reprefill",
        "length_bias", "wait", "wait_max", "restarts", "lag_max", "versions_max",
        *(f"{k}_{c}" for k in ("tokens", "flops", "seconds") for c in CATEGORIES),
    }  # fmt: skip
    for line in training:
        assert set(line) == expected
        assert all(math.isfinite(line[key]) for key in expected - {"kind"})
        assert 0 < line["reward"] < 1
        assert line["reward"] == line["reward_digits:share"]
        assert 0 < line["live_groups"] <= 1
        assert line["small_groups"] == line["offpolicy_tokens"] == 0
        assert 0 < line["length"] <= line["length_max"] <= 10
        assert math.log(99) * 0.9 < line["entropy"] < math.log(99) * 1.1  # an untaught policy
        assert line["tokens_grade"] == round(line["length"] * 12)
        assert line["tokens_prefill"] > 0
        assert line["tokens_decode"] == line["tokens_grade"] - 12  # the first comes with prefill
        assert line["seconds_train"] > 0
    assert [line["version"] for line in training] == [1, 2, 3, 4]
    assert [line["epoch"] for line in training] == [0, 0, 0, 0]  # 9 of 10 prompts, then the tenth

    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2, 3, 3, 4, 4]
    for sample in samples:
        assert set(sample) == {
            "step", "row", "prompt", "completion", "answer", "reward", "finish",
        }  # fmt: skip
        assert sample["prompt"].endswith(" =\n")
        assert sample["finish"] in ("stop", "length")
        digits = sum(character.isdigit() for character in sample["completion"])
        assert sample["reward"] == pytest.approx(digits / max(1, len(sample["completion"])))
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")

    found = checkpoints(run / "checkpoints")
    assert list(found) == [2, 4]
    state = json.loads((found[4] / "state.json").read_text())
    for kind in ("tokens", "flops", "seconds"):
        for category in set(CATEGORIES) - {"sync"}:  # writing the checkpoint itself comes after
            total = sum(line[f"{kind}_{category}"] for line in training)
            assert state["ledger"][kind][category] == pytest.approx(total)
    assert state["held_out_reward"] == lines[-1]["reward"]
    trained = AutoModelForCausalLM.from_pretrained(found[4])
    initial = AutoModelForCausalLM.from_pretrained("policy")
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (found[4], "policy"))
    assert ours.encode("1 + 2 =\n") == theirs.encode("1 + 2 =\n")
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(trained.parameters(), initial.parameters(), strict=True)
    ]
    assert min(moved) > 1e-4
    assert not [path for path in run.rglob("*") if "tmp" in path.name]

    out = captured.out
    assert "10 training and 4 held-out problems" in out
    assert [out.count(f"\nstep {step}/4  reward ") for step in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert [out.count(f"held-out after step {step}: ") for step in (0, 3, 4)] == [1, 1, 1]
    assert str(found[4]) in out


@pytest.mark.usefixtures("no_curves")
def test_the_reward_rises(project: Project) -> None:
    run = train(project.config(train__steps=25, train__learning_rate=2e-2, eval__every=0)).path
    training = [line["reward"] for line in records(run) if line["kind"] == "train"]
    before, after = (line["reward"] for line in records(run) if line["kind"] == "eval")
    assert training[0] < 0.3
    assert min(training[-3:]) > 0.6
    assert before < 0.3
    assert after > 0.6


def test_the_same_command_again_does_nothing(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(project.train()) == 0
    run = project.out / "run"
    first = capsys.readouterr().out
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    figures = print_summary(RunDir(run))
    capsys.readouterr()
    assert main(project.train()) == 0
    again = capsys.readouterr().out
    assert f"going on from step 4 of {run}\n" in again
    assert "held-out after" not in again
    assert again.partition("Held-out (")[2] == first.partition("Held-out (")[2] != ""
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert [path.name for path in before if after[path] != before[path]] in ([], ["curves.png"])
    assert print_summary(RunDir(run)) == figures
    assert figures["steps"] == 4


@pytest.mark.usefixtures("no_curves")
def test_more_steps_go_on(project: Project, whole: Wholes) -> None:
    assert main(project.train(train__steps=3)) == 0
    assert main(project.train(train__steps=5)) == 0
    reference = whole(train__steps=5)
    assert_same(project.out / "run", reference)


@pytest.mark.usefixtures("no_curves")
def test_flops_end_a_run(project: Project, whole: Wholes) -> None:
    """After the step that reaches them, with its evaluation and checkpoint; more goes on."""
    reference = whole(train__steps=5)
    spent = {line["step"]: line["flops_total_paper"] for line in lines_of(reference)}
    limit = (spent[2] + spent[3]) / 2
    run = train(project.config(train__steps=5, train__flops=limit)).path
    assert steps_of(run) == [1, 2, 3]
    assert steps_of(run, "eval")[-1] == max(checkpoints(run / "checkpoints")) == 3
    assert main(project.train(train__steps=5, train__flops=limit)) == 0
    assert lines_of(run)[-1]["step"] == 3
    assert main(project.train(train__steps=5, train__flops=limit / 2)) == 2
    assert main(project.train(train__steps=5)) == 0
    ours, theirs = weights(run), weights(reference)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_seed_decides(project: Project) -> None:
    runs = {name: train(project.config(name)).path for name in ("a", "b")}
    assert_same(runs["a"], runs["b"])
    other = train(project.config("c", run__seed=1)).path
    assert records(other) != records(runs["a"])
    drawn = [(path / "samples.jsonl").read_text() for path in (runs["a"], other)]
    assert not set(drawn[0].splitlines()) & set(drawn[1].splitlines())


@pytest.mark.usefixtures("no_curves")
def test_what_does_not_matter_does_not_matter(project: Project, whole: Wholes) -> None:
    other = train(
        project.config(
            checkpoint__every=1, checkpoint__keep_best=2, grading__workers=2, log__display="off",
            engine__cache_gb=0.5,
        )
    ).path  # fmt: skip
    assert_same(other, whole())


@pytest.mark.parametrize("slots", [1, 64])
def test_slots_change_no_token(slots: int, project: Project, whole: Wholes) -> None:
    run = train(project.config(engine__slots=slots, train__steps=1)).path
    reference = (whole() / "samples.jsonl").read_text().splitlines()[:2]
    assert (run / "samples.jsonl").read_text().splitlines() == reference
    ours, theirs = records(run)[1], records(whole())[1]
    for key in ("reward", "length", "tokens_decode", "truncated"):
        assert ours[key] == theirs[key]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


@pytest.mark.usefixtures("no_curves")
def test_old_checkpoints_go_and_the_best_stays(project: Project) -> None:
    changes = {"train__steps": 6, "checkpoint__every": 1, "eval__every": 1}
    run = train(project.config(checkpoint__keep_last=2, **changes)).path
    rewards = {r["step"]: r["reward"] for r in records(run) if r["kind"] == "eval"}
    best = max(range(1, 7), key=lambda step: (rewards[step], step))
    assert set(checkpoints(run / "checkpoints")) == {5, 6, best}
    all_of_them = train(project.config("all", checkpoint__keep_last=9, **changes)).path
    assert set(checkpoints(all_of_them / "checkpoints")) == {1, 2, 3, 4, 5, 6}


# --- killed at any moment -------------------------------------------------------------------------


def write_half_a_line(run: RunDir, record: dict[str, Any]) -> None:
    text = json.dumps(record)
    with run.metrics_path.open("a") as file:
        file.write(text[: len(text) // 2])
    raise Killed


def write_half_a_file(tensors: Any, path: Path) -> None:
    path.write_bytes(b"\x40\0\0\0\0\0\0\0{half")
    raise Killed


def half_delete(pattern: str) -> Callable[..., None]:
    def act(folder: Path, *_: Any) -> None:
        for path in (folder / "step-2").glob(pattern):
            path.unlink()
        raise Killed

    return act


MOMENTS: dict[str, tuple[Any, str, int, Callable[..., None], bool]] = {
    "directory claimed": (RunDir, "claim", 1, kill, True),
    "first evaluation": (GraderPool, "submit", 5, kill, False),
    "first collect": (GraderPool, "submit", 18, kill, False),
    "later collect": (GraderPool, "submit", 40, kill, True),
    "in a forward": (LocalEngine, "_decode", 40, kill, False),
    "before training": (Trainer, "step", 3, kill, False),
    "between minibatches": (Trainer, "_optimizer_step", 6, kill, False),
    "after training": (Trainer, "step", 4, kill, True),
    "in a line of an evaluation": (RunDir, "log", 5, write_half_a_line, False),
    "in a line of a step": (RunDir, "log", 6, write_half_a_line, False),
    "between the logs": (RunDir, "log", 6, kill, True),
    "model written": (Trainer, "state", 2, kill, False),
    "in the optimizer's moments": (checkpoint, "save_file", 2, write_half_a_file, False),
    "checkpoint written": (os, "rename", 2, kill, False),
    "checkpoint in place": (os, "rename", 2, kill, True),
    "old checkpoint half deleted": (checkpoint, "prune", 2, half_delete("model.*"), False),
    "old checkpoint nearly deleted": (checkpoint, "prune", 2, half_delete("*.json"), False),
    "curves": (reroll.loop, "plot_run", 1, kill, False),
}
"""the first evaluation grades 12 rollouts, and so does each step"""


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again_it_is_the_run_that_was_not_killed(
    moment: str, project: Project, whole: Wholes, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = whole(**RICH)
    owner, name, call, act, after = MOMENTS[moment]
    config = project.config(**RICH)
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, act, after)
        with pytest.raises(Killed):
            train(config)
    train(config)
    assert_same(project.out / "run", reference)
    held_out = state_of(project.out / "run")["held_out_reward"]
    assert held_out == state_of(reference)["held_out_reward"]


@pytest.mark.usefixtures("no_curves")
def test_killed_again_while_starting_again(
    project: Project, whole: Wholes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = project.config(**RICH)
    for owner, name, call in (
        (Trainer, "step", 4), (os, "replace", 1), (Trainer, "load_state", 1), (os, "replace", 2),
        (LocalEngine, "step", 9), (Trainer, "step", 1),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            at_call(patch, owner, name, call, kill)
            with pytest.raises(Killed):
                train(config)
    train(config)
    assert_same(project.out / "run", whole(**RICH))


@pytest.mark.usefixtures("no_curves")
def test_the_last_evaluation_is_remembered(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later checkpoints are ranked by it, also those of another start."""
    config = project.config(eval__every=0, train__steps=5, checkpoint__keep_last=9)
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "step", 3, kill)
        with pytest.raises(Killed):
            train(config)
    train(config)
    run = project.out / "run"
    found = checkpoints(run / "checkpoints")
    before = next(r["reward"] for r in records(run) if r["kind"] == "eval")
    for step in (2, 4):
        assert json.loads((found[step] / "state.json").read_text())["held_out_reward"] == before


@pytest.mark.usefixtures("no_curves")
def test_leftovers_of_a_kill_are_cleared_away(project: Project, whole: Wholes) -> None:
    config = project.config(**RICH | {"checkpoint__keep_last": 9})
    train(config)
    run = project.out / "run"
    folder = run / "checkpoints"
    shutil.move(folder / "step-5", folder / ".step-5.tmp")
    (folder / ".step-5.tmp" / "state.json").unlink()
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-50])
    train(config)
    assert_same(run, whole(**RICH))
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-4", "step-5"]


def start(project: Project, gate: Path, **changes: Any) -> subprocess.Popen[str]:
    """`python -m reroll train` as a user starts it, with graders that wait at the gate."""
    arguments = project.train(task__graders='[{name = "digits:gated"}]', **changes)
    return subprocess.Popen(
        [sys.executable, "-m", "reroll", *arguments],
        cwd=project.folder, env=os.environ | {"GATE": str(gate)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_lines(process: subprocess.Popen[str], metrics: Path, count: int) -> None:
    """Until metrics.jsonl has so many lines; the gate keeps the run from going far beyond."""
    patience = time.monotonic() + 500  # so that a run that hangs does not hang the tests
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < patience
        time.sleep(0.005)


@pytest.fixture
def gate(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that says at how many lines of metrics.jsonl the graders wait."""
    path = project.out / "limit"
    monkeypatch.setenv("GATE", str(path))
    yield path
    path.write_text("1000000")  # let go whatever still waits


LONG = {"train__steps": 9, "task__graders": '[{name = "digits:gated"}]'}
"""13 lines: evaluations after steps 0, 3, 6, 9"""


FULL_BUFFER = {
    "schedule__kind": "april", "schedule__over": 3.0, "correct__mode": "tis",
    "rollout__max_tokens": 60, "engine__slots": 5, "engine__prefill_rows": 2,
}  # fmt: skip
"""more rollouts are interrupted at every update than are trained on"""


@pytest.mark.parametrize("changes", [{}, FULL_BUFFER], ids=["sync", "a full buffer"])
def test_sigkill_at_random_moments(project: Project, gate: Path, changes: dict[str, Any]) -> None:
    delay = random.Random(20)
    run = project.out / "run"
    for lines in (2, 6, 10):
        # the graders wait two lines later, so the kill comes before the end on any machine
        gate.write_text(str(lines + 2))
        with start(project, gate, train__steps=9, **changes) as process:
            try:
                wait_for_lines(process, run / "metrics.jsonl", lines)
                time.sleep(delay.uniform(0, 0.3))
            finally:
                process.kill()
        assert process.returncode == -signal.SIGKILL
    gate.write_text("1000000")
    with start(project, gate, train__steps=9, **changes) as process:
        out, _ = process.communicate()
    assert process.returncode == 0, out
    assert "going on from step " in out
    reference = train(project.config("whole", **LONG | changes)).path
    assert steps_of(reference) == list(range(1, 10))
    assert_same(run, reference)
    lines = (run / "checkpoints" / "step-9" / "under_way.jsonl").read_text().splitlines()
    assert len(lines) == (6 if changes else 0)
    members = [member for line in lines for member in json.loads(line)["members"]]
    assert any(m["state"] == "partial" and m["completion"]["token_ids"] for m in members) == bool(
        changes
    )


def test_ctrl_c(project: Project, gate: Path) -> None:
    gate.write_text("4")
    run = project.out / "run"
    with start(project, gate, train__steps=9) as process:
        try:
            wait_for_lines(process, run / "metrics.jsonl", 4)  # evaluation, steps 1, 2, 3
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 130, out
    assert out.endswith("stopped after step 3; the same command goes on from here\n")
    assert "Traceback" not in out
    assert max(checkpoints(run / "checkpoints")) == 3
    assert steps_of(run) == [1, 2, 3]
    gate.write_text("1000000")
    train(project.config(**LONG))
    assert_same(run, train(project.config("whole", **LONG)).path)


# --- interrupted ----------------------------------------------------------------------------------


def interrupt(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def terminate(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGTERM)


INTERRUPTS: dict[str, tuple[Any, str, int, Callable[..., None], bool, int]] = {
    "first evaluation": (GraderPool, "submit", 5, interrupt, False, 0),
    "greedy evaluation": (GraderPool, "submit", 10, interrupt, False, 0),
    "first collect": (GraderPool, "submit", 18, interrupt, False, 0),
    "later collect": (GraderPool, "submit", 40, interrupt, False, 2),
    "terminated": (GraderPool, "submit", 40, terminate, False, 2),
    "training": (Trainer, "_optimizer_step", 5, interrupt, False, 3),
    "weights handed over": (LocalEngine, "load_weights", 4, interrupt, False, 3),
    "log": (RunDir, "log", 4, interrupt, False, 3),
    "display": (Display, "step", 3, interrupt, False, 3),
    "evaluation": (reroll.loop, "evaluate", 2, interrupt, False, 3),
    "evaluation logged": (RunDir, "log", 5, interrupt, True, 3),
    "checkpoint": (checkpoint, "save", 1, interrupt, False, 2),
    "last evaluation": (reroll.loop, "evaluate", 3, interrupt, False, 5),
    "last checkpoint": (checkpoint, "save", 3, interrupt, True, 5),
}
"""where the signal comes, and the step after which the run stops"""


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("moment", INTERRUPTS)
def test_interrupted_and_started_again_it_is_the_run_that_was_not_interrupted(
    moment: str,
    project: Project,
    whole: Wholes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = whole(**RICH)
    owner, name, call, act, after, step = INTERRUPTS[moment]
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, act, after)
        assert main(project.train(**RICH)) == 130
    captured = capsys.readouterr()
    assert captured.err == ""
    said = f"stopped after step {step}; the same command goes on from here\n"
    assert captured.out.endswith(said)
    run = project.out / "run"
    assert max(checkpoints(run / "checkpoints")) == step
    assert steps_of(run) == list(range(1, step + 1))
    assert main(project.train(**RICH)) == 0
    assert f"going on from step {step} of" in capsys.readouterr().out
    assert_same(run, reference)


@pytest.mark.usefixtures("no_curves")
def test_a_second_ctrl_c_waits_for_the_checkpoint(
    project: Project, whole: Wholes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_call(patch, GraderPool, "submit", 30, interrupt)
        at_call(patch, checkpoint, "save_file", 1, interrupt)
        assert main(project.train(**RICH)) == 130
    run = project.out / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]
    train(project.config(**RICH))
    assert_same(run, whole(**RICH))


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_curves")
def test_a_loss_that_is_not_finite(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = PolicyLoss.__call__
    with monkeypatch.context() as patch:
        patch.setattr(PolicyLoss, "__call__", lambda *args: loss(*args) * float("nan"))
        assert main(project.train(eval__every=0)) == 1
    captured = capsys.readouterr()
    run = project.out / "run"
    assert captured.err.count("\n") == 1
    assert "not finite 3 optimizer steps in a row" in captured.err
    assert captured.err.endswith(f"the state is saved in {run}\n")
    assert "Traceback" not in captured.out
    assert "step 1: loss or gradient not finite, optimizer step skipped" in captured.out
    assert steps_of(run) == [1, 2]
    assert [line["skipped_steps"] for line in records(run)[1:]] == [1, 1]
    saved = checkpoints(run / "checkpoints")
    assert list(saved) == [2]
    assert_initial(saved[2])
    assert main(project.train(eval__every=0)) == 0
    assert steps_of(run) == [1, 2, 3, 4]
    assert records(run)[-2]["skipped_steps"] == 0


def assert_initial(folder: Path) -> None:
    """Skipped steps leave the weights as they were."""
    now, initial = (load_file(f / "model.safetensors") for f in (folder, Path("policy")))
    assert all(torch.equal(now[name], initial[name]) for name in initial)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("name", ["rename", "fsync"])
def test_a_disk_that_is_full_at_a_checkpoint(
    name: str,
    project: Project,
    whole: Wholes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        calls = at_call(patch, os, name, -1, full_disk)
        train(project.config("other", **RICH))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_call(patch, os, name, calls[0] // 3 + 1, full_disk)  # of the second of 3 checkpoints
        assert main(project.train(**RICH)) == 2
    run = project.out / "run"
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(
        f"reroll: {run / 'checkpoints' / 'step-4'}: cannot write the checkpoint"
    )
    assert "No space left on device" in error
    assert "the last whole checkpoint is step-2; free space" in error
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]
    assert main(project.train(**RICH)) == 0
    assert_same(run, whole(**RICH))


@pytest.mark.usefixtures("no_curves")
def test_a_disk_that_is_full_while_tensors_are_written(
    project: Project,
    whole: Wholes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The real thing: safetensors has an error of its own for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def small_files() -> Iterator[None]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    save, calls = checkpoint.save, [0]

    def save_to_a_full_disk(*args: Any) -> Path:
        calls[0] += 1
        if calls[0] < 2:
            return save(*args)
        with small_files():
            return save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_to_a_full_disk)
        assert main(project.train(**RICH)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step-4: cannot write the checkpoint" in error
    assert "the last whole checkpoint is step-2" in error
    assert main(project.train(**RICH)) == 0
    assert_same(project.out / "run", whole(**RICH))


def test_too_many_ungraded_rollouts_stop_the_run(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    fussy = {"task__graders": '[{name = "digits:fussy"}]', "grading__max_failures": 0}
    assert main(project.train(**fussy)) == 2
    captured = capsys.readouterr()
    first, *rest = captured.err.splitlines()
    assert first.startswith("reroll: grading.max_failures = 0.0: ")
    assert first.endswith(" of 12 rollouts came back ungraded; the first failure was:")
    assert "RuntimeError: no ones, please" in rest[-1]
    assert any("digits.py" in line for line in rest)  # the grader's traceback, and not ours
    assert not any("reroll/loop.py" in line for line in rest)


@pytest.mark.usefixtures("no_curves")
def test_few_ungraded_rollouts_are_counted_and_left_out(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    collected: list[Any] = []
    credited: list[Any] = []
    at_call(monkeypatch, Trainer, "credit", 1, lambda _, groups: collected.extend(groups))
    at_call(monkeypatch, Trainer, "step", 1, lambda _, groups: credited.extend(groups))
    fussy = {"task__graders": '[{name = "digits:fussy"}]', "grading__max_failures": 1}
    assert main(project.train(train__steps=1, **fussy)) == 0
    (line,) = lines_of(project.out / "run")
    everything = [rollout for group in collected for rollout in group.rollouts]
    failed = [r for r in everything if "1" in r.text]
    graded = [r for r in everything if "1" not in r.text]
    assert 0 < len(failed) < 12
    assert line["ungraded"] == len(failed)
    assert all(r.reward is None for r in failed)
    assert line["reward"] == pytest.approx(sum(r.reward for r in graded) / len(graded))
    assert [[one.rollout for one in group] for group in credited] == [
        [r for r in group.rollouts if r.reward is not None] for group in collected
    ]
    live = [group for group in credited if any(one.advantages.any() for one in group)]
    assert line["live_groups"] == len(live) / 3
    trained = [one.rollout for group in live for one in group]
    assert line["tokens_trained"] == sum(len(r.completion.token_ids) for r in trained)
    said = f"step 1: {len(failed)} rollouts left ungraded (RuntimeError: no ones, please)"
    assert said in capsys.readouterr().out


@pytest.mark.usefixtures("no_curves")
def test_log_probs_that_disagree_are_told(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = {"train__steps": 1, "train__check_logprobs": "true", "rollout__temperature": 0.7}
    assert main(project.train("right", **checked)) == 0
    assert "log-probs differ" not in capsys.readouterr().out
    (line,) = [r for r in records(project.out / "right") if r["kind"] == "train"]
    assert 0 <= line["logprob_difference_mean"] <= line["logprob_difference_max"] < 1e-4
    monkeypatch.setattr(reroll.figures, "LOGPROB_BOUNDS", {"float": -1.0, "bfloat16": -1.0})
    assert main(project.train("told", **checked)) == 0
    assert "step 1: sampling and training log-probs differ by" in capsys.readouterr().out
