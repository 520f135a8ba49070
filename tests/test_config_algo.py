"""What each algorithm's name stands for, and settings that make no sense together."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from reroll.config import ALGORITHMS, Config, load_config, save_config, settings
from reroll.errors import UserError

# --- presets --------------------------------------------------------------------------------------

EVERY = {
    "generation_bound": 4.0, "kl_coef": 0.0, "kl_unbiased": False, "gamma": 1.0, "lam": 1.0,
    "whiten": True, "entropy_coef": 0.0, "running_weight": 4.0, "running_decay": 0.9,
}  # fmt: skip
"""the same whatever the algorithm"""
GROUPS = {"kl_in": "loss", "kl_estimator": "k3"}
RETURNS = {"kl_in": "reward", "kl_estimator": "k1"}
NO_FILTER = {"dynamic_sampling": False, "overlong": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300, eq. 3 and 4, section 4.1.2: reward minus mean over deviation, each reply's
    # mean over its tokens, k3 in the loss
    "grpo": {"advantage": "grpo", "ratio": "token", "average": "sequence",
             "clip_low": 0.2, "clip_high": 0.2, **NO_FILTER, **GROUPS},
    # arXiv 2503.20783, section 3.2: no deviation, a constant in place of the length
    "dr_grpo": {"advantage": "dr_grpo", "ratio": "token", "average": "constant",
                "clip_low": 0.2, "clip_high": 0.2, **NO_FILTER, **GROUPS},
    # arXiv 2503.14476, eq. 8 to 13, section 4.1: 0.2 and 0.28, all tokens alike, no group without
    # signal, a buffer of 4,096 in a limit of 20,480 tokens
    "dapo": {"advantage": "grpo", "ratio": "token", "average": "token",
             "clip_low": 0.2, "clip_high": 0.28,
             "dynamic_sampling": True, "overlong": 4096 / 20480, **GROUPS},
    # arXiv 2507.18071, eq. 5 to 7, section 5.1: geometric mean over a reply, 3e-4 and 4e-4
    "gspo": {"advantage": "grpo", "ratio": "sequence", "average": "sequence",
             "clip_low": 3e-4, "clip_high": 4e-4, **NO_FILTER, **GROUPS},
    # arXiv 2402.14740: leave-one-out mean, the reply as one action, the KL in its reward
    "rloo": {"advantage": "rloo", "ratio": "product", "average": "sequence",
             "clip_low": 0.2, "clip_high": 0.2, **NO_FILTER, **RETURNS},
    # the same mean over what went before, token by token, so that it may hold stale tokens
    "rloo_running": {"advantage": "running", "ratio": "token", "average": "constant",
                     "clip_low": 0.2, "clip_high": 0.2, **NO_FILTER, **RETURNS},
    # arXiv 2501.03262: PPO's surrogate, the KL in the reward, normalised over the batch
    "reinforce_pp": {"advantage": "reinforce_pp", "ratio": "token", "average": "token",
                     "clip_low": 0.2, "clip_high": 0.2, **NO_FILTER, **RETURNS},
    # arXiv 1707.06347, table 3: clip range 0.2; the KL in the reward as in arXiv 2203.02155
    "ppo": {"advantage": "gae", "ratio": "token", "average": "token",
            "clip_low": 0.2, "clip_high": 0.2, **NO_FILTER, **RETURNS},
}  # fmt: skip
"""[algo] as each name resolves, against its paper"""


def from_file(folder: Path, given: dict[str, Any], name: str = "run.toml") -> Path:
    """A file with these `section.key` values."""
    tables: dict[str, Any] = {}
    for key, value in given.items():
        section, _, rest = key.partition(".")
        tables.setdefault(section, {})[rest] = value
    path = folder / name
    path.write_text(tomli_w.dumps(tables))
    return path


def as_flags(given: dict[str, Any]) -> dict[str, str]:
    """The same as texts of flags."""
    return {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in given.items()}


def both_ways(folder: Path, given: dict[str, Any]) -> list[Config]:
    """Loaded from a file, from flags, and the first half from one and the rest from the other."""
    keys = list(given)
    first, rest = ({k: given[k] for k in part} for part in (keys[::2], keys[1::2]))
    return [
        load_config(from_file(folder, given)),
        load_config(None, as_flags(given)),
        load_config(from_file(folder, first), as_flags(rest)),
    ]


def check_accepted(given: dict[str, Any], folder: Path) -> None:
    """Taken as given, however it is given, and the same when saved and loaded again."""
    for config in both_ways(folder, given):
        found = dict(settings(config))
        assert {key: found[key] for key in given} == given
        save_config(config, folder / "saved.toml")
        assert load_config(folder / "saved.toml") == config


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_name_stands_for(name: str, tmp_path: Path) -> None:
    for config in both_ways(tmp_path, {"algo.name": name}):
        assert config.algo.model_dump() == {"name": name, **PRESETS[name], **EVERY}
        assert config.model_copy(update={"algo": Config().algo}) == Config()


def test_every_algorithm_is_in_the_table() -> None:
    assert list(PRESETS) == list(ALGORITHMS)


def test_without_a_name_it_is_grpo(tmp_path: Path) -> None:
    assert Config() == load_config(None, {"algo.name": "grpo"})
    assert load_config(from_file(tmp_path, {"algo.clip_high": 0.3})).algo.name == "grpo"


EXPLICIT = [
    ("grpo", "advantage", "rloo"),
    ("grpo", "average", "token"),
    ("grpo", "kl_estimator", "k2"),
    ("dr_grpo", "advantage", "grpo"),  # the default of the section, but not of the algorithm
    ("dr_grpo", "average", "sequence"),
    ("dapo", "clip_high", 0.2),
    ("dapo", "dynamic_sampling", False),
    ("dapo", "overlong", 0.0),
    ("gspo", "clip_low", 0.2),
    ("gspo", "clip_high", 5e-4),
    ("gspo", "ratio", "token"),
    ("rloo", "ratio", "token"),
    ("rloo", "kl_in", "loss"),
    ("reinforce_pp", "average", "sequence"),
    ("reinforce_pp", "gamma", 0.9),
    ("ppo", "lam", 0.95),
    ("ppo", "whiten", False),
    ("ppo", "kl_estimator", "k3"),
]


@pytest.mark.parametrize(("name", "key", "value"), EXPLICIT)
def test_what_is_said_wins_over_what_a_name_stands_for(
    name: str, key: str, value: Any, tmp_path: Path
) -> None:
    expected = {"name": name, **PRESETS[name], **EVERY} | {key: value}
    assert expected != {"name": name, **PRESETS[name], **EVERY}
    for config in both_ways(tmp_path, {"algo.name": name, f"algo.{key}": value}):
        assert config.algo.model_dump() == expected
    for config in both_ways(tmp_path, {f"algo.{key}": value, "algo.name": name}):
        assert config.algo.model_dump() == expected


def test_a_name_from_a_flag_leaves_what_the_file_says(tmp_path: Path) -> None:
    path = from_file(
        tmp_path, {"algo.name": "dapo", "algo.clip_high": 0.3, "algo.entropy_coef": 0.1}
    )
    algo = load_config(path, {"algo.name": "dr_grpo"}).algo
    assert algo.model_dump() == {
        "name": "dr_grpo", **PRESETS["dr_grpo"], **EVERY, "clip_high": 0.3, "entropy_coef": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_saved_configuration_shows_and_keeps_what_ran(name: str, tmp_path: Path) -> None:
    changed = {"algo.kl_coef": 0.02, "algo.entropy_coef": 0.01, "algo.clip_high": 0.2}
    for given in ({"algo.name": name}, {"algo.name": name, **changed}):
        config = load_config(from_file(tmp_path, given))
        save_config(config, tmp_path / "config.toml")
        shown = tomllib.loads((tmp_path / "config.toml").read_text())["algo"]
        own = {key.removeprefix("algo."): value for key, value in given.items()}
        assert shown == {"name": name, **PRESETS[name], **EVERY, **own}
        assert load_config(tmp_path / "config.toml") == config


NAMES = "'grpo', 'dr_grpo', 'dapo', 'gspo', 'rloo', 'rloo_running', 'reinforce_pp' or 'ppo'"


@pytest.mark.parametrize("value", ["grop", "GRPO", "", 3, True, ["grpo"], {"grpo": 1}])
def test_an_unknown_name_is_refused_with_the_list(value: Any, tmp_path: Path) -> None:
    path = from_file(tmp_path, {"algo.name": value})
    message = refusal(path)
    assert message == f"{path}: algo.name = {value!r}: input should be {NAMES}"
    if isinstance(value, str) and value:
        assert refusal(None, {"algo.name": value}) == message.replace(f"{path}: ", "--")


def test_a_section_that_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("algo = 'grpo'")
    assert refusal(path).startswith(f"{path}: algo = 'grpo': input should be a valid dictionary")
    assert refusal(path, {"algo.name": "ppo"}) == "--algo.name: algo = 'grpo' is not a table"


# --- contradictions -------------------------------------------------------------------------------


def refusal(path: Path | None, flags: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as raised:
        load_config(path, flags)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


def no_critic(key: str, value: Any, name: str, advantage: str) -> tuple[dict[str, Any], str]:
    return (
        {f"critic.{key}": value, "algo.name": name},
        rf"algo\.advantage = '{advantage}' has no critic; use algo\.name = 'ppo', or "
        r"algo\.advantage = 'gae'",
    )


def one_number(average: str, ratio: str, name: str) -> tuple[dict[str, Any], str]:
    return (
        {"algo.average": average, "algo.ratio": ratio, "algo.name": name},
        rf"with algo\.ratio = '{ratio}' the loss is one number a rollout, which '{average}' would "
        r"weight by length; set algo\.average = 'sequence'",
    )


def useless(key: str, value: Any, name: str, other: str, needs: str) -> tuple[dict[str, Any], str]:
    return (
        {f"algo.{key}": value, "algo.name": name},
        rf"has no effect with algo\.{other}; it needs {needs}",
    )


def lagging(key: str, value: Any, mode: str, needs: str) -> tuple[dict[str, Any], str]:
    return (
        {f"correct.{key}": value, "correct.mode": mode},
        rf"has no effect with correct\.mode = '{mode}'; it needs {needs}",
    )


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"a group of one, {name}": (
            {"rollout.samples": 1, "algo.name": name},
            rf"algo\.advantage = '{PRESETS[name]['advantage']}' compares rollouts of a group, so "
            r"it needs at least 2; 'running' \(rloo_running\), 'reinforce_pp' and 'gae' \(ppo\) "
            r"can do with 1",
        )
        for name in ("grpo", "dr_grpo", "dapo", "gspo", "rloo")
    },
    "a group of one has no signal": (
        {"algo.dynamic_sampling": True, "algo.name": "reinforce_pp", "rollout.samples": 1},
        r"it looks for groups of unequal rewards, and with rollout\.samples = 1 there are none",
    ),
    "more minibatches than groups": (
        {"train.minibatches": 5, "rollout.prompts": 4},
        r"groups stay whole, so at most rollout\.prompts = 4 minibatches",
    ),
    "the critic alone to the end": (
        {"critic.warmup": 3, "algo.name": "ppo", "train.steps": 3},
        r"the policy would never be trained in train\.steps = 3",
    ),
    "a shared critic of none": no_critic("trunk", "shared", "grpo", "grpo"),
    "a critic's rate of none": no_critic("learning_rate", 1e-4, "dapo", "grpo"),
    "a critic's clip of none": no_critic("clip", 0.0, "rloo", "rloo"),
    "a critic's weight of none": no_critic("coef", 1.0, "reinforce_pp", "reinforce_pp"),
    "a critic's warm-up of none": no_critic("warmup", 1, "dr_grpo", "dr_grpo"),
    "k1 in the loss": (
        {"algo.kl_estimator": "k1", "algo.kl_coef": 0.1},
        r"k1 in the loss has an expected gradient of zero; set algo\.kl_estimator to 'k2' or 'k3', "
        r"algo\.kl_unbiased = true, or algo\.kl_in = 'reward'",
    ),
    "k1 from the reward to the loss": (  # what the name filled in is not what the user wrote
        {"algo.kl_in": "loss", "algo.name": "ppo", "algo.kl_coef": 0.1},
        r"algo\.name = 'ppo' sets algo\.kl_estimator = 'k1'; k1 in the loss has .*",
    ),
    "a KL corrected that is not there": (
        {"algo.kl_unbiased": True, "algo.name": "grpo"},
        r"has no effect with algo\.kl_coef = 0\.0; set that first",
    ),
    "k2 in the loss, corrected": (
        {"algo.kl_estimator": "k2", "algo.kl_unbiased": True, "algo.kl_coef": 0.1},
        "in the loss its gradient is exact as it is, and the ratio of algo.kl_unbiased = true "
        "would bend it; use 'k1' or 'k3', or leave that off",
    ),
    "a KL corrected in the reward": (
        {"algo.kl_unbiased": True, "algo.kl_in": "reward", "algo.kl_coef": 0.1},
        r"the ratio corrects a KL in the loss; with algo\.kl_in = 'reward' leave it off",
    ),
    "a reply's ratio over tokens": one_number("token", "sequence", "gspo"),
    "a reply's ratio over a constant": one_number("constant", "sequence", "gspo"),
    "a reply's product over tokens": one_number("token", "product", "rloo"),
    "a reply's product over a constant": one_number("constant", "product", "rloo"),
    "another ratio under a token's average": (
        {"algo.ratio": "sequence", "algo.name": "dapo"},
        r"algo\.name = 'dapo' sets algo\.average = 'token'; with algo\.ratio = 'sequence' the loss "
        "is one number a rollout, which 'token' would weight by length; "
        r"set algo\.average = 'sequence'",
    ),
    "a reply's ratio for tokens of their own credit": (
        {"algo.ratio": "product", "algo.average": "sequence", "algo.name": "ppo"},
        r"one ratio for a whole reply, and algo\.advantage = 'gae' differs from token to token; "
        "use 'token'",
    ),
    "a reply's ratio under a discount": (
        {"algo.ratio": "product", "algo.name": "reinforce_pp", "algo.gamma": 0.9},
        r".*algo\.advantage = 'reinforce_pp' differs from token to token; use 'token'",
    ),
    "a penalty for none": (
        {"rollout.penalty": 0.3, "rollout.truncated": "zero"},
        r"has no effect with rollout\.truncated = 'zero'; it needs 'penalty'",
    ),
    "overlong by less than a token": (
        {"rollout.max_tokens": 2, "algo.name": "dapo"},
        r"algo\.overlong = 0\.2 of that is no token; raise one of them, or set algo\.overlong = 0",
    ),
    **{
        f"a cap that weakens under {mode}": (
            {"correct.cap": 0.5, "correct.mode": mode},
            "would weaken tokens that need no correction; use 1 or more, or 0 for no cap",
        )
        for mode in ("tis", "decoupled")
    },
    "tokens weighted in a reply's ratio": (
        {"correct.mode": "tis", "algo.name": "gspo"},
        r"it weights single tokens, and algo\.ratio = 'sequence' is one ratio for a whole "
        "rollout; use 'decoupled' or 'mask'",
    ),
    "tokens weighted in a reply's product": (
        {"correct.mode": "tis", "algo.name": "rloo"},
        r".*algo\.ratio = 'product' is .*; use 'decoupled' or 'mask'",
    ),
    **{
        f"length punished twice, {truncated}": (
            {"rollout.truncated": truncated, "algo.name": "dapo"},
            r"algo\.overlong = 0\.2 punishes length already; use 'keep' or 'mask', or set "
            r"algo\.overlong = 0",
        )
        for truncated in ("zero", "penalty")
    },
    "lambda without a critic": useless("lam", 0.9, "reinforce_pp", "advantage = 'rei.*'", "'gae'"),
    "whiten without a critic": useless("whiten", False, "grpo", "advantage = 'grpo'", "'gae'"),
    "a discount in groups": useless(
        "gamma", 0.99, "rloo", "advantage = 'rloo'", "'gae' or 'reinforce_pp'"
    ),
    "a running mean's weight without one": useless(
        "running_weight", 2.0, "rloo", "advantage = 'rloo'", "'running'"
    ),
    "a running mean's decay without one": useless(
        "running_decay", 0.5, "ppo", "advantage = 'gae'", "'running'"
    ),
    "a bound on no refill": useless(
        "generation_bound", 2.0, "gspo", "dynamic_sampling = False", "True"
    ),
    **{
        f"a cap under {mode}": lagging("cap", 3.0, mode, "'tis' or 'decoupled'")
        for mode in ("none", "mask")
    },
    **{
        f"a largest lag under {mode}": lagging("max_lag", 2, mode, "'mask'")
        for mode in ("none", "tis", "decoupled")
    },
    "the weight of a value loss of its own": (
        {"critic.coef": 0.5, "algo.name": "ppo"},
        r"has no effect with critic\.trunk = 'own'; it needs 'shared'",
    ),
    "adapters of no rank, scaled": (
        {"lora.alpha": 8.0, "train.epochs": 2},
        r"has no effect with lora\.rank = 0; set that first",
    ),
    "adapters of no rank, placed": (
        {"lora.targets": ["q_proj"], "train.epochs": 2},
        r"has no effect with lora\.rank = 0; set that first",
    ),
}
"""settings, the first of which is the one to change; and what is said of it"""


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_contradiction_is_refused_by_the_key_to_change(kind: str, tmp_path: Path) -> None:
    given, said = CONTRADICTIONS[kind]
    key, value = next(iter(given.items()))
    expected = re.compile(re.escape(f"{key} = {value!r}: ").replace("True", "(true|True)") + said)
    path = from_file(tmp_path, given)
    message = refusal(path)
    assert message.startswith(f"{path}: {key} = ")
    assert expected.fullmatch(message.removeprefix(f"{path}: "))
    # all flags; or this one beside a file with the rest; or the rest beside a file with this one
    assert expected.fullmatch(refusal(None, as_flags(given)).removeprefix("--"))
    rest = {k: v for k, v in given.items() if k != key}
    path = from_file(tmp_path, rest)
    message = refusal(path, as_flags({key: value}))
    assert message.startswith(f"--{key} = ")
    assert expected.fullmatch(message.removeprefix("--"))
    path = from_file(tmp_path, {key: value})
    message = refusal(path, as_flags(rest))
    assert message.startswith(f"{path}: {key} = ")


ACCEPTED: dict[str, dict[str, Any]] = {
    "one rollout a prompt, REINFORCE++": {"algo.name": "reinforce_pp", "rollout.samples": 1},
    "one rollout a prompt, PPO": {"algo.name": "ppo", "rollout.samples": 1},
    "two rollouts a prompt": {"algo.name": "rloo", "rollout.samples": 2},
    "signal among two, REINFORCE++": {
        "algo.name": "reinforce_pp", "algo.dynamic_sampling": True, "rollout.samples": 2,
    },
    "an advantage of one rollout under another name": {
        "algo.name": "grpo", "algo.advantage": "reinforce_pp", "rollout.samples": 1,
    },
    "as many minibatches as groups": {"train.minibatches": 4, "rollout.prompts": 4},
    "the critic alone but for one step": {
        "algo.name": "ppo", "critic.warmup": 2, "train.steps": 3,
    },
    "a critic under another name": {
        "algo.name": "grpo", "algo.advantage": "gae", "critic.trunk": "shared",
        "critic.coef": 0.5, "algo.lam": 0.9,
    },
    "a critic's defaults spelled out": {"algo.name": "grpo", "critic.clip": 0.2},
    "k1 in the reward": {
        "algo.name": "grpo", "algo.kl_in": "reward", "algo.kl_estimator": "k1",
        "algo.kl_coef": 0.1,
    },
    "k1 in the loss, corrected": {
        "algo.kl_estimator": "k1", "algo.kl_unbiased": True, "algo.kl_coef": 0.1,
    },
    "k3 in the loss, corrected": {"algo.kl_unbiased": True, "algo.kl_coef": 0.1},
    "k2 in the loss": {"algo.name": "ppo", "algo.kl_in": "loss", "algo.kl_estimator": "k2",
                       "algo.kl_coef": 0.1},
    "k3 in the reward": {"algo.name": "ppo", "algo.kl_estimator": "k3", "algo.kl_coef": 0.1},
    "GSPO, decoupled": {"algo.name": "gspo", "correct.mode": "decoupled", "correct.cap": 3.0},
    "GSPO, old tokens left out": {
        "algo.name": "gspo", "correct.mode": "mask", "correct.max_lag": 0,
    },
    "RLOO, decoupled without a cap": {
        "algo.name": "rloo", "correct.mode": "decoupled", "correct.cap": 0.0,
    },
    "GRPO, truncated importance sampling": {"correct.mode": "tis", "correct.cap": 4.0},
    "every reply alike with a token's ratio": {"algo.name": "dapo", "algo.average": "sequence"},
    "RLOO with a token's ratio, over tokens": {
        "algo.name": "rloo", "algo.ratio": "token", "algo.average": "token",
    },
    "overlong, truncated ones kept": {"algo.name": "dapo", "rollout.truncated": "keep"},
    "overlong, truncated ones left out": {"algo.name": "dapo", "rollout.truncated": "mask"},
    "truncated ones cost, no overlong": {
        "algo.name": "dapo", "algo.overlong": 0.0, "rollout.truncated": "penalty",
    },
    "a discount, REINFORCE++": {"algo.name": "reinforce_pp", "algo.gamma": 0.9},
    "a discount, PPO": {"algo.name": "ppo", "algo.gamma": 0.9, "algo.lam": 0.9,
                        "algo.whiten": False},
    "filtered and not refilled": {"algo.name": "dapo", "algo.generation_bound": 1.0},
    "defaults without effect": {
        "algo.lam": 1.0, "algo.gamma": 1.0, "algo.generation_bound": 4.0, "correct.cap": 2.0,
        "lora.alpha": 32.0,
    },
    "adapters and PPO": {"algo.name": "ppo", "lora.rank": 8, "algo.kl_coef": 0.01},
    "adapters, scaled and placed": {
        "lora.rank": 8, "lora.alpha": 16.0, "lora.targets": ["q_proj", "v_proj"],
    },
    "the weight of a shared trunk's value loss": {
        "algo.name": "ppo", "critic.trunk": "shared", "critic.coef": 0.5,
    },
    "epochs and minibatches": {"train.epochs": 4, "train.minibatches": 8, "algo.name": "ppo"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_looks_like_a_contradiction_and_is_none(kind: str, tmp_path: Path) -> None:
    check_accepted(ACCEPTED[kind], tmp_path)
