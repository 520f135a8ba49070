"""Settings that are fine by themselves and make no sense together, refused with the reason.

`contradiction` looks at a whole configuration before anything is loaded. Messages begin with the
key to change.
"""

from typing import TYPE_CHECKING

from reroll.config.algo import ALGORITHMS, GROUP_ADVANTAGES, AlgoSection, CriticSection
from reroll.config.check_prefix import prefix_contradiction
from reroll.config.check_prune import prune_contradiction
from reroll.config.check_schedule import schedule_contradiction
from reroll.config.schedule import OVER, STALE

if TYPE_CHECKING:
    from reroll.config.load import Config


def contradiction(config: "Config") -> str | None:
    """The first contradiction as one line, or None."""
    for find in (
        _groups,
        _batch,
        _critic,
        _kl,
        _ratio,
        _length,
        _without_effect,
        _cap,
        _reuse,
        schedule_contradiction,
        prune_contradiction,
        prefix_contradiction,
    ):
        if text := find(config):
            return text
    return None


def _groups(config: "Config") -> str | None:
    algo, samples = config.algo, config.rollout.samples
    if samples == 1 and algo.advantage in GROUP_ADVANTAGES:
        return (
            f"rollout.samples = 1: algo.advantage = {algo.advantage!r} compares rollouts of a "
            "group, so it needs at least 2; 'running' (rloo_running), 'reinforce_pp' and 'gae' "
            "(ppo) can do with 1"
        )
    if algo.advantage == "running" and algo.dynamic_sampling:
        return (
            "algo.dynamic_sampling = true: it leaves out groups of equal rewards, and with "
            "algo.advantage = 'running' these have a gradient too; false here"
        )
    if samples == 1 and algo.dynamic_sampling:
        return (
            "algo.dynamic_sampling = true: it looks for groups of unequal rewards, and with "
            "rollout.samples = 1 there are none"
        )
    return None


def _batch(config: "Config") -> str | None:
    if config.train.minibatches > config.rollout.prompts:
        return (
            f"train.minibatches = {config.train.minibatches}: groups stay whole, "
            f"so at most rollout.prompts = {config.rollout.prompts} minibatches"
        )
    return None


def _critic(config: "Config") -> str | None:
    if config.algo.advantage == "gae":
        if config.critic.warmup >= config.train.steps:
            return (
                f"critic.warmup = {config.critic.warmup}: the policy would never be trained in "
                f"train.steps = {config.train.steps}"
            )
        return None
    default = CriticSection()
    for key, value in config.critic:
        if value != getattr(default, key):
            return (
                f"critic.{key} = {value!r}: algo.advantage = {config.algo.advantage!r} has no "
                "critic; use algo.name = 'ppo', or algo.advantage = 'gae'"
            )
    return None


def _kl(config: "Config") -> str | None:
    algo = config.algo
    if algo.kl_coef == 0:
        return None
    if algo.kl_in == "reward" and algo.kl_unbiased:
        return (
            "algo.kl_unbiased = true: the ratio corrects a KL in the loss; with "
            "algo.kl_in = 'reward' leave it off"
        )
    if algo.kl_in == "loss" and algo.kl_estimator == "k1" and not algo.kl_unbiased:
        return (
            f"{_at_odds(algo, 'kl_estimator', 'kl_in')}k1 in the loss has an expected gradient of "
            "zero; set algo.kl_estimator to 'k2' or 'k3', "
            "algo.kl_unbiased = true, or algo.kl_in = 'reward'"
        )
    if algo.kl_unbiased and algo.kl_estimator == "k2":
        return (
            "algo.kl_estimator = 'k2': in the loss its gradient is exact as it is, and the ratio "
            "of algo.kl_unbiased = true would bend it; use 'k1' or 'k3', or leave that off"
        )
    return None


def _ratio(config: "Config") -> str | None:
    algo, mode = config.algo, config.correct.mode
    if algo.ratio == "token":
        return None
    kl_per_token = algo.kl_coef > 0 and algo.kl_in == "reward"
    if algo.advantage == "gae" or (
        algo.advantage == "reinforce_pp" and (algo.gamma < 1 or kl_per_token)
    ):
        return (
            f"algo.ratio = {algo.ratio!r}: one ratio for a whole reply, and algo.advantage = "
            f"{algo.advantage!r} differs from token to token; use 'token'"
        )
    if algo.average != "sequence":
        return (
            f"{_at_odds(algo, 'average', 'ratio')}with "
            f"algo.ratio = {algo.ratio!r} the loss is one number a rollout, which "
            f"{algo.average!r} would weight by length; set algo.average = 'sequence'"
        )
    if mode == "tis":
        return (
            f"correct.mode = 'tis': it weights single tokens, and algo.ratio = {algo.ratio!r} is "
            "one ratio for a whole rollout; use 'decoupled' or 'mask'"
        )
    return None


def _length(config: "Config") -> str | None:
    algo, rollout = config.algo, config.rollout
    if algo.overlong > 0 and rollout.truncated in ("zero", "penalty"):
        return (
            f"rollout.truncated = {rollout.truncated!r}: algo.overlong = {algo.overlong} punishes "
            "length already; use 'keep' or 'mask', or set algo.overlong = 0"
        )
    if algo.overlong > 0 and round(algo.overlong * rollout.max_tokens) == 0:
        return (
            f"rollout.max_tokens = {rollout.max_tokens}: algo.overlong = {algo.overlong} of that "
            "is no token; raise one of them, or set algo.overlong = 0"
        )
    return None


def _reuse(config: "Config") -> str | None:
    reuse, store = config.reuse, config.store
    if not reuse.on:
        for key, value in store:
            if value != getattr(type(store)(), key) and not config.prune.on:
                return f"store.{key} = {value!r}: has no effect with reuse.on = False; set that"
        return None
    if not reuse.audited:
        for key in ("audit_every", "audit_prompts"):
            if (value := getattr(reuse, key)) != getattr(type(reuse)(), key):
                return (
                    f"reuse.{key} = {value}: has no effect with reuse.rule = {reuse.rule!r} and "
                    f"reuse.audit = {reuse.audit!r}; set reuse.audit = 'on'"
                )
    elif config.rollout.prompts < 2:
        return (
            "rollout.prompts = 1: an audit compares at least two problems of a step; raise it, or "
            "set reuse.audit = 'off'"
        )
    if isinstance(reuse.refresh, float) and not 0 <= reuse.refresh <= 1:
        return f"reuse.refresh = {reuse.refresh}: a share of keys, between 0 and 1, or 'trained'"
    if reuse.epochs + reuse.delay > store.epochs:
        return (
            f"store.epochs = {store.epochs}: reuse.epochs + reuse.delay = "
            f"{reuse.epochs + reuse.delay} asks for older rollouts than are kept; raise it"
        )
    writers = reuse.rule == "lenient" and reuse.anchor == "generator"
    if writers and config.algo.ratio != "token" and config.correct.mode != "decoupled":
        return (
            f"algo.ratio = {config.algo.ratio!r}: with reuse.anchor = 'generator' a reply holds "
            "tokens of several policy versions, over which one ratio of the whole reply means "
            "nothing; set correct.mode = 'decoupled', or algo.ratio = 'token'"
        )
    return None


def _cap(config: "Config") -> str | None:
    if 0 < config.correct.cap < 1:
        return (
            f"correct.cap = {config.correct.cap}: would weaken tokens that need no correction; use "
            "1 or more, or 0 for no cap"
        )
    return None


def _at_odds(algo: AlgoSection, key: str, other: str) -> str:
    """How to begin on two settings at odds: with `other` where algo.name filled in `key`."""
    value = getattr(algo, key)
    if value != ALGORITHMS[algo.name].get(key):
        return f"algo.{key} = {value!r}: "
    return (
        f"algo.{other} = {getattr(algo, other)!r}: algo.name = {algo.name!r} sets "
        f"algo.{key} = {value!r}; "
    )


_NEEDS: tuple[tuple[str, str, str, tuple[object, ...]], ...] = (
    ("algo", "lam", "advantage", ("gae",)),
    ("algo", "whiten", "advantage", ("gae",)),
    ("algo", "gamma", "advantage", ("gae", "reinforce_pp")),
    ("algo", "running_weight", "advantage", ("running",)),
    ("algo", "running_decay", "advantage", ("running",)),
    ("algo", "generation_bound", "dynamic_sampling", (True,)),
    ("algo", "kl_unbiased", "kl_coef", ()),
    ("rollout", "penalty", "truncated", ("penalty",)),
    ("critic", "coef", "trunk", ("shared",)),
    ("correct", "cap", "mode", ("tis", "decoupled")),
    ("correct", "max_lag", "mode", ("mask",)),
    *(
        ("reuse", key, "on", (True,))
        for key in (
            *("rule", "epochs", "rollouts", "gate", "window", "redraft", "siblings", "stagger"),
            *("audit", "audit_every", "audit_prompts", "verify"),
        )
    ),
    ("reuse", "stagger", "siblings", (True,)),
    ("reuse", "refresh", "rule", ("held",)),
    ("reuse", "max_age", "rule", ("held",)),
    *(("reuse", key, "rule", ("fresh", "held")) for key in ("rollouts", "gate", "window")),
    *(("reuse", key, "rule", ("lenient",)) for key in ("lenience", "anchor", "cut", "delay")),
    ("reuse", "lenience", "cut", ("ratio",)),
    *(("schedule", key, "kind", ("sorted",)) for key in ("batches", "mode", "refill", "held")),
    ("schedule", "held", "mode", ("on_policy",)),
    ("schedule", "over", "kind", tuple(OVER)),
    ("schedule", "max_lag", "kind", STALE),
    ("schedule", "keep_cache", "kind", ("async",)),
    ("lora", "alpha", "rank", ()),
    ("lora", "targets", "rank", ()),
)
"""section, setting, another one of it, and the values of that under which the first has an effect
(none: any but 0)"""


def _without_effect(config: "Config") -> str | None:
    for section, key, other, wanted in _NEEDS:
        owner = getattr(config, section)
        value, there = getattr(owner, key), getattr(owner, other)
        default = type(owner).model_fields[key].get_default(call_default_factory=True)
        if value != default and (there not in wanted if wanted else there == 0):
            remedy = f"it needs {' or '.join(map(repr, wanted))}" if wanted else "set that first"
            return (
                f"{section}.{key} = {value!r}: has no effect with {section}.{other} = {there!r}; "
                f"{remedy}"
            )
    return None
