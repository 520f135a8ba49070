"""The engine contract: one poll-driven object that turns requests into events.

`submit` queues, `step` does one tick and reports what happened, `abort` takes requests out and
gives what each had so far. Nothing here knows about text, rewards or training. Whoever stands
behind the contract, the tokens of a request depend on its key and on the weights alone: not on
the batch, the slot, the order, interruptions or drafts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from reroll.types import Completion, Request


@dataclass(frozen=True, slots=True)
class Finished:
    """A request ended by itself: stop id or limit."""

    completion: Completion


@dataclass(frozen=True, slots=True)
class Probed:
    """A request came to a place that it is watched at; it may have gone on or ended by now."""

    request_id: int
    position: int
    """completion tokens read, prefix included"""
    hidden: torch.Tensor | None
    """last hidden state `[H]` after reading them, if asked for"""
    token_ids: list[int]
    """`[position]` these tokens (of a last one: all tokens, that which ended it included)"""
    logprobs: list[float]
    """`[position]`"""
    entropies: list[float]
    """`[position]`, empty unless asked for"""
    place: int = 0
    """which of the watch's `at`, then `steps`"""
    last: bool = False
    """it has ended: the state is that which its last token was drawn from"""


Event = Finished | Probed


class Span(NamedTuple):
    """A request's stay in a slot, in seconds of engine time."""

    request_id: int
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do; what it cannot is refused when the run starts."""

    lossless_drafts: bool = False
    lenient_drafts: bool = False
    hidden_states: bool = False
    priorities: bool = False


@dataclass(slots=True)
class Stats:
    """Counters since the engine was made; `running` and `waiting` are of now."""

    capacity: int = 0
    running: int = 0
    waiting: int = 0
    ticks: int = 0
    tokens_prefilled: int = 0
    """prompt, prefix and resumed tokens run through the model (shared rows once, no padding)"""
    tokens_verified: int = 0
    """draft tokens run through the model, nodes of a tree once, those of re-drafting included"""
    tokens_reused: int = 0
    """draft tokens accepted, those of re-drafting included"""
    tokens_redrafted: int = 0
    """of the verified: offered again after a sequence had left its tree"""
    tokens_redraft_reused: int = 0
    """of these, accepted"""
    nodes_offered: int = 0
    """nodes of the draft trees; those not verified were not worth it or never reached"""
    trees_offered: int = 0
    trees_skipped: int = 0
    """draft trees of which nothing was verified"""
    tokens_decoded: int = 0
    """tokens run through the model one by one"""
    tokens_drawn: int = 0
    """completion tokens drawn; the first of a request comes with its prefill"""
    context: dict[str, int] = field(
        default_factory=lambda: {"prefill": 0, "verify": 0, "decode": 0}
    )
    """sum over those tokens of the tokens each attended to, by category (for FLOPs)"""
    tokens_resumed: int = 0
    """of the prefilled: drawn before an interruption"""
    slot_seconds: float = 0.0
    """sum over time of the slots in use: `capacity` times all seconds with none idle"""
    seconds: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})
    """prefill includes verification: they share forwards"""

    @property
    def clock(self) -> float:
        """Seconds of engine time."""
        return sum(self.seconds.values())


class Engine(Protocol):
    """What `rollout/collect.py` needs of an engine."""

    policy_version: int
    spans: list[Span] | None
    """a list, if set, gets every request's stay in a slot when it leaves"""

    @property
    def capabilities(self) -> Capabilities:
        """What this engine can do."""
        ...

    def submit(self, request: Request) -> None:
        """Queue a request. Raises UserError when it can never fit."""
        ...

    def step(self) -> list[Event]:
        """One tick: admit, draw one token (or a verified run of them) a slot, report."""
        ...

    def abort(self, ids: Iterable[int] | None, reason: str) -> list[Completion]:
        """Take these requests (None: all) out; each completion holds what it had so far."""
        ...

    def score(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
    ) -> list[list[float]]:
        """Tempered log-probs of each (context, continuation)'s continuation tokens."""
        ...

    def load_weights(self, version: int, keep: bool = False) -> None:
        """Take the trainer's weights as policy `version`.

        keep: requests inside go on with keys and values of the old weights. Raises ValueError if
        there are any without it.
        """
        ...

    def stats(self) -> Stats:
        """The counters; a live object, copy it to keep."""
        ...
