"""Traces: old successes with where they come from, in one SQLite file that grows.

A trace is found by what it says: its id is a hash of problem and tokens. What collecting them has
cost stands beside them, from the first token on. `sqlite3 FILE 'select * from overview'` reads it.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from reroll.errors import UserError
from reroll.types import Prompt

APPLICATION_ID = 0x72657274
"""`PRAGMA application_id` of our files: "rert" """
FORMAT = 1
"""`PRAGMA user_version` of what this module reads and writes"""
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE problems (row INTEGER PRIMARY KEY, problem TEXT NOT NULL, attempts INTEGER NOT NULL,
    successes INTEGER NOT NULL, solved_at INTEGER);
CREATE TABLE traces (id INTEGER PRIMARY KEY, row INTEGER NOT NULL, problem TEXT NOT NULL,
    token_ids BLOB NOT NULL, text TEXT NOT NULL, answer_at INTEGER NOT NULL,
    source TEXT NOT NULL, attempt INTEGER NOT NULL, attempts INTEGER NOT NULL,
    sampling TEXT NOT NULL, model TEXT NOT NULL, tokenizer TEXT NOT NULL, graders TEXT NOT NULL,
    reward REAL NOT NULL, flops REAL NOT NULL);
CREATE TABLE ledger (name TEXT PRIMARY KEY, amount REAL NOT NULL);
CREATE VIEW overview AS SELECT row, length(token_ids) / 4 AS length, attempts, source, reward, text
    FROM traces ORDER BY row;
"""


@dataclass(frozen=True, slots=True)
class Trace:
    """One success. Its tokens end with the stop id, where it drew one."""

    id: int
    row: int
    """of its problem in the training split"""
    problem: str
    """hash of the prompt's tokens and of the reference answer"""
    token_ids: tuple[int, ...]
    text: str
    answer_at: int
    """tokens before the answer stands there: more than these give it away"""
    source: str
    """collected, training, imported; and ", retokenized" where the tokens are not the writer's"""
    attempt: int
    """index of the attempt that it is, from 0"""
    attempts: int
    """made at the problem until then, those of its wave that ended later left out"""
    sampling: str
    """JSON of temperature and limit"""
    model: str
    """digest of the weights that wrote it; empty: unknown"""
    tokenizer: str
    """digest of tokenizer and prompt template"""
    graders: str
    """digest of what graded it; empty: unknown"""
    reward: float
    flops: float
    """spent on its problem until it was found, counted as the paper does"""


def problem_hash(prompt: Prompt) -> str:
    """What a problem is, whatever its row."""
    packed = np.array(prompt.token_ids, np.int32).tobytes() + repr(prompt.answer).encode()
    return hashlib.blake2b(packed, digest_size=16).hexdigest()


def trace_id(problem: str, token_ids: Sequence[int]) -> int:
    """62 bits, never 0."""
    packed = problem.encode() + np.array(token_ids, np.int32).tobytes()
    digest = hashlib.blake2b(packed, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 2) | 1


@dataclass(slots=True)
class Tried:
    """How often a problem was attempted, and when it was first solved."""

    row: int
    problem: str
    attempts: int = 0
    successes: int = 0
    solved_at: int | None = None
    """index of the first attempt that succeeded"""


class TraceStore:
    """One file of traces; every error of it is a UserError that names it.

    read_only: for a run that starts from them; else the file is made where it is not there.
    """

    def __init__(self, path: Path | str, read_only: bool = False) -> None:
        self.path = Path(os.path.abspath(path))
        if read_only and not self.path.is_file():
            raise UserError(f"{self.path}: no such file; `reroll collect` writes it")
        with self._errors():
            fresh = not self.path.exists()
            # exclusive: two collections must not mix their waves
            self._db = sqlite3.connect(self.path, timeout=1.0, isolation_level=None)
            try:
                if fresh:
                    self._db.executescript(
                        f"BEGIN; PRAGMA application_id = {APPLICATION_ID}; "
                        f"PRAGMA user_version = {FORMAT}; {SCHEMA} COMMIT;"
                    )
                self._check()
                if not read_only:
                    self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
                    self._db.execute("BEGIN IMMEDIATE")
                    self._db.execute("COMMIT")
            except BaseException:
                self._db.close()
                raise

    def _check(self) -> None:
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise UserError(f"{self.path}: not a file of traces; choose another")
        if version != FORMAT:
            raise UserError(
                f"{self.path}: of format {version}, and this version of reroll reads {FORMAT}; "
                "collect again"
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:  # a mistake of ours
            raise
        except (sqlite3.Error, OSError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.path}: cannot be used ({said}); wait for whoever uses it, free space, or "
                "move it away and collect again"
            ) from None

    # --- what it holds ----------------------------------------------------------------------------

    def meta(self) -> dict[str, Any]:
        """What the collection was made with; empty for a new file."""
        with self._errors():
            rows = self._db.execute("SELECT name, value FROM meta").fetchall()
        return {name: json.loads(value) for name, value in rows}

    def claim(self, meta: dict[str, Any]) -> None:
        """Say what the collection is made with; refused for a file that was made otherwise."""
        if there := self.meta():
            for name, value in meta.items():
                if there.get(name) != value:
                    raise UserError(
                        f"{self.path}: was collected with {name} = {there.get(name)!r}, not "
                        f"{value!r}; collect into another file, or undo the change to go on"
                    )
            return
        rows = [(name, json.dumps(value)) for name, value in meta.items()]
        with self._transaction():
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", rows)

    def close_with(self, meta: dict[str, Any]) -> None:
        """Say that the collection is complete, as far as it was asked for."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO meta VALUES ('finished', ?)", (json.dumps(meta),)
            )

    def tried(self) -> dict[int, Tried]:
        """Every problem that was attempted, by row."""
        with self._errors():
            rows = self._db.execute(
                "SELECT row, problem, attempts, successes, solved_at FROM problems ORDER BY row"
            ).fetchall()
        return {row[0]: Tried(*row) for row in rows}

    def traces(self) -> list[Trace]:
        """All of them, by row."""
        names = ", ".join(f.name for f in fields(Trace))
        with self._errors():
            rows = self._db.execute(f"SELECT {names} FROM traces ORDER BY row, id").fetchall()
        at = [f.name for f in fields(Trace)].index("token_ids")
        found = []
        for row in rows:
            values: list[Any] = list(row)
            values[at] = tuple(np.frombuffer(row[at], np.int32).tolist())
            found.append(Trace(*values))
        return found

    def ledger(self) -> dict[str, float]:
        """What it has cost so far."""
        with self._errors():
            return dict(self._db.execute("SELECT name, amount FROM ledger ORDER BY name"))

    # --- what is added ----------------------------------------------------------------------------

    def add(
        self,
        traces: Sequence[Trace],
        tried: Sequence[Tried] = (),
        spent: dict[str, float] | None = None,
    ) -> None:
        """A wave's successes, attempts and cost: all or nothing. A trace that is there stays."""
        names = [f.name for f in fields(Trace)]
        places = ", ".join("?" * len(names))
        with self._transaction():
            self._db.executemany(
                f"INSERT OR IGNORE INTO traces ({', '.join(names)}) VALUES ({places})",
                (
                    [
                        np.array(value, np.int32).tobytes() if name == "token_ids" else value
                        for name, value in ((n, getattr(trace, n)) for n in names)
                    ]
                    for trace in traces
                ),
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO problems VALUES (:row, :problem, :attempts, :successes, "
                ":solved_at)",
                map(asdict, tried),
            )
            self._db.executemany(
                "INSERT INTO ledger VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET "
                "amount = amount + excluded.amount",
                (spent or {}).items(),
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
