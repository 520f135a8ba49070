"""A user's folder in small: a policy, problems, graders, and the flags of a short run on them."""

import contextlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from reroll import figures
from reroll.cli import parse_overrides
from reroll.config import Config, load_config
from reroll.loop import train
from reroll.rollout.collected import Collected
from reroll.train.checkpoint import checkpoints
from reroll.train.trainer import Trainer
from reroll.types import Group

ROOT = Path(__file__).parents[1]

GRADERS = '''
"""Graders of the tests: the share of digits earns something from the first step on."""
import os, pathlib, time


def share(prompt, completion, answer, **columns):
    return sum(character.isdigit() for character in completion) / max(1, len(completion))


def three(prompt, completion, answer, **columns):
    """A rare success that the beginning of another one makes likely."""
    return float(sum(character.isdigit() for character in completion) >= 3)


def dull(prompt, completion, answer, **columns):
    return 0.5


def hopeless(prompt, completion, answer, **columns):
    raise RuntimeError("never")


def fussy(prompt, completion, answer, **columns):
    if "1" in completion:
        raise RuntimeError("no ones, please")
    return share(prompt, completion, answer)


def gated(prompt, completion, answer, **columns):
    """Like `share`, but waits while metrics.jsonl has as many lines as the file `limit` says."""
    gate = pathlib.Path(os.environ["GATE"])
    metrics = gate.parent / "run" / "metrics.jsonl"
    while metrics.exists() and metrics.read_bytes().count(b"\\n") >= int(gate.read_text() or 0):
        time.sleep(0.005)
    return share(prompt, completion, answer)
'''

FLAGS = {
    "run.threads": 1, "model.path": "policy", "model.device": "cpu",
    "task.source": "jsonl", "task.name": "problems.jsonl", "task.answer_pattern": r"(-?\d+)",
    "task.train_size": 10, "task.eval_size": 4, "task.graders": '[{name = "digits:share"}]',
    "grading.seconds": 600, "rollout.prompts": 3, "rollout.samples": 4, "rollout.max_tokens": 10,
    "engine.slots": 8, "train.steps": 4, "train.learning_rate": 1e-2, "eval.every": 3,
    "eval.samples": 2, "checkpoint.every": 2, "log.display": "plain",
}  # fmt: skip
"""a run of a second: evaluations after steps 0, 3, 4 and checkpoints after 2, 4"""


class Project:
    """The folder made by `make`; runs are written to `out` unless told otherwise."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out

    @staticmethod
    def make(folder: Path) -> Path:
        """Write everything that a run reads."""
        save_policy(folder / "policy")
        (folder / "digits.py").write_text(GRADERS)
        rows = [{"prompt": f"{a} + {a * 3 % 7} =", "answer": str(a + a * 3 % 7)} for a in range(16)]
        (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def flags(self, name: str = "run", **changes: Any) -> list[str]:
        """Command-line flags of the run `name`; changes: `train__steps=2` is --train.steps 2."""
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        settings = FLAGS | {"run.out": self.out / name} | changed
        return [word for key, value in settings.items() for word in (f"--{key}", str(value))]

    def train(self, name: str = "run", **changes: Any) -> list[str]:
        """Arguments of `reroll train` for it: an empty file, and flags."""
        empty = self.out / "empty.toml"
        empty.touch()
        return ["train", str(empty), *self.flags(name, **changes)]

    def config(self, name: str = "run", **changes: Any) -> Config:
        """The same as a configuration."""
        return load_config(None, parse_overrides(self.flags(name, **changes)))


def save_policy(folder: Path) -> None:
    """A Qwen3 of 22 thousand weights, untaught, that reads and writes characters."""
    tokenizer = recipe("demo_policy").character_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=128,
        tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(name: str) -> ModuleType:
    """A script of recipes/, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock measured."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [
        {
            key: value
            for key, value in json.loads(line).items()
            if not key.startswith(("seconds", "tokens_per_second", "goodput", "bubble"))
        }
        for line in lines
    ]


class Wholes:
    """Runs from the first step to the last in one go, each made once."""

    def __init__(self, folder: Path, out: Callable[[], Path]) -> None:
        self.folder, self.out = folder, out
        self.made: dict[str, Path] = {}

    def __call__(self, **changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in self.made:
            with contextlib.chdir(self.folder):
                self.made[key] = train(Project(self.folder, self.out()).config(**changes)).path
        return self.made[key]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint has as tensors: policy or adapters, critic, moments."""
    newest = max(checkpoints(run / "checkpoints").items())[1]
    return {
        f"{file.stem}/{name}": value
        for file in sorted(newest.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def state_of(run: Path) -> dict[str, Any]:
    """What else the newest checkpoint remembers."""
    newest = max(checkpoints(run / "checkpoints").items())[1]
    return json.loads((newest / "state.json").read_text())


def assert_same(run: Path, other: Path) -> None:
    """The same lines, times aside, the same rollouts, weights and moments, bit for bit."""
    assert records(run) == records(other)
    assert (run / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert max(checkpoints(run / "checkpoints")) == max(checkpoints(other / "checkpoints"))
    ours, theirs = state_of(run), state_of(other)
    for key in ("trainer", "under_way"):
        assert ours[key] == theirs[key]
    for kind in ("tokens", "flops"):
        assert ours["ledger"][kind] == theirs["ledger"][kind]


def lines_of(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [record for record in records(run) if record["kind"] == kind]


def steps_of(run: Path, kind: str = "train") -> list[int]:
    return [record["step"] for record in lines_of(run, kind)]


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing but `finally` runs after it."""


def kill(*_: Any, **__: Any) -> None:
    raise Killed


def at_call(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, act: Callable[..., None],
    after: bool = False,
) -> list[int]:  # fmt: skip
    """Let `act` (which gets the arguments) happen before or after call number `call` of a function.

    Returns a list with the number of calls.
    """
    function, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        due = calls[0] == call
        if due and not after:
            act(*args, **kwargs)
        result = function(*args, **kwargs)
        if due and after:
            act(*args, **kwargs)
        return result

    monkeypatch.setattr(owner, name, wrapped)
    return calls


def killed_and_gone_on(
    project: Project, whole: Wholes, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[Path, Path]:
    """Kill a run after its fourth update and start it again: it must be the run that was not
    killed. Returns both, for what else there is to compare."""
    reference, config = whole(**changes), project.config(**changes)
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "step", 4, kill, after=True)
        with pytest.raises(Killed):
            train(config)
    run = project.out / "run"
    assert max(checkpoints(run / "checkpoints")) == 2
    train(config)
    assert_same(run, reference)
    return run, reference


def watch_groups(monkeypatch: pytest.MonkeyPatch) -> list[list[Group]]:
    """The groups of each step of what is trained from now on."""
    found: list[list[Group]] = []
    metrics = figures.rollout_metrics

    def watched(collected: Collected) -> dict[str, float]:
        found.append(collected.groups)
        return metrics(collected)

    monkeypatch.setattr(figures, "rollout_metrics", watched)
    return found
