"""Pruning among the other settings: what is refused at the start, and with what remedy."""

import json
import re
from typing import Any

import pytest

from reroll.config import load_config
from reroll.errors import UserError

ON = {"prune.on": True}
PAPER = ON | {"prune.mode": "paper"}
PODS = PAPER | {"prune.rule": "pods"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a setting without pruning": (
        {"prune.keep": [0.25]},
        "prune.keep = [0.25]: has no effect with prune.on = False; set that",
    ),
    "a critic": (
        ON | {"algo.name": "ppo"},
        "prune.on = true: the critic of algo.advantage = 'gae' would learn the values of "
        "survivors, which are too high or too low for all that were started; prune under "
        "'grpo', 'dr_grpo', 'rloo', 'reinforce_pp' or 'running'",
    ),
    "a group of which nothing is pruned": (
        ON | {"rollout.samples": 4},
        "rollout.samples = 4: prune.keep = 0.5 and prune.least = 4 leave 4 of them, so nothing is "
        "pruned; raise it, or lower the others",
    ),
    "a share that keeps all": (
        ON | {"rollout.samples": 8, "prune.keep": [0.95]},
        "rollout.samples = 8: prune.keep = 0.95 and prune.least = 4 leave 8 of them, so nothing is "
        "pruned; raise it, or lower the others",
    ),
    "fewer than are to be kept": (
        ON | {"rollout.samples": 3},
        "rollout.samples = 3: prune.keep = 0.5 and prune.least = 4 leave 3 of them, so nothing is "
        "pruned; raise it, or lower the others",
    ),
    "a correction without chances": (
        ON | {"prune.rule": "fixed"},
        "prune.rule = 'fixed': its choice is no lot, so there are no chances to correct by; set "
        "prune.mode = 'paper', or prune.rule = 'tilt'",
    ),
    "a correction of pods": (
        ON | {"prune.rule": "pods"},
        "prune.rule = 'pods': its choice is no lot, so there are no chances to correct by; set "
        "prune.mode = 'paper', or prune.rule = 'tilt'",
    ),
    "several weights under one ratio": (
        ON | {"prune.weigh": "prefix", "algo.name": "gspo"},
        "prune.weigh = 'prefix': algo.ratio = 'sequence' is one ratio for a whole rollout, which "
        "takes one weight; use 'all', 'none' or 'auto'",
    ),
    "weights in the paper": (
        PAPER | {"prune.weigh": "all"},
        "prune.weigh = 'all': has no effect with prune.mode = 'paper'; it needs 'corrected'",
    ),
    "a cap in the paper": (
        PAPER | {"prune.cap": 4.0},
        "prune.cap = 4.0: has no effect with prune.mode = 'paper'; it needs 'corrected'",
    ),
    "equal rewards in the paper": (
        PAPER | {"prune.equal": "train"},
        "prune.equal = 'train': has no effect with prune.mode = 'paper'; it needs 'corrected'",
    ),
    "a cap on no weights": (
        ON | {"prune.weigh": "none", "prune.cap": 3.0},
        "prune.cap = 3: has no effect with prune.weigh = 'none'",
    ),
    "a cap below 1": (
        ON | {"prune.cap": 0.5},
        "prune.cap = 0.5: would weaken tokens that need no correction; use 1 or more, or 0 for no "
        "cap",
    ),
    "shares without places": (
        ON | {"prune.keep": [0.75, 0.5]},
        "prune.keep = [0.75, 0.5]: one share for each place of prune.at = [0.25], what is left of "
        "those started",
    ),
    "shares that rise": (
        ON | {"prune.keep": [0.5, 0.75], "prune.at": [0.25, 0.5]},
        "prune.keep = [0.5, 0.75]: shares of those started, in (0, 1], never rising",
    ),
    "a share of nothing": (
        ON | {"prune.keep": [0.0]},
        "prune.keep = [0.0]: shares of those started, in (0, 1], never rising",
    ),
    "a share of more than all": (
        ON | {"prune.keep": [1.5, 0.5], "prune.at": [0.25, 0.5]},
        "prune.keep = [1.5, 0.5]: shares of those started, in (0, 1], never rising",
    ),
    "places that fall": (
        ON | {"prune.keep": [0.75, 0.5], "prune.at": [0.5, 0.25]},
        "prune.at = [0.5, 0.25]: places above 0, each beyond the one before",
    ),
    "a place at the start": (
        ON | {"prune.at": [0.0]},
        "prune.at = [0.0]: places above 0, each beyond the one before",
    ),
    "a share for a number of tokens": (
        ON | {"prune.when": "tokens"},
        "prune.at = [0.25]: whole numbers with prune.when = 'tokens'",
    ),
    "a share for a number of steps": (
        ON | {"prune.when": "steps", "prune.at": [1.5]},
        "prune.at = [1.5]: whole numbers with prune.when = 'steps'",
    ),
    "a place beyond the limit": (
        ON | {"prune.when": "tokens", "prune.at": [64], "rollout.max_tokens": 64},
        "prune.at = [64.0]: no rollout gets there with rollout.max_tokens = 64; lower it",
    ),
    "a signal for pods": (
        PODS | {"prune.signal": "length"},
        "prune.signal = 'length': has no effect with prune.rule = 'pods'; leave it out, or change "
        "that",
    ),
    "a place for pods": (
        PODS | {"prune.at": [0.5]},
        "prune.at = [0.5]: has no effect with prune.rule = 'pods'; leave it out, or change that",
    ),
    "a ratio for pods": (
        PODS | {"prune.ratio": 0.3},
        "prune.ratio = 0.3: has no effect with prune.rule = 'pods'; leave it out, or change that",
    ),
    "a refill for pods": (
        PODS | {"prune.refill": "samples"},
        "prune.refill = 'samples': has no effect with prune.rule = 'pods'; leave it out, or change "
        "that",
    ),
    "a warm-up for pods": (
        PODS | {"prune.warmup": 5},
        "prune.warmup = 5: has no effect with prune.rule = 'pods'; leave it out, or change that",
    ),
    "an audit of chance": (
        ON | {"prune.signal": "random", "prune.audit": 0.5},
        "prune.audit = 0.5: has no effect with prune.signal = 'random'; leave it out, or change "
        "that",
    ),
    "a head for chance": (
        ON | {"prune.signal": "random", "prune.head_width": 64},
        "prune.head_width = 64: has no effect with prune.signal = 'random'; leave it out, or "
        "change that",
    ),
    "a floor for a fixed choice": (
        PAPER | {"prune.rule": "fixed", "prune.floor": 0.1},
        "prune.floor = 0.1: has no effect with prune.rule = 'fixed'; leave it out, or change that",
    ),
    "a bound on what is not looked at": (
        ON | {"prune.adaptive": False, "prune.least_auc": 0.7},
        "prune.least_auc = 0.7: has no effect with prune.adaptive = False; leave it out, or change "
        "that",
    ),
    "no statistics where there is nothing else": (
        ON | {"prune.statistics": False},
        "prune.statistics = False: has no effect with prune.signal = 'confidence'; leave it out, "
        "or change that",
    ),
    "a boundary of no steps": (
        ON | {"prune.boundary": "."},
        "prune.boundary = '.': has no effect with prune.when = 'share'; leave it out, or change "
        "that",
    ),
    "no range of rewards": (
        ON | {"prune.low": 1.0},
        "prune.low = 1: not below prune.high = 1",
    ),
    "a penalty below the range": (
        ON | {"rollout.truncated": "penalty", "rollout.penalty": 0.5},
        "prune.low = 0: rollout.penalty = 0.5 takes truncated rollouts below it; set it to -0.5 or "
        "less",
    ),
    "graders beyond the range": (
        ON | {"task.graders": '[{name = "a:b", weight = 0.75}, {name = "c:d", weight = 0.5}]'},
        "prune.high = 1: the weights of task.graders allow for rewards up to 1.25, if each grades "
        "up to 1; set it to the greatest reward there is",
    ),
}  # fmt: skip


def loaded(settings: dict[str, Any]) -> Any:
    def written(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return load_config(
        None, {"rollout.samples": "16"} | {k: written(v) for k, v in settings.items()}
    )


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused_with_the_remedy(what: str) -> None:
    settings, message = REFUSED[what]
    with pytest.raises(UserError, match=rf"^(--|defaults: ){re.escape(message)}$"):
        loaded(settings)


SERVED: list[dict[str, Any]] = [
    ON,
    PAPER,
    PODS | {"prune.keep": [0.25]},
    PAPER | {"prune.rule": "fixed", "prune.ratio": 0.3},
    ON | {"prune.signal": "random", "prune.keep": [0.75, 0.5], "prune.at": [0.2, 0.5]},
    ON | {"prune.signal": "quality", "prune.statistics": False},
    ON | {"prune.signal": "length", "prune.boundary": "."},
    ON | {"prune.when": "steps", "prune.at": [2], "prune.boundary": "\\n"},
    ON | {"prune.when": "tokens", "prune.at": [63], "rollout.max_tokens": 64},
    ON | {"prune.keep": [1.0, 0.5], "prune.at": [0.25, 0.5]},
    ON | {"prune.cap": 0.0, "prune.weigh": "all", "prune.equal": "train"},
    ON | {"algo.name": "gspo"},
    ON | {"algo.name": "gspo", "prune.weigh": "all"},
    ON | {"algo.name": "dapo"},
    ON | {"algo.name": "reinforce_pp"},
    ON | {"algo.name": "rloo_running", "schedule.kind": "april"},
    ON | {"rollout.samples": 5},
    ON | {"rollout.truncated": "penalty", "rollout.penalty": 0.5, "prune.low": -0.5},
    ON | {"task.graders": '[{name = "a:b", weight = 2.0}]', "prune.high": 2.0},
    ON | {"prune.adaptive": False},
    ON | {"store.epochs": 2},
]  # fmt: skip


@pytest.mark.parametrize("settings", SERVED, ids=str)
def test_what_makes_sense_is_not(settings: dict[str, Any]) -> None:
    assert loaded(settings).prune.on


@pytest.mark.parametrize(
    "kind", ["sync", "longest_first", "sorted", "april", "tail_batch", "async"]
)
@pytest.mark.parametrize("reuse", [False, True])
def test_it_goes_with_every_schedule_and_with_reuse(kind: str, reuse: bool) -> None:
    config = loaded(ON | {"schedule.kind": kind, "reuse.on": reuse})
    assert config.prune.on and config.prune.learns and config.prune.probes


def test_a_boundary_from_a_shell() -> None:
    config = loaded(ON | {"prune.when": "steps", "prune.at": [1], "prune.boundary": "\\n\\t."})
    assert config.prune.boundary == "\n\t."
