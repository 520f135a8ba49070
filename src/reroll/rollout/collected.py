"""What collect is asked for and what it gives back: a batch, graded and settled."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from reroll.errors import UserError
from reroll.rollout.unit import Unit
from reroll.tasks.pool import Grade, GradeJob
from reroll.types import Finish, Group, Purpose, Rollout, Sampling

Progress = Callable[[int, int], None]
"""called with (rollouts finished, rollouts in all) after each tick that finished some"""


class Graders(Protocol):
    """What collect needs of `tasks/pool.py`."""

    @property
    def pending(self) -> int:
        """Jobs without a grade."""
        ...

    def submit(self, job: GradeJob) -> None:
        """Take a job in."""
        ...

    def poll(self, wait: bool = False) -> Sequence[Grade]:
        """Grades that have come; wait: at least one."""
        ...


@dataclass(frozen=True, slots=True)
class CollectSpec:
    """What is sampled and how the results are treated."""

    purpose: Purpose
    seed: int
    """seed of the run, part of every noise key"""
    samples: int
    """rollouts of each prompt"""
    sampling: Sampling
    truncated: str = "keep"
    """keep, mask, zero or penalty: what a completion cut by its limit earns (see `settle`)"""
    penalty: float = 0.0
    label: str = ""
    """names the collect to the graders (recorded time-outs go by it); empty: the purpose"""
    apart: bool = False
    """whether a batch is made of rollouts instead of groups"""
    held: bool = False
    """whether a rollout that is started anew keeps its noise, with its tokens as a draft"""


@dataclass(slots=True)
class Collected:
    """Groups of a batch, and what happened on the way."""

    groups: list[Group]
    """in the order of the batch (sync: of the prompts)"""
    live: list[Group] | None = None
    """those of them that are trained on; None: all (no dynamic sampling)"""
    ungraded: int = 0
    truncated: int = 0
    first_failure: str = ""
    seconds_grading: float = 0.0
    """inside the grader processes"""
    tokens_known: int = 0
    """of completions whose grade was known already"""
    tokens_dropped: int = 0
    """drawn since the last batch, or kept until then, and never to be trained on"""
    cut: list[int] = field(default_factory=list)
    """tokens of each rollout that was dropped before it ended"""
    lost: list[int] = field(default_factory=list)
    """tokens of each rollout that had ended and was dropped"""
    restarts: int = 0
    """rollouts that lost tokens and are started anew"""
    waits: list[int] = field(default_factory=list)
    """updates from admission to training of each unit"""
    update: int = 0
    """batches before this one"""

    def trained(self) -> list[Group]:
        """The groups to train on."""
        return self.groups if self.live is None else self.live


def grade_job(rollout: Rollout, job_id: int, spec: CollectSpec) -> GradeJob:
    """The graders' job for a rollout that has ended and whose text is there."""
    prompt = rollout.prompt
    # evaluations come again with the same keys and other weights: the text tells them apart
    mark = zlib.crc32(rollout.text.encode("utf-8", "replace"))
    place = f"{prompt.row}/{prompt.trace:x}+{prompt.cut}" if prompt.trace else f"{prompt.row}"
    name = f"{spec.label or spec.purpose}/{place}/{rollout.sample}/{rollout.visit}/{mark:08x}"
    return GradeJob(job_id, name, prompt.text, rollout.text, prompt.answer, prompt.columns)


def earned(rollout: Rollout, spec: CollectSpec) -> float | None:
    """What a graded rollout's reward will be once it is settled; see `settle`."""
    if rollout.completion.finish is Finish.LENGTH and rollout.reward is not None:
        if spec.truncated == "zero":
            return 0.0
        if spec.truncated == "penalty":
            return rollout.reward - spec.penalty
    return rollout.reward


def settle(rollout: Rollout, spec: CollectSpec) -> None:
    """Apply the policy for truncated completions, once graded.

    keep: as graded. mask: no gradient, but its reward stays in the group's statistics.
    zero: reward 0. penalty: reward minus `spec.penalty`.
    """
    rollout.reward = earned(rollout, spec)
    cut = rollout.completion.finish is Finish.LENGTH and rollout.reward is not None
    if cut and spec.truncated == "mask":
        rollout.completion.loss_mask = [False] * len(rollout.completion.loss_mask)


def finish(collected: Collected, spec: CollectSpec) -> Collected:
    """Settle every rollout, count what went wrong."""
    rollouts = [rollout for group in collected.groups for rollout in group.rollouts]
    pruned = [rollout for group in collected.groups for rollout in group.pruned]
    for rollout in (*rollouts, *pruned):
        settle(rollout, spec)
    ungraded = [rollout for rollout in rollouts if rollout.reward is None]
    collected.ungraded = len(ungraded)
    collected.truncated = sum(r.completion.finish is Finish.LENGTH for r in rollouts)
    if ungraded:
        collected.first_failure = min(ungraded, key=lambda r: (r.prompt.identity, r.sample)).failure
    collected.seconds_grading = sum(r.seconds_grading for r in rollouts)
    return collected


def check_failures(collected: Collected, max_failures: float) -> None:
    """Raise UserError when more than that share of a batch's rollouts came back ungraded."""
    count = sum(len(group.rollouts) for group in collected.groups)
    if collected.ungraded > math.floor(max_failures * count):
        raise UserError(
            f"grading.max_failures = {max_failures}: {collected.ungraded} of {count} rollouts "
            f"came back ungraded; the first failure was:\n{collected.first_failure.rstrip()}"
        )


def groups_of(units: Sequence[Unit]) -> list[Group]:
    """Groups of a batch's units: single rollouts of one visit to a prompt are put together, those
    with another prefix never."""
    found: dict[tuple[tuple[int, int, int], int], Group] = {}
    for unit in units:
        group = unit.group()
        known = found.setdefault((unit.prompt.identity, unit.visit), group)
        if known is not group:
            known.rollouts += group.rollouts
    return list(found.values())
