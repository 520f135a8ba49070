"""The collector of a run, as its configuration wants it."""

from dataclasses import replace

from reroll.config import GROUP_ADVANTAGES, Config
from reroll.config.schedule import WHOLE
from reroll.errors import UserError
from reroll.rollout.buffer import Buffer
from reroll.rollout.collect import Collector
from reroll.rollout.collected import CollectSpec
from reroll.rollout.decisions import Decisions
from reroll.rollout.launch import Source
from reroll.rollout.policies import make_schedule
from reroll.rollout.prune import Pruner
from reroll.rollout.vote import Voter
from reroll.setup import Parts
from reroll.types import Purpose


def make_spec(config: Config, parts: Parts) -> CollectSpec:
    """What a run's training rollouts are."""
    return CollectSpec(
        Purpose.TRAIN,
        config.run.seed,
        config.rollout.samples,
        replace(parts.sampling, temperature=config.rollout.temperature),
        config.rollout.truncated,
        config.rollout.penalty,
        apart=apart(config),
        held=config.schedule.held,
    )


def make_collector(
    config: Config, parts: Parts, source: Source, spec: CollectSpec, decisions: Decisions
) -> Collector:
    """The collector of a run's training rollouts, with nothing under way."""
    chosen, algo, samples = config.schedule, config.algo, config.rollout.samples
    schedule = make_schedule(chosen, config.engine.slots)
    buffer = Buffer(
        config.rollout.prompts * (samples if spec.apart else 1),
        1 if spec.apart else samples,
        config.engine.slots,
        algo.generation_bound if algo.dynamic_sampling else None,
        schedule.patience,
    )

    return Collector(
        parts.engine, parts.graders, parts.decode, source, spec, schedule, buffer, decisions
    )


def apart(config: Config) -> bool:
    """Whether a batch is made of rollouts: where nothing compares those of a prompt, neither the
    algorithm nor pruning, and the schedule does not wait for all."""
    lone = config.algo.advantage not in GROUP_ADVANTAGES and not config.prune.on
    return lone and config.schedule.kind not in WHOLE


def make_pruner(config: Config, parts: Parts) -> Pruner | None:
    """What prunes a run's rollouts, as the checkpoint had it; None: nothing does."""
    prune = config.prune
    if not prune.on:
        return None
    pruner = Pruner(
        prune,
        max_tokens=config.rollout.max_tokens,
        seed=config.run.seed,
        step_ids=_step_ids(config, parts),
    )
    if saved := parts.restored.get("prune"):
        pruner.load_state(saved | {"tensors": parts.restored["tensors"]})
    return pruner


def make_voter(config: Config, parts: Parts) -> Voter | None:
    """Votes by what the checkpoint's pruning has learnt; None: it had no pruning."""
    pruner = make_pruner(config, parts)
    return pruner and Voter(config.prune, pruner.predictor, pruner.step_ids)


def _step_ids(config: Config, parts: Parts) -> frozenset[int]:
    """Tokens that end a step; none where steps are not counted."""
    prune = config.prune
    if prune.when != "steps" and prune.signal != "length":
        return frozenset()
    ids = range(len(parts.tokenizer))
    ends = frozenset(i for i in ids if prune.boundary in parts.decode([i]))
    if not ends:
        raise UserError(
            f"prune.boundary = {prune.boundary!r}: no token of this model's vocabulary has it; "
            "choose a text that one token holds"
        )
    return ends
