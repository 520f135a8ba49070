"""What ticks cost on a virtual clock, and a replica that ticks on it.

A tick is one decode step of a replica, in which `batch` requests, which together attend to
`context` tokens, each advance by one token. All times are in seconds, or in any other unit that is
used throughout. A tick takes more than 0 seconds, and no less with more context.
"""

import math
from bisect import bisect_right, insort
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol

ROUNDING = 1e-6
"""share of a tick below which a difference in time is taken for a rounding error"""

_ORDER = 48
_LAST = (1 << _ORDER) - 1
"""bits of a request's number below the tick at which it ends"""


class Cost(Protocol):
    """What the simulated engine asks."""

    def tick(self, batch: int, context: float) -> float:
        """Seconds of one decode step."""
        ...

    def prefill(self, tokens: int) -> float:
        """Seconds of reading so many tokens before the first step."""
        ...


@dataclass(frozen=True, slots=True)
class Linear:
    """Seconds: `base` a tick, and so many for each request and for each token attended to.

    The toy law tau(b) = 1 + b / b0 is `Linear(1, 1 / b0)`.
    """

    base: float
    per_request: float
    per_context: float = 0.0
    per_prefill: float = 0.0
    """a token read before the first step"""

    def tick(self, batch: int, context: float) -> float:
        """Seconds: base + per_request * batch + per_context * context."""
        return self.base + self.per_request * batch + self.per_context * context

    def prefill(self, tokens: int) -> float:
        """Seconds: per_prefill * tokens."""
        return self.per_prefill * tokens


@dataclass(frozen=True, slots=True)
class Table:
    """Measured: `seconds[i]` is a tick of `batches[i]` requests, whatever they attend to.

    Linear in between; below the first batch its seconds, beyond the last one its slope goes on (if
    it falls, by a measurement's noise, the last seconds). Raises ValueError for batches that do
    not ascend, seconds that are not above 0, or a table without rows.
    """

    batches: tuple[int, ...]
    seconds: tuple[float, ...]
    per_prefill: float = 0.0
    """seconds of a token read before the first step"""

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.batches, self.batches[1:], strict=False))
        matching = len(self.batches) == len(self.seconds) > 0
        if not ascending or not matching or min(self.seconds) <= 0:
            raise ValueError(f"not a table of ticks: {self.batches}, {self.seconds}")

    def tick(self, batch: int, context: float) -> float:
        """Seconds by the table; `context` does not count."""
        batches, seconds = self.batches, self.seconds
        right = min(bisect_right(batches, batch), len(batches) - 1)
        if right == 0:
            return seconds[0]
        slope = (seconds[right] - seconds[right - 1]) / (batches[right] - batches[right - 1])
        if batch > batches[right]:
            return seconds[right] + max(slope, 0.0) * (batch - batches[right])
        return seconds[right - 1] + slope * (batch - batches[right - 1])

    def prefill(self, tokens: int) -> float:
        """Seconds: per_prefill * tokens."""
        return self.per_prefill * tokens


@dataclass(frozen=True, slots=True)
class Roofline:
    """What the hardware cannot beat: a tick waits for its memory or for its arithmetic.

    memory = (parameters * weight_bytes + kv_bytes * context) / bandwidth
    compute = 2 * parameters * batch / flops
    tick = overhead + max(memory, compute)
    prefill = 2 * parameters * tokens / flops

    Weights are read once a tick, keys and values once for each token attended to; the arithmetic
    of attention is left out.
    """

    bandwidth: float
    """bytes a second"""
    flops: float
    """a second"""
    parameters: float
    """that a token passes"""
    kv_bytes: float
    """keys and values of one token, all layers"""
    weight_bytes: float = 2
    """of one parameter"""
    overhead: float = 0.0
    """seconds a tick takes besides: launches, sampling, scheduling"""

    def tick(self, batch: int, context: float) -> float:
        """Seconds, by the class's formula."""
        memory = (self.parameters * self.weight_bytes + self.kv_bytes * context) / self.bandwidth
        return self.overhead + max(memory, 2 * self.parameters * batch / self.flops)

    def prefill(self, tokens: int) -> float:
        """Seconds, by the class's formula; no overhead."""
        return 2 * self.parameters * tokens / self.flops


def stretch(cost: Cost, steps: int, batch: int, context: float) -> float:
    """Seconds of `steps` ticks of the same requests, which attend to `context` tokens in the first
    and to `batch` more in each next one.

    It is `steps` times the tick in the middle: exact where a tick is linear in its context. Where
    it bends upwards (a roofline's corner) and the stretch spans the bend, a little too short.
    """
    return steps * cost.tick(batch, context + batch * (steps - 1) / 2)


def steps_within(cost: Cost, seconds: float, batch: int, context: float) -> int:
    """The largest number of whole ticks whose `stretch` is no longer than `seconds`.

    A tick that ends within `ROUNDING` of itself after `seconds` is counted.
    """
    first = cost.tick(batch, context)
    limit = seconds + ROUNDING * first
    low, high = 0, int(limit / first)  # no tick is shorter than the first
    if stretch(cost, high, batch, context) <= limit:
        return max(high, 0)
    while high - low > 1:
        middle = (low + high) // 2
        if stretch(cost, middle, batch, context) <= limit:
            low = middle
        else:
            high = middle
    return low


class Replica:
    """Slots that tick together, from one change of their requests to the next.

        |- tick -|- tick -|--- prefill of c ---|- tick -|
                     ^    ^                    ^        ^
                     now  `until`              `at`     `due`, if somebody ends here

    Here a request left in mid-tick and c took its slot: the others see that tick through, which is
    counted already, and c joins them in the next one, once it is read.
    """

    __slots__ = (
        "at", "changed", "context", "due", "ends", "index", "log", "prompt", "tick", "until",
    )  # fmt: skip

    def __init__(self, index: int) -> None:
        self.index = index
        self.ends: list[int] = []
        """of each request, ascending: the tick after which it ends, then its number"""
        self.context = 0
        """tokens attended to in the next tick: each request's prompt and the tokens it has"""
        self.tick = 0
        """ticks counted; the last of them is still going on if the clock is before `until`"""
        self.until = self.at = 0.0
        """the end of the last tick counted; the start of the next one, after prefills"""
        self.due = math.inf
        """when the next request ends; infinite: none, or to be planned anew"""
        self.changed = False
        self.prompt: tuple[int, ...] | None = None
        """read last, under the present weights"""
        self.log: list[tuple[int, int]] = []
        """(tick, version): tokens drawn after that many ticks are of that version"""

    def begin(self, now: float, version: int) -> None:
        """Start afresh where nothing runs: what was going on when the last one left is void."""
        self.at = self.until = now
        self.log = [(self.tick, version)]

    def add(self, number: int, ticks: int) -> None:
        """A request, by a number of at most 48 bits, joins for so many ticks."""
        insort(self.ends, self.tick + ticks << _ORDER | number)

    def remove(self, numbers: set[int]) -> None:
        """These requests leave."""
        self.ends = [end for end in self.ends if end & _LAST not in numbers]

    def ended(self) -> list[int]:
        """Take out those whose last tick has been counted: their numbers, ascending."""
        ends, last, numbers = self.ends, self.tick << _ORDER | _LAST, []
        while ends and ends[0] <= last:
            numbers.append(ends.pop(0) & _LAST)
        return numbers

    def left(self) -> int:
        """Ticks not counted yet until the next request ends."""
        return (self.ends[0] >> _ORDER) - self.tick

    def plan(self, cost: Cost) -> None:
        """Set `due`; something must be running."""
        batch, steps = len(self.ends), self.left()
        self.due = self.until
        if steps > 0:
            self.due = self.at + stretch(cost, steps, batch, self.context)

    def whole(self, cost: Cost, now: float) -> int:
        """Ticks that have ended by now; something must be running."""
        if now < self.until:
            return self.tick - 1
        if now <= self.at:
            return self.tick
        return self.tick + steps_within(cost, now - self.at, len(self.ends), self.context)

    def settle(self, cost: Cost, now: float) -> int:
        """Count the ticks since `at`, with one that is going on: what changes now comes after it.
        Returns how many were counted."""
        batch = len(self.ends)
        if not batch or now <= self.at:
            return 0
        steps = self.whole(cost, now) - self.tick
        until = self.at + stretch(cost, steps, batch, self.context)
        if now - until > ROUNDING * cost.tick(batch, self.context + batch * steps):
            steps += 1
            until = self.at + stretch(cost, steps, batch, self.context)
        else:
            until = min(until, now)
        self.move(steps, until)
        return steps

    def move(self, steps: int, until: float) -> None:
        """Count so many ticks of all requests."""
        self.tick += steps
        self.context += steps * len(self.ends)
        self.at = self.until = until

    def reload(self, cost: Cost, now: float, version: int) -> None:
        """Other weights: tokens whose ticks end from now on are of this version."""
        self.prompt = None
        if self.ends:
            whole = self.whole(cost, now)
            while self.log and self.log[-1][0] >= whole:
                self.log.pop()
            self.log.append((whole, version))

    def versions(self, start: int, drawn: int) -> list[tuple[int, int]]:
        """(version, count) stretches of the tokens drawn in so many ticks after tick `start`."""
        log = self.log
        if log[-1][0] <= start:
            return [(log[-1][1], drawn)]
        stretches, end = [], start + drawn
        for place in range(bisect_right(log, start, key=itemgetter(0)) - 1, len(log)):
            begin = max(log[place][0], start)
            stop = min(log[place + 1][0], end) if place + 1 < len(log) else end
            stretches.append((log[place][1], max(stop - begin, 0)))
        return stretches
