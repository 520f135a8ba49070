"""A unit and its members: what a batch is made of, and the rollouts it consists of.

A unit is a group where the algorithm compares the rollouts of a prompt, a single rollout where it
does not. A member's way:

    queued -> running -> done         ended by itself: graded, then trained on
           -> partial -> running      interrupted, its tokens kept
           -> queued                  interrupted and started anew, its tokens lost
           -> dropped                 more than the unit needs
           -> pruned                  left out by a rule, on its way or after its end
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from reroll.types import Group, Prompt, Request, Rollout, Watch


class State(StrEnum):
    """Where a member is; see the module."""

    QUEUED = "queued"
    RUNNING = "running"
    PARTIAL = "partial"
    DONE = "done"
    DROPPED = "dropped"
    PRUNED = "pruned"


WAITING = (State.QUEUED, State.PARTIAL)


@dataclass(slots=True, eq=False)
class Member:
    """One rollout under way. Compared by identity."""

    unit: "Unit"
    rollout: Rollout
    request: Request
    state: State = State.QUEUED
    stamp: int = 0
    """which of its entries in the queue is the valid one"""
    lost: list[int] = field(default_factory=list)
    """tokens that it lost and that are drafts of its own, where noise is held"""
    drafts_lost: int = 0
    """of its request's drafts, the first, that are such tokens"""
    seen: dict[int, tuple[int, Any]] = field(default_factory=dict)
    """place of a probe -> (tokens read, features), until its batch has been learnt from"""
    extra: bool = False
    """started in place of one that was pruned, and not to be judged itself"""

    @property
    def tokens(self) -> int:
        """Completion tokens drawn and kept so far."""
        return self.rollout.drawn


@dataclass(slots=True, eq=False)
class Unit:
    """Members that are trained on together. Compared by identity."""

    index: int
    """in order of admission"""
    prompt: Prompt
    visit: int
    need: int
    """members that make it ready"""
    admitted: int
    """updates before it was admitted"""
    members: list[Member] = field(default_factory=list)
    done: list[Member] = field(default_factory=list)
    """in the order in which they ended"""
    since: int | None = None
    """updates before its first member was started; None: none was"""
    cut: int = 0
    """tokens of its longest member when it last lost them; 0: it never did"""
    expected: int | None = None
    """tokens drawn for the longest rollout of its prompt's last visit; None: there was none"""
    watch: Watch | None = None
    """where its members are probed"""
    stage: int = 0
    """how often it has been judged"""
    pruned: list[Member] = field(default_factory=list)
    """members no more"""
    wanted: int = 0
    """members that made it ready before any were pruned"""

    @property
    def started(self) -> int:
        """Members there were before any were pruned or added."""
        return sum(not member.extra for member in self.members) + len(self.pruned)

    @property
    def complete(self) -> bool:
        """Whether as many have ended as it needs."""
        return len(self.done) >= self.need

    def group(self) -> Group:
        """As the trainer wants it, members in order of their samples."""
        done, pruned = (
            sorted(members, key=lambda member: member.rollout.sample)
            for members in (self.done, self.pruned)
        )
        return Group(self.prompt, [m.rollout for m in done], [m.rollout for m in pruned])

    def length(self) -> float:
        """Mean completion tokens of the members that ended."""
        return sum(member.tokens for member in self.done) / max(1, len(self.done))
