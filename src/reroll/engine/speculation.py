"""How an engine uses drafts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speculation:
    """How drafts are used. None of it changes a token, but for requests with a `Lenience`."""

    branching: bool = True
    """several drafts of a prompt make a tree; False: each request verifies its first one alone"""
    window: int = 64
    """depth of a tree that one forward runs at most"""
    gate: bool = False
    """verify only nodes that are expected to save more than they cost"""
    redraft: int = 1
    """tokens a slot and tick at most, offered ones included: 1, 2, 4 or 8"""
    siblings: bool = False
    """what a group's members have finished is offered to those that still run or wait"""
    stagger: bool = False
    """requests without drafts are prefilled for free slots alone, not ahead, so that later ones
    find finished siblings to follow"""
