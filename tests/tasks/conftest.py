"""A character tokenizer, and a user's module of graders in a working directory of its own."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"


class CharTokenizer:
    """One token a character, 1 in front; `end` behind too, where a tokenizer does that."""

    eos_token_id = 2

    def __init__(self, chat_template: str | None = None, end: bool = False) -> None:
        self.chat_template = chat_template
        self.end = end

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [ord(character) for character in text]
        return [1, *ids] + [2] * self.end if add_special_tokens else ids

    def apply_chat_template(self, conversation: list[dict[str, str]], **settings: Any) -> str:
        assert settings == {"tokenize": False, "add_generation_prompt": True}
        if self.chat_template == "no system" and conversation[0]["role"] == "system":
            raise ValueError("System role not supported\nby this template")
        turns = [f"[{turn['role']}]{turn['content']}" for turn in conversation]
        return "".join(turns) + "[assistant]"


@pytest.fixture
def tokenizer() -> CharTokenizer:
    return CharTokenizer()


REWARDS = """
import os, pathlib, signal, subprocess, sys, time

def exact(prompt, completion, answer, **columns):
    return completion == answer

def length(prompt, completion, answer, **columns):
    return len(completion)

def level(prompt, completion, answer, level):
    return level

def everything(prompt, completion, answer, **columns):
    return float((prompt, completion, answer, columns) == ("p", "c", "a", {"level": 2}))

def modules(prompt, completion, answer, **columns):
    return "torch" in sys.modules or "transformers" in sys.modules

def act(prompt, completion, answer, **columns):
    print("noise on stdout")
    print("noise on stderr", file=sys.stderr)
    pathlib.Path("ran-" + completion).touch()
    if completion == "hang":
        child = subprocess.Popen(["sleep", "1000"])
        pathlib.Path("pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(1e6)
    if completion == "raise": raise RuntimeError("boom")
    if completion == "sys.exit": sys.exit(1)
    if completion == "exit": os._exit(3)
    if completion == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if completion == "hog": bytearray(8 << 30)
    if completion == "nan": return float("nan")
    if completion == "none": return None
    if completion == "text": return "1.0"
    while completion == "wait" and not pathlib.Path("go").exists(): time.sleep(0.01)
    return 1

def few(completion): return 1.0

constant = 1.0
"""


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with rewards.py in it."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
