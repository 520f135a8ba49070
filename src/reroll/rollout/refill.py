"""Dynamic sampling of DAPO, arXiv 2503.14476, eq. 11: new prompts until enough groups have signal.

A group whose rewards are all equal teaches nothing. Such groups are left out and new prompts are
started in their place, as many as the share of live groups so far says are needed, until the batch
holds the number wanted or the stated bound on generation is reached. More groups than wanted may
come of it; they are kept, since they are paid for. Rewards are those of the graders. How many
prompts a step takes depends on rewards alone, so a resumed run takes the same.
"""

import math
from collections.abc import Callable

from reroll.rollout.collect import Collected
from reroll.types import Group


def has_signal(group: Group) -> bool:
    """Whether two graded rollouts of the group differ in reward: not all right, not all wrong."""
    rewards = {r.reward for r in group.rollouts if r.reward is not None}
    return len(rewards) > 1


def refill(
    draw: Callable[[int], Collected], wanted: int, bound: float
) -> tuple[Collected, list[Group]]:
    """(everything collected, the groups with signal among it).

    draw: collects that many of the next prompts. bound: prompts started at most, in multiples of
    `wanted`; when it is reached, the batch is what there is.
    """
    most = math.floor(bound * wanted + 1e-9)
    every = draw(wanted)
    live = [group for group in every.groups if has_signal(group)]
    while len(live) < wanted and len(every.groups) < most:
        started = len(every.groups)
        missing = -(-(wanted - len(live)) * started // max(len(live), 1))  # rounded up
        more = draw(min(missing, most - started))
        live += [group for group in more.groups if has_signal(group)]
        every = _joined(every, more)
    return every, live


def _joined(one: Collected, other: Collected) -> Collected:
    return Collected(
        one.groups + other.groups,
        ungraded=one.ungraded + other.ungraded,
        truncated=one.truncated + other.truncated,
        first_failure=one.first_failure or other.first_failure,
        seconds_grading=one.seconds_grading + other.seconds_grading,
        tokens_known=one.tokens_known + other.tokens_known,
    )
