"""Prefixes that make no sense with the other settings, refused with the reason."""

from typing import TYPE_CHECKING

from reroll.config.prefix import PrefixSection
from reroll.config.schedule import WHOLE

if TYPE_CHECKING:
    from reroll.config.load import Config


def prefix_contradiction(config: "Config") -> str | None:
    """The first contradiction of prefixes with anything else as one line, or None."""
    collect, prefix = config.collect, config.prefix
    if collect.screen > collect.cap:
        return (
            f"collect.screen = {collect.screen}: more attempts than collect.cap = {collect.cap} "
            "allows, so no hard problem would ever be solved; lower it, or raise the cap"
        )
    if not prefix.on:
        if config.sft.epochs:
            return (
                f"sft.epochs = {config.sft.epochs}: trains on traces, which come with prefix.on = "
                "true; set that, and prefix.prefixed = 0 to go on without prefixes"
            )
        default = PrefixSection()
        for key, value in prefix:
            # where traces lie is of use to `reroll collect` too
            if key != "traces" and value != getattr(default, key):
                return f"prefix.{key} = {value!r}: has no effect with prefix.on = False; set that"
        return None
    for find in (_mix, _cuts, _batches):
        if text := find(config):
            return text
    return None


def _mix(config: "Config") -> str | None:
    prefix, batch = config.prefix, config.rollout.prompts
    parts = prefix.prefixed + prefix.original + prefix.easy
    if not parts:
        return "prefix.prefixed = 0: nothing is left of the mix; give a part of it to something"
    if not prefix.prefixed and not prefix.original:
        return "prefix.original = 0: no hard problem would be tried; set prefix.on = False instead"
    if batch % parts:
        return (
            f"rollout.prompts = {batch}: the mix {prefix.prefixed} : {prefix.original} : "
            f"{prefix.easy} is held in every batch, so it must be a multiple of {parts}"
        )
    if prefix.mode == "on_failure" and not prefix.original:
        return (
            "prefix.original = 0: with prefix.mode = 'on_failure' it is the groups without prefix "
            "that fail; give them a part of the mix"
        )
    if prefix.untraced and not prefix.original:
        return (
            "prefix.untraced = true: problems without a trace come in the original part of the "
            "mix, and prefix.original = 0"
        )
    if prefix.refresh and not prefix.original:
        return (
            "prefix.refresh = true: successes without prefix take the place of traces, and with "
            "prefix.original = 0 there are none"
        )
    return None


def _cuts(config: "Config") -> str | None:
    prefix, default = config.prefix, PrefixSection()
    if any(not 0 <= share < 1 for share in prefix.ladder):
        return f"prefix.ladder = {prefix.ladder}: shares of a trace, in [0, 1)"
    if prefix.low > prefix.high:
        return f"prefix.low = {prefix.low:g}: above prefix.high = {prefix.high:g}"
    if prefix.placement == "continuation" and prefix.hint != default.hint:
        return "prefix.hint: has no effect with prefix.placement = 'continuation'; it needs 'hint'"
    if "{fragment}" not in prefix.hint:
        return f"prefix.hint = {prefix.hint!r}: needs {{fragment}}, where the trace begins"
    uses = {
        "low": ("uniform", "resample", "step"),
        "per_trace": ("uniform", "step"),
        "boundary": ("step",),
        "success": ("target", "minimal"),
        "gain": ("target",),
        "until": ("schedule",),
    }
    for key, cuts in uses.items():
        if prefix.cut not in cuts and (value := getattr(prefix, key)) != getattr(default, key):
            return (
                f"prefix.{key} = {value!r}: has no effect with prefix.cut = {prefix.cut!r}; it "
                f"needs {' or '.join(map(repr, cuts))}"
            )
    return None


def _batches(config: "Config") -> str | None:
    if config.schedule.kind not in WHOLE:
        return (
            f"schedule.kind = {config.schedule.kind!r}: it makes up batches of what ends first, "
            "which are those with a prefix, and the mix would not hold; use 'sync' or "
            "'longest_first'"
        )
    if config.algo.dynamic_sampling:
        return (
            "algo.dynamic_sampling = true: groups without signal are replaced by what comes next, "
            "and the mix of prefix.on would not hold; set it false"
        )
    return None
