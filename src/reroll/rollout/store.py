"""Past rollouts on disk, to be offered as drafts: one SQLite file, one transaction a step.

A row is one rollout, found by (prompt hash, dataset row, visit, sample). Rows lie in the order they
came, so a step appends and a prompt's rollouts are neighbours; ordered by key the file was larger
and slower. Bytes are counted by rows, not pages, so that what `evict` deletes is the same in a
resumed run; the file does not shrink, freed pages are used again.

`sqlite3 FILE 'select * from overview'` reads it; table `meta` says what the columns hold. It is
locked while a run has it open, for readers too: copy FILE and FILE-wal to look inside.
"""

import hashlib
import json
import math
import os
import sqlite3
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from reroll.errors import UserError

APPLICATION_ID = 0x7265726C
"""`PRAGMA application_id` of our files: "rerl" """
FORMAT = 1
"""`PRAGMA user_version` of what this module reads and writes"""
PAGE = 4096
"""bytes; larger pages write faster but waste up to a third on rollouts of 1,000-8,000 tokens"""
ROW_OVERHEAD = 128
"""bytes booked for a row beside its streams and texts: scalars and entries of two indices"""
MEMORY_OVERHEAD = 1024
"""bytes that Python takes beside them for a row in memory, and for a visit"""
CHECK_BELOW = 256 * 2**20
"""bytes of file up to which opening checks all of it: a second at most"""
LOCK_SECONDS = 1.0
"""how long to wait for whoever has the file open"""
DISK = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
)
"""errors of a disk or a permission, which leave the store as good as it was"""

COLUMNS = (
    ("prompt_hash", "BLOB NOT NULL", "16 bytes of blake2b over prompt tokens, trace and cut"),
    ("row", "INTEGER NOT NULL", "row of the dataset"),
    ("sample", "INTEGER NOT NULL", "index in its group"),
    ("visit", "INTEGER NOT NULL", "epoch in which it was started"),
    ("step", "INTEGER NOT NULL", "training step that collected it, from 1"),
    ("noise_visit", "INTEGER NOT NULL", "visit that its noise key was made with"),
    ("version", "INTEGER NOT NULL", "policy version when it was collected"),
    ("reward", "REAL", "grade, before any policy for truncated ones; NULL: ungraded"),
    ("rewards", "TEXT NOT NULL", "JSON: each grader's number"),
    ("graders", "TEXT NOT NULL", "digest of the graders; empty: unknown"),
    ("finish", "TEXT NOT NULL", "stop or length"),
    ("trained", "INTEGER NOT NULL", "1: it carried gradient"),
    ("length", "INTEGER NOT NULL", "completion tokens, L"),
    ("bytes", "INTEGER NOT NULL", "what the row counts towards the bound on size"),
    ("token_ids", "BLOB NOT NULL", "L token ids, int32 little-endian"),
    ("logprobs", "BLOB NOT NULL", "L behaviour log-probs of the writer, float32 little-endian"),
    ("versions", "BLOB NOT NULL", "runs of (policy version, count), int32; -1: prefix tokens"),
    ("checksum", "INTEGER NOT NULL", "CRC-32 of all the others: SQLite's pages have none"),
)
NAMES = ", ".join(name for name, _, _ in COLUMNS)
PLACE = {name: index for index, (name, _, _) in enumerate(COLUMNS)}
VISIT_IS = "prompt_hash = ? AND row = ? AND visit"
SCHEMA = f"""
CREATE TABLE rollouts (
    id INTEGER PRIMARY KEY, {", ".join(f"{name} {kind}" for name, kind, _ in COLUMNS)},
    UNIQUE (prompt_hash, row, visit DESC, sample));
CREATE INDEX by_step ON rollouts (step, bytes);
CREATE VIEW overview AS SELECT hex(prompt_hash) AS prompt_hash, row, sample, visit, step, length,
    reward, finish FROM rollouts ORDER BY id;
CREATE TABLE meta (name TEXT PRIMARY KEY, meaning TEXT NOT NULL);
"""

Row = tuple[Any, ...]
"""a row as `COLUMNS` has it: what lies on disk and in memory"""
Visit = tuple[bytes, int, int]
"""prompt hash, row, visit: what is kept in memory or forgotten together"""


def prompt_hash(token_ids: Sequence[int], trace: int = 0, cut: int = 0) -> bytes:
    """16 bytes that stand for a prompt, and for the prefix (trace, cut) its rollouts start from."""
    packed = struct.pack(f"<{len(token_ids)}i2q", *token_ids, trace, cut)
    return hashlib.blake2b(packed, digest_size=16).digest()


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

    def __post_init__(self) -> None:
        kinds = (("token_ids", np.int32), ("logprobs", np.float32), ("versions", np.int32))
        for name, kind in kinds:
            stream = np.asarray(getattr(self, name), kind).view()
            stream.flags.writeable = False
            if stream.shape != (len(self.token_ids),):
                raise ValueError(f"{name}: {stream.shape}, not one for each token")
            object.__setattr__(self, name, stream)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Past) and _encode(b"", self) == _encode(b"", other)

    def __hash__(self) -> int:
        return hash((self.row, self.sample, self.visit, self.step))


class Store:
    """The past rollouts of one run. Every error of the file is a UserError that names it."""

    def __init__(
        self,
        path: Path | str,
        *,
        max_gb: float = 4.0,
        keep_visits: int = 4,
        memory_gb: float = 0.25,
    ) -> None:
        """Open the file, or make it; one that cannot be used is refused and left as it is.

        max_gb, keep_visits: what `evict` leaves. memory_gb: rollouts kept in memory as well. GiB.
        """
        self.path = Path(os.path.abspath(path))
        self._max_bytes, self._keep_visits = int(max_gb * 2**30), keep_visits
        self._recent = _Recent(int(memory_gb * 2**30))
        with _errors(self.path):
            if not self.path.exists():
                _make(self.path)
            _check_header(self.path)
            self._db = _connect(self.path)
            try:
                self._oldest = self._find_oldest()
            except BaseException:
                self._db.close()  # or the lock stays for as long as the error is held
                raise

    def get(self, prompt: bytes, row: int, *, before_visit: int, visits: int) -> list[Past]:
        """Rollouts with before_visit - visits <= visit < before_visit, newest visit first."""
        window = range(before_visit - 1, max(before_visit - visits, self._oldest) - 1, -1)
        found = {visit: self._recent.get((prompt, row, visit)) for visit in window}
        if None in found.values():
            with _errors(self.path):
                found |= self._read(prompt, row, window)
        return [_decode(one) for visit in window for one in found[visit] or ()]

    def _read(self, prompt: bytes, row: int, window: range) -> dict[int, list[Row]]:
        """The rows of each visit of the window, from disk; from now on in memory as well."""
        rows = self._db.execute(
            f"SELECT {NAMES} FROM rollouts WHERE {VISIT_IS} BETWEEN ? AND ? ORDER BY sample",
            (prompt, row, window[-1], window[0]),
        )
        found: dict[int, list[Row]] = {visit: [] for visit in window}
        for one in rows:
            if _checksum(one) != one[-1]:
                raise sqlite3.DatabaseError(f"a rollout of dataset row {row} is not as written")
            found[one[PLACE["visit"]]].append(one)
        for visit, its in found.items():
            self._recent.put((prompt, row, visit), its)
        return found

    def put(self, step: int, items: Sequence[tuple[bytes, Past]]) -> None:
        """Write a step's rollouts, all or none; a row of the same key is replaced."""
        groups: dict[Visit, dict[int, Row]] = {}
        for prompt, past in items:
            if not past.step == step >= 1 or past.visit < 0:
                raise ValueError(f"put in step {step}: step {past.step}, visit {past.visit}")
            group = groups.setdefault((prompt, past.row, past.visit), {})
            group[past.sample] = _encode(prompt, past)
        self._oldest = min([self._oldest, *(visit for _, _, visit in groups)])
        with self._transaction():
            before = {visit: self._before(visit) for visit in groups}
            self._db.executemany(
                f"INSERT OR REPLACE INTO rollouts ({NAMES}) VALUES ({', '.join('?' * len(PLACE))})",
                (row for group in groups.values() for row in group.values()),
            )
        for visit, group in groups.items():
            if (there := before[visit]) is not None:
                merged = {row[PLACE["sample"]]: row for row in there} | group
                self._recent.put(visit, [merged[sample] for sample in sorted(merged)])

    def _before(self, visit: Visit) -> list[Row] | None:
        """The visit's rows so far; None if they are on disk alone."""
        rows = self._recent.get(visit)
        query = f"SELECT 1 FROM rollouts WHERE {VISIT_IS} = ? LIMIT 1"
        if rows is None and self._db.execute(query, visit).fetchone() is None:
            return []
        return rows

    def cut_back(self, step: int) -> None:
        """Delete what later steps wrote, as a run does that goes on from `step`; 0: everything."""
        with self._transaction():
            self._db.execute("DELETE FROM rollouts WHERE step > ?", (step,))
            self._oldest = self._find_oldest()
        self._recent.clear()

    def evict(self) -> int:
        """Delete visits that are too old, then oldest steps until the bound holds; how many rows.

        Only right after a checkpoint: what a resumed run would look up again has to stay.
        """
        with self._transaction():
            gone = self._delete(self._too_old()) + self._delete(self._too_much())
            self._oldest = self._find_oldest()
            return gone

    def _too_old(self) -> list[tuple[int, Visit]]:
        rows = self._db.execute(
            "SELECT id, prompt_hash, row, visit FROM rollouts JOIN (SELECT prompt_hash, row, "
            "max(visit) AS newest FROM rollouts GROUP BY prompt_hash, row) USING (prompt_hash, row)"
            " WHERE visit <= newest - ?",
            (self._keep_visits,),
        )
        return [(id, (prompt, row, visit)) for id, prompt, row, visit in rows]

    def _too_much(self) -> list[tuple[int, Visit]]:
        over = self._bytes() - self._max_bytes
        found: list[tuple[int, Visit]] = []
        for (step,) in self._db.execute("SELECT DISTINCT step FROM rollouts ORDER BY step"):
            # a step at a time: sorting them all would read the whole file
            query = "SELECT id, prompt_hash, row, visit, bytes FROM rollouts WHERE step = ?"
            for id, prompt, row, visit, size in self._db.execute(f"{query} ORDER BY id", (step,)):
                if over <= 0:
                    return found
                found.append((id, (prompt, row, visit)))
                over -= size
        return found

    def _delete(self, rows: list[tuple[int, Visit]]) -> int:
        self._db.executemany("DELETE FROM rollouts WHERE id = ?", ((id,) for id, _ in rows))
        for _, visit in rows:
            self._recent.drop(visit)
        return len(rows)

    def _find_oldest(self) -> int:
        """No visit before this one is there, so a long window need not be looked through."""
        (visit,) = self._db.execute("SELECT min(visit) FROM rollouts").fetchone()
        return sys.maxsize if visit is None else visit

    def _bytes(self) -> int:
        return self._db.execute("SELECT coalesce(sum(bytes), 0) FROM rollouts").fetchone()[0]

    def __len__(self) -> int:
        with _errors(self.path):
            return self._db.execute("SELECT count(*) FROM rollouts").fetchone()[0]

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, freed pages and what is not yet in the file proper included."""
        return sum(p.stat().st_size for p in (self.path, _beside(self.path)) if p.exists())

    def stats(self) -> dict[str, int]:
        """Rollouts, what they count towards `max_gb`, bytes on disk, bytes in memory."""
        with _errors(self.path):
            held = {"rollouts": len(self), "bytes": self._bytes()}
            return held | {"disk": self.size_bytes, "memory": self._recent.bytes}

    def close(self) -> None:
        """Let go of the file; all of it is in one piece then."""
        with _errors(self.path):
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite itself rolls back when a disk is full
                    self._db.execute("ROLLBACK")
                raise


class _Recent:
    """Rows of visits, the least recently used forgotten first when they take too many bytes."""

    def __init__(self, limit: int) -> None:
        self.bytes, self._limit = 0, limit
        self._visits: OrderedDict[Visit, list[Row]] = OrderedDict()

    def get(self, visit: Visit) -> list[Row] | None:
        if visit in self._visits:
            self._visits.move_to_end(visit)
        return self._visits.get(visit)

    def put(self, visit: Visit, rows: list[Row]) -> None:
        self.drop(visit)
        self._visits[visit] = rows
        self.bytes += _memory(rows)
        while self.bytes > self._limit:
            self.bytes -= _memory(self._visits.popitem(last=False)[1])

    def drop(self, visit: Visit) -> None:
        if visit in self._visits:
            self.bytes -= _memory(self._visits.pop(visit))

    def clear(self) -> None:
        self._visits.clear()
        self.bytes = 0


def _memory(rows: list[Row]) -> int:
    return MEMORY_OVERHEAD + sum(row[PLACE["bytes"]] + MEMORY_OVERHEAD for row in rows)


def _encode(prompt: bytes, past: Past) -> Row:
    numbers = (past.row, past.sample, past.visit, past.step, past.noise_visit, past.version)
    # plus 0.0: SQLite turns -0.0 into 0.0, and the checksum would not
    reward = None if past.reward is None else float(past.reward) + 0.0
    if reward is not None and math.isnan(reward):
        raise ValueError("a reward that is not a number: SQLite's NULL would read as ungraded")
    texts = (json.dumps(past.rewards), str(past.graders), str(past.finish))
    streams = (past.token_ids.tobytes(), past.logprobs.tobytes(), _runs(past.versions))
    size = ROW_OVERHEAD + sum(map(len, texts)) + sum(map(len, streams))
    ends = (int(past.trained), len(past.token_ids), size)
    row = (bytes(prompt), *map(int, numbers), reward, *texts, *ends, *streams)
    return (*row, _checksum(row))


def _decode(row: Row) -> Past:
    _, *numbers, reward, rewards, graders, finish, trained, _, _, ids, logprobs, runs, _ = row
    versions, counts = np.frombuffer(runs, np.int32).reshape(-1, 2).T
    streams = np.frombuffer(ids, np.int32), np.frombuffer(logprobs, np.float32)
    values: list[Any] = [*numbers, *streams, np.repeat(versions, counts)]
    values += [reward, json.loads(rewards), graders, finish, bool(trained)]
    return Past(*values)


def _runs(values: np.ndarray) -> bytes:
    """Run-length encoded: (value, count) pairs."""
    if not len(values):
        return b""
    ends = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
    return np.column_stack((values[ends], np.diff(ends, prepend=-1))).astype(np.int32).tobytes()


def _checksum(row: Row) -> int:
    """CRC-32 of a row; -1 if a stream is not bytes, as in a damaged file."""
    first = PLACE["token_ids"]
    streams = row[first : PLACE["checksum"]]
    if not all(isinstance(stream, bytes) for stream in streams):
        return -1
    return zlib.crc32(repr(row[:first]).encode() + b"".join(streams))


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Whatever is wrong with the file, as a UserError with the remedy."""
    try:
        yield
    except sqlite3.ProgrammingError:  # a closed store, say: a mistake of ours, not of the file
        raise
    except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
        said = " ".join(str(error).split())[:200]  # SQLite quotes what it found, however long
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if isinstance(error, OSError) or code in DISK:
            remedy = "free space, or allow reading and writing there, and start again to go on"
            raise UserError(f"{path}: cannot be used ({said}): {remedy}") from None
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            remedy = "wait for it to end, or give each run a directory of its own"
            raise UserError(f"{path}: another process is using it ({said}): {remedy}") from None
        raise _refused(path, f"damaged ({said})") from None


def _refused(path: Path, reason: str) -> UserError:
    wal = f" with {_beside(path).name}" if _beside(path).exists() else ""
    return UserError(
        f"{path}: {reason}; move it away or delete it{wal}: reuse then starts with an empty store, "
        "without drafts until the next epoch"
    )


def _beside(path: Path, suffix: str = "-wal") -> Path:
    return path.with_name(path.name + suffix)


def _make(path: Path) -> None:
    """Write an empty store under another name and rename it: a kill leaves all of it or nothing."""
    for orphan in (_beside(path), _beside(path, "-journal")):
        if orphan.exists():  # SQLite would replay it into the new file
            raise UserError(f"{orphan}: left over from a store that is gone; delete it as well")
    fresh = _beside(path, ".new")
    fresh.unlink(missing_ok=True)
    db = sqlite3.connect(fresh, isolation_level=None)
    try:
        db.executescript(
            f"PRAGMA page_size = {PAGE}; PRAGMA journal_mode = MEMORY; BEGIN; {SCHEMA}"
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT};"
        )
        db.executemany(
            "INSERT INTO meta VALUES (?, ?)", ((name, says) for name, _, says in COLUMNS)
        )
        db.execute("COMMIT")
    finally:
        db.close()
    os.replace(fresh, path)


def _check_header(path: Path) -> None:
    """Refuse what is not ours before SQLite may touch it; sqlite.org/fileformat2.html, 1.3."""
    if path.is_dir():
        raise _refused(path, "a directory, not a store of rollouts")
    with path.open("rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise _refused(path, "not a store of rollouts")
    changes, pages, format_, application, valid_for = (
        int.from_bytes(header[at : at + 4], "big") for at in (24, 28, 60, 68, 92)
    )
    if application != APPLICATION_ID:
        raise _refused(path, "a database of another program")
    if format_ != FORMAT:
        raise _refused(path, f"of format {format_}, and this version of reroll reads {FORMAT}")
    short = changes == valid_for and path.stat().st_size < pages * PAGE
    if short and not _beside(path).exists():
        raise _refused(path, "damaged (its end is missing)")


def _connect(path: Path) -> sqlite3.Connection:
    """Open a file whose header is right, check it, and hold it for this process alone."""
    # A large file that was closed in order is not read through, gigabytes at every start: malformed
    # pages show in use, and so does a row that is not as written; at worst a damaged index hides
    # rows.
    wal, large = _beside(path), path.stat().st_size >= CHECK_BELOW
    killed = wal.exists() and wal.stat().st_size > 0
    check = "quick_check" if killed and large else "" if large else "integrity_check"
    if check:
        _read_through(path)
    db = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
    try:
        # exclusive: two runs must not mix their rollouts, and no shared memory is needed, which
        # network file systems lack
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        # WAL with NORMAL: a commit is in the operating system's hands before `put` returns, so a
        # killed process loses nothing, a torn tail of the log is not replayed, and the file proper
        # is only written from a flushed log; a power cut may lose the last steps, no more
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA secure_delete = OFF")  # some builds overwrite what is deleted
        db.execute("PRAGMA cache_size = -16384")  # 16 MiB: the index of a full store
        if check and (said := db.execute(f"PRAGMA {check}(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(said.splitlines()[-1])
        db.execute(f"SELECT id, {NAMES} FROM rollouts LIMIT 0")
        db.execute("BEGIN IMMEDIATE")  # may we write?
        db.execute("ROLLBACK")
    except BaseException:
        db.close()
        raise
    return db


def _read_through(path: Path) -> None:
    """Into the operating system's cache, front to back: a check alone reads ten times slower.

    Before SQLite opens it: closing a file gives up every lock that the process has on it.
    """
    with path.open("rb", buffering=0) as file:
        while file.read(2**20):
            pass
