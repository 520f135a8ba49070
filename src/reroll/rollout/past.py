"""A past rollout, and the row it is on disk."""

import json
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

ROW_OVERHEAD = 128
"""bytes booked for a row beside its streams and texts: scalars and entries of two indices"""

COLUMNS = (
    ("prompt_hash", "BLOB NOT NULL", "16 bytes of blake2b over prompt tokens, trace and cut"),
    ("row", "INTEGER NOT NULL", "row of the dataset"),
    ("sample", "INTEGER NOT NULL", "index in its group"),
    ("visit", "INTEGER NOT NULL", "epoch in which it was started"),
    ("step", "INTEGER NOT NULL", "training step that collected it, from 1"),
    ("noise_visit", "INTEGER NOT NULL", "visit that its noise key was made with"),
    ("version", "INTEGER NOT NULL", "policy version when it was collected"),
    ("reward", "REAL", "grade; NULL: ungraded, or cut by the limit"),
    ("rewards", "TEXT NOT NULL", "JSON: each grader's number"),
    ("graders", "TEXT NOT NULL", "digest of the graders; empty: unknown"),
    ("finish", "TEXT NOT NULL", "stop or length; pruned: stopped on its way"),
    ("trained", "INTEGER NOT NULL", "1: it carried gradient"),
    (
        "pruning",
        "TEXT NOT NULL",
        "JSON: looks at it (tokens read, score, probability, survival, "
        "kept, ended, head version) and the tokens saved; empty: none",
    ),
    ("length", "INTEGER NOT NULL", "completion tokens, L"),
    ("bytes", "INTEGER NOT NULL", "what the row counts towards the bound on size"),
    ("token_ids", "BLOB NOT NULL", "L token ids, int32 little-endian"),
    ("logprobs", "BLOB NOT NULL", "L behaviour log-probs of the writer, float32 little-endian"),
    ("versions", "BLOB NOT NULL", "runs of (policy version, count), int32; -1: prefix tokens"),
    ("checksum", "INTEGER NOT NULL", "CRC-32 of all the others: SQLite's pages have none"),
)
NAMES = ", ".join(name for name, _, _ in COLUMNS)
PLACE = {name: index for index, (name, _, _) in enumerate(COLUMNS)}

Row = tuple[Any, ...]
"""a row as `COLUMNS` has it: what lies on disk and in memory"""


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """One past rollout; `COLUMNS` says what its fields are.

    Streams `[L]` are read-only arrays; lists are taken as well and made into them.
    """

    row: int
    sample: int
    visit: int
    step: int
    noise_visit: int
    version: int
    token_ids: np.ndarray
    """int32"""
    logprobs: np.ndarray
    """float32"""
    versions: np.ndarray
    """int32, one for each token"""
    reward: float | None
    rewards: dict[str, float]
    graders: str
    finish: str
    trained: bool
    pruning: str = ""

    def __post_init__(self) -> None:
        kinds = (("token_ids", np.int32), ("logprobs", np.float32), ("versions", np.int32))
        for name, kind in kinds:
            stream = np.asarray(getattr(self, name), kind).view()
            stream.flags.writeable = False
            if stream.shape != (len(self.token_ids),):
                raise ValueError(f"{name}: {stream.shape}, not one for each token")
            object.__setattr__(self, name, stream)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Past) and encode(b"", self) == encode(b"", other)

    def __hash__(self) -> int:
        return hash((self.row, self.sample, self.visit, self.step))


def encode(prompt: bytes, past: Past) -> Row:
    """A rollout as a row."""
    numbers = (past.row, past.sample, past.visit, past.step, past.noise_visit, past.version)
    # plus 0.0: SQLite turns -0.0 into 0.0, and the checksum would not
    reward = None if past.reward is None else float(past.reward) + 0.0
    if reward is not None and math.isnan(reward):
        raise ValueError("a reward that is not a number: SQLite's NULL would read as ungraded")
    texts = (json.dumps(past.rewards), str(past.graders), str(past.finish))
    streams = (past.token_ids.tobytes(), past.logprobs.tobytes(), _runs(past.versions))
    size = ROW_OVERHEAD + sum(map(len, (*texts, past.pruning, *streams)))
    ends = (int(past.trained), str(past.pruning), len(past.token_ids), size)
    row = (bytes(prompt), *map(int, numbers), reward, *texts, *ends, *streams)
    return (*row, checksum(row))


def decode(row: Row) -> Past:
    """A row as a rollout."""
    *before, pruning, _, _, ids, logprobs, runs, _ = row
    _, *numbers, reward, rewards, graders, finish, trained = before
    versions, counts = np.frombuffer(runs, np.int32).reshape(-1, 2).T
    streams = np.frombuffer(ids, np.int32), np.frombuffer(logprobs, np.float32)
    values: list[Any] = [*numbers, *streams, np.repeat(versions, counts)]
    values += [reward, json.loads(rewards), graders, finish, bool(trained), pruning]
    return Past(*values)


def _runs(values: np.ndarray) -> bytes:
    """Run-length encoded: (value, count) pairs."""
    if not len(values):
        return b""
    ends = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
    return np.column_stack((values[ends], np.diff(ends, prepend=-1))).astype(np.int32).tobytes()


def checksum(row: Row) -> int:
    """CRC-32 of a row; -1 if a stream is not bytes, as in a damaged file."""
    first = PLACE["token_ids"]
    streams = row[first : PLACE["checksum"]]
    if not all(isinstance(stream, bytes) for stream in streams):
        return -1
    return zlib.crc32(repr(row[:first]).encode() + b"".join(streams))
