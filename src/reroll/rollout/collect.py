"""Collect: prompts in, graded groups out. Read this file first.

One collect starts every rollout of a batch of prompts, steps the engine until all have ended,
hands each to the graders the moment it ends (they work in other processes, the engine never waits
for them) and gives back whole groups in the order of the prompts. This is the synchronous
schedule: everything started is finished, nothing is stale. What changes which tokens are sampled
or trained never reads the clock, so a run can be repeated and resumed.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reroll.algo.noise import make_key
from reroll.engine.base import Engine, Finished
from reroll.errors import UserError
from reroll.rollout.decisions import Decisions, Start
from reroll.tasks.pool import Grade, GradeJob, GraderPool
from reroll.types import Finish, Group, Prompt, Purpose, Request, Rollout, Sampling

Progress = Callable[[int, int], None]
"""called with (rollouts finished, rollouts in all) after each tick that finished some"""


NOTHING = Decisions()
"""no technique decides anything"""


@dataclass(frozen=True, slots=True)
class CollectSpec:
    """What one collect samples and how it treats the results."""

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


@dataclass(slots=True)
class Collected:
    """Groups in the order of the prompts, and what happened on the way."""

    groups: list[Group]
    ungraded: int = 0
    truncated: int = 0
    first_failure: str = ""
    seconds_grading: float = 0.0
    """inside the grader processes"""
    tokens_known: int = 0
    """of completions whose grade was known already"""


def collect(
    engine: Engine,
    graders: GraderPool,
    decode: Callable[[list[int]], str],
    prompts: Sequence[Prompt],
    visits: Sequence[int],
    spec: CollectSpec,
    progress: Progress | None = None,
    decisions: Decisions = NOTHING,
) -> Collected:
    """Sample, grade and group `spec.samples` rollouts of each prompt.

    visits: how often each prompt had been started before, for this purpose; part of the key.
    decode: token ids to text, special tokens left out. decisions: of the techniques.
    Ungraded rollouts are counted; `check_failures` says when there are too many.
    """
    assert not graders.pending, "the graders still work for another collect"
    groups = [Group(prompt) for prompt in prompts]
    tokens_known = 0
    waiting: dict[int, Rollout] = {}
    try:
        requests: list[Request] = []
        for group, visit in zip(groups, visits, strict=True):
            starts = decisions.start(group.prompt, visit, spec.samples)
            for sample, start in enumerate(starts):
                requests.append(_request(group.prompt, sample, start, spec, len(requests)))
                rollout = Rollout(group.prompt, sample, visit, key_visit=start.key_visit)
                waiting[requests[-1].id] = rollout
                group.rollouts.append(rollout)
        if decisions.stagger:  # a stable sort: those with drafts first, in whole groups
            requests.sort(key=lambda r: -1 if r.drafts else waiting[r.id].sample)
        for request in requests:
            engine.submit(request)
        by_id = dict(waiting)
        while waiting:
            before = len(waiting)
            for event in engine.step():
                if isinstance(event, Finished):
                    rollout = waiting.pop(event.completion.request_id)
                    rollout.completion = event.completion
                    job = _job(rollout, event.completion.request_id, decode, spec)
                    if (known := decisions.grade(rollout)) is None:
                        graders.submit(job)
                    else:
                        rollout.reward, rollout.rewards = known
                        tokens_known += len(rollout.completion.token_ids)
            _take_grades(graders.poll(), by_id)
            if progress is not None and len(waiting) != before:
                progress(len(by_id) - len(waiting), len(by_id))
        while graders.pending:
            _take_grades(graders.poll(wait=True), by_id)
    except BaseException:
        # an interrupted collect leaves the engine empty, so that weights can be saved or changed
        engine.abort(None, "collect interrupted")
        raise
    collected = _finish(groups, spec)
    collected.tokens_known = tokens_known
    return collected


def _request(
    prompt: Prompt, sample: int, start: Start, spec: CollectSpec, request_id: int
) -> Request:
    key = make_key(spec.seed, spec.purpose, prompt.row, sample, start.key_visit)
    return Request(
        request_id,
        prompt.token_ids,
        key,
        spec.sampling,
        drafts=start.drafts,
        lenience=start.lenience,
    )


def _job(
    rollout: Rollout, job_id: int, decode: Callable[[list[int]], str], spec: CollectSpec
) -> GradeJob:
    prompt = rollout.prompt
    rollout.text = decode(rollout.completion.token_ids)
    # evaluations come again with the same keys and other weights: the text tells them apart
    mark = zlib.crc32(rollout.text.encode("utf-8", "replace"))
    name = f"{spec.label or spec.purpose}/{prompt.row}/{rollout.sample}/{rollout.visit}/{mark:08x}"
    return GradeJob(job_id, name, prompt.text, rollout.text, prompt.answer, prompt.columns)


def _take_grades(grades: Sequence[Grade], rollouts: dict[int, Rollout]) -> None:
    for grade in grades:
        rollout = rollouts[grade.id]
        rollout.reward, rollout.rewards = grade.reward, grade.rewards or {}
        rollout.failure, rollout.seconds_grading = grade.failure, grade.seconds


def settle(rollout: Rollout, spec: CollectSpec) -> None:
    """Apply the policy for truncated completions, once graded.

    keep: as graded. mask: no gradient, but its reward stays in the group's statistics.
    zero: reward 0. penalty: reward minus `spec.penalty`.
    """
    if rollout.completion.finish is not Finish.LENGTH or rollout.reward is None:
        return
    if spec.truncated == "mask":
        rollout.completion.loss_mask = [False] * len(rollout.completion.loss_mask)
    elif spec.truncated == "zero":
        rollout.reward = 0.0
    elif spec.truncated == "penalty":
        rollout.reward -= spec.penalty


def _finish(groups: list[Group], spec: CollectSpec) -> Collected:
    """Settle every rollout, count what went wrong."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for rollout in rollouts:
        settle(rollout, spec)
    ungraded = [rollout for rollout in rollouts if rollout.reward is None]
    return Collected(
        groups,
        ungraded=len(ungraded),
        truncated=sum(r.completion.finish is Finish.LENGTH for r in rollouts),
        first_failure=(
            min(ungraded, key=lambda r: (r.prompt.row, r.sample)).failure if ungraded else ""
        ),
        seconds_grading=sum(r.seconds_grading for r in rollouts),
    )


def check_failures(collected: Collected, max_failures: float) -> None:
    """Raise UserError when more than that share of a batch's rollouts came back ungraded."""
    count = sum(len(group.rollouts) for group in collected.groups)
    if collected.ungraded > math.floor(max_failures * count):
        raise UserError(
            f"grading.max_failures = {max_failures}: {collected.ungraded} of {count} rollouts "
            f"came back ungraded; the first failure was:\n{collected.first_failure.rstrip()}"
        )
