"""Dynamic sampling of DAPO, arXiv 2503.14476, eq. 11: new prompts until enough groups have signal.

A group whose rewards are all equal teaches nothing. Such groups are left out and new prompts are
started in their place, as many as the share of live groups so far says are needed, until the batch
holds the number wanted or the stated bound on generation is reached. More groups than wanted may
come of it; they are kept, since they are paid for. Rewards are those of the graders. How many
prompts a step takes depends on rewards alone, so a resumed run takes the same.
"""

from reroll.types import Group


def has_signal(group: Group) -> bool:
    """Whether two graded rollouts of the group differ in reward: not all right, not all wrong."""
    rewards = {r.reward for r in group.rollouts if r.reward is not None}
    return len(rewards) > 1


def missing(live: int, started: int, wanted: int) -> int:
    """Groups to start, where `live` of those started have signal and `wanted` are asked for."""
    return -(-(wanted - live) * started // max(live, 1))  # rounded up
