"""Checkpoints: `checkpoints/step-N` is a Hugging Face folder plus what a run needs to go on.

Written under a temporary name, flushed to disk and renamed, so a checkpoint either is whole or is
not there. Only safetensors and JSON: nothing is unpickled.

    model.safetensors, config.json, tokenizer files   load it with `from_pretrained`
    adapter_model.safetensors, adapter_config.json    in their place where LoRA is trained
    optimizer.safetensors                             AdamW moments by parameter name
    critic_weights, critic_moments .safetensors       PPO's critic and its optimizer
    under_way.jsonl                                   rollouts begun and not trained on, by unit
    head.safetensors                                  networks that pruning goes by
    state.json                                        step, version, held-out reward, ...
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from reroll.errors import UserError
from reroll.train.trainer import Trainer

_NAME = re.compile(r"step-(\d+)$")


def checkpoints(folder: Path) -> dict[int, Path]:
    """Whole checkpoints by step, oldest first."""
    found = {}
    for path in folder.glob("step-*") if folder.exists() else ():
        match = _NAME.match(path.name)
        if match and (path / "state.json").exists():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def save(
    folder: Path,
    step: int,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
) -> Path:
    """Write `folder/step-N`. state: JSON, but for its `tensors`, which go to a file of their own.
    Raises UserError (disk full, no permission); older ones stay valid."""
    target, temporary = folder / f"step-{step}", folder / f".step-{step}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        trainer.model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        inner = trainer.state()
        _save_tensors(inner.pop("moments"), temporary / "optimizer.safetensors")
        for name, tensors in inner.pop("critic").items():
            _save_tensors(tensors, temporary / f"critic_{name}.safetensors")
        if state.get("tensors"):
            _save_tensors(state["tensors"], temporary / "head.safetensors")
        under_way = dict(state.get("under_way", {}))
        lines = [json.dumps(unit) + "\n" for unit in under_way.pop("units", [])]
        (temporary / "under_way.jsonl").write_text("".join(lines))
        told = state | {"under_way": under_way, "step": step, "trainer": inner}
        told.pop("tensors", None)
        text = json.dumps(told, indent=1)
        (temporary / "state.json").write_text(text + "\n")
        for path in temporary.rglob("*"):
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        _flush(folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        if not isinstance(error, OSError) and "I/O" not in str(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        last = max(checkpoints(folder), default=None)
        kept = (
            f"the last whole checkpoint is step-{last}"
            if last is not None
            else "there is no earlier one"
        )
        raise UserError(
            f"{target}: cannot write the checkpoint ({error}); {kept}; free space, or set run.out "
            "to another disk, and start again with the same command to go on"
        ) from None
    return target


def load(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Put the optimizer of a checkpoint into `trainer`; returns the state written with it.

    The policy's weights are read by `setup.load_policy`, before the trainer is made.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        if "cursor" in state:  # of the time before rollouts could be under way
            raise UserError(
                f"{path}: written by an older version of reroll; start in another run.out, with "
                f"model.path = {str(path)!r} to go on from its weights"
            )
        with (path / "under_way.jsonl").open() as lines:
            state["under_way"]["units"] = [json.loads(line) for line in lines]
        head = path / "head.safetensors"
        state["tensors"] = load_file(head) if head.exists() else {}
        inner = state["trainer"] | {"moments": load_file(path / "optimizer.safetensors")}
        if trainer.critic is not None:
            inner["critic"] = {
                name: load_file(path / f"critic_{name}.safetensors")
                for name in ("weights", "moments")
            }
        trainer.load_state(inner)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # truncated or foreign files fail in many ways, all the user's to see
        raise UserError(
            f"{path}: not a whole checkpoint ({error}); delete this folder to go on from an "
            "earlier one"
        ) from None
    return state


def prune(folder: Path, keep_last: int, keep_best: int) -> list[int]:
    """Delete all but the newest and the best by held-out reward; returns the steps deleted."""
    found = checkpoints(folder)
    rewards = {}
    for step, path in found.items():
        reward = json.loads((path / "state.json").read_text()).get("held_out_reward")
        if reward is not None:
            rewards[step] = reward
    best = sorted(rewards, key=lambda step: (rewards[step], step), reverse=True)[:keep_best]
    kept = {*list(found)[-keep_last:], *best}
    gone = [step for step in found if step not in kept]
    for step in gone:
        shutil.rmtree(found[step])
    return gone


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def _flush(path: Path) -> None:
    """fsync a file or folder, so that the rename never outruns the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
