"""Reuse through the whole loop: the same tokens for less, the same run however it is stopped."""

import json
import math
import signal
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import reroll.loop
import reroll.setup
from reroll.algo.noise import make_key
from reroll.cli import main
from reroll.config import ModelSection
from reroll.engine.costs import Costs, load_costs
from reroll.engine.local import LocalEngine
from reroll.errors import UserError
from reroll.loop import train
from reroll.model.load import load_tokenizer
from reroll.rollout.collect import collect
from reroll.rollout.collected import Collected, CollectSpec
from reroll.rollout.decisions import NOTHING, Decisions, Start
from reroll.rollout.reuse import Reuse
from reroll.rollout.store import Store, prompt_hash
from reroll.setup import prepare
from reroll.tasks.pool import GraderPool
from reroll.train import checkpoint
from reroll.train.forwards import Shares
from reroll.train.trainer import Trainer
from reroll.types import Draft, Finish, Group, Lenience, Prompt, Purpose, Request, Rollout
from tests.project import (
    Killed,
    Project,
    assert_same,
    at_call,
    kill,
    lines_of,
    records,
    state_of,
    steps_of,
    weights,
)

CHEAP = Costs((1, 64), ((1.0, 1.01, 1.02, 1.03), (1.0, 1.01, 1.02, 1.03)), 0.02)
"""what forwards cost, the same for every run: measured, it would differ from run to run"""
SHORT = {
    "task__train_size": 5, "task__eval_size": 1, "eval__every": 0, "eval__samples": 1,
    "log__display": "off", "train__learning_rate": 3e-3, "rollout__max_tokens": 12,
    "rollout__temperature": 0.2,
}  # fmt: skip
"""three of five problems a step; tempered, so that an untaught policy repeats itself here and
there"""
FRESH = {"reuse__on": "true"}
HELD = FRESH | {"reuse__rule": "held"}
LENIENT = FRESH | {"reuse__rule": "lenient"}
QUIET = {"reuse__audit": "off"}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture out: it takes longer than the training."""
    monkeypatch.setattr(reroll.loop, "plot_run", lambda run: None)


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "measure", lambda engine: CHEAP)


class Run(NamedTuple):
    """A run, and the rollouts of each of its steps."""

    path: Path
    steps: list[list[Rollout]]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return lines_of(self.path)

    def total(self, key: str) -> float:
        return sum(line[key] for line in self.lines)


Train = Callable[..., Run]


@pytest.fixture
def run(project: Project, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains a run of that name, from the first step on, and watches what it is trained on."""
    steps: list[list[Rollout]] = []
    figures = reroll.loop.figures.rollout_metrics

    def watched(collected: Collected) -> dict[str, float]:
        steps.append([rollout for group in collected.groups for rollout in group.rollouts])
        return figures(collected)

    monkeypatch.setattr(reroll.loop.figures, "rollout_metrics", watched)

    def run_(name: str, **changes: Any) -> Run:
        steps.clear()
        path = train(project.config(name, **SHORT | changes)).path
        return Run(path, list(steps))

    return run_


def drawn(steps: Sequence[Sequence[Rollout]]) -> list[list[tuple[Any, ...]]]:
    """Everything about each step's rollouts that must not depend on drafts."""
    return [
        [
            (
                r.prompt.row, r.sample, r.visit, r.key_visit, r.completion.token_ids,
                r.completion.versions, r.completion.finish, r.reward, r.rewards, r.text,
            )
            for r in step
        ]
        for step in steps
    ]  # fmt: skip


def logprobs(steps: Sequence[Sequence[Rollout]]) -> list[float]:
    return [x for step in steps for r in step for x in r.completion.logprobs]


def assert_alike(one: Run, other: Run) -> None:
    """The same tokens and rewards; log-probs, losses and weights up to float noise."""
    assert drawn(one.steps) == drawn(other.steps)
    assert logprobs(one.steps) == pytest.approx(logprobs(other.steps), rel=1e-4, abs=1e-4)
    exactly = ("reward", "length", "truncated", "stopped", "version", "tokens_trained")
    nearly = ("loss", "grad_norm", "approx_kl", "clip_fraction", "entropy", "value_loss")
    for line, its in zip(one.lines, other.lines, strict=True):
        assert {k: line[k] for k in exactly} == {k: its[k] for k in exactly}
        assert {k: line[k] for k in nearly if k in line} == pytest.approx(
            {k: its[k] for k in nearly if k in its}, rel=1e-4, abs=1e-5
        )
    ours, its = weights(one.path), weights(other.path)
    for name in ours:
        if name.startswith("model/"):
            torch.testing.assert_close(ours[name], its[name], rtol=1e-4, atol=1e-5)


COLUMNS = (
    "prompt_hash, row, sample, visit, step, noise_visit, version, reward, rewards, graders, finish,"
    " trained, length, token_ids, logprobs, versions"
)


def rows(path: Path) -> list[tuple[Any, ...]]:
    """What the run's store holds, in the order it was written."""
    with sqlite3.connect(path / "rollouts.sqlite") as db:
        found = db.execute(f"SELECT {COLUMNS} FROM rollouts ORDER BY step, id").fetchall()
    db.close()
    return found


def pasts(run: Run) -> dict[tuple[int, int, int], Any]:
    """The rollouts of the run's store by (row, sample, visit), streams decoded."""
    prompts = {r.prompt.token_ids: r.prompt for step in run.steps for r in step}
    found = {}
    with Store(run.path / "rollouts.sqlite") as store:
        for prompt in prompts.values():
            name = prompt_hash(prompt.token_ids)
            for past in store.get(name, prompt.row, before_visit=99, visits=99):
                found[past.row, past.sample, past.visit] = past
    return found


def stored(path: Path) -> bool:
    return (path / "rollouts.sqlite").exists() or (path / "costs.json").exists()


# --- the same tokens ----------------------------------------------------------------------------


def test_fresh_reuse_changes_no_token_and_saves_decoding(run: Train) -> None:
    # several optimizer steps a batch: from the second on the ratio is that of stored log-probs
    changes = {"train__steps": 20, "train__minibatches": 2}
    off, on = run("off", **changes), run("on", **changes, **FRESH)
    assert_alike(on, off)
    assert not stored(off.path) and stored(on.path)
    assert {r.visit for step in on.steps for r in step} == set(range(12))
    assert all(r.key_visit == r.visit for step in on.steps for r in step)
    assert 500 < on.total("tokens_reused") > on.total("tokens_redraft_reused") > 0
    assert on.total("tokens_decode") < 0.8 * off.total("tokens_decode")
    for line in on.lines:
        tokens = line["length"] * 12
        assert line["reused_tokens"] == pytest.approx(line["tokens_reused"] / tokens)
        assert line["offpolicy_tokens"] == 0
    assert on.lines[0]["drafted"] == 0 and on.lines[-1]["drafted"] == 1
    # the stop id is not the pad id, which is a token like any other
    tokenizer = load_tokenizer(ModelSection(path="policy"))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = [r.completion.token_ids for step in on.steps for r in step]
    assert any(tokenizer.pad_token_id in reply[:-1] for reply in ids)
    assert any(r.completion.finish is Finish.STOP for step in on.steps for r in step)


def test_the_store_holds_what_was_trained_on(run: Train) -> None:
    on = run("on", train__steps=6, store__epochs=9, **FRESH)
    found = pasts(on)
    everything = [r for step in on.steps for r in step]
    assert len(found) == len(everything) == 72
    for number, step in enumerate(on.steps, start=1):
        line = on.lines[number - 1]
        for r in step:
            past = found[r.prompt.row, r.sample, r.visit]
            assert past.token_ids.tolist() == r.completion.token_ids
            assert past.logprobs.tolist() == pytest.approx(r.completion.logprobs, rel=1e-6)
            assert past.versions.tolist() == [line["version"] - 1] * len(past.token_ids)
            assert (past.step, past.noise_visit, past.version) == (number, r.visit, number - 1)
            assert past.finish == r.completion.finish
            cut = past.finish == Finish.LENGTH
            assert past.reward == (None if cut else r.reward)
            assert past.rewards == ({} if cut else {"digits:share": r.reward})
        trained = [r for r in step if found[r.prompt.row, r.sample, r.visit].trained]
        assert line["live_groups"] > 0
        assert 0 < len(trained) <= round(12 * line["live_groups"])
    assert len({past.graders for past in found.values()}) == 1
    assert any(past.finish == Finish.STOP and past.reward for past in found.values())


def without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Reuse.start
    monkeypatch.setattr(Reuse, "start", lambda *args: [s._replace(drafts=()) for s in start(*args)])


def test_held_noise_draws_the_same_with_drafts_and_without(
    run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = HELD | QUIET | {"train__steps": 20, "reuse__refresh": 0.25}
    on = run("on", **changes)
    with monkeypatch.context() as patch:
        without_drafts(patch)
        off = run("off", **changes, reuse__siblings="false")
    assert_alike(on, off)
    assert off.total("tokens_reused") == 0
    assert on.total("tokens_reused") > 1000
    assert on.total("tokens_decode") < 0.6 * off.total("tokens_decode")
    held = [r for step in on.steps for r in step if r.key_visit < r.visit]
    later = sum(r.visit > 0 for step in on.steps for r in step)
    assert 0.6 * later < len(held) < 0.9 * later


def test_keys_that_are_all_redrawn_are_fresh_ones(run: Train) -> None:
    fresh = run("fresh", train__steps=4, **FRESH)
    held = run("held", train__steps=4, **HELD, **QUIET, reuse__refresh=1.0)
    assert drawn(held.steps) == drawn(fresh.steps)


STILL = {"train__learning_rate": 1e-30, "task__train_size": 6}
"""weights that stay as they are, in two batches an epoch"""


def test_the_same_weights_and_keys_decode_nothing_again(run: Train) -> None:
    still = run("still", train__steps=6, **HELD, **QUIET, **STILL | {"reuse__refresh": 0.0})
    first = {(r.prompt.row, r.sample): r for step in still.steps[:2] for r in step}
    assert len(first) == 24
    longer = {size > 1 for size in (len(r.completion.token_ids) for r in first.values())}
    assert longer == {True}  # a reply of one token comes with its prefill
    for line, step in zip(still.lines, still.steps, strict=True):
        if line["step"] <= 2:
            assert line["tokens_decode"] > 0
            assert line["full_reuse"] == line["drafted"] == line["duplicates"] == 0
            continue
        assert line["full_reuse"] == line["duplicates"] == line["accept_prefix"] == 1
        assert line["tokens_decode"] == line["ticks"] == 0
        # the last token is drawn, never read off the tree
        assert line["tokens_reused"] == line["length"] * 12 - 12
        for r in step:
            past = first[r.prompt.row, r.sample]
            assert r.completion.token_ids == past.completion.token_ids
            assert (r.reward, r.key_visit) == (past.reward, 0)
            assert r.completion.logprobs == pytest.approx(past.completion.logprobs, abs=1e-5)
        # what ended by itself is known; what the limit cut is graded again
        cut = sum(len(r.completion.token_ids) for r in step if r.completion.finish == "length")
        assert line["tokens_grade"] == cut < line["length"] * 12


@pytest.mark.parametrize("kind", ["everything", "nothing"])
def test_a_batch_trains_the_same_however_much_of_it_was_reused(kind: str, project: Project) -> None:
    """From the second minibatch on the ratio is that of the log-probs of verification."""
    changes = SHORT | FRESH | {
        "train__minibatches": 3, "train__epochs": 2, "reuse__siblings": "false",
        "rollout__temperature": 0.7,
    }  # fmt: skip
    with prepare(project.config(**changes), None, None) as parts:
        spec = CollectSpec(
            Purpose.TRAIN, 0, 4, replace(parts.sampling, temperature=0.7), "keep", 0.0
        )
        before = {n: p.detach().clone() for n, p in parts.model.named_parameters()}
        texts: dict[int, list[list[int]]] = {}

        def batch(decisions: Decisions) -> list[Group]:
            prompts = parts.task.train[:3]
            return collect(
                parts.engine, parts.graders, parts.decode, prompts, [0] * 3, spec,
                decisions=decisions,
            ).groups  # fmt: skip

        def step(groups: list[Group]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
            with torch.no_grad():
                for name, parameter in parts.model.named_parameters():
                    parameter.copy_(before[name])
            trainer = reroll.setup.make_trainer(
                project.config(**changes), parts.model, None, Shares(trees=True)
            )
            figures = trainer.step(trainer.credit(groups)[0])
            return {n: p.detach().clone() for n, p in parts.model.named_parameters()}, figures

        plain = batch(NOTHING)
        for group in plain:
            texts[group.prompt.row] = [r.completion.token_ids for r in group.rollouts]

        def start(prompt: Prompt, visit: int, samples: int) -> list[Start]:
            ids = texts[prompt.row]
            if kind == "nothing":  # no sample begins so
                free = next(t for t in range(50) if t not in {reply[0] for reply in ids})
                ids = [[free] * 8]
            return [Start(visit, tuple(Draft(reply) for reply in ids))] * samples

        reused = batch(Decisions(start))
        everything = [r for group in reused for r in group.rollouts]
        for r in everything:
            whole = len(r.completion.token_ids) - 1
            assert r.completion.accepted == (whole if kind == "everything" else 0)
        assert drawn([everything]) == drawn([[r for group in plain for r in group.rollouts]])
        (one, figures), (other, expected) = step(reused), step(plain)
        assert figures["approx_kl"] > 0
        for key in ("loss", "grad_norm", "approx_kl", "clip_fraction"):
            assert figures[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6)
        assert max((one[n] - before[n]).abs().max().item() for n in one) > 1e-3
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_dynamic_sampling_refills_the_same(run: Train) -> None:
    dapo = {
        "algo__name": "dapo", "rollout__samples": 2, "rollout__max_tokens": 5, "train__steps": 8,
    }  # fmt: skip
    off, on = run("off", **dapo), run("on", **dapo, **FRESH)
    assert_alike(on, off)
    assert on.total("tokens_reused") > 0
    started = [line["groups_started"] for line in on.lines]
    assert started == [line["groups_started"] for line in off.lines]
    assert max(started) > 3
    # groups without signal are remembered too
    assert len(rows(on.path)) == 2 * sum(started) - forgotten(on)
    assert (
        state_of(on.path)["under_way"]["counts"]["cursor"]
        == state_of(off.path)["under_way"]["counts"]["cursor"]
        == sum(started)
    )


def forgotten(run: Run) -> int:
    """Rollouts of visits too old for the store of four."""
    newest = {r.prompt.row: r.visit for step in run.steps for r in step}
    return sum(r.visit <= newest[r.prompt.row] - 4 for step in run.steps for r in step)


def test_a_problem_that_comes_twice_in_a_step(run: Train) -> None:
    """More prompts a step than problems: the second visit cannot draw on the first yet."""
    twice = {"task__train_size": 3, "rollout__prompts": 5, "train__steps": 4}
    off, on = run("off", **twice), run("on", **twice, **FRESH)
    assert_alike(on, off)
    assert on.total("tokens_reused") > 0
    assert {len({r.visit for r in step}) for step in on.steps} == {2, 3}


def test_ppo_learns_the_same(run: Train) -> None:
    ppo = {"algo__name": "ppo", "train__steps": 5, "train__minibatches": 2}
    off, on = run("off", **ppo), run("on", **ppo, **FRESH)
    assert_alike(on, off)
    assert on.total("tokens_reused") > 0
    assert min(line["value_loss"] for line in on.lines) > 0


# --- lenient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["previous", "generator"])
def test_lenient_tokens_and_who_wrote_them(anchor: str, run: Train) -> None:
    changes = LENIENT | QUIET | {
        "train__steps": 8, "reuse__anchor": anchor, "reuse__lenience": 1.1, "store__epochs": 9,
    }  # fmt: skip
    if anchor == "generator":
        changes |= {"correct__mode": "tis"}
    lenient = run("lenient", **changes)
    found = pasts(lenient)
    kept, drafted = [], 0
    for number, step in enumerate(lenient.steps, start=1):
        for r in step:
            completion, past = r.completion, found[r.prompt.row, r.sample, r.visit]
            assert past.versions.tolist() == completion.versions
            assert past.token_ids.tolist() == completion.token_ids
            assert past.logprobs.tolist() == pytest.approx(completion.logprobs, rel=1e-6)
            draft = found.get((r.prompt.row, r.sample, r.visit - 1))
            count = completion.walked
            assert completion.versions[count:] == [number - 1] * (len(past.token_ids) - count)
            if draft is None or draft.step == number:  # a batch may span two epochs
                continue
            drafted += 1
            kept.append(count / len(past.token_ids))
            assert completion.token_ids[:count] == draft.token_ids[:count].tolist()
            writers = draft.versions[:count].tolist()
            its = draft.logprobs[:count].tolist()
            if anchor == "generator":
                assert completion.versions[:count] == writers
                assert completion.logprobs[:count] == its
            else:
                assert completion.versions[:count] == [number - 1] * count
                assert count == 0 or completion.logprobs[:count] != its
    assert 0.2 < sum(kept) / len(kept) < 1
    stale = [line["offpolicy_tokens"] for line in lenient.lines]
    if anchor == "previous":
        assert stale == [0] * 8
    else:
        # of several epochs, and booked by lag
        assert stale[0] == 0 and min(stale[2:]) > 0.1
        assert len({v for past in found.values() for v in past.versions.tolist()}) == 8
        lags = {key for line in lenient.lines for key in line if key.startswith("ess_lag_")}
        assert len(lags) > 3
    assert all(math.isfinite(line["loss"]) for line in lenient.lines)


def test_lenient_requests_are_those_of_the_rule(
    run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are new each visit; a draft is the sample's own."""
    requests: list[Request] = []
    submit = LocalEngine.submit
    monkeypatch.setattr(LocalEngine, "submit", lambda e, r: (requests.append(r), submit(e, r))[1])
    lenient = run("lenient", train__steps=4, **LENIENT, **QUIET)
    requests = [r for r in requests if r.sampling.temperature == 0.2]
    by_key = {r.key: r for r in requests}
    step_of: dict[tuple[int, int], int] = {}
    for number, step in enumerate(lenient.steps):
        for r in step:
            request = by_key[make_key(0, "train", r.prompt.row, r.sample, r.visit)]
            # a batch may span two epochs, and know nothing yet of the first
            last = (step_of.get((r.prompt.row, r.visit - age), number) for age in (1, 2))
            old = min(last) < number
            assert (r.key_visit, len(request.drafts)) == (r.visit, int(old))
            assert request.lenience == (Lenience(1.6487) if old else None)
            step_of[r.prompt.row, r.visit] = number


# --- stopped and started again ------------------------------------------------------------------

LONG = SHORT | {
    "rollout__temperature": 0.1,
    "train__steps": 8, "checkpoint__every": 4, "checkpoint__keep_last": 9, "store__epochs": 3,
    "eval__every": 2, "train__minibatches": 2,
}  # fmt: skip
"""checkpoints after 4 and 8, in the midst of epochs; the store forgets the first of them"""
OFTEN = {"reuse__audit_every": 2, "reuse__audit_prompts": 2}
RULES = {
    "fresh": FRESH,
    "held": HELD | OFTEN | {"reuse__refresh": "trained"},
    "lenient": LENIENT | OFTEN | {
        "reuse__anchor": "generator", "correct__mode": "tis", "store__max_gb": 4e-6,
    },
}  # fmt: skip
"""the store of the last holds 16 rollouts, so that drafts depend on what it has forgotten"""


def interrupt(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGINT)


MOMENTS: dict[str, tuple[Any, str, int, Callable[..., None], bool]] = {
    "trained": (Trainer, "step", 6, kill, True),
    "stored": (Store, "put", 5, kill, True),
    "checkpoint in place": (Store, "evict", 1, kill, False),
    "interrupted in a collect": (GraderPool, "submit", 42, interrupt, False),
}
"""each is later than a checkpoint, and earlier than the next; the interrupt makes one of its own"""
PAIRS = [
    ("fresh", "stored"), ("fresh", "interrupted in a collect"),
    ("held", "interrupted in a collect"),
    ("lenient", "trained"), ("lenient", "checkpoint in place"),
    ("lenient", "interrupted in a collect"),
]  # fmt: skip


@pytest.fixture(scope="module")
def wholes() -> dict[str, Any]:
    """Runs that were not stopped, by rule."""
    return {}


@pytest.fixture
def whole(
    wholes: dict[str, Any], project_folder: Path, tmp_path_factory: pytest.TempPathFactory,
    project: Project,
) -> Callable[[str], Path]:  # fmt: skip
    def of(rule: str) -> Path:
        if rule not in wholes:
            there = Project(project_folder, tmp_path_factory.mktemp("whole"))
            wholes[rule] = train(there.config(**LONG | RULES[rule])).path
        return wholes[rule]

    return of


def assert_same_run(path: Path, other: Path) -> None:
    """What `assert_same` says, and the same rows and counts."""
    assert_same(path, other)
    assert rows(path) == rows(other)
    assert state_of(path)["engine"] == state_of(other)["engine"]


@pytest.mark.parametrize(("rule", "moment"), PAIRS)
def test_stopped_and_started_again_it_is_the_run_that_was_not(
    rule: str, moment: str, project: Project, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = whole(rule)
    config = project.config(**LONG | RULES[rule])
    owner, name, call, act, after = MOMENTS[moment]
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, act, after)
        with pytest.raises((Killed, KeyboardInterrupt)):
            train(config)
    path = project.out / "run"
    done = max(checkpoint.checkpoints(path / "checkpoints"))
    assert done == (3 if moment.startswith("interrupted") else 4)
    cuts = []
    cut_back = Store.cut_back

    def watched(store: Store, step: int) -> None:
        cut_back(store, step)
        cuts.append((step, store.stats()["rollouts"]))

    monkeypatch.setattr(Store, "cut_back", watched)
    before = rows(path)
    train(config)
    kept = [row for row in before if row[4] <= done]
    assert cuts == [(done, len(kept))]
    assert (len(kept) < len(before)) == (moment in ("trained", "stored"))
    assert_same_run(path, reference)
    assert steps_of(path) == list(range(1, 9))


def test_what_the_stopped_runs_go_through(whole: Any) -> None:
    """The comparisons above would prove little about runs that reuse and forget nothing."""
    for rule in RULES:
        path = whole(rule)
        lines = lines_of(path)
        assert sum(line["tokens_reused"] for line in lines) > 15, rule
        audits = [line["step"] for line in lines if "reward_gap" in line]
        assert audits == ([] if rule == "fresh" else [4, 6, 8])
        held = rows(path)
        assert 0 < len(held) < 8 * 12
        assert {row[4] for row in held} < set(range(1, 9))  # whole steps are gone by the end
        assert state_of(path)["engine"]["pace"]["tokens"] > 0
    assert {row[11] for row in held} == {0, 1}


def test_the_store_forgets_with_checkpoints_alone(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    save, evict, put = checkpoint.save, Store.evict, Store.put

    def watched_save(folder: Path, step: int, *rest: Any) -> Path:
        seen.append(step)
        return save(folder, step, *rest)

    def watched_evict(store: Store) -> int:
        gone = evict(store)
        seen.append("some" if gone else "none")
        return gone

    def watched_put(store: Store, step: int, items: Any) -> None:
        before = len(store)
        put(store, step, items)
        assert len(store) == before + 12

    monkeypatch.setattr(checkpoint, "save", watched_save)
    monkeypatch.setattr(Store, "evict", watched_evict)
    monkeypatch.setattr(Store, "put", watched_put)
    changes = LONG | FRESH | {"eval__every": 0, "store__epochs": 2}
    path = train(project.config(**changes)).path
    assert seen == [4, "some", 8, "some"]
    # of each problem the newest two visits
    visits: dict[int, set[int]] = {}
    for row in rows(path):
        visits.setdefault(row[1], set()).add(row[3])
    assert len(visits) == 5
    assert all(max(v) - min(v) < 2 for v in visits.values())


# --- what is left alone -------------------------------------------------------------------------


def test_an_evaluation_leaves_the_store_alone(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = train(project.config(**SHORT | FRESH | {"train__steps": 3})).path
    files = sorted(p for p in path.rglob("*") if p.is_file())
    before = [p.read_bytes() for p in files]
    assert {"rollouts.sqlite", "costs.json"} <= {p.name for p in files}
    at_call(monkeypatch, Store, "__init__", 1, kill)  # it is not even opened
    capsys.readouterr()
    assert main(["eval", str(path)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    during = lines_of(path, "eval")[-1]
    assert record["step"] == during["step"] == 3
    assert {k: record[k] for k in ("reward", "greedy_reward", "length")} == {
        k: during[k] for k in ("reward", "greedy_reward", "length")
    }
    assert sorted(p for p in path.rglob("*") if p.is_file()) == files
    assert [p.read_bytes() for p in files] == before


def test_without_reuse_nothing_of_it_is_there(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("reuse is off")

    for owner, name in (
        (Store, "__init__"), (LocalEngine, "measure"), (reroll.setup, "takes_trees"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, never)
    path = train(project.config(**SHORT | {"train__steps": 3})).path
    assert not stored(path)
    assert sorted(p.name for p in path.iterdir()) == [
        "checkpoints", "config.toml", "metrics.jsonl", "samples.jsonl", "timeline.jsonl",
        "timeouts.txt",
    ]  # fmt: skip
    for line in records(path):
        assert not {"drafted", "reused_tokens", "tokens_reused", "reward_gap"} & set(line)
        assert line.get("tokens_verify", 0) == 0


# --- what lies in the directory already ---------------------------------------------------------


def test_rollouts_of_another_run_are_not_deleted(run: Train, project: Project) -> None:
    first = run("first", **FRESH, train__steps=2)
    other = project.config("other", **SHORT | FRESH)
    folder = Path(other.run.out)
    folder.mkdir(parents=True)
    (folder / "rollouts.sqlite").write_bytes((first.path / "rollouts.sqlite").read_bytes())
    with pytest.raises(UserError, match="holds rollouts of another run; move it away"):
        train(other)
    assert rows(folder) == rows(first.path) != []
    # a start that failed before its first rollout leaves an empty one: no other run's
    (folder / "rollouts.sqlite").unlink()
    Store(folder / "rollouts.sqlite").close()
    assert len(lines_of(train(other).path)) > 0


def test_costs_of_a_start_that_failed_are_measured_again(
    run: Train, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be of another model, other slots, another dtype."""
    config = project.config("one", **SHORT | FRESH | {"train__steps": 2})
    folder = Path(config.run.out)
    folder.mkdir(parents=True)
    wrong = replace(CHEAP, prefill=77.0, rounded=True)
    wrong.save(folder / "costs.json")
    train(config)
    assert load_costs(folder / "costs.json") == CHEAP
    # those of the run itself are kept
    wrong.save(folder / "costs.json")
    train(project.config("one", **SHORT | FRESH | {"train__steps": 3}))
    assert load_costs(folder / "costs.json") == wrong


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (HELD | {"train__steps": 4}, ["no audit in 4 steps"]),
        (HELD | {"train__steps": 5}, []),
        (FRESH | {"train__steps": 1}, ["no problem comes twice"]),
        (FRESH | {"train__steps": 2}, []),
    ],
)
def test_what_would_not_happen_is_said_before(
    changes: dict[str, Any], said: list[str], project: Project
) -> None:
    with prepare(project.config(**SHORT | changes), None, None) as parts:
        notes = [n for n in parts.notes if n.startswith("reuse: no ")]
    assert len(notes) == len(said)
    assert all(text in note for text, note in zip(said, notes, strict=True))
