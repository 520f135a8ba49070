"""Algorithms through the whole loop: refills, critics, adapters, and a run started again."""

import contextlib
import json
import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import reroll.loop
from reroll.cli import main
from reroll.config import ALGORITHMS, GROUP_ADVANTAGES, load_config
from reroll.errors import UserError
from reroll.loop import train
from reroll.model.flops import cost_model
from reroll.model.logprobs import token_logprobs
from reroll.order import stream
from reroll.rollout.buffer import Buffer
from reroll.rollout.collect import Collector
from reroll.rollout.collected import Collected, Progress
from reroll.rollout.launch import Launch
from reroll.rollout.refill import has_signal
from reroll.rollout.unit import Unit
from reroll.rundir import RunDir
from reroll.setup import prepare
from reroll.train.checkpoint import checkpoints
from reroll.train.trainer import Trainer
from reroll.types import Group, Prompt
from tests.project import (
    Killed,
    Project,
    Wholes,
    assert_same,
    at_call,
    killed_and_gone_on,
    lines_of,
    records,
    state_of,
    steps_of,
    weights,
)

SHORT = {"train__steps": 2, "eval__every": 0, "task__eval_size": 1, "log__display": "off"}
DAPO = {"algo__name": "dapo", "rollout__samples": 2, "rollout__max_tokens": 5}
"""groups of two short replies: about half of them have no signal"""
DULL = {"task__graders": '[{name = "digits:dull"}]', "algo__dynamic_sampling": "true"}
"""none of them has"""
SCHEDULES = {
    "train__steps": 4, "train__warmup": 1, "train__decay": "cosine", "train__weight_decay": 0.1,
    "eval__every": 0, "task__eval_size": 2, "checkpoint__keep_last": 1, "log__display": "off",
}  # fmt: skip
PPO = {"algo__name": "ppo", "train__minibatches": 2, "critic__learning_rate": 1e-2}
LONG = {"rollout__max_tokens": 60, "engine__slots": 5}
"""replies of many lengths, for schedules"""

KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "dynamic sampling": (DAPO | {"train__minibatches": 2}, set()),
    "ppo, own trunk": (
        PPO | {"algo__kl_coef": 0.1, "critic__warmup": 3},
        {"critic_weights", "critic_moments"},
    ),
    "ppo, shared trunk": (
        PPO | {"critic__trunk": "shared", "critic__warmup": 1},
        {"critic_weights", "critic_moments"},
    ),
    "april": (LONG | {"schedule__kind": "april", "correct__mode": "tis"}, set()),
    "april, single rollouts": (
        LONG | {"schedule__kind": "april", "correct__mode": "tis", "algo__name": "rloo_running"},
        set(),
    ),
    "sorted, dynamic sampling": (
        LONG
        | DAPO
        | {"rollout__max_tokens": 30, "schedule__kind": "sorted", "correct__mode": "decoupled"},
        set(),
    ),
    "sorted, ppo": (
        LONG | PPO | {"schedule__kind": "sorted", "schedule__batches": 2, "correct__mode": "mask"},
        {"critic_weights", "critic_moments"},
    ),
    "sorted, on policy": (
        LONG | {"schedule__kind": "sorted", "schedule__mode": "on_policy"},
        set(),
    ),
    "tail batch": (LONG | {"schedule__kind": "tail_batch"}, set()),
    "async": (LONG | {"schedule__kind": "async", "schedule__max_lag": 2}, set()),
    "lora": ({"lora__rank": 4, "algo__kl_coef": 0.1, "train__minibatches": 2}, {"adapter_model"}),
    "lora, ppo": (
        PPO | {"lora__rank": 4, "train__gradient_checkpointing": "true"},
        {"adapter_model", "critic_weights", "critic_moments"},
    ),
    "lora, bfloat16": ({"lora__rank": 4, "model__dtype": "bfloat16"}, {"adapter_model"}),
    "epochs": (
        {
            "algo__name": "gspo",
            "train__epochs": 2,
            "train__minibatches": 3,
            "correct__mode": "mask",
        },
        set(),
    ),
}
"""settings, and what the checkpoint holds beside the optimizer (of full weights: the model)"""


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture out: it takes longer than the training."""
    monkeypatch.setattr(reroll.loop, "plot_run", lambda run: None)


def newest(run: Path) -> Path:
    return max(checkpoints(run / "checkpoints").items())[1]


def lengths(groups: Sequence[Group]) -> int:
    return sum(len(r.completion.token_ids) for group in groups for r in group.rollouts)


def initial() -> dict[str, torch.Tensor]:
    return load_file(Path("policy") / "model.safetensors")


# --- every algorithm ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_steps_of_each_algorithm(name: str, project: Project) -> None:
    config = project.config(**SHORT, algo__name=name, rollout__samples=2)
    run = train(config).path
    assert load_config(run / "config.toml") == config
    lines = lines_of(run)
    assert [line["version"] for line in lines] == [1, 2]
    for line in lines:
        assert all(math.isfinite(v) for v in line.values() if not isinstance(v, str))
        assert line["grad_norm"] > 1e-3
        assert 0 < line["live_groups"] <= 1
        assert line["tokens_trained"] > 0
        assert ("small_groups" in line) == (config.algo.advantage in GROUP_ADVANTAGES)
        assert ("groups_started" in line) == (name == "dapo")
        assert ("overlong" in line) == (name == "dapo")
        assert ("value_loss" in line) == (name == "ppo")
        assert "kl" not in line
    now, before = load_file(newest(run) / "model.safetensors"), initial()
    assert not any(torch.equal(now[key], before[key]) for key in before)


def test_the_epoch_of_a_batch_is_that_of_its_earliest_prompt(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits, samples = [], reroll.loop.figures.samples

    def watched(step: int, groups: Sequence[Group], count: int) -> Any:
        visits.append({r.visit for group in groups for r in group.rollouts})
        return samples(step, groups, count)

    monkeypatch.setattr(reroll.loop.figures, "samples", watched)
    changes = LONG | {"schedule__kind": "sorted", "correct__mode": "tis", "train__steps": 8}
    run = train(project.config(**SHORT | changes)).path
    assert [line["epoch"] for line in lines_of(run)] == [min(some) for some in visits]
    # 10 prompts, 3 a batch, taken in 12 at a time: the place in the stream is far ahead
    assert visits[0] == {0} and {0, 1} in visits


@pytest.mark.parametrize("name", ["rloo_running", "reinforce_pp", "ppo"])
def test_one_rollout_a_prompt_is_enough(name: str, project: Project) -> None:
    run = train(project.config(**SHORT, algo__name=name, rollout__samples=1)).path
    for line in lines_of(run):
        assert line["live_groups"] == 1
        assert line["grad_norm"] > 1e-3
        assert line["tokens_grade"] == round(3 * line["length"])


def test_groups_with_too_few_graded_are_counted(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[Group] = []
    at_call(monkeypatch, Trainer, "credit", 1, lambda _, groups: collected.extend(groups))
    fussy = {"task__graders": '[{name = "digits:fussy"}]', "grading__max_failures": 1}
    config = project.config(
        **SHORT | fussy | {"train__steps": 1}, rollout__samples=2, rollout__prompts=8
    )
    (line,) = lines_of(train(config).path)
    few = [g for g in collected if sum(r.reward is not None for r in g.rollouts) < 2]
    assert 0 < len(few) < 8
    assert line["small_groups"] == len(few)
    assert line["live_groups"] == sum(map(has_signal, collected)) / 8


def test_under_dynamic_sampling_they_are_counted_over_all_that_started(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    # which leaves them out of the batch; and failures are a share of the whole step, though the
    # last draws of a refill may hold nothing but failures
    every: list[Group] = []

    def watched(collector: Collector, progress: Progress | None = None) -> Collected:
        found = next_batch(collector, progress)
        if collector.buffer.bound is not None:  # evaluations have none
            every.extend(found.groups)
        return found

    next_batch = Collector.next
    monkeypatch.setattr(Collector, "next", watched)
    fussy = (
        SHORT
        | DAPO
        | {
            "task__graders": '[{name = "digits:fussy"}]',
            "train__steps": 1,
            "rollout__samples": 2,
        }
    )

    def run(name: str, share: float) -> dict[str, Any]:
        config = project.config(name, **fussy, grading__max_failures=share)
        (line,) = lines_of(train(config).path)
        return line

    line = run("all", 1.0)
    failed = [sum(r.reward is None for r in group.rollouts) for group in every]
    count, rollouts = sum(failed), 2 * len(every)
    assert 0 < line["small_groups"] == sum(n > 0 for n in failed) < len(every)
    assert line["ungraded"] == count
    assert run("enough", (count + 0.5) / rollouts)["ungraded"] == count
    with pytest.raises(UserError, match=rf"{count} of {rollouts} rollouts came back ungraded"):
        run("fewer", (count - 0.5) / rollouts)


def test_epochs_and_minibatches(project: Project, whole: Wholes) -> None:
    changes = SHORT | {"train__minibatches": 3, "train__decay": "linear"}
    one, two = (lines_of(whole(**changes, train__epochs=n)) for n in (1, 2))
    assert [line["version"] for line in one] == [3, 6]
    assert [line["version"] for line in two] == [6, 12]
    # the rate of the last optimizer step: of 6 or 12, the first of which has all of 1e-2
    assert [line["learning_rate"] for line in one] == pytest.approx([4e-2 / 6, 1e-2 / 6])
    assert [line["learning_rate"] for line in two] == pytest.approx([7e-2 / 12, 1e-2 / 12])
    for key in ("reward", "length", "tokens_decode", "live_groups", "small_groups"):
        assert one[0][key] == two[0][key]  # the same rollouts
    for key in ("tokens_trained", "tokens_train", "flops_train"):
        assert two[0][key] == pytest.approx(2 * one[0][key])
    assert two[0]["approx_kl"] > one[0]["approx_kl"] > 0
    assert (two[0]["offpolicy_tokens"], one[0]["offpolicy_tokens"]) == (0, 0)
    assert two[1] != one[1]


# --- dynamic sampling -----------------------------------------------------------------------------


def test_dynamic_sampling_trains_on_groups_with_signal(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Prompt] = []
    visits: list[int] = []
    steps: list[tuple[list[Group], list[Group]]] = []
    credited: list[list[Group]] = []
    next_batch, open_unit, credit = Collector.next, Buffer.open, Trainer.credit

    def watched_open(buffer: Buffer, prompt: Prompt, visit: int, need: int) -> Unit:
        if buffer.bound is not None:  # evaluations have none
            prompts.append(prompt)
            visits.append(visit)
        return open_unit(buffer, prompt, visit, need)

    def watched_next(collector: Collector, progress: Progress | None = None) -> Collected:
        found = next_batch(collector, progress)
        if collector.buffer.bound is not None:
            steps.append((found.groups, found.trained()))
        return found

    def watched_credit(trainer: Trainer, groups: list[Group]) -> Any:
        credited.append(list(groups))
        return credit(trainer, groups)

    monkeypatch.setattr(Buffer, "open", watched_open)
    monkeypatch.setattr(Collector, "next", watched_next)
    monkeypatch.setattr(Trainer, "credit", watched_credit)
    # long enough for some to stop by themselves, so that groups differ in tokens
    changes = SHORT | DAPO | {"train__steps": 5, "rollout__max_tokens": 12}
    run = train(project.config(**changes)).path
    lines, cursor = lines_of(run), 0
    assert credited == [live for _, live in steps]
    with prepare(project.config(**changes), None, None) as parts:
        expected = stream(0, len(prompts), parts.task.train, 0)
    assert (prompts, visits) == expected
    for line, (every, live) in zip(lines, steps, strict=True):
        assert live == [group for group in every if has_signal(group)]
        assert line["groups_started"] == len(every)
        assert line["groups_trained"] == len(live)
        assert line["waste"] == pytest.approx(1 - lengths(live) / lengths(every))
        assert line["tokens_grade"] == lengths(every)
        assert line["tokens_trained"] == lengths(live)
        assert line["live_groups"] == line["groups_trained"] / line["groups_started"]
        assert line["epoch"] == cursor // 10
        graded = [r.reward for group in every for r in group.rollouts]
        assert line["reward"] == pytest.approx(sum(graded) / len(graded))
        assert [g.prompt for g in every] == prompts[cursor : cursor + len(every)]
        cursor += len(every)
    assert state_of(run)["under_way"]["counts"]["cursor"] == cursor > 5 * 3
    assert max(line["groups_started"] for line in lines) <= 4 * 3
    by_groups = [1 - line["groups_trained"] / line["groups_started"] for line in lines]
    assert max(abs(a - line["waste"]) for a, line in zip(by_groups, lines, strict=True)) > 0.01


def test_a_step_that_finds_no_signal_is_told_and_the_run_goes_on(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = SHORT | DULL | {"algo__generation_bound": 2.5, "log__display": "plain"}
    assert main(project.train(**changes)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for step in (1, 2):
        said = (
            f"step {step}: 3 groups short of rollout.prompts: no more with signal "
            "within algo.generation_bound = 2.5\n"
        )
        assert captured.out.count(said) == 1
    run = project.out / "run"
    for line in lines_of(run):
        assert (line["groups_started"], line["groups_trained"], line["waste"]) == (7, 0, 1)
        assert line["version"] == line["loss"] == line["grad_norm"] == line["tokens_train"] == 0
        assert line["live_groups"] == line["skipped_steps"] == line["tokens_trained"] == 0
    assert state_of(run)["under_way"]["counts"]["cursor"] == 14
    now, before = load_file(newest(run) / "model.safetensors"), initial()
    assert all(torch.equal(now[key], before[key]) for key in before)


def test_a_step_that_finds_too_little_trains_on_that(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = SHORT | DAPO | {
        "train__steps": 4, "rollout__max_tokens": 3, "algo__generation_bound": 1.0,
        "log__display": "plain",
    }  # fmt: skip
    assert main(project.train(**changes)) == 0
    out = capsys.readouterr().out
    lines = lines_of(project.out / "run")
    assert {line["groups_started"] for line in lines} == {3}
    trained = [int(line["groups_trained"]) for line in lines]
    assert set(trained) & {1, 2}
    assert [line["version"] for line in lines] == [
        sum(count > 0 for count in trained[:n]) for n in range(1, 5)
    ]
    for step, count in enumerate(trained, start=1):
        said = f"step {step}: {3 - count} groups short of rollout.prompts: "
        assert (said in out) == (count < 3)


NO_SIGNAL = {
    "dapo": {"algo__name": "dapo"},
    "rloo": {"algo__name": "rloo", "algo__kl_coef": 0.1},
    "reinforce_pp": {"algo__name": "reinforce_pp"},
    "ppo": {"algo__name": "ppo"},
    "ppo, shared trunk": {"algo__name": "ppo", "critic__trunk": "shared"},
    "lora and other losses": {"lora__rank": 2, "algo__kl_coef": 0.1, "algo__entropy_coef": 0.1},
    "minibatches and epochs": {"train__minibatches": 3, "train__epochs": 2},
}


@pytest.mark.parametrize("kind", NO_SIGNAL)
def test_no_group_left_to_train_on(kind: str, project: Project) -> None:
    changes = SHORT | DULL | {"train__steps": 1, "algo__generation_bound": 1.0}
    run = train(project.config(**changes | NO_SIGNAL[kind])).path
    (line,) = lines_of(run)
    assert (line["groups_trained"], line["version"], line["grad_norm"]) == (0, 0, 0)
    if "lora" not in kind:
        now, before = load_file(newest(run) / "model.safetensors"), initial()
        assert all(torch.equal(now[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["grpo", "reinforce_pp", "ppo"])
def test_no_rollout_graded_at_all(name: str, project: Project) -> None:
    hopeless = {"task__graders": '[{name = "digits:hopeless"}]', "grading__max_failures": 1}
    run = train(project.config(**SHORT | hopeless | {"train__steps": 1}, algo__name=name)).path
    (line,) = lines_of(run)
    assert (line["ungraded"], line["tokens_trained"], line["grad_norm"]) == (12, 0, 0)
    now, before = load_file(newest(run) / "model.safetensors"), initial()
    assert all(torch.equal(now[key], before[key]) for key in before)


# --- started again --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_started_again_it_is_the_run_that_was_not_killed(
    kind: str, project: Project, whole: Wholes, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, files = KINDS[kind]
    run, _ = killed_and_gone_on(project, whole, monkeypatch, **SCHEDULES | changes)
    assert steps_of(run) == [1, 2, 3, 4]
    # what is compared is all there is
    model = set() if "adapter_model" in files else {"model"}
    assert {name.partition("/")[0] for name in weights(run)} == {"optimizer", *files, *model}
    moved = {k for k, v in weights(run).items() if k.startswith("critic_weights/") and v.any()}
    assert bool(moved) == ("critic_weights" in files)


def test_what_the_kinds_of_runs_go_through(whole: Wholes) -> None:
    """The comparisons above would prove little about runs without refills or critics at work."""
    runs = {kind: whole(**SCHEDULES | changes) for kind, (changes, _) in KINDS.items()}
    dynamic = runs["dynamic sampling"]
    assert state_of(dynamic)["under_way"]["counts"]["cursor"] > 4 * 3
    assert [line["version"] for line in lines_of(dynamic)] == [2, 4, 6, 8]
    own, shared = lines_of(runs["ppo, own trunk"]), lines_of(runs["ppo, shared trunk"])
    # the critic alone: three steps, so that a run started again at 2 has one to go; and one
    assert [line["version"] for line in own] == [0, 0, 0, 2]
    assert [line["version"] for line in shared] == [0, 2, 4, 6]
    for line in (*own[1:], *shared[1:]):
        assert line["value_loss"] > 0
        assert line["explained_variance"] != 0
    assert [line["version"] for line in lines_of(runs["epochs"])] == [6, 12, 18, 24]
    for kind in ("april", "sorted, dynamic sampling", "sorted, ppo", "async"):
        lines = lines_of(runs[kind])
        assert max(line["versions_max"] for line in lines) > 1
        assert max(line["offpolicy_tokens"] for line in lines) > 0
        assert sum(line["reprefill"] for line in lines) > 0
        assert lines[1]["tokens_lag_0"] < 1
    assert sum(line["restarts"] for line in lines_of(runs["sorted, on policy"])) > 0
    assert sum(line["waste"] for line in lines_of(runs["tail batch"])) > 0
    for kind in ("lora", "lora, ppo", "lora, bfloat16"):
        moved = {k: v for k, v in weights(runs[kind]).items() if k.startswith("adapter_model/")}
        assert moved and all(value.any() for value in moved.values())
    assert {v.dtype for v in moved.values()} == {torch.float32}  # of a bfloat16 policy


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def no_more() -> None:
    raise Killed


@pytest.mark.parametrize("stop", [interrupt, no_more])
def test_stopped_between_two_draws_of_a_step(
    stop: Callable[[], None],
    project: Project,
    whole: Wholes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = SCHEDULES | KINDS["dynamic sampling"][0]
    steps: list[list[int]] = []
    next_batch, admit = Collector.next, Launch.admit

    def watched_next(collector: Collector, progress: Progress | None = None) -> Collected:
        if collector.buffer.bound is not None:
            steps.append([])
        return next_batch(collector, progress)

    def stopped(collector: Collector, units: int) -> None:
        if collector.buffer.bound is not None:
            steps[-1].append(units)
            if len(steps) == 3 and len(steps[-1]) == 2:
                stop()
        admit(collector, units)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "next", watched_next)
        patch.setattr(Launch, "admit", stopped)
        if stop is interrupt:
            assert main(project.train(**changes)) == 130
        else:
            with pytest.raises(Killed):
                train(project.config(**changes))
    run = project.out / "run"
    assert len(steps) == 3 and len(steps[-1]) == 2
    assert max(checkpoints(run / "checkpoints")) == 2
    assert state_of(run)["under_way"]["counts"]["cursor"] == sum(map(sum, steps[:2])) > 2 * 3
    train(project.config(**changes))
    assert_same(run, whole(**changes))


@pytest.mark.parametrize("kind", ["ppo, own trunk", "lora"])
def test_interrupted_between_checkpoints(
    kind: str, project: Project, whole: Wholes, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = SCHEDULES | KINDS[kind][0]
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "step", 3, lambda *_: interrupt())
        assert main(project.train(**changes)) == 130
    run = project.out / "run"
    assert max(checkpoints(run / "checkpoints")) == 3
    assert steps_of(run) == [1, 2, 3]
    assert main(project.train(**changes)) == 0
    assert_same(run, whole(**changes))


def test_a_checkpoint_with_a_damaged_critic(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(project.train(**SHORT, algo__name="ppo")) == 0
    folder = newest(project.out / "run")
    path = folder / "critic_moments.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    assert main(project.train(**SHORT, algo__name="ppo")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"reroll: {folder}: not a whole checkpoint (")
    assert error.count("\n") == 1


# --- adapters -------------------------------------------------------------------------------------


def test_a_checkpoint_of_adapters_is_read_by_transformers(project: Project, whole: Wholes) -> None:
    changes = SCHEDULES | KINDS["lora"][0]
    run = whole(**changes)
    folder = newest(run)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 32)
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # finds the base by its path
    pairs = [((5, 6, 7), [8, 9, 10])]
    with prepare(project.config(**changes), RunDir(run), 4) as parts, torch.no_grad():
        ours = token_logprobs(parts.model, pairs).logprobs
    base = AutoModelForCausalLM.from_pretrained("policy")
    with torch.no_grad():
        assert torch.equal(token_logprobs(loaded, pairs).logprobs, ours)
        assert (token_logprobs(base, pairs).logprobs - ours).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["lora", "lora, ppo", "ppo, own trunk", "ppo, shared trunk"])
def test_evaluating_a_run(kind: str, whole: Wholes, capsys: pytest.CaptureFixture[str]) -> None:
    run = whole(**SCHEDULES | KINDS[kind][0])
    during = lines_of(run, "eval")[-1]
    before = records(run)
    with contextlib.chdir(whole.folder):
        assert main(["eval", str(run)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record.pop("step") == during["step"] == 4
    assert record.pop("target") == str(run)
    assert record and record == {key: during[key] for key in record}
    assert records(run) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lora__rank": 2, "lora__targets": '["q_prj"]'}, "lora.targets = ['q_prj']: "),
        ({"lora__rank": -1}, "--lora.rank = -1: input should be greater than or equal to 0"),
        ({"lora__rank": 2, "lora__alpha": 0}, "--lora.alpha = 0: input should be greater than 0"),
    ],
)
def test_adapters_that_cannot_be(
    flags: dict[str, Any], said: str, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(project.train(**SHORT | flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"reroll: {said}")
    assert error.count("\n") == 1


# --- what it costs --------------------------------------------------------------------------------

KL = {"algo__kl_coef": 0.1}
COSTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "nothing to score": ({"algo__entropy_coef": 0.1}, 0, 3),
    "reference": (KL, 1, 3),
    "reference, checkpointing": (KL | {"train__gradient_checkpointing": "true"}, 1, 4),
    "adapters": (KL | {"lora__rank": 4}, 1, 2),
    "critic": ({"algo__name": "ppo"}, 1, 3 + 3),
    "critic and reference": (KL | {"algo__name": "ppo"}, 2, 3 + 3),
    "critic alone at first": (
        {"algo__name": "ppo", "critic__warmup": 1, "train__steps": 2}, 1, 3,
    ),
    "shared critic": ({"algo__name": "ppo", "critic__trunk": "shared"}, 1, 3),
    "critic with adapters": ({"algo__name": "ppo", "lora__rank": 4}, 1, 2 + 2),
    "critic, two epochs of three": (
        {"algo__name": "ppo", "train__epochs": 2, "train__minibatches": 3}, 1, 12,
    ),
}  # fmt: skip
"""settings; forwards of every token before a batch is trained on; those that training costs"""


@pytest.mark.parametrize("kind", COSTS)
def test_scoring_and_training_are_booked(kind: str, project: Project) -> None:
    changes, scored, trained = COSTS[kind]
    alone = {"train__steps": 1, "train__trees": False}
    config = project.config(**SHORT | alone | changes)
    line = lines_of(train(config).path)[0]
    # prompts are prefilled once a group, and trained on in each of its 4 rollouts
    tokens = line["tokens_grade"] + 4 * line["tokens_prefill"]
    passes = 3 + ("checkpointing" in kind) - ("adapters" in kind)
    assert line["tokens_score"] == scored * tokens
    assert line["tokens_train"] == trained / passes * tokens
    assert bool(line["flops_score"]) == bool(scored)
    per_token = cost_model(AutoModelForCausalLM.from_pretrained("policy")).per_token
    assert line["flops_train"] > trained * tokens * per_token  # attention comes on top
    assert line["flops_train"] < 1.5 * trained * tokens * per_token
    if scored:
        assert line["flops_train"] / line["flops_score"] == pytest.approx(trained / scored)


# --- what rollouts begin with alike ---------------------------------------------------------------


def test_trees_change_no_token(project: Project) -> None:
    runs = {
        trees: train(
            project.config(f"trees-{trees}", **SHORT, model__dtype="float64", train__trees=trees)
        )
        for trees in (True, False)
    }
    samples = [(run.path / "samples.jsonl").read_text() for run in runs.values()]
    assert samples[0] == samples[1] != ""
    shared, flat = (lines_of(run.path) for run in runs.values())
    for one, other in zip(shared, flat, strict=True):
        assert one["tree_tokens_ratio"] < 0.9 and other["tree_tokens_ratio"] == 1
        assert one["tokens_train"] < 0.9 * other["tokens_train"]
        assert one["flops_train"] < other["flops_train"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-9)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_a_model_that_takes_no_trees_is_trained_one_by_one(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("reroll.setup.trains_on_trees", lambda *_, **__: False)
    path = train(project.config(**SHORT | {"log__display": "plain"})).path
    assert "train.trees: this model takes no tree masks (self-check)" in capsys.readouterr().out
    assert all(line["tree_tokens_ratio"] == 1 for line in lines_of(path))


def test_a_model_that_takes_no_flex_attention_is_trained_under_dense_masks(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("reroll.model.attention.FLEX_ON", "cpu")  # where torch refuses it
    monkeypatch.setattr("reroll.model.flops.FLEX_FROM", 1)
    path = train(project.config(**SHORT | {"log__display": "plain"})).path
    assert "takes no flex attention (self-check at the start)" in capsys.readouterr().out
    assert all(line["tree_tokens_ratio"] < 1 for line in lines_of(path))
    # unchecked it would be used, and fail; switched off it is not even tried
    monkeypatch.setattr("reroll.setup.trains_on_trees", lambda *_, **__: True)
    train(project.config("dense", **SHORT, train__flex=False))
    with pytest.raises(NotImplementedError), torch.compiler.set_stance("force_eager"):
        train(project.config("unchecked", **SHORT))


def test_a_model_that_takes_no_leaves_is_trained_on_trees(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("reroll.setup.trains_on_trees", lambda *_, leafy=False, **__: not leafy)
    path = train(project.config(**SHORT | {"log__display": "plain"})).path
    assert "takes no leaves behind trees (self-check)" in capsys.readouterr().out
    assert all(line["tree_tokens_ratio"] < 1 for line in lines_of(path))
