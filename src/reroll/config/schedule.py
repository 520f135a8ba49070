"""Settings of the schedule: when prompts come in and when a batch is due."""

from typing import Any, Literal

from pydantic import Field, model_validator

from reroll.config.sections import Section

OVER = {"april": 2.0, "tail_batch": 1.25}
"""`over` of each schedule that has one, where it is left out: those of the papers' scripts"""
WHOLE = ("sync", "longest_first")
"""schedules that finish everything before a batch is due"""
STALE = ("sorted", "april", "async")
"""schedules under which rollouts hold tokens of several versions (sorted: with mode = "partial")"""


class ScheduleSection(Section):
    """In what order rollouts run, and what becomes of those that are unfinished."""

    kind: Literal["sync", "longest_first", "sorted", "april", "tail_batch", "async"] = Field(
        default="sync",
        description="finish all; the same, longest first; SortedRL; APRIL; RollPacker; bounded lag",
    )
    batches: int = Field(
        default=4, ge=1, description="sorted: prompts come in groups of so many updates"
    )
    mode: Literal["partial", "on_policy"] = Field(
        default="partial",
        description="sorted: interrupted rollouts keep their tokens, or are started anew",
    )
    refill: bool = Field(
        default=True,
        description="sorted: let the next group in when a slot would be idle; the paper: false",
    )
    held: bool = Field(
        default=False,
        description="sorted, on_policy: started anew with the same noise and the dropped tokens "
        "as a draft, so that lengths are not drawn again",
    )
    over: float = Field(
        default=2.0,
        ge=1,
        description="april: prompts under way, in batches; tail_batch: prompts and samples "
        "started, over those that are trained on",
    )
    max_lag: int = Field(
        default=4,
        ge=0,
        description="updates that a rollout may wait from its first token to its training",
    )
    keep_cache: bool = Field(
        default=False,
        description="async: keep keys and values of older weights; a resumed run is then no longer "
        "the same run",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """`over` by kind."""
        kind = values.get("kind") if isinstance(values, dict) else None
        return {"over": OVER[kind]} | values if isinstance(kind, str) and kind in OVER else values

    @property
    def stale(self) -> bool:
        """Whether batches hold tokens of earlier versions."""
        return self.kind in STALE and (self.kind != "sorted" or self.mode == "partial")
