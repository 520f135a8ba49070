"""Prefixes: how much of an old success a hard problem is given, and the prompt that this makes.

PrefixRL (arXiv 2601.18795) cuts every trace at three places, drawn once between 40 and 80 % of its
tokens. The other rules: a cut that keeps the success rate where it teaches most, and goes to
nothing as the policy gets better (AdaPrefix-GRPO, arXiv 2607.07674); the shortest that helps (POPE,
arXiv 2601.18779); one schedule for all (QuestA, arXiv 2507.13266).

A cut is in tokens, by token ids: the prefix is an unfinished reply of the policy, never decoded and
read again, and never put through a chat template.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from reroll.algo.noise import make_key
from reroll.config import PrefixSection
from reroll.rollout.traces import Trace
from reroll.types import Prompt

RUNG = 0.1
"""share of a trace by which `minimal` goes up or down"""


def with_prefix(prompt: Prompt, trace: Trace, cut: int) -> Prompt:
    """The problem, to be gone on with from the first `cut` tokens of a trace; 0: the problem."""
    if cut <= 0:
        return prompt
    return replace(prompt, prefix_ids=trace.token_ids[:cut], trace=trace.id, cut=cut)


def limit(trace: Trace, config: PrefixSection) -> int:
    """Tokens of a trace that may be given at most; below 1: it is of no use."""
    end = trace.answer_at if config.guard else len(trace.token_ids)
    return min(end, len(trace.token_ids) - config.least, config.most)


def frozen_cuts(trace: Trace, config: PrefixSection, seed: int, ends: Sequence[int]) -> list[int]:
    """`uniform` and `step`: the places where a trace is cut, rising; drawn once and for all.

    ends: places where a step ends. Raises ValueError for a trace of no use.
    """
    rng = random.Random(make_key(seed, "cuts", trace.row, 0, 0, trace.id))
    found = {_within(trace, config, _drawn(rng, config)) for _ in range(config.per_trace)}
    if config.cut == "step":
        found = {_at_step(cut, ends) for cut in found}
    return sorted(found)


def cut_at(trace: Trace, config: PrefixSection, share: float) -> int:
    """A share of a trace in tokens, within what may be given; 0: nothing."""
    return max(0, min(round(share * len(trace.token_ids)), limit(trace, config)))


def drawn_share(config: PrefixSection, seed: int, row: int, visit: int) -> float:
    """`resample`: the share of a trace given at a visit."""
    return _drawn(random.Random(make_key(seed, "cuts", row, 1, visit)), config)


def scheduled_share(config: PrefixSection, done: float) -> float:
    """`schedule`: the share given once `done` of the run is over: a cosine from `high` to 0."""
    if done >= config.until:
        return 0.0
    return config.high * 0.5 * (1 + math.cos(math.pi * done / config.until))


def first_share(config: PrefixSection) -> float:
    """`target`, `minimal`: where a problem begins."""
    return config.high if config.cut == "target" else min(RUNG, config.high)


def next_share(config: PrefixSection, share: float, success: float, equal: bool) -> float:
    """`target`, `minimal`: the share that a problem is given after a group with this success rate.

    success: of all that were started, also of those that were stopped: what pruning leaves has the
    rate that pruning gives it. equal: whether they all earned the same.
    """
    if config.cut == "target":
        wanted = share - config.gain * (success - config.success)
    else:  # up while nothing works, down while nothing fails
        wanted = share + (RUNG if success < config.success else -RUNG) * equal
    return min(max(wanted, 0.0), config.high)


def step_ends(trace: Trace, boundary: str, decode: Callable[[list[int]], str]) -> list[int]:
    """Places in a trace, in tokens, right after a text that ends a step."""
    pieces = [decode([token]) for token in trace.token_ids]
    return [place for place, piece in enumerate(pieces, 1) if boundary in piece]


def _drawn(rng: random.Random, config: PrefixSection) -> float:
    return rng.uniform(config.low, config.high)


def _within(trace: Trace, config: PrefixSection, share: float) -> int:
    most = limit(trace, config)
    if most < 1:
        raise ValueError(f"problem {trace.row}: nothing of its trace may be given")
    return max(1, min(round(share * len(trace.token_ids)), most))


def _at_step(cut: int, ends: Sequence[int]) -> int:
    """The last end of a step up to the cut; the cut itself where there is none."""
    before = [end for end in ends if end <= cut]
    return before[-1] if before else cut
