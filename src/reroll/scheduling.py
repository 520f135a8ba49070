"""The collector of a run, as its configuration wants it."""

from reroll.config import GROUP_ADVANTAGES, Config
from reroll.config.schedule import WHOLE
from reroll.order import stream
from reroll.rollout.buffer import Buffer
from reroll.rollout.collect import Collector
from reroll.rollout.collected import CollectSpec
from reroll.rollout.decisions import Decisions
from reroll.rollout.policies import make_schedule
from reroll.setup import Parts
from reroll.types import Prompt


def make_collector(
    config: Config, parts: Parts, spec: CollectSpec, decisions: Decisions
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

    def source(start: int, count: int) -> tuple[list[Prompt], list[int]]:
        return stream(start, count, parts.task.train, config.run.seed)

    return Collector(
        parts.engine, parts.graders, parts.decode, source, spec, schedule, buffer, decisions
    )


def apart(config: Config) -> bool:
    """Whether a batch is made of rollouts: where the algorithm does not compare those of a prompt,
    and the schedule does not wait for all."""
    lone = config.algo.advantage not in GROUP_ADVANTAGES
    return lone and config.schedule.kind not in WHOLE
