"""Settings of reuse and its store: what is refused, with what words, and what is not."""

from pathlib import Path
from typing import Any

import pytest

from reroll.config import (
    Config,
    ReuseSection,
    StoreSection,
    describe,
    load_config,
    save_config,
)
from tests.test_config_algo import as_flags, both_ways, check_accepted, from_file, refusal

ON = {"reuse.on": True}
HELD = ON | {"reuse.rule": "held"}
LENIENT = ON | {"reuse.rule": "lenient"}


def test_it_is_off_unless_asked_for() -> None:
    config = Config()
    assert not config.reuse.on
    assert (config.reuse.rule, config.reuse.verify) == ("fresh", "same")
    assert not config.reuse.audited
    assert load_config(None, {"reuse.on": "true"}) == Config(reuse=ReuseSection(on=True))


AUDITED = {
    ("fresh", "auto"): False, ("held", "auto"): True, ("lenient", "auto"): True,
    ("fresh", "on"): True, ("held", "on"): True, ("lenient", "on"): True,
    ("fresh", "off"): False, ("held", "off"): False, ("lenient", "off"): False,
}  # fmt: skip


@pytest.mark.parametrize(("rule", "audit"), AUDITED)
def test_what_is_audited(rule: Any, audit: Any) -> None:
    assert ReuseSection(on=True, rule=rule, audit=audit).audited == AUDITED[rule, audit]
    assert not ReuseSection(on=False, rule=rule, audit=audit).audited


# --- one setting --------------------------------------------------------------------------------

BOUNDS: dict[tuple[str, Any], str] = {
    ("reuse.rule", "SPEC-RL"): "input should be 'fresh', 'held' or 'lenient'",
    ("reuse.epochs", 0): "input should be greater than or equal to 1",
    ("reuse.rollouts", 0): "input should be greater than or equal to 1",
    ("reuse.window", 0): "input should be greater than or equal to 1",
    ("reuse.redraft", 3): "input should be 1, 2, 4 or 8",
    ("reuse.redraft", 16): "input should be 1, 2, 4 or 8",
    ("reuse.max_age", 0): "input should be greater than or equal to 1",
    ("reuse.lenience", 0.0): "input should be greater than 0",
    ("reuse.lenience", -1.0): "input should be greater than 0",
    ("reuse.anchor", "oldest"): "input should be 'previous' or 'generator'",
    ("reuse.cut", "nowhere"): "input should be 'ratio', 'random' or 'none'",
    ("reuse.delay", -1): "input should be greater than or equal to 0",
    ("reuse.audit", "yes"): "input should be 'auto', 'on' or 'off'",
    ("reuse.audit_every", 0): "input should be greater than or equal to 1",
    ("reuse.audit_prompts", 1): "input should be greater than or equal to 2",
    ("reuse.verify", "float8"): "input should be 'same' or 'bfloat16'",
    ("store.epochs", 0): "input should be greater than or equal to 1",
    ("store.max_gb", 0.0): "input should be greater than 0",
    ("store.memory_gb", -0.5): "input should be greater than or equal to 0",
}


@pytest.mark.parametrize(("key", "value"), BOUNDS)
def test_a_value_out_of_bounds(key: str, value: Any, tmp_path: Path) -> None:
    said = f"{key} = {value!r}: {BOUNDS[key, value]}"
    path = from_file(tmp_path, {key: value})
    assert refusal(path) == f"{path}: {said}"
    assert refusal(None, as_flags({key: value})) == f"--{said}"


@pytest.mark.parametrize("value", ["tranied", "0.5x", "1/4"])
def test_a_refresh_that_is_no_share(value: str, tmp_path: Path) -> None:
    path = from_file(tmp_path, HELD | {"reuse.refresh": value})
    message = refusal(path)
    assert message.startswith(f"{path}: reuse.refresh")
    assert f" = {value!r}: " in message
    message = refusal(None, as_flags(HELD) | {"reuse.refresh": value})
    assert message.startswith(f"--reuse.refresh = {value!r}: ")


@pytest.mark.parametrize("value", [0.0, 1.0, 0.125, "trained"])
def test_shares_that_may_be_redrawn(value: Any, tmp_path: Path) -> None:
    for config in both_ways(tmp_path, HELD | {"reuse.refresh": value}):
        assert config.reuse.refresh == value
        save_config(config, tmp_path / "saved.toml")
        assert load_config(tmp_path / "saved.toml") == config


def test_whole_numbers_are_shares_too() -> None:
    for text, share in (("0", 0.0), ("1", 1.0)):
        assert load_config(None, as_flags(HELD) | {"reuse.refresh": text}).reuse.refresh == share


def test_help_shows_every_setting_of_both_sections() -> None:
    shown = {key for key, *_ in describe()}
    assert {f"reuse.{key}" for key in ReuseSection.model_fields} <= shown
    assert {f"store.{key}" for key in StoreSection.model_fields} <= shown


# --- settings that do not go together -----------------------------------------------------------

OTHER_THAN_DEFAULT: dict[str, Any] = {
    "rule": "held", "epochs": 3, "rollouts": 4, "gate": False, "window": 8, "redraft": 1,
    "siblings": False, "stagger": True, "audit": "on", "audit_every": 2, "audit_prompts": 4,
    "verify": "bfloat16",
}  # fmt: skip


def useless(key: str, value: Any, other: str, there: Any, needs: str) -> tuple[dict[str, Any], str]:
    rule = {} if other == "on" else {f"reuse.{other}": there}
    on = {} if other == "on" else ON
    if other == "cut":
        rule |= {"reuse.rule": "lenient"}
    return (
        {f"reuse.{key}": value, **on, **rule},
        f"has no effect with reuse.{other} = {there!r}; it needs {needs}",
    )


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"{key} without reuse": useless(key, value, "on", False, "True")
        for key, value in OTHER_THAN_DEFAULT.items()
    },
    **{
        f"{key} under {rule}": useless(key, value, "rule", rule, "'held'")
        for rule in ("fresh", "lenient")
        for key, value in (("refresh", 0.5), ("refresh", "trained"), ("max_age", 3))
    },
    **{
        f"{key} under {rule}": useless(key, value, "rule", rule, "'lenient'")
        for rule in ("fresh", "held")
        for key, value in (
            ("lenience", 1.0), ("anchor", "generator"), ("cut", "none"), ("delay", 1),
        )
    },
    "rollouts under lenient": useless("rollouts", 4, "rule", "lenient", "'fresh' or 'held'"),
    **{
        f"lenience without a ratio, {cut}": useless("lenience", 1.0, "cut", cut, "'ratio'")
        for cut in ("random", "none")
    },
    **{
        f"a share of {share}": (
            {"reuse.refresh": share, **HELD},
            "a share of keys, between 0 and 1, or 'trained'",
        )
        for share in (-0.25, 1.5)
    },
    "a window beyond what is kept": (
        {"store.epochs": 2, "reuse.epochs": 3, **ON},
        "reuse.epochs + reuse.delay = 3 asks for older rollouts than are kept; raise it",
    ),
    "a delay beyond what is kept": (
        {"store.epochs": 3, "reuse.delay": 2, **LENIENT},
        "reuse.epochs + reuse.delay = 4 asks for older rollouts than are kept; raise it",
    ),
    **{
        f"one ratio over several writers, {ratio}": (
            {"algo.ratio": ratio, "algo.name": name, "reuse.anchor": "generator", **LENIENT} | more,
            "with reuse.anchor = 'generator' a reply holds tokens of several policy versions, over "
            "which one ratio of the whole reply means nothing; set correct.mode = 'decoupled', or "
            "algo.ratio = 'token'",
        )
        for ratio, name, more in (
            ("sequence", "gspo", {}),
            ("product", "rloo", {}),
            ("sequence", "gspo", {"correct.mode": "mask"}),
        )
    },
}  # fmt: skip
"""settings, the first of which is the one to change; and what is said of it"""


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_contradiction_is_refused_by_the_key_to_change(kind: str, tmp_path: Path) -> None:
    given, said = CONTRADICTIONS[kind]
    key, value = next(iter(given.items()))
    expected = f"{key} = {value!r}: {said}"
    path = from_file(tmp_path, given)
    assert refusal(path) == f"{path}: {expected}"
    # all flags; or this one beside a file with the rest; or the rest beside a file with this one
    assert refusal(None, as_flags(given)) == f"--{expected}"
    rest = {k: v for k, v in given.items() if k != key}
    assert refusal(from_file(tmp_path, rest), as_flags({key: value})) == f"--{expected}"
    path = from_file(tmp_path, {key: value})
    assert refusal(path, as_flags(rest)) == f"{path}: {expected}"


ACCEPTED: dict[str, dict[str, Any]] = {
    "everything about trees": {
        f"reuse.{k}": v for k, v in {"on": True, **OTHER_THAN_DEFAULT, "stagger": False}.items()
    },
    "defaults without effect": {
        "reuse.refresh": 0.25, "reuse.max_age": 8, "reuse.lenience": 1.6487,
        "reuse.anchor": "previous", "reuse.epochs": 2, "reuse.audit": "auto",
    },
    "no ratio, lenience as it is": LENIENT | {"reuse.cut": "none", "reuse.anchor": "generator"},
    "as far back as is kept": ON | {"store.epochs": 2, "reuse.epochs": 2},
    "as far back as is kept, delayed": LENIENT | {
        "store.epochs": 3, "reuse.epochs": 1, "reuse.delay": 2,
    },
    "several writers under a token's ratio": LENIENT | {
        "reuse.anchor": "generator", "algo.name": "gspo", "algo.ratio": "token",
    },
    "several writers, decoupled": LENIENT | {
        "reuse.anchor": "generator", "algo.name": "gspo", "correct.mode": "decoupled",
    },
    "several writers, weighted": LENIENT | {"reuse.anchor": "generator", "correct.mode": "tis"},
    "one ratio over what was stamped anew": LENIENT | {"algo.name": "gspo"},
    "a store in less space": ON | {"store.max_gb": 0.5, "store.memory_gb": 0.0},
    "audits of fresh noise": ON | {"reuse.audit": "on", "reuse.audit_every": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_looks_like_a_contradiction_and_is_none(kind: str, tmp_path: Path) -> None:
    check_accepted(ACCEPTED[kind], tmp_path)
