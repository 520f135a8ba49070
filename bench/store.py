"""The store of past rollouts: seconds to write a step, to look up, to evict, to open after a kill.

A step is 1,024 prompts x 8 rollouts x 750 tokens: ids from a vocabulary of 152k and log-probs, in
Python lists as the engine makes them. The same prompts come again each step, as another visit. Cold
look-ups are the first after opening, with the operating system asked to forget the file; warm ones
come from the store's own memory, right after the step was written. The killed process had written
all steps and died at once, its log unmerged and the file forgotten.

    python -m bench.store [--quick] [--fresh]
"""

import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import Parts, arguments, table
from reroll.config import ReuseSection
from reroll.rollout.decisions import Start
from reroll.rollout.reuse import Reuse
from reroll.rollout.store import Past, Store, prompt_hash
from reroll.types import Prompt

SAMPLES, TOKENS, VOCABULARY = 8, 750, 152_000
STEPS = 8
"""in the file when the last write is timed"""
KEEP = 4
REPEATS = 3
SEED = 0
KEYS = (
    "write_seconds", "megabytes", "lookup_ms_cold", "lookup_ms_cold_p99", "lookup_ms_warm",
    "write_seconds_step_8", "evict_seconds", "reopen_seconds", "start_ms",
)  # fmt: skip


@cache
def names(prompts: int) -> list[bytes]:
    return [prompt_hash((row,) * 100) for row in range(prompts)]


@cache
def streams(prompts: int) -> list[tuple[list[int], list[float]]]:
    """Token ids and log-probs of each rollout of a step."""
    generator = np.random.default_rng(SEED)
    rows = prompts * SAMPLES
    ids = generator.integers(0, VOCABULARY, (rows, TOKENS), dtype=np.int32)
    logprobs = -generator.exponential(size=(rows, TOKENS)).astype(np.float32)
    return [(i.tolist(), p.tolist()) for i, p in zip(ids, logprobs, strict=True)]


def rollouts(prompts: int, step: int) -> list[tuple[bytes, Past]]:
    """A step as the loop hands it over."""
    made = []
    for index, (ids, logprobs) in enumerate(streams(prompts)):
        row, sample = divmod(index, SAMPLES)
        past = Past(
            row=row,
            sample=sample,
            visit=step,
            step=step,
            noise_visit=step,
            version=step,
            token_ids=ids,
            logprobs=logprobs,
            versions=[step] * TOKENS,
            reward=float(index % 2),
            rewards={"accuracy": float(index % 2)},
            graders="0123456789abcdef",
            finish="stop",
            trained=True,
        )
        made.append((names(prompts)[row], past))
    return made


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def write(store: Store, prompts: int, step: int) -> float:
    """Lists to arrays to disk."""
    return seconds(lambda: store.put(step, rollouts(prompts, step)))


def look_up(store: Store, prompts: int, step: int) -> list[float]:
    """Seconds of each prompt's look-up of one visit, in random order."""
    order = np.random.default_rng(SEED + step).permutation(prompts).tolist()
    found = []
    for row in order:
        name = names(prompts)[row]
        started = time.perf_counter()
        past = store.get(name, row, before_visit=step + 1, visits=1)
        found.append(time.perf_counter() - started)
        assert len(past) == SAMPLES
    return found


def forget(path: Path) -> None:
    """Ask the operating system to drop the file from its cache, so that the disk is read."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_step(folder: Path, prompts: int) -> dict[str, Any]:
    """One step in a file of its own: write, look up warm, size, look up cold."""
    path = folder / "first.sqlite"
    path.unlink(missing_ok=True)
    streams(prompts)
    with Store(path) as store:
        written = write(store, prompts, 1)
        warm = look_up(store, prompts, 1)
    size = path.stat().st_size
    forget(path)
    with Store(path) as store:
        forget(path)  # opening has read it
        cold = look_up(store, prompts, 1)
    return {"write": written, "bytes": size, "warm": warm, "cold": cold}


def write_and_die(path: Path, prompts: int, steps: int) -> None:
    """The process that is killed."""
    store = Store(path)
    for step in range(1, steps + 1):
        store.put(step, rollouts(prompts, step))
    os.kill(os.getpid(), signal.SIGKILL)


def life(folder: Path, prompts: int) -> dict[str, Any]:
    """STEPS steps in one file by a process that is killed; open, write one more, evict, open."""
    path = folder / "life.sqlite"
    path.unlink(missing_ok=True)
    streams(prompts)
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=write_and_die, args=(path, prompts, STEPS))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL, child.exitcode
    log = path.with_name(f"{path.name}-wal").stat().st_size
    forget(path)
    opened: list[Store] = []
    reopened = seconds(lambda: opened.append(Store(path, keep_visits=KEEP)))
    (store,) = opened
    assert len(store) == STEPS * prompts * SAMPLES, "a step was lost"
    written = write(store, prompts, STEPS + 1)
    deleted: list[int] = []
    evicted = seconds(lambda: deleted.append(store.evict()))
    assert deleted == [(STEPS + 1 - KEEP) * prompts * SAMPLES]
    refilled = write(store, prompts, STEPS + 2)
    started = [start(store, row, STEPS + 3) for row in range(0, prompts, 4)]
    closed = seconds(store.close)
    again = seconds(lambda: Store(path).close())
    return {
        "reopen": reopened,
        "log_bytes": log,
        "write": written,
        "evict": evicted,
        "write_into_freed": refilled,
        "close": closed,
        "reopen_clean": again,
        "bytes": path.stat().st_size,
        "start": started,
    }


def start(store: Store, row: int, visit: int) -> float:
    """Seconds of what `collect` waits for before a prompt's samples are in the engine: the look-up
    of all that is kept, as many rollouts of the last epochs as are drafts, token lists of these."""
    reuse, prompt = Reuse(ReuseSection(on=True), store, SEED), Prompt(row, "", (row,) * 100)
    found: list[Start] = []
    spent = seconds(lambda: found.extend(reuse.start(prompt, visit, SAMPLES)))
    assert [len(one.drafts) for one in found] == [2 * SAMPLES] * SAMPLES
    return spent


def milliseconds(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile, largest, total."""
    ms = np.array(values) * 1e3
    return {
        "median": float(np.median(ms)),
        "p99": float(np.percentile(ms, 99)),
        "max": float(ms.max()),
        "total": float(ms.sum()),
    }


def main() -> None:
    """Measure, print tables, save."""
    args = arguments(__doc__.split("\n")[0])
    parts = Parts("store", args)
    prompts, repeats = (128, 1) if args.quick else (1024, REPEATS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        firsts = [
            parts.measure(f"first_{i}", lambda: first_step(folder, prompts)) for i in range(repeats)
        ]
        later = parts.measure("life", lambda: life(folder, prompts))
    writes = [first["write"] for first in firsts]
    cold = milliseconds([value for first in firsts for value in first["cold"]])
    warm = milliseconds([value for first in firsts for value in first["warm"]])
    begun = milliseconds(later["start"])
    raw = prompts * SAMPLES * TOKENS * 8
    values = (
        statistics.median(writes), firsts[0]["bytes"] / 1e6, cold["median"], cold["p99"],
        warm["median"], later["write"], later["evict"], later["reopen"], begun["median"],
    )  # fmt: skip
    table(
        f"Look-ups of {SAMPLES} rollouts of {TOKENS} tokens a prompt, milliseconds",
        ["", "median", "99 %", "largest"],
        [
            [name, *(f"{ms[k]:.3f}" for k in ("median", "p99", "max"))]
            for name, ms in (("from disk", cold), ("from memory", warm), ("drafts made", begun))
        ],
    )
    table(
        f"Steps of {prompts:,} x {SAMPLES} x {TOKENS} tokens ({raw / 1e6:.1f} MB raw)",
        ["what", "seconds", "MB"],
        [
            ["write the first", f"{values[0]:.2f}", f"{values[1]:.1f}"],
            [f"write the next, {STEPS} in the file", f"{later['write']:.2f}", ""],
            [f"evict {STEPS + 1 - KEEP} steps of {STEPS + 1}", f"{later['evict']:.2f}", ""],
            ["write into what that freed", f"{later['write_into_freed']:.2f}", ""],
            [
                "open after a kill",
                f"{later['reopen']:.2f}",
                f"{later['log_bytes'] / 1e6:.1f} of log",
            ],
            ["open after a close", f"{later['reopen_clean']:.2f}", f"{later['bytes'] / 1e6:.1f}"],
        ],
    )
    summary = {key: round(value, 3) for key, value in zip(KEYS, values, strict=True)}
    detail = {
        "writes": writes,
        "cold_ms": cold,
        "warm_ms": warm,
        "later": later,
        "prompts": prompts,
    }
    parts.finish("store", summary, [SEED], detail)


if __name__ == "__main__":
    main()
