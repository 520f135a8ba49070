"""The record of timed-out gradings: which job a time limit hits depends on the machine's mood.

Its names are read again when a run resumes, so that the same jobs fail the same way.
"""

import os
from pathlib import Path


class Timeouts:
    """Names of timed-out jobs, one a line in `path`; None keeps no record."""

    def __init__(self, path: Path | None) -> None:
        """Read what is there."""
        self._path = path
        self._names: set[str] = set()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        if torn:  # a crash while writing: that failure was never reported
            os.truncate(path, len(whole) + 1 if whole else 0)
        self._names.update(name for name in whole.decode("utf-8").split("\n") if name)

    def __contains__(self, name: str) -> bool:
        """Whether that job timed out, in this run or before it was resumed."""
        return name in self._names

    def add(self, name: str) -> None:
        """Record a name; it is on disk when this returns."""
        assert "\n" not in name, f"the name of a job takes one line: {name!r}"
        if self._path is None:
            return
        self._names.add(name)
        with self._path.open("ab") as file:
            file.write(name.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
