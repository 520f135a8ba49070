"""Settings of reuse: old rollouts as drafts of new ones, and the store that keeps them."""

from typing import Literal

from pydantic import Field

from reroll.config.sections import Section


class ReuseSection(Section):
    """Old rollouts and finished siblings as drafts (docs/techniques/reuse.md)."""

    on: bool = Field(default=False, description="use them; needs a problem to come again")
    rule: Literal["fresh", "held", "lenient"] = Field(
        default="fresh",
        description="new noise each epoch, exact; the noise of the epoch before, exact but no "
        "longer independent of the weights; SPEC-RL's acceptance, not exact",
    )
    epochs: int = Field(default=2, ge=1, description="past epochs whose rollouts are drafts")
    rollouts: int = Field(
        default=16, ge=1, description="drafts of a problem at most, the newest (fresh, held)"
    )
    gate: bool = Field(
        default=True, description="verify only what is expected to save more than it costs"
    )
    window: int = Field(
        default=64, ge=1, description="depth in tokens that one verification goes at most"
    )
    redraft: Literal[1, 2, 4, 8] = Field(
        default=8,
        description="tokens a slot and tick at most once a reply has left the old ones; 1: off",
    )
    siblings: bool = Field(
        default=True, description="finished replies of the running group are drafts for the others"
    )
    stagger: bool = Field(
        default=False,
        description="without old rollouts, start a problem's samples one after the other, to "
        "follow finished ones: fewer decoded tokens, more forwards",
    )
    refresh: float | Literal["trained"] = Field(
        default=0.25,
        description="share of held keys redrawn each epoch, or those whose rollout was trained on",
    )
    max_age: int = Field(default=8, ge=1, description="epochs that a key is held at most")
    lenience: float = Field(
        default=1.6487, gt=0, description="l: a token stays with chance min(1, l p_new / p_old)"
    )
    anchor: Literal["previous", "generator"] = Field(
        default="previous",
        description="p_old is that of the epoch before (the paper), or of whoever wrote the token, "
        "which then keeps its log-prob and version for [correct]",
    )
    cut: Literal["ratio", "random", "none"] = Field(
        default="ratio",
        description="where lenient reuse cuts: by the ratio; ablations of the paper: anywhere, "
        "never",
    )
    delay: int = Field(
        default=0, ge=0, description="lenient drafts are this many epochs older (an ablation)"
    )
    audit: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="sample some problems afresh and compare rewards; auto: under held and lenient",
    )
    audit_every: int = Field(default=5, ge=1, description="steps between audits")
    audit_prompts: int = Field(default=8, ge=2, description="problems of an audit")
    verify: Literal["same", "bfloat16"] = Field(
        default="same",
        description="bfloat16: run forwards over draft trees in it where that is faster, prompts "
        "among them; tokens drawn there follow the rounded law, so they may differ from a run's "
        "without drafts",
    )

    @property
    def audited(self) -> bool:
        """Whether audits are due."""
        return self.on and (self.audit == "on" or (self.audit == "auto" and self.rule != "fresh"))


class StoreSection(Section):
    """Past rollouts on disk, rollouts.sqlite in the run directory (written with reuse.on)."""

    epochs: int = Field(default=4, ge=1, description="epochs of each problem kept")
    max_gb: float = Field(default=4.0, gt=0, description="bound on what is kept on disk, in GiB")
    memory_gb: float = Field(default=0.25, ge=0, description="of it kept in memory too, in GiB")
