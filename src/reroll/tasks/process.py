"""One grader process as its parent holds it: start, give jobs, hear answers, kill.

A job in flight is written to the process's pipe before it is asked for, so that cheap graders never
wait for the parent. What lies in the pipe is bounded, so that the parent never waits for a grader.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

from reroll.tasks.child import child_command, child_environment
from reroll.tasks.worker import Answer

QUICK_SECONDS = 0.02
"""a process whose last job took less is given jobs ahead"""
JOBS_AHEAD = 8
BYTES_AHEAD = 32 * 1024
"""pickled; well below what the pipe holds"""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A job on its way."""

    id: int
    name: str
    payload: bytes
    """pickled (prompt, completion, answer, columns)"""


class GraderProcess:
    """A running grader process in a session of its own, which whatever it starts shares.

    `jobs` are those it has been given and has not answered; the first is being graded since
    `since` (monotonic clock), or, before `ready`, the process is starting since then.
    """

    def __init__(self, setup: bytes) -> None:
        """Start it and send it `setup`."""
        self.connection, theirs = _wide_pipe()
        with theirs:
            self._process = subprocess.Popen(
                child_command("reroll.tasks.worker", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what graders print must not garble the display
                stderr=subprocess.DEVNULL,
                env=child_environment(),
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.jobs: deque[Parcel] = deque()
        self.since = time.monotonic()
        self.ready = False
        self.broken = ""
        """why it could not start, in its own words"""
        self.left = False
        """it ended after its last answer: none of `jobs` is to blame"""
        self._lost = False
        self._killed = False
        self._pace = float("inf")
        with contextlib.suppress(OSError):
            self.connection.send_bytes(setup)

    def alive(self) -> bool:
        """Whether it runs, means to go on, and can be heard."""
        return not (self.broken or self.left or self._lost) and self._process.poll() is None

    def has_room(self, parcel: Parcel) -> bool:
        """Whether `give` would neither block nor queue the job behind a slow one."""
        if not self.ready or not self.alive():
            return False
        ahead = sum(len(job.payload) for job in self.jobs) + len(parcel.payload)
        quick = self._pace < QUICK_SECONDS and len(self.jobs) < JOBS_AHEAD and ahead <= BYTES_AHEAD
        return quick or not self.jobs

    def give(self, parcel: Parcel) -> None:
        """Send a job. A connection that breaks here is noticed by `hear`."""
        if not self.jobs:
            self.since = time.monotonic()
        self.jobs.append(parcel)
        with contextlib.suppress(OSError):
            self.connection.send_bytes(parcel.payload)

    def hear(self) -> Iterator[tuple[Parcel, Answer]]:
        """Jobs that it has answered since the last call."""
        try:
            while not self._lost and self.connection.poll():
                message = self.connection.recv()
                if message[0] == "ready":
                    self.ready, self.since = True, time.monotonic()
                elif message[0] == "broken":
                    self.broken = message[1]
                else:
                    _, answer, self.since, self.left = message
                    self._pace = answer.seconds
                    yield self.jobs.popleft(), answer
        except (EOFError, OSError):
            self._lost = True

    def hang_up(self) -> None:
        """Close the connection: an idle process then ends by itself."""
        self.connection.close()

    def leave(self, seconds: float) -> None:
        """Wait so long for it to end by itself, if it is idle."""
        if self.ready and not self.jobs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def kill(self) -> str:
        """End it and all that it started; returns how it had ended, if it was dead already."""
        if self._killed:
            return "killed"
        self._killed = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            # The connection of a dying process closes a little before its status is there.
            self._process.wait(1.0 if self._lost else 0.0)
        status = self._process.returncode
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self.connection.close()
        if status is None:
            return "killed"
        if status == -signal.SIGKILL:
            return "killed: SIGKILL, perhaps because memory ran out"
        return (
            f"died: {signal.Signals(-status).name}" if status < 0 else f"died: exit status {status}"
        )


def _wide_pipe() -> tuple[Connection, Connection]:
    """Two ends that hold BYTES_AHEAD and more without a reader, also where the default is 8 KiB."""
    ends = socket.socketpair()
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * BYTES_AHEAD)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * BYTES_AHEAD)
    return Connection(ends[0].detach()), Connection(ends[1].detach())
