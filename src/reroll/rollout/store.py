"""Past rollouts on disk, to be offered as drafts: one SQLite file, one transaction a step.

A row is one rollout, found by (prompt hash, dataset row, visit, sample). Rows lie in the order they
came, so a step appends and a prompt's rollouts are neighbours; ordered by key the file was larger
and slower. Bytes are counted by rows, not pages, so that what `evict` deletes is the same in a
resumed run; the file does not shrink, freed pages are used again.

`sqlite3 FILE 'select * from overview'` reads it; table `meta` says what the columns hold. It is
locked while a run has it open, for readers too: copy FILE and FILE-wal to look inside.
"""

import hashlib
import os
import sqlite3
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from reroll.rollout.past import NAMES, PLACE, Past, Row, checksum, decode, encode
from reroll.rollout.storefile import beside, errors_of, open_file

MEMORY_OVERHEAD = 1024
"""bytes that Python takes for a row in memory beside its streams, and for a visit"""
VISIT_IS = "prompt_hash = ? AND row = ? AND visit"

Visit = tuple[bytes, int, int]
"""prompt hash, row, visit: what is kept in memory or forgotten together"""


def prompt_hash(token_ids: Sequence[int], trace: int = 0, cut: int = 0) -> bytes:
    """16 bytes that stand for a prompt, and for the prefix (trace, cut) its rollouts start from."""
    packed = struct.pack(f"<{len(token_ids)}i2q", *token_ids, trace, cut)
    return hashlib.blake2b(packed, digest_size=16).digest()


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
        self._max_bytes, self.keep_visits = int(max_gb * 2**30), keep_visits
        self._recent = _Recent(int(memory_gb * 2**30))
        with errors_of(self.path):
            self._db = open_file(self.path)
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
            with errors_of(self.path):
                found |= self._read(prompt, row, window)
        return [decode(one) for visit in window for one in found[visit] or ()]

    def _read(self, prompt: bytes, row: int, window: range) -> dict[int, list[Row]]:
        """The rows of each visit of the window, from disk; from now on in memory as well."""
        rows = self._db.execute(
            f"SELECT {NAMES} FROM rollouts WHERE {VISIT_IS} BETWEEN ? AND ? ORDER BY sample",
            (prompt, row, window[-1], window[0]),
        )
        found: dict[int, list[Row]] = {visit: [] for visit in window}
        for one in rows:
            if checksum(one) != one[-1]:
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
            group[past.sample] = encode(prompt, past)
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
            (self.keep_visits,),
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
        with errors_of(self.path):
            return self._db.execute("SELECT count(*) FROM rollouts").fetchone()[0]

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, freed pages and what is not yet in the file proper included."""
        return sum(p.stat().st_size for p in (self.path, beside(self.path)) if p.exists())

    def stats(self) -> dict[str, int]:
        """Rollouts, what they count towards `max_gb`, bytes on disk, bytes in memory."""
        with errors_of(self.path):
            held = {"rollouts": len(self), "bytes": self._bytes()}
            return held | {"disk": self.size_bytes, "memory": self._recent.bytes}

    def close(self) -> None:
        """Let go of the file; all of it is in one piece then."""
        with errors_of(self.path):
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with errors_of(self.path):
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
