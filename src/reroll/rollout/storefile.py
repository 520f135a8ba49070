"""The store's file: its tables, how it is made, what is refused, what errors say."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reroll.errors import UserError
from reroll.rollout.past import COLUMNS, NAMES

APPLICATION_ID = 0x7265726C
"""`PRAGMA application_id` of our files: "rerl" """
FORMAT = 2
"""`PRAGMA user_version` of what this module reads and writes"""
PAGE = 4096
"""bytes; larger pages write faster but waste up to a third on rollouts of 1,000-8,000 tokens"""
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

SCHEMA = f"""
CREATE TABLE rollouts (
    id INTEGER PRIMARY KEY, {", ".join(f"{name} {kind}" for name, kind, _ in COLUMNS)},
    UNIQUE (prompt_hash, row, visit DESC, sample));
CREATE INDEX by_step ON rollouts (step, bytes);
CREATE VIEW overview AS SELECT hex(prompt_hash) AS prompt_hash, row, sample, visit, step, length,
    reward, finish FROM rollouts ORDER BY id;
CREATE TABLE meta (name TEXT PRIMARY KEY, meaning TEXT NOT NULL);
"""


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
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
    wal = f" with {beside(path).name}" if beside(path).exists() else ""
    return UserError(
        f"{path}: {reason}; move it away or delete it{wal}: reuse then starts with an empty store, "
        "without drafts until the next epoch"
    )


def beside(path: Path, suffix: str = "-wal") -> Path:
    """The log of a store, or another file that goes with it."""
    return path.with_name(path.name + suffix)


def _make(path: Path) -> None:
    """Write an empty store under another name and rename it: a kill leaves all of it or nothing."""
    for orphan in (beside(path), beside(path, "-journal")):
        if orphan.exists():  # SQLite would replay it into the new file
            raise UserError(f"{orphan}: left over from a store that is gone; delete it as well")
    fresh = beside(path, ".new")
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
    if short and not beside(path).exists():
        raise _refused(path, "damaged (its end is missing)")


def open_file(path: Path) -> sqlite3.Connection:
    """Make the file or check it, and hold it for this process alone."""
    if not path.exists():
        _make(path)
    _check_header(path)
    # A large file that was closed in order is not read through, gigabytes at every start: malformed
    # pages show in use, and so does a row that is not as written; at worst a damaged index hides
    # rows.
    wal, large = beside(path), path.stat().st_size >= CHECK_BELOW
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
