"""What a user should know of a run before its first step."""

from reroll.config import Config
from reroll.engine.local import LocalEngine
from reroll.model.attention import takes_flex
from reroll.rollout.reuse import Reuse
from reroll.train.trainer import Trainer


def reuse_notes(config: Config, engine: LocalEngine, problems: int) -> list[str]:
    """What a user who reuses rollouts should know before the run."""
    reuse, costs, slots = config.reuse, engine.costs, config.engine.slots
    notes = [
        f"reuse: a decoded token costs {costs.token(slots) / costs.prefill:.1f} verified ones at "
        f"{slots} slots, {costs.token(1) / costs.prefill:.0f} at one"
    ]
    if reuse.verify == "bfloat16":
        used = "bfloat16" if costs.rounded else "the same dtype"
        notes.append(f"reuse: drafts verified in {used}")
    if not engine.speculation.branching:
        notes.append(
            "reuse: this model takes no tree masks (self-check): one draft a sample, no re-drafting"
        )
    once = config.train.steps * config.rollout.prompts <= problems
    if once and not config.algo.dynamic_sampling:
        notes.append(
            "reuse: no problem comes twice in train.steps x rollout.prompts, so that siblings are "
            "the only drafts"
        )
    if reuse.audited and reuse.audit_every > config.train.steps:
        notes.append(
            f"reuse: no audit in {config.train.steps} steps with reuse.audit_every = "
            f"{reuse.audit_every}: what this run trains on is not compared with fresh samples"
        )
    return notes


def trees_notes(config: Config, trainer: Trainer) -> list[str]:
    """What of trees was asked for and does not work with this model."""
    takes, wants, notes = trainer.shares, config.train, []
    if wants.trees and not takes.trees:
        notes.append("takes no tree masks (self-check): trained on one by one")
    if takes.trees and not (takes.leaves or wants.gradient_checkpointing):
        notes.append("takes no leaves behind trees (self-check): wide rows")
    if takes.trees and wants.flex and takes_flex(trainer.model) and not takes.flex:
        notes.append("takes no flex attention (self-check at the start): dense masks")
    return [f"train.trees: this model {note}" for note in notes]


def resumed_notes(reuse: Reuse | None) -> list[str]:
    """What a run that goes on has from before."""
    if reuse is None:
        return []
    held = reuse.store.stats()
    return [f"reuse: {held['rollouts']:,} past rollouts, {held['bytes'] / 1e6:.1f} MB"]
