"""Schedules compared without a model: the collector of a run on an engine that only counts.

Collector, schedules, buffer and figures are those of training; engine, lengths and the time of an
update are simulated (`engine/simulated.py`, `workload.py`). Rollouts and updates take turns, as in
a run. Nothing here says what staleness does to learning: only what a schedule costs and saves.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reroll.config.simulate import SimulateConfig
from reroll.engine.clock import Cost
from reroll.engine.simulated import SimulatedEngine
from reroll.occupancy import lag_metrics, length_bias, schedule_metrics
from reroll.rollout.buffer import Buffer
from reroll.rollout.collect import Collector
from reroll.rollout.collected import Collected, CollectSpec
from reroll.rollout.decisions import Decisions, Graded
from reroll.rollout.policies import fifo, make_schedule
from reroll.rollout.unit import Unit
from reroll.timeline import Occupancy, batch_of
from reroll.types import Group, Purpose, Sampling
from reroll.workload import Arm, Replies, make_arms, train_rate

POINTS = 8192
"""of the cumulated slot time that are kept at most, for the picture"""


@dataclass(slots=True)
class Result:
    """What came of an arm, without its warm-up."""

    arm: Arm
    figures: dict[str, float]
    """see `docs/glossary.md`; seconds and tokens are sums, the others of all that was trained on"""
    occupancy: Occupancy
    timeline: list[dict[str, Any]]
    """batches as `timeline.draw_timeline` wants them, if asked for"""


def simulate(
    config: SimulateConfig,
    cost: Cost,
    replies: Replies,
    watch: bool = False,
    progress: Callable[[Arm], None] | None = None,
) -> list[Result]:
    """Run every arm. watch: keep every stay in a slot, for timelines."""
    results = []
    for arm in make_arms(config):
        if progress is not None:
            progress(arm)
        results.append(run_arm(config, arm, cost, replies, watch))
    return results


def run_arm(
    config: SimulateConfig, arm: Arm, cost: Cost, replies: Replies, watch: bool = False
) -> Result:
    """Simulate one schedule: its warm-up, then the updates that are measured."""
    with _no_cycles_sought():
        run = _Run(config, arm, cost, replies)
        for _ in range(math.ceil(config.warmup / arm.split)):
            run.update()
        run.measure(watch)
        for _ in range(math.ceil(config.updates / arm.split)):
            run.update()
        result = Result(arm, run.figures(), run.occupancy, run.timeline)
        run.close()
    return result


@dataclass(slots=True)
class _Sums:
    """Over the batches that are measured."""

    batches: int = 0
    seconds: float = 0.0
    clock: float = 0.0
    """of collecting alone"""
    idle: float = 0.0
    """of these seconds, by the share of slots that were idle"""
    trained: float = 0.0
    """tokens"""
    drawn: float = 0.0
    """and those lost"""
    ticks: int = 0
    """of all replicas"""
    busy: int = 0
    """tokens drawn in them: slots that were not idle"""
    resumed: float = 0.0
    stale: float = 0.0
    lag_max: float = 0.0
    restarts: float = 0.0
    lengths: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)


class _NoGraders:
    """Rewards are known; see `Decisions.grade`."""

    pending = 0

    def submit(self, job: object) -> None:
        raise AssertionError("nothing is to be graded")

    def poll(self, wait: bool = False) -> tuple[()]:
        return ()


class _Run:
    """An arm on its way."""

    def __init__(self, config: SimulateConfig, arm: Arm, cost: Cost, replies: Replies) -> None:
        self.arm, self.config = arm, config
        self.engine = SimulatedEngine(
            replies.length, cost, slots=config.slots, replicas=arm.replicas
        )
        slots = config.slots * arm.replicas
        schedule = make_schedule(arm.schedule, slots)
        if arm.oracle:
            schedule = replace(
                schedule,
                order=lambda member: (-replies.length(member.request), *fifo(member)),
                by_sibling=False,
                ahead=None,
            )
        self.units: list[Unit] = []
        """of the last batch"""

        def harvest(buffer: Buffer) -> list[Unit] | None:
            if (units := schedule.harvest(buffer)) is not None:
                self.units = units
            return units

        self.buffer = Buffer(
            config.prompts * arm.split, config.samples, slots, patience=schedule.patience
        )
        spec = CollectSpec(Purpose.TRAIN, config.seed, config.samples, Sampling(replies.cap))
        known = Graded(0.0, {})
        self.collector = Collector(
            self.engine, _NoGraders(), lambda ids: "", replies.source, spec,
            replace(schedule, harvest=harvest), self.buffer,
            Decisions(grade=lambda rollout: known),
        )  # fmt: skip
        self.rate = train_rate(config) * arm.replicas
        self.measure(watch=False)

    def measure(self, watch: bool) -> None:
        """Count from here on."""
        self.sums = _Sums()
        self.occupancy = Occupancy(self.engine.stats().capacity, self.engine.clock, POINTS)
        self.begin, self.timeline = self.engine.clock, []
        self.engine.spans = [] if watch else None
        self._mark(stay=True)

    def _mark(self, stay: bool = False) -> None:
        self.occupancy.add(self.engine.clock, self.engine.stats().slot_seconds, stay)

    def update(self) -> None:
        """Collect a batch and train on it, in so many updates as the arm has for it."""
        engine, split = self.engine, self.arm.split
        before, begin = replace(engine.stats()), engine.clock
        before.seconds = dict(before.seconds)
        collected = self.collector.next(lambda ended, whole: self._mark())
        self._mark(stay=True)
        version = engine.policy_version
        metrics = schedule_metrics(collected, before, engine.stats(), engine.clock - begin, version)
        if engine.spans is not None:
            update = len(self.timeline) + 1
            self.timeline.append(batch_of(update, engine.spans, self.buffer, collected, self.begin))
            engine.spans.clear()
        tokens = self._add(collected, metrics, engine.clock - begin)
        self.sums.ticks += engine.stats().ticks - before.ticks
        self.sums.busy += engine.stats().tokens_drawn - before.tokens_drawn
        pause = tokens / self.rate + self.config.sync_seconds
        self.occupancy.pause(engine.clock, pause)
        engine.advance(pause)
        self._mark(stay=True)
        self.sums.seconds += engine.clock - begin
        engine.load_weights(version + split, keep=bool(self.buffer.running))
        _take_apart(self.units)

    def _add(self, collected: Collected, metrics: dict[str, float], clock: float) -> int:
        """Count a batch; returns its trained tokens."""
        sums, version, tokens = self.sums, self.engine.policy_version, 0
        for later, part in enumerate(_parts(collected.trained(), self.arm.split)):
            lengths = [len(r.completion.token_ids) for group in part for r in group.rollouts]
            sums.lengths += lengths
            sums.stale += lag_metrics(part, version + later)["offpolicy_tokens"] * sum(lengths)
            tokens += sum(lengths)
        sums.batches += 1
        sums.clock += clock
        sums.idle += metrics["bubble"] * clock
        sums.trained += tokens
        sums.drawn += tokens / (1 - metrics["waste"])
        sums.resumed += metrics["reprefill"] * tokens
        sums.restarts += metrics["restarts"]
        sums.lag_max = max(sums.lag_max, metrics["lag_max"] + self.arm.split - 1)
        sums.cut += collected.cut
        sums.lost += collected.lost
        sums.waits += collected.waits
        return tokens

    def close(self) -> None:
        """Let go of everything under way."""
        _take_apart(list(self.buffer.units()))
        del self.collector, self.buffer, self.engine

    def figures(self) -> dict[str, float]:
        """Of all batches since `measure`."""
        sums, updates = self.sums, self.sums.batches * self.arm.split
        late = np.percentile(sums.waits, 99, method="inverted_cdf") if sums.waits else 0
        return {
            "goodput": sums.trained / sums.seconds,
            "bubble": sums.idle / sums.clock,
            "bubble_ticks": 1 - sums.busy / (self.config.slots * sums.ticks),
            "waste": 1 - sums.trained / sums.drawn,
            "offpolicy_tokens": sums.stale / sums.trained,
            "lag_max": sums.lag_max,
            "reprefill": sums.resumed / sums.trained,
            "length_bias": length_bias(sums.lengths, sums.cut, sums.lost),
            "wait_p99": float(late),
            "wait_max": float(max(sums.waits, default=0)),
            "restarts": sums.restarts,
            "updates": float(updates),
            "seconds": sums.seconds,
            "seconds_update": sums.seconds / updates,
            "tokens_trained": sums.trained,
        }


def _parts(groups: Sequence[Group], parts: int) -> Iterator[Sequence[Group]]:
    """The groups in so many parts, in order."""
    size = math.ceil(len(groups) / parts)
    return (groups[start : start + size] for start in range(0, len(groups), size))


def _take_apart(units: Sequence[Unit]) -> None:
    """Units and members point at each other: without this only a search would free them."""
    for unit in units:
        unit.members.clear()
        unit.done.clear()


@contextmanager
def _no_cycles_sought() -> Iterator[None]:
    """Without searches for cyclic garbage: with millions of rollouts alive they take most of the
    time, and batches are taken apart by hand."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
