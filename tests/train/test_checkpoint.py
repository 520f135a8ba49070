"""A checkpoint is whole or not there, and training goes on from it bit by bit."""

import copy
import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from reroll.config import ModelSection
from reroll.errors import UserError
from reroll.model.load import load_model, load_tokenizer
from reroll.train import checkpoint
from reroll.train.checkpoint import checkpoints, load, prune, save
from reroll.train.trainer import Trainer
from tests.train.batches import group, make_trainer


@pytest.fixture
def config(project_folder) -> ModelSection:
    return ModelSection(path=str(project_folder / "policy"), device="cpu")


@pytest.fixture
def tokenizer(config):
    return load_tokenizer(config)


@pytest.fixture
def trainer(config) -> Trainer:
    """After two optimizer steps."""
    trainer = make_trainer(load_model(config))
    train(trainer, 0)
    train(trainer, 1)
    return trainer


def train(trainer: Trainer, step: int) -> None:
    """A step on tokens below 16, which this vocabulary has."""
    made = group(step, [0.0, 1.0, 0.25], [5, 7, 2])
    for r in made.rollouts:
        r.completion.token_ids = [t % 16 for t in r.completion.token_ids]
    made.prompt = type(made.prompt)(0, "", tuple(t % 16 for t in made.prompt.token_ids))
    for r in made.rollouts:
        r.prompt = made.prompt
    trainer.step(trainer.credit([made])[0])


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(trainer.model.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def files(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- round trip ---------------------------------------------------------------------------------


def test_round_trip_is_bitwise(trainer, tokenizer, config, tmp_path):
    state = {"held_out_reward": 0.375, "order": [3, 1, 2], "text": "ä\n"}
    path = save(tmp_path, 12, trainer, tokenizer, state)
    assert path == tmp_path / "step-12"
    trainer_now, moments_now = weights(trainer), copy.deepcopy(trainer.state()["moments"])

    other = make_trainer(load_model(config, path))
    restored = load(path, other)
    assert {key: restored[key] for key in state} == state
    assert restored["step"] == 12
    assert other.version == 2 and same(weights(other), trainer_now)
    assert len(moments_now) > 3 and same(other.state()["moments"], moments_now)
    for step in (2, 3):
        train(trainer, step)
        train(other, step)
    assert not same(weights(trainer), trainer_now)
    assert same(weights(other), weights(trainer))
    assert same(other.state()["moments"], trainer.state()["moments"])


def test_a_checkpoint_is_a_hugging_face_folder(trainer, tokenizer, tmp_path):
    path = save(tmp_path, 1, trainer, tokenizer, {})
    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    assert same(model.state_dict(), weights(trainer))
    text = "12 + 7 ="
    assert AutoTokenizer.from_pretrained(path).encode(text) == tokenizer.encode(text)
    suffixes = {name.rpartition(".")[2] for name in files(path)}
    assert suffixes <= {"safetensors", "json", "jsonl", "jinja", "txt"}  # nothing that is unpickled
    assert files(tmp_path)[0] == "step-1"  # and nothing temporary is left


def test_a_new_trainer_has_a_checkpoint_too(tokenizer, config, tmp_path):
    path = save(tmp_path, 0, make_trainer(load_model(config)), tokenizer, {})
    other = make_trainer(load_model(config, path))
    load(path, other)
    assert other.version == 0 and other.state()["moments"] == {}


def test_a_step_written_again_replaces_the_first(trainer, tokenizer, tmp_path):
    save(tmp_path, 3, trainer, tokenizer, {"mark": "first"})
    path = save(tmp_path, 3, trainer, tokenizer, {"mark": "second"})
    assert json.loads((path / "state.json").read_text())["mark"] == "second"
    assert list(checkpoints(tmp_path)) == [3]


# --- failure ------------------------------------------------------------------------------------


FULL = OSError(errno.ENOSPC, "No space left on device")
TENSORS = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)


@pytest.mark.parametrize(
    "where, error",
    [
        (checkpoint, FULL),
        (checkpoint, TENSORS),
        (checkpoint.os, FULL),
        (checkpoint.os, PermissionError(errno.EACCES, "Permission denied")),
    ],
    ids=["moments", "safetensors", "rename", "permission"],
)
def test_a_failed_write_leaves_no_trace(
    where, error, trainer, tokenizer, config, tmp_path, monkeypatch
):
    folder = tmp_path / "checkpoints"
    first = save(folder, 1, trainer, tokenizer, {"held_out_reward": 0.5})
    kept, before = weights(trainer), files(folder)
    train(trainer, 5)

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, "save_file" if where is checkpoint else "rename", fail)
        with pytest.raises(UserError) as raised:
            save(folder, 2, trainer, tokenizer, {})
    message = str(raised.value)
    assert message.startswith(f"{folder / 'step-2'}: cannot write the checkpoint (")
    assert (error.strerror if isinstance(error, OSError) else "No space left") in message
    assert "the last whole checkpoint is step-1" in message and "\n" not in message
    assert files(folder) == before
    assert checkpoints(folder) == {1: first}
    other = make_trainer(load_model(config, first))
    load(first, other)
    assert same(weights(other), kept)
    # with the disk freed, the same call goes through
    save(folder, 2, trainer, tokenizer, {})
    assert list(checkpoints(folder)) == [1, 2]


def test_a_failed_first_write_says_that_there_is_none(trainer, tokenizer, tmp_path, monkeypatch):
    def fail(*args):
        raise FULL

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match="there is no earlier one"):
        save(tmp_path / "new", 1, trainer, tokenizer, {})
    assert checkpoints(tmp_path / "new") == {}


def test_a_folder_that_cannot_be_made(trainer, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/step-1: cannot write the checkpoint"):
        save(tmp_path / "file", 1, trainer, tokenizer, {})


def test_a_mistake_in_the_program_is_not_taken_for_a_full_disk(trainer, tokenizer, tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path, 1, trainer, tokenizer, {"not": object()})
    assert checkpoints(tmp_path) == {}


def test_nothing_is_there_before_the_rename(trainer, tokenizer, tmp_path, monkeypatch):
    rename, seen = os.rename, []

    def spy(source, target):
        seen.append((checkpoints(tmp_path), files(source)))
        rename(source, target)

    monkeypatch.setattr(os, "rename", spy)
    path = save(tmp_path, 1, trainer, tokenizer, {})
    ((found, written),) = seen
    assert found == {} and written == files(path)
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= set(written)


def test_what_a_killed_run_leaves_is_ignored_and_cleared(trainer, tokenizer, tmp_path):
    first = save(tmp_path, 1, trainer, tokenizer, {})
    leftover = tmp_path / ".step-2.tmp"
    shutil.copytree(first, leftover)
    (leftover / "rubbish").write_text("")
    (tmp_path / "step-7").mkdir()  # without state.json: never whole
    shutil.copytree(first, tmp_path / "step-x")
    shutil.copytree(first, tmp_path / "step-9.old")
    assert checkpoints(tmp_path) == {1: first}
    second = save(tmp_path, 2, trainer, tokenizer, {})
    assert not leftover.exists() and files(second) == files(first)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: truncate(path / "optimizer.safetensors", 0),
        lambda path: truncate(path / "optimizer.safetensors", 100),
        lambda path: truncate(path / "optimizer.safetensors", 20_000),
        lambda path: (path / "optimizer.safetensors").unlink(),
        lambda path: truncate(path / "state.json", 20),
        lambda path: (path / "state.json").write_text("{}"),
    ],
    ids=["empty", "header", "moments", "no moments", "half a state", "another state"],
)
def test_a_spoilt_checkpoint_is_named(spoil, trainer, tokenizer, config, tmp_path):
    path = save(tmp_path, 4, trainer, tokenizer, {})
    spoil(path)
    with pytest.raises(UserError, match=rf"^{path}: not a whole checkpoint \(.*delete this folder"):
        load(path, make_trainer(load_model(config)))


def truncate(path, size: int) -> None:
    data = path.read_bytes()
    assert len(data) > size
    path.write_bytes(data[:size])


# --- what is kept -------------------------------------------------------------------------------


def fake(folder, rewards: dict[int, float | None]) -> None:
    """Checkpoints of nothing but a state, with these held-out rewards by step."""
    for step, reward in rewards.items():
        path = folder / f"step-{step}"
        path.mkdir()
        state = {"step": step} | ({} if reward is None else {"held_out_reward": reward})
        (path / "state.json").write_text(json.dumps(state))


def test_checkpoints_come_in_the_order_of_steps(tmp_path):
    assert checkpoints(tmp_path / "not there") == {}
    fake(tmp_path, {10: None, 9: None, 100: None, 0: None})
    assert list(checkpoints(tmp_path)) == [0, 9, 10, 100]


REWARDS = {1: 0.5, 2: 0.9, 3: None, 4: 0.9, 5: 0.1, 6: 0.7, 7: None}


@pytest.mark.parametrize(
    "keep_last, keep_best, kept",
    [
        (1, 0, [7]),
        (3, 0, [5, 6, 7]),
        (1, 1, [4, 7]),  # of equals the later one
        (1, 2, [2, 4, 7]),
        (2, 3, [2, 4, 6, 7]),
        (1, 5, [1, 2, 4, 5, 6, 7]),
        (1, 6, [1, 2, 4, 5, 6, 7]),  # more than have a reward
        (1, 9, [1, 2, 4, 5, 6, 7]),
        (7, 1, [1, 2, 3, 4, 5, 6, 7]),
        (20, 0, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_prune_keeps_the_newest_and_the_best(keep_last, keep_best, kept, tmp_path):
    fake(tmp_path, REWARDS)
    (tmp_path / ".step-8.tmp").mkdir()
    (tmp_path / "notes").write_text("mine")
    gone = prune(tmp_path, keep_last, keep_best)
    assert list(checkpoints(tmp_path)) == kept
    assert gone == [step for step in REWARDS if step not in kept]
    assert (tmp_path / "notes").exists()
    assert prune(tmp_path, keep_last, keep_best) == []
