"""A grader process: the child's side of `reroll.tasks.process`.

It is sent `(graders, task section, memory limit in GiB, parent's process id)` and answers
`("ready",)` or `("broken", reason)`. Then each job that it is sent, a pickled
`(prompt, completion, answer, columns)`, is answered in order by
`("graded", Answer, monotonic time at its end, whether the process leaves)`.
It leaves when the connection closes, when its parent is gone, or after a MemoryError.
"""

import os
import pickle
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection

from reroll.errors import UserError
from reroll.tasks.grade import Grader, as_reward, check_graders

MAX_TRACEBACK = 4000
"""characters; a message must fit into the pipe, so that a worker never waits for its parent"""
MAX_REASON = 300


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one job."""

    rewards: dict[str, float] | None
    """each grader's number; None: ungraded"""
    failure: str
    """why it is ungraded"""
    seconds: float


def main(descriptor: str) -> None:
    """Serve the connection on that file descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(descriptor))
    specs, task, memory_gb, parent = connection.recv()
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    _limit_memory(memory_gb)
    try:
        graders = check_graders(specs, task)
    except UserError as error:
        connection.send(("broken", str(error)))
        return
    except MemoryError:
        reason = f"grading.memory_gb = {memory_gb:g}: too little to load the graders"
        connection.send(("broken", reason))
        return
    except Exception as error:  # a library that does not load, perhaps for want of memory
        text = " ".join(str(error).split())[:MAX_REASON]
        reason = f"task.graders: loading them with grading.memory_gb = {memory_gb:g} fails: "
        connection.send(("broken", f"{reason}{type(error).__name__}: {text}"))
        return
    connection.send(("ready",))
    try:
        while True:
            _answer(connection, graders, memory_gb)
    except (EOFError, ConnectionError):
        return  # closed: no more jobs, or no more parent


def _answer(connection: Connection, graders: dict[str, Grader], memory_gb: float) -> None:
    """Grade one job. After a MemoryError the heap is unfit for others, so the process ends."""
    payload = connection.recv_bytes()
    start = time.monotonic()
    full = False
    try:
        rewards, failure = _grade(payload, graders)
    except MemoryError:
        rewards, failure, full = (
            None,
            f"killed: memory limit of {memory_gb:g} GB (grading.memory_gb)",
            True,
        )
    end = time.monotonic()
    connection.send(("graded", Answer(rewards, failure, end - start), end, full))
    if full:
        raise EOFError


def _grade(payload: bytes, graders: dict[str, Grader]) -> tuple[dict[str, float] | None, str]:
    """Every grader's reward, or None and the first traceback."""
    rewards, name = {}, "reading the job"
    try:
        prompt, completion, answer, columns = pickle.loads(payload)
        for name, grader in graders.items():
            rewards[name] = as_reward(grader(prompt, completion, answer, columns))
    except MemoryError:
        raise
    except BaseException as error:  # sys.exit() in a grader is a failure like others
        text = "".join(traceback.format_exception(error))
        return None, f"{name}: {text[-MAX_TRACEBACK:]}"
    return rewards, ""


def _limit_memory(gigabytes: float) -> None:
    try:
        import resource
    except ImportError:
        return
    limit = int(gigabytes * 2**30)
    for kind, bound in ((resource.RLIMIT_AS, limit), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        try:
            resource.setrlimit(kind, (bound, bound))
        except (OSError, ValueError):
            continue  # macOS has no limit of the address space


def _end_with_parent(parent: int) -> None:
    """A grader that hangs does not see the connection close; this thread sees the parent go."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)
