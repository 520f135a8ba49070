"""Jobs that take turns, so that a slow minute of the machine hits all of them alike.

Each job runs in a process of its own, and only one of them runs at a time: at each `yield_turn` the
job that has made the least progress goes on. What is timed between two calls is a job's own.
"""

import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_turns: tuple[Any, Any, int] | None = None
"""of this process: (condition, progress of all jobs, own index)"""


def side_by_side(job: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`job(*each)` of all arguments; a job that raises lets the others end, then it is raised."""
    spawn = multiprocessing.get_context("spawn")
    changed, progress = spawn.Condition(), spawn.Array("d", [-1.0] * len(arguments), lock=False)
    with ProcessPoolExecutor(
        len(arguments), mp_context=spawn, initializer=_take, initargs=(changed, progress)
    ) as pool:
        futures = [pool.submit(_run, job, each, index) for index, each in enumerate(arguments)]
        return [future.result() for future in futures]


def yield_turn(done: float) -> None:
    """Let others go on that have done less; to be called by a job, with how much it has done.

    Elsewhere it does nothing.
    """
    if _turns is None:
        return
    changed, progress, index = _turns
    with changed:
        progress[index] = done
        changed.notify_all()
        changed.wait_for(lambda: min(range(len(progress)), key=lambda i: progress[i]) == index)


def _take(changed: Any, progress: Any) -> None:
    global _turns
    _turns = (changed, progress, -1)


def _run(job: Callable[..., Any], each: tuple[Any, ...], index: int) -> Any:
    global _turns
    assert _turns is not None
    changed, progress, _ = _turns
    _turns = (changed, progress, index)
    try:
        yield_turn(-1.0)
        return job(*each)
    finally:
        with changed:
            progress[index] = math.inf
            changed.notify_all()
