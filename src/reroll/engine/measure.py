"""Time an engine's forwards for its table of costs."""

import time
from collections.abc import Callable

import numpy as np
import torch

from reroll.engine.costs import CHUNKS, Costs
from reroll.engine.runner import Columns, Runner, make_law, take
from reroll.engine.slots import SlotCache
from reroll.model.tree import EVERYTHING
from reroll.types import Request, Sampling

_ROWS, _GIVEN = 8, 32


def measure_costs(runner: Runner, cache: SlotCache, prefill_tokens: int, repeats: int = 4) -> Costs:
    """The shortest of `repeats`, after a first run that is thrown away: whatever else runs on the
    machine only adds. Ticks are half full, and the draws are counted; a forward over trees has a
    few hundred nodes a row.

    Where the runner may verify in a rounded dtype, it is left to do so only if that is faster.
    """
    slots = cache.slots
    batches = sorted({1, *(b for b in (4, 16, 64, 256) if b < slots), slots})
    ticks = np.array(
        [
            [_shortest(lambda b=b, c=c: _tick(runner, cache, b, c), repeats) for c in CHUNKS]
            for b in batches
        ]
    )
    for axis in (0, 1):  # more work takes no less time
        ticks = np.flip(np.minimum.accumulate(np.flip(ticks, axis), axis), axis)
    width = max(2 * _GIVEN, min(320, prefill_tokens // _ROWS))
    seconds = _shortest(lambda: _trees(runner, width), repeats)
    if (rounded := runner.verify) is not None:
        runner.verify = None
        exact = _shortest(lambda: _trees(runner, width), repeats)
        runner.verify = rounded if seconds < exact else None
        seconds = min(seconds, exact)
    return Costs(
        tuple(batches),
        tuple(map(tuple, ticks.tolist())),
        seconds / (_ROWS * width),
        rounded=runner.verify is not None,
    )


def _shortest(work: Callable[[], None], repeats: int) -> float:
    seconds: list[float] = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():  # does nothing where nothing was asked of it
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _tick(runner: Runner, cache: SlotCache, batch: int, chunk: int) -> None:
    device = runner.device
    length = max(1, min(cache.capacity // 2, cache.capacity - chunk))
    lengths = torch.full((batch,), length, device=device)
    tokens = torch.zeros((batch, chunk), dtype=torch.long, device=device)
    logits, _ = runner.decode(cache, tokens, lengths, length + chunk, False)
    law = make_law([Request(0, (0,), 0, Sampling(1))], device)
    rows = torch.zeros(batch * chunk, dtype=torch.long, device=device)
    runner.draw(logits.flatten(0, 1), rows, take(law, rows)).tokens.tolist()


def _trees(runner: Runner, width: int) -> None:
    """Rows of a prompt with chains of 64 nodes behind it."""
    step = np.arange(width)
    node = np.maximum(step - _GIVEN, 0)
    end = np.where(step < _GIVEN, EVERYTHING, _GIVEN + (node // 64 + 1) * 64)
    position = np.where(step < _GIVEN, step, _GIVEN + node % 64)
    columns = Columns(*(np.repeat(x[None], _ROWS, axis=0) for x in (step, end, position)))
    logits = runner.prefill([[0] * width] * _ROWS, [_GIVEN - 1] * _ROWS, False, columns).logits
    logits[0, 0].item()
