"""Settings of pruning: which rollouts of a group are stopped while they run, and by what."""

from typing import Literal

from pydantic import Field, field_validator

from reroll.config.sections import Section


class PruneSection(Section):
    """Stop part of a group's rollouts early (ARRoL), and correct for it."""

    on: bool = Field(default=False, description="stop those that look hopeless")
    mode: Literal["corrected", "paper"] = Field(
        default="corrected",
        description="baseline over all started, inverse-probability weights; or survivors alone",
    )
    signal: Literal["confidence", "quality", "length", "random"] = Field(
        default="confidence",
        description="what predicts success: log-probs and entropies so far; the last hidden state "
        "(ARRoL); how far it has come; nothing (a control)",
    )
    statistics: bool = Field(
        default=True, description="quality: with the statistics of 'confidence' beside the state"
    )
    rule: Literal["tilt", "fixed", "pods"] = Field(
        default="tilt",
        description="survival tilted towards `ratio` and drawn; the set nearest to `ratio`; the "
        "set of widest rewards, once all have ended (a control)",
    )
    when: Literal["tokens", "share", "steps"] = Field(
        default="share",
        description="what `at` counts: tokens; the running mean length; steps, each one ended by "
        "`boundary`",
    )
    at: list[float] = Field(
        default=[0.25], min_length=1, description="probe positions, rising; one or several"
    )
    boundary: str = Field(default="\n", min_length=1, description="text that ends a step")
    keep: list[float] = Field(
        default=[0.5], min_length=1, description="share of those started kept after each probe"
    )
    least: int = Field(default=4, ge=2, description="rollouts of a group kept at least")
    ratio: float = Field(
        default=0.5, ge=0, le=1, description="mean success that the kept ones should have"
    )
    floor: float = Field(
        default=0.2, gt=0, le=1, description="least chance to be kept that a rollout has"
    )
    weigh: Literal["auto", "prefix", "all", "none"] = Field(
        default="auto",
        description="corrected: tokens that get inverse-probability weights; auto: those before "
        "the probe, or all where algo.ratio is one for a whole rollout",
    )
    cap: float = Field(
        default=2.0,
        ge=0,
        description="corrected: largest of these weights, which are 1 / survival; 0: no cap",
    )
    equal: Literal["skip", "train"] = Field(
        default="skip",
        description="corrected: groups whose survivors earned alike; training on them is unbiased "
        "and dearer",
    )
    refill: Literal["groups", "samples"] = Field(
        default="groups",
        description="what gets the slots: what is next in the queue; more samples of groups that "
        "are expected to have signal",
    )
    warmup: int = Field(default=2, ge=1, description="first batches without pruning, to learn from")
    audit: float = Field(
        default=0.1, ge=0, le=1, description="share of groups left whole, to measure by"
    )
    adaptive: bool = Field(
        default=True,
        description="keep everything while the signal on whole groups is no better than chance, "
        "or under `least_auc`",
    )
    least_auc: float = Field(
        default=0.55, ge=0, le=1, description="adaptive: AUC inside groups that is worth pruning by"
    )
    head_width: int = Field(default=16, ge=1, description="hidden units of the signal's network")
    head_rate: float = Field(default=1e-2, gt=0, description="of the signal's optimizer")
    head_memory: int = Field(
        default=4096, ge=1, description="graded rollouts that the signal is trained on"
    )
    low: float = Field(default=0.0, description="least reward there is")
    high: float = Field(default=1.0, description="greatest reward there is")

    @field_validator("boundary")
    @classmethod
    def _from_a_shell(cls, text: str) -> str:
        """`--prune.boundary '\\n'` means a new line."""
        return text.replace("\\n", "\n").replace("\\t", "\t")

    @property
    def learns(self) -> bool:
        """Whether there is a network to train."""
        return self.on and self.rule != "pods" and self.signal != "random"

    @property
    def probes(self) -> bool:
        """Whether rollouts are stopped on their way."""
        return self.on and self.rule != "pods"
