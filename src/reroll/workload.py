"""What a simulation is made of: schedules, what ticks cost, and how long replies are.

Lengths are functions of (seed, row) and of the request's noise key, so that they depend neither on
the schedule nor on when a request is asked again.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, cast

from reroll.config import ScheduleSection
from reroll.config.simulate import SimulateConfig
from reroll.engine.clock import Cost, Linear, Roofline, Table
from reroll.engine.costs import load_costs
from reroll.errors import UserError
from reroll.rollout.storefile import errors_of, open_file
from reroll.rundir import RunDir
from reroll.types import Prompt, Request

_BITS = 16
_MASK = (1 << _BITS) - 1
_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the table."""

    name: str
    schedule: ScheduleSection
    replicas: int = 1
    split: int = 1
    """updates that each batch is split into"""
    oracle: bool = False
    """whether rollouts run longest first by lengths that nobody can know"""


@dataclass(frozen=True, slots=True)
class Replies:
    """How long the replies of a stream of prompts are."""

    length: Callable[[Request], int]
    """completion tokens, at least 1; of requests with prompts from `source`"""
    cap: int
    """and at most"""
    problems: int
    """that come round and round; 0: without end"""
    prompt_tokens: int

    def source(self, start: int, count: int) -> tuple[list[Prompt], list[int]]:
        """(prompts, visits) of `count` places of the stream, from place `start`."""
        problems = self.problems or start + count
        places = [divmod(place, problems) for place in range(start, start + count)]
        return [self._prompt(row) for _, row in places], [visit for visit, _ in places]

    def _prompt(self, row: int) -> Prompt:
        """A prompt whose tokens are numbers that no other one has; nobody reads them."""
        tokens = range(row * self.prompt_tokens, (row + 1) * self.prompt_tokens)
        return Prompt(row, "", cast("tuple[int, ...]", tokens))


def make_arms(config: SimulateConfig) -> list[Arm]:
    """Every schedule at every value of what is swept, for each number of replicas."""
    return [
        replace(arm, replicas=replicas)
        for replicas in config.replicas
        for name in dict.fromkeys(config.schedules)
        for arm in _variants(name, config)
    ]


def _variants(name: str, config: SimulateConfig) -> Iterator[Arm]:
    def section(**values: Any) -> ScheduleSection:
        return ScheduleSection.model_validate({"max_lag": config.max_lag} | values)

    match name:
        case "sync_split":
            for n in config.batches:
                yield Arm(f"sync, split in {n}", section(), split=n)
        case "sorted_on_policy" | "sorted_strict" | "sorted":
            mode = "on_policy" if name == "sorted_on_policy" else "partial"
            how = {"sorted_on_policy": "on-policy", "sorted": "refill"}.get(name, "partial")
            for n in config.batches:
                values = {"batches": n, "mode": mode, "refill": name == "sorted"}
                yield Arm(f"sorted {n}, {how}", section(kind="sorted", **values))
        case "april":
            for over in config.over:
                yield Arm(f"april {over:g}", section(kind="april", over=over))
        case "oracle":
            yield Arm("oracle order", section(kind="longest_first"), oracle=True)
        case "tail_batch":
            for over in config.tail_over:
                yield Arm(f"tail batch {over:g}", section(kind="tail_batch", over=over))
        case _:
            yield Arm(name.replace("_", " "), section(kind=name))


def make_cost(config: SimulateConfig) -> Cost:
    """What a replica's ticks take, in seconds. Raises UserError for a run without a table."""
    if config.costs:
        path = RunDir(config.costs).costs_path
        if (costs := load_costs(path)) is None:
            raise UserError(
                f"costs = {config.costs!r}: no {path.name} there; a run with reuse.on measures one"
            )
        ticks = tuple(costs.tick(batch) for batch in costs.batches)
        return Table(costs.batches, ticks, costs.prefill)
    if config.tick_base:
        return Linear(config.tick_base, config.tick_per_request)
    bandwidth, flops = config.hardware
    return Roofline(bandwidth, flops, config.parameters, config.kv_bytes, overhead=config.overhead)


def train_rate(config: SimulateConfig) -> float:
    """Tokens that a replica trains on in a second; infinite if that takes no time."""
    if config.train_tokens_per_second:
        return config.train_tokens_per_second
    if config.costs or config.tick_base:
        return math.inf
    return config.hardware[1] / (6 * config.parameters)


def make_replies(config: SimulateConfig) -> Replies:
    """By the log-normal law, or as a run recorded them. Raises UserError for a run without any."""
    tokens = config.prompt_tokens
    if config.run:
        recorded = recorded_lengths(config.run)
        cap = max(map(max, recorded))
        return Replies(_drawn(recorded, tokens), cap, len(recorded), tokens)
    return Replies(_lognormal(config), config.cap, config.problems, tokens)


def recorded_lengths(run: str | Path) -> list[list[int]]:
    """Completion tokens of every stored rollout of a run, a list for each problem.

    Raises UserError if the run has no store, or one that cannot be read.
    """
    path = RunDir(run).store_path
    if not path.exists():
        raise UserError(f"run = {str(run)!r}: no {path.name} there; a run with reuse.on writes one")
    rows: dict[int, list[int]] = {}
    with errors_of(path), closing(open_file(path)) as db:
        for row, length in db.execute(
            "SELECT row, length FROM overview ORDER BY row, visit, sample"
        ):
            rows.setdefault(row, []).append(max(1, length))
    if not rows:
        raise UserError(f"run = {str(run)!r}: its {path.name} holds no rollouts")
    return list(rows.values())


def _drawn(recorded: Sequence[Sequence[int]], tokens: int) -> Callable[[Request], int]:
    """One of the prompt's recorded lengths, by the request's key."""

    def length(request: Request) -> int:
        lengths = recorded[request.prompt_ids[0] // tokens]
        return lengths[(request.key & _WORD) % len(lengths)]

    return length


def _lognormal(config: SimulateConfig) -> Callable[[Request], int]:
    """floor(median * exp(p + e)) in [1, cap], p of the prompt and e of the request normal with
    variances prompt_share * spread^2 and (1 - prompt_share) * spread^2.

    Both are looked up by 16 bits of a hash in a table of normal quantiles: a tenth of the time of
    drawing them, and the moments differ by less than 1e-4 of themselves.
    """
    tokens, cap, normal = config.prompt_tokens, config.cap, NormalDist()
    quantiles = [normal.inv_cdf((i + 0.5) / (_MASK + 1)) for i in range(_MASK + 1)]
    between = config.spread * math.sqrt(config.prompt_share)
    within = config.spread * math.sqrt(1 - config.prompt_share)
    medians = [config.median * math.exp(between * z) for z in quantiles]
    factors = [math.exp(within * z) for z in quantiles]
    start = _mix(config.seed)

    def length(request: Request) -> int:
        median = medians[_mix(start + request.prompt_ids[0] // tokens) & _MASK]
        return max(1, int(min(median * factors[request.key & _MASK], cap)))

    return length


def _mix(x: int) -> int:
    """SplitMix64 of a counter, as in `algo/noise.py`."""
    x = (x + 1) * 0x9E3779B97F4A7C15 & _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31
