"""Schedules among the other settings: what is refused at the start, and with what remedy."""

import re
from typing import Any

import pytest

from reroll.config import load_config
from reroll.errors import UserError

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a group longer than the lag bound": (
        {"schedule.kind": "sorted", "schedule.batches": 6},
        "schedule.batches = 6: the last of them would wait for 5 updates, more than "
        "schedule.max_lag = 4; lower the one or raise the other",
    ),
    "more under way than the lag bound": (
        {"schedule.kind": "april", "schedule.over": 5.5},
        "schedule.over = 5.5: not all of that can be trained on within schedule.max_lag = 4 "
        "updates; lower the one or raise the other",
    ),
    "april that adds no group": (
        {"schedule.kind": "april", "schedule.over": 1.2, "rollout.prompts": 4},
        "schedule.over = 1.2: of 4 that adds nothing to start; raise it to 1.25 or more, or set "
        "schedule.kind = 'sync'",
    ),
    "april that adds no rollout": (
        {"schedule.kind": "april", "schedule.over": 1.01, "rollout.prompts": 4,
         "rollout.samples": 8, "algo.name": "reinforce_pp"},
        "schedule.over = 1.01: of 32 that adds nothing to start; raise it to 1.032 or more, or "
        "set schedule.kind = 'sync'",
    ),
    "tail batching that adds neither prompt nor sample": (
        {"schedule.kind": "tail_batch", "rollout.prompts": 2, "rollout.samples": 3},
        "schedule.over = 1.25: of 3 that adds nothing to start; raise it to 1.334 or more, or "
        "set schedule.kind = 'sync'",
    ),
    "stale tokens under a ratio of whole replies": (
        {"schedule.kind": "april", "algo.name": "gspo"},
        "algo.ratio = 'sequence': with schedule.kind = 'april' a reply holds tokens of several "
        "policy versions, over which one ratio of the whole reply means nothing; set correct.mode "
        "= 'decoupled', or algo.ratio = 'token'",
    ),
    "groups of unequal rewards, of single rollouts": (
        {"schedule.kind": "sorted", "algo.name": "ppo", "algo.dynamic_sampling": True},
        "algo.dynamic_sampling = true: it looks for groups of unequal rewards, and with "
        "schedule.kind = 'sorted' and algo.advantage = 'gae' a batch is made of single rollouts; "
        "set one of the three otherwise",
    ),
    "a running baseline without groups of equal rewards": (
        {"algo.name": "rloo_running", "algo.dynamic_sampling": True},
        "algo.dynamic_sampling = true: it leaves out groups of equal rewards, and with "
        "algo.advantage = 'running' these have a gradient too; false here",
    ),
    "staggered starts in another order": (
        {"reuse.on": True, "reuse.stagger": True, "schedule.kind": "longest_first"},
        "reuse.stagger = true: has no effect with schedule.kind = 'longest_first', which has an "
        "order of its own; use 'sync', or false here",
    ),
    "a strict group that is to be refilled": (
        {"schedule.kind": "sorted", "schedule.refill": False, "algo.name": "dapo"},
        "algo.dynamic_sampling = true: schedule.kind = 'sorted' takes in no prompts for those left "
        "out; use schedule.refill = true, 'april' or 'async', or false here",
    ),
    "a kept cache without correction": (
        {"schedule.kind": "async", "schedule.keep_cache": True},
        "schedule.keep_cache = true: tokens behind keys and values of older weights are of no "
        "version's law; set correct.mode to 'tis', 'decoupled' or 'mask'",
    ),
    "a race without groups": (
        {"schedule.kind": "tail_batch", "algo.name": "rloo_running"},
        "schedule.kind = 'tail_batch': it races the samples of a group, and algo.advantage = "
        "'running' has no groups; use 'sorted' or 'april'",
    ),
    "over for a schedule that has none": (
        {"schedule.kind": "sorted", "schedule.over": 1.5},
        "schedule.over = 1.5: has no effect with schedule.kind = 'sorted'; it needs 'april' or "
        "'tail_batch'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused_with_the_remedy(what: str) -> None:
    settings, message = REFUSED[what]
    with pytest.raises(UserError, match=f"{re.escape(message)}$"):
        load_config(None, {key: str(value).lower() for key, value in settings.items()})


SERVED: list[dict[str, Any]] = [
    {"schedule.kind": "sorted", "schedule.batches": 5},
    {"schedule.kind": "april", "schedule.over": 1.25, "rollout.prompts": 4},
    {"schedule.kind": "april", "schedule.over": 1.04, "rollout.prompts": 4,
     "rollout.samples": 8, "algo.name": "rloo_running"},
    {"schedule.kind": "tail_batch", "rollout.prompts": 2, "rollout.samples": 4},
    {"schedule.kind": "april", "algo.name": "gspo", "correct.mode": "decoupled"},
    {"schedule.kind": "sorted", "schedule.mode": "on_policy", "algo.name": "rloo"},
    {"schedule.kind": "april", "algo.name": "dapo"},
]  # fmt: skip


@pytest.mark.parametrize("settings", SERVED, ids=str)
def test_what_makes_sense_is_not(settings: dict[str, Any]) -> None:
    config = load_config(None, {key: str(value) for key, value in settings.items()})
    assert config.schedule.kind == settings["schedule.kind"]
