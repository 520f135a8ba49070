"""Pruning that makes no sense with the other settings, refused with the reason."""

from itertools import pairwise
from typing import TYPE_CHECKING

from reroll.config.prune import PruneSection

if TYPE_CHECKING:
    from reroll.config.load import Config


def prune_contradiction(config: "Config") -> str | None:
    """The first contradiction of pruning with anything else as one line, or None."""
    prune = config.prune
    if not prune.on:
        default = PruneSection()
        for key, value in prune:
            if value != getattr(default, key):
                return f"prune.{key} = {value!r}: has no effect with prune.on = False; set that"
        return None
    for find in (_group, _estimator, _places, _control, _rewards):
        if text := find(config):
            return text
    return None


def _group(config: "Config") -> str | None:
    prune, samples = config.prune, config.rollout.samples
    if config.algo.advantage == "gae":
        return (
            "prune.on = true: the critic of algo.advantage = 'gae' would learn the values of "
            "survivors, which are too high or too low for all that were started; prune under "
            "'grpo', 'dr_grpo', 'rloo', 'reinforce_pp' or 'running'"
        )
    kept = max(prune.least, round(min(prune.keep) * samples))
    if kept >= samples:
        return (
            f"rollout.samples = {samples}: prune.keep = {min(prune.keep):g} and prune.least = "
            f"{prune.least} leave {min(kept, samples)} of them, so nothing is pruned; raise it, or "
            "lower the others"
        )
    return None


def _estimator(config: "Config") -> str | None:
    prune, algo = config.prune, config.algo
    if prune.mode == "corrected" and prune.rule != "tilt":
        return (
            f"prune.rule = {prune.rule!r}: its choice is no lot, so there are no chances to "
            "correct by; set prune.mode = 'paper', or prune.rule = 'tilt'"
        )
    if prune.rule == "fixed" and prune.signal == "random":
        return (
            "prune.rule = 'fixed': with prune.signal = 'random' it has nothing to go by; use 'tilt'"
        )
    if prune.mode == "corrected" and prune.weigh == "prefix" and algo.ratio != "token":
        return (
            f"prune.weigh = 'prefix': algo.ratio = {algo.ratio!r} is one ratio for a whole "
            "rollout, which takes one weight; use 'all', 'none' or 'auto'"
        )
    if prune.mode == "paper":
        default = PruneSection()
        for key in ("weigh", "cap", "equal"):
            if (value := getattr(prune, key)) != getattr(default, key):
                return (
                    f"prune.{key} = {value!r}: has no effect with prune.mode = 'paper'; it needs "
                    "'corrected'"
                )
    if prune.weigh == "none" and prune.cap != PruneSection().cap:
        return f"prune.cap = {prune.cap:g}: has no effect with prune.weigh = 'none'"
    if 0 < prune.cap < 1:
        return (
            f"prune.cap = {prune.cap:g}: would weaken tokens that need no correction; use 1 or "
            "more, or 0 for no cap"
        )
    return None


def _places(config: "Config") -> str | None:
    prune, limit = config.prune, config.rollout.max_tokens
    if len(prune.keep) != len(prune.at):
        return (
            f"prune.keep = {prune.keep}: one share for each place of prune.at = {prune.at}, what "
            "is left of those started"
        )
    if any(not 0 < share <= 1 for share in prune.keep) or any(
        later > share for share, later in pairwise(prune.keep)
    ):
        return f"prune.keep = {prune.keep}: shares of those started, in (0, 1], never rising"
    if any(later <= at for at, later in pairwise(prune.at)) or prune.at[0] <= 0:
        return f"prune.at = {prune.at}: places above 0, each beyond the one before"
    if prune.when != "share" and any(at != round(at) for at in prune.at):
        return f"prune.at = {prune.at}: whole numbers with prune.when = {prune.when!r}"
    if prune.when == "tokens" and prune.at[-1] >= limit:
        return (
            f"prune.at = {prune.at}: no rollout gets there with rollout.max_tokens = {limit}; "
            "lower it"
        )
    return None


def _control(config: "Config") -> str | None:
    """Settings that a control does without."""
    prune, default = config.prune, PruneSection()
    idle: dict[str, tuple[str, ...]] = {}
    if prune.rule == "pods":
        idle["rule"] = ("signal", "when", "at", "floor", "ratio", "refill")
    if not prune.learns:
        control = "rule" if prune.rule == "pods" else "signal"
        names = (
            "warmup",
            "audit",
            "adaptive",
            "least_auc",
            "head_width",
            "head_rate",
            "head_memory",
        )
        idle[control] = (*idle.get(control, ()), *names)
    if prune.rule == "fixed":
        idle["rule"] = ("floor",)
    if not prune.adaptive:
        idle["adaptive"] = ("least_auc",)
    if prune.signal != "quality":
        idle["signal"] = (*idle.get("signal", ()), "statistics")
    if prune.when != "steps" and prune.signal != "length":
        idle["when"] = ("boundary",)
    for other, keys in idle.items():
        for key in keys:
            if (value := getattr(prune, key)) != getattr(default, key):
                return (
                    f"prune.{key} = {value!r}: has no effect with prune.{other} = "
                    f"{getattr(prune, other)!r}; leave it out, or change that"
                )
    return None


def _rewards(config: "Config") -> str | None:
    prune, rollout = config.prune, config.rollout
    if prune.low >= prune.high:
        return f"prune.low = {prune.low:g}: not below prune.high = {prune.high:g}"
    if rollout.truncated == "penalty" and prune.low > -rollout.penalty:
        return (
            f"prune.low = {prune.low:g}: rollout.penalty = {rollout.penalty:g} takes truncated "
            f"rollouts below it; set it to {-rollout.penalty:g} or less"
        )
    weights = [grader.weight for grader in config.task.graders]
    if weights and prune.high < sum(w for w in weights if w > 0):
        most = sum(w for w in weights if w > 0)
        return (
            f"prune.high = {prune.high:g}: the weights of task.graders allow for rewards up to "
            f"{most:g}, if each grades up to 1; set it to the greatest reward there is"
        )
    return None
