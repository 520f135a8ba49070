"""Schedules that make no sense with the other settings, refused with the reason."""

import math
from typing import TYPE_CHECKING

from reroll.config.algo import GROUP_ADVANTAGES
from reroll.config.schedule import OVER, WHOLE

if TYPE_CHECKING:
    from reroll.config.load import Config


def schedule_contradiction(config: "Config") -> str | None:
    """The first contradiction of a schedule with anything else as one line, or None."""
    schedule, apart = config.schedule, config.algo.advantage not in GROUP_ADVANTAGES
    if schedule.kind == "sorted" and schedule.batches > schedule.max_lag + 1:
        return (
            f"schedule.batches = {schedule.batches}: the last of them would wait for "
            f"{schedule.batches - 1} updates, more than schedule.max_lag = {schedule.max_lag}; "
            "lower the one or raise the other"
        )
    if schedule.kind == "april" and schedule.over > schedule.max_lag + 1:
        return (
            f"schedule.over = {schedule.over}: not all of that can be trained on within "
            f"schedule.max_lag = {schedule.max_lag} updates; lower the one or raise the other"
        )
    if schedule.kind in OVER and not any(
        math.floor(schedule.over * count + 1e-9) > count for count in _over_what(config)
    ):
        most = max(_over_what(config))
        return (
            f"schedule.over = {schedule.over}: of {most} that adds nothing to start; raise it to "
            f"{math.ceil(1000 * (1 + 1 / most)) / 1000:g} or more, or set schedule.kind = 'sync'"
        )
    if schedule.stale and config.algo.ratio != "token" and config.correct.mode != "decoupled":
        return (
            f"algo.ratio = {config.algo.ratio!r}: with schedule.kind = {schedule.kind!r} a reply "
            "holds tokens of several policy versions, over which one ratio of the whole reply "
            "means nothing; set correct.mode = 'decoupled', or algo.ratio = 'token'"
        )
    if apart and config.algo.dynamic_sampling and schedule.kind not in WHOLE:
        return (
            "algo.dynamic_sampling = true: it looks for groups of unequal rewards, and with "
            f"schedule.kind = {schedule.kind!r} and algo.advantage = {config.algo.advantage!r} a "
            "batch is made of single rollouts; set one of the three otherwise"
        )
    if config.reuse.stagger and schedule.kind != "sync":
        return (
            f"reuse.stagger = true: has no effect with schedule.kind = {schedule.kind!r}, which "
            "has an order of its own; use 'sync', or false here"
        )
    strict = schedule.kind == "sorted" and not schedule.refill
    if config.algo.dynamic_sampling and (strict or schedule.kind == "tail_batch"):
        return (
            f"algo.dynamic_sampling = true: schedule.kind = {schedule.kind!r} takes in no prompts "
            "for those left out; use schedule.refill = true, 'april' or 'async', or false here"
        )
    if schedule.keep_cache and config.correct.mode == "none":
        return (
            "schedule.keep_cache = true: tokens behind keys and values of older weights are of no "
            "version's law; set correct.mode to 'tis', 'decoupled' or 'mask'"
        )
    if schedule.kind == "tail_batch" and apart:
        return (
            "schedule.kind = 'tail_batch': it races the samples of a group, and algo.advantage = "
            f"{config.algo.advantage!r} has no groups; use 'sorted' or 'april'"
        )
    return None


def _over_what(config: "Config") -> tuple[int, ...]:
    """What `schedule.over` multiplies: units of a batch, or prompts and samples of each."""
    prompts, samples = config.rollout.prompts, config.rollout.samples
    if config.schedule.kind == "tail_batch":
        return prompts, samples
    return (prompts if config.algo.advantage in GROUP_ADVANTAGES else prompts * samples,)
