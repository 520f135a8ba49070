import re
from pathlib import Path
from typing import Any

import pytest

from reroll.cli import parse_overrides
from reroll.config import Config, describe, differences, load_config, save_config, settings
from reroll.errors import UserError
from tests.project import ROOT


def mistake(path: Path | str | None, overrides: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as raised:
        load_config(path, overrides)
    message = str(raised.value)
    assert message and "\n" not in message
    return message


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


MISTAKES = {
    "unknown section": ("[modle]\npath = 'x'", r"modle: unknown setting; did you mean model\?"),
    "unknown key": (
        "[model]\npth = 'x'",
        r"model\.pth: unknown setting; did you mean model\.path\?",
    ),
    "key of another section": (
        "[rollout]\nmicrobatch_tokens = 1",
        r"rollout\.microbatch_tokens: unknown setting; did you mean train\.microbatch_tokens\?",
    ),
    "key of several other sections": (
        "[rollout]\nlearning_rate = 1",
        r"rollout\.learning_rate: unknown setting; did you mean (train|critic|sft)\."
        r"learning_rate\?",
    ),
    "nothing near": (
        "[qqq]\nzzz = 1",
        r"qqq: unknown setting; `reroll train --help` lists them all",
    ),
    "key outside sections": ("seed = 1", r"seed: unknown setting; did you mean .*\?"),
    "text for a number": (
        "[rollout]\nprompts = 'many'",
        r"rollout\.prompts = 'many': input should be a valid integer",
    ),
    "fraction for a whole number": (
        "[train]\nsteps = 2.5",
        r"train\.steps = 2\.5: input should be a valid integer",
    ),
    "number for text": ("[run]\nout = 7", r"run\.out = 7: input should be a valid string"),
    "text for a truth value": (
        "[eval]\ngreedy = 'perhaps'",
        r"eval\.greedy = 'perhaps': input should be a valid boolean",
    ),
    "too small": (
        "[rollout]\nprompts = 0",
        r"rollout\.prompts = 0: input should be greater than or equal to 1",
    ),
    "too large": (
        "[grading]\nmax_failures = 1.5",
        r"grading\.max_failures = 1\.5: input should be less than or equal to 1",
    ),
    "open bound": ("[algo]\nclip_low = 1", r"algo\.clip_low = 1: input should be less than 1"),
    "not finite": (
        "[train]\nlearning_rate = inf",
        r"train\.learning_rate = inf: input should be a finite number",
    ),
    "bad choice": (
        "[model]\ndtype = 'float8'",
        r"model\.dtype = 'float8': input should be 'float32', 'bfloat16' or 'float64'",
    ),
    "section that is no table": ("rollout = 3", r"rollout = 3: input should be a valid dictionary"),
    "table for a number": (
        "[rollout.samples]\nx = 1",
        r"rollout\.samples = \{'x': 1\}: input should be a valid integer",
    ),
    "graders that are no list": (
        "[task]\ngraders = 'math'",
        r"task\.graders = 'math': input should be a valid list",
    ),
    "a grader that is no table": (
        "[task]\ngraders = ['math']",
        r"task\.graders\.0 = 'math': input should be a valid dictionary",
    ),
    "a grader without a name": (
        "[[task.graders]]\nweight = 1.0",
        r"task\.graders\.0\.name = .*field required",
    ),
    "a grader with an unknown key": (
        "[[task.graders]]\nname = 'math'\n[[task.graders]]\nname = 'a:b'\nwieght = 2",
        r"task\.graders\.1\.wieght: unknown setting",
    ),
    "a truth for a number": (
        "[train]\nsteps = true",
        r"train\.steps = True: should not be true or false",
    ),
    "a word where another one is meant": (
        "[reuse]\non = true\nrule = 'held'\nrefresh = 'all'",
        r"reuse\.refresh = 'all': input should be a valid number.*, or input should be 'trained'",
    ),
    "an unknown tracker": (
        "[log]\ntrackers = ['tensorbord']",
        r"log\.trackers\.0 = 'tensorbord': input should be 'tensorboard', 'wandb' or 'trackio'",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_in_the_file_is_one_line_with_file_key_and_value(
    kind: str, tmp_path: Path
) -> None:
    text, expected = MISTAKES[kind]
    path = write(tmp_path, text)
    assert re.fullmatch(f"{re.escape(str(path))}: {expected}.*", mistake(path))


FLAG_MISTAKES = {
    ("modle.path", "x"): r"--modle\.path: unknown setting; did you mean model\.path\?",
    ("model.pth", "x"): r"--model\.pth: unknown setting; did you mean model\.path\?",
    ("steps", "3"): r"--steps: settings are --section\.key value; did you mean train\.steps\?",
    ("rollout.prompts", "many"): r"--rollout\.prompts = 'many': input should be a valid integer",
    ("rollout.prompts", "0"): r"--rollout\.prompts = 0: input should be greater than or equal to 1",
    ("model.dtype", "float8"): r"--model\.dtype = 'float8': input should be 'float32', .*",
    ("run.out.x", "1"): r"--run\.out\.x = \{'x': 1\}: input should be a valid string",
    ("run.seed.x", "1"): r"--run\.seed\.x: run\.seed = 1 is not a table",
    ("task.graders", "math"): r"--task\.graders = 'math': input should be a valid list",
    ("task.graders", "[{weight = 1}]"): r"--task\.graders = .*field required",
    ("log.trackers", '["tensorbord"]'): r"--log\.trackers = 'tensorbord': input should be .*",
}


@pytest.mark.parametrize(("flag", "text"), FLAG_MISTAKES)
def test_a_mistake_in_a_flag_names_the_flag_and_not_the_file(
    flag: str, text: str, tmp_path: Path
) -> None:
    path = write(tmp_path, "[run]\nseed = 1\n")
    message = mistake(path, {"eval.every": "5", flag: text})
    assert re.fullmatch(f"{FLAG_MISTAKES[flag, text]}.*", message)
    assert "run.toml" not in message


def test_a_mistake_in_the_file_is_not_blamed_on_a_flag_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path, "[model]\npth = 'x'\n[rollout]\nsamples = 1")
    assert mistake(path, {"model.path": "y"}).startswith(f"{path}: model.pth: unknown")
    path = write(tmp_path, "[rollout]\nsamples = 1")
    assert mistake(path, {"rollout.prompts": "2"}).startswith(f"{path}: rollout.samples = 1: ")


def test_a_flag_into_what_the_file_made_no_table(tmp_path: Path) -> None:
    path = write(tmp_path, "model = 3")
    assert mistake(path, {"model.path": "x"}) == "--model.path: model = 3 is not a table"
    path = write(tmp_path, "[task]\nparams = 4")
    message = mistake(path, {"task.params.min_terms": "2"})
    assert message == "--task.params.min_terms: task.params = 4 is not a table"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[run\nseed = 1", "line 1"),
        ("[run]\nout = x\nseed = 1", "line 2"),
        ("[run]\nseed = 1\nseed = 2\n", "line 3"),
    ],
)
def test_malformed_toml_names_file_and_place(text: str, where: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert re.fullmatch(
        f"{re.escape(str(path))}: not valid TOML: .*{where}.*", mistake(path, {"run.seed": "3"})
    )


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    expected = f"{missing}: cannot read the configuration: No such file or directory"
    assert mistake(missing) == expected
    assert "cannot read the configuration: Is a directory" in mistake(tmp_path)
    (tmp_path / "latin.toml").write_bytes("[run]\nout = 'é'".encode("latin-1"))
    assert "latin.toml: not valid TOML" in mistake(tmp_path / "latin.toml")


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "[run]\nseed = 1\n[train]\nsteps = 7\nlearning_rate = 1e-3\n[task.params]\nmin_terms = 2\n",
    )
    overrides = {"train.steps": "9", "task.params.max_terms": "5", "eval.greedy": "false"}
    config = load_config(path, overrides)
    assert (config.run.seed, config.train.steps, config.train.learning_rate) == (1, 9, 1e-3)
    assert config.task.params == {"min_terms": 2, "max_terms": 5}
    assert config.eval.greedy is False
    assert config.rollout == Config().rollout
    assert load_config(None) == Config()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("model.path", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("run.out", "7", "7"),
        ("run.out", "2025-01-31", "2025-01-31"),
        ("run.out", "true", "true"),
        ("task.template", r'"{question} =\n"', "{question} =\n"),
        ("task.template", r"{question} =\n", r"{question} =\n"),
        ("task.answer_pattern", r"'(\d+)'", r"(\d+)"),
        ("task.answer_pattern", r"(-?\d+)", r"(-?\d+)"),
        ("train.learning_rate", "1", 1.0),
        ("train.learning_rate", "1e-5", 1e-5),
        ("eval.greedy", "False", False),
        ("task.params", "{min_terms = 2}", {"min_terms": 2}),
        ("log.trackers", '["tensorboard", "wandb"]', ["tensorboard", "wandb"]),
    ],
)
def test_what_the_text_of_a_flag_stands_for(key: str, text: str, value: Any) -> None:
    config = load_config(None, {key: text})
    assert dict(settings(config))[key] == value
    assert [line.partition(":")[0] for line in differences(Config(), config)] == [key]


EVERYTHING = """
[run]
out = "runs/\\"quoted\\" ünïcode"
seed = 9
threads = 3
[model]
path = 'C:\\models\\x'
device = "cuda:1"
dtype = "bfloat16"
autocast = "off"
trust_remote_code = true
[task]
source = "jsonl"
name = "a.jsonl"
eval_name = "b.jsonl"
train_split = "t"
eval_split = "e"
train_size = 11
eval_size = 12
seed = 13
prompt_column = "q"
answer_column = ""
template = "{q}\\n\\t=\\\\boxed{}"
system = "two\\nlines"
chat = "off"
answer_pattern = 'so (-?\\d+)$'
max_prompt_tokens = 14
params = { names = ["a", "b"], deep = { x = 1.5, y = [1, 2] } }
graders = [{ name = "math", weight = 0.5 }, { name = "m:f", weight = -1.0 }]
[grading]
workers = 2
seconds = 3.5
memory_gb = 2.0
max_failures = 0.25
[rollout]
prompts = 5
samples = 3
max_tokens = 17
temperature = 0.7
truncated = "penalty"
penalty = 0.125
[engine]
slots = 6
cache_gb = 1.5
prefill_tokens = 100
prefill_rows = 4
[reuse]
on = true
rule = "lenient"
epochs = 3
redraft = 4
siblings = false
lenience = 0.5
anchor = "generator"
delay = 2
audit = "off"
verify = "bfloat16"
[store]
epochs = 6
max_gb = 2.5
memory_gb = 0.0
[algo]
name = "ppo"
advantage = "gae"
average = "token"
clip_low = 0.1
clip_high = 0.3
dynamic_sampling = true
generation_bound = 2.5
kl_coef = 0.01
kl_estimator = "k1"
kl_in = "loss"
kl_unbiased = true
gamma = 0.99
lam = 0.95
whiten = false
entropy_coef = 0.02
[critic]
trunk = "shared"
learning_rate = 3e-5
clip = 0.0
coef = 0.5
warmup = 2
[correct]
mode = "decoupled"
cap = 5.0
max_lag = 4
[lora]
rank = 4
alpha = 8.0
targets = ["q_proj", "v_proj"]
[train]
steps = 21
minibatches = 2
epochs = 3
learning_rate = 2e-5
warmup = 3
decay = "cosine"
weight_decay = 0.1
beta1 = 0.8
beta2 = 0.95
max_grad_norm = 0.5
microbatch_tokens = 99
gradient_checkpointing = true
trees = false
flex = false
check_logprobs = true
[eval]
every = 0
samples = 7
temperature = 0.9
greedy = false
correct_at = 0.5
[checkpoint]
every = 4
keep_last = 5
keep_best = 0
[log]
display = "off"
trackers = ["tensorboard", "trackio"]
samples = 0
timeline = 3
"""


THE_REST = {
    "algo.ratio": "sequence",
    "algo.overlong": "0.25",
    "algo.kl_in": "reward",
    "correct.mode": "mask",
    "correct.max_lag": "2",
    "reuse.on": "true",
    "reuse.rule": "held",
    "reuse.rollouts": "5",
    "reuse.gate": "false",
    "reuse.window": "32",
    "reuse.audit_every": "7",
    "reuse.audit_prompts": "3",
    "reuse.refresh": "trained",
    "reuse.max_age": "3",
    "schedule.kind": "sorted",
    "schedule.mode": "on_policy",
    "schedule.batches": "3",
    "schedule.refill": "false",
    "schedule.held": "true",
}
CUT = {
    "reuse.on": "true",
    "reuse.rule": "lenient",
    "reuse.cut": "random",
    "schedule.kind": "async",
    "schedule.max_lag": "2",
    "schedule.keep_cache": "true",
    "correct.mode": "tis",
}
STAGGER = {"reuse.on": "true", "reuse.stagger": "true"}
RACE = {
    "schedule.kind": "april",
    "schedule.over": "1.5",
    "algo.name": "rloo_running",
    "algo.running_weight": "2",
    "algo.running_decay": "0.5",
}
PRUNE = {
    "prune.on": "true",
    "prune.signal": "quality",
    "prune.statistics": "false",
    "prune.when": "steps",
    "prune.at": "[2.0, 4.0]",
    "prune.boundary": ";",
    "prune.keep": "[0.75, 0.5]",
    "prune.least": "3",
    "prune.ratio": "0.4",
    "prune.floor": "0.1",
    "prune.weigh": "all",
    "prune.cap": "3",
    "prune.equal": "train",
    "prune.refill": "samples",
    "prune.warmup": "3",
    "prune.audit": "0.2",
    "prune.least_auc": "0.6",
    "prune.head_width": "8",
    "prune.head_rate": "0.02",
    "prune.head_memory": "100",
    "prune.low": "-1",
    "prune.high": "2",
}
COLLECT = {
    "collect.screen": "16",
    "collect.cap": "64",
    "collect.wave": "4",
    "collect.problems": "100",
    "collect.traces": "30",
    "train.flops": "1e12",
    "prefix.on": "true",
    "prefix.traces": "traces.sqlite",
    "prefix.cut": "step",
    "prefix.low": "0.2",
    "prefix.high": "0.7",
    "prefix.per_trace": "2",
    "prefix.boundary": ";",
    "prefix.guard": "false",
    "prefix.least": "4",
    "prefix.most": "500",
    "prefix.prefixed": "2",
    "prefix.original": "3",
    "prefix.easy": "3",
    "prefix.untraced": "true",
    "prefix.mode": "on_failure",
    "prefix.retire": "0.8",
    "prefix.refresh": "true",
    "prefix.ladder": "[0.0, 0.5]",
    "prefix.ladder_problems": "8",
    "sft.epochs": "2",
    "sft.batch": "8",
    "sft.learning_rate": "1e-5",
    "sft.warmup": "3",
    "sft.weight_decay": "0.1",
}
STEER = {
    "prefix.on": "true",
    "prefix.cut": "target",
    "prefix.success": "0.4",
    "prefix.gain": "0.2",
}
FALL = {
    "prefix.on": "true",
    "prefix.cut": "schedule",
    "prefix.until": "0.5",
    "prefix.placement": "hint",
    "prefix.hint": "Begin: {fragment}",
}
PAPER = {
    "prune.on": "true",
    "prune.mode": "paper",
    "prune.rule": "fixed",
    "prune.adaptive": "false",
}
"""what does not go together with the above, nor with each other"""


def test_saved_and_loaded_again_it_is_the_same(tmp_path: Path) -> None:
    configs = [load_config(write(tmp_path, EVERYTHING))]
    flags = (THE_REST, CUT, RACE, STAGGER, PRUNE, PAPER, COLLECT, STEER, FALL)
    configs += [load_config(None, one) for one in flags]
    changed = {line.partition(":")[0] for c in configs for line in differences(Config(), c)}
    assert changed == {key for key, _ in settings(Config())}
    for each in (*configs, Config()):
        save_config(each, tmp_path / "saved.toml")
        again = load_config(tmp_path / "saved.toml")
        assert again == each
        assert differences(each, again) == []


SHIPPED = [*(ROOT / "recipes").glob("*.toml"), ROOT / "src" / "reroll" / "assets" / "demo.toml"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    assert load_config(path) != Config()


def test_differences_name_key_old_and_new() -> None:
    new = load_config(None, {"train.steps": "7", "task.params.n": "1", "eval.greedy": "false"})
    assert differences(Config(), new) == [
        "task.params: {} -> {'n': 1}",
        "train.steps: 100 -> 7",
        "eval.greedy: True -> False",
    ]


def test_it_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.train = config.train  # type: ignore[misc]


def test_every_setting_is_described() -> None:
    described = list(describe())
    assert [key for key, *_ in described] == [key for key, _ in settings(Config())]
    for key, kind, _, text in described:
        assert kind, key
        assert len(text) > 5, key
    kinds = {key: kind for key, kind, *_ in described}
    assert kinds["model.dtype"] == "float32|bfloat16|float64"
    assert (kinds["train.steps"], kinds["run.out"], kinds["eval.greedy"]) == ("int", "str", "bool")


def test_every_default_that_help_shows_can_be_given_back_as_a_flag() -> None:
    shown = {key: default for key, _, default, _ in describe()}
    assert load_config(None, shown) == Config()


def test_override_forms() -> None:
    words = ["--a.b", "1", "--c.d=x=y", "--e.f=", "--g.h", "-1", "--a.b", "2", "--i.j", "--k"]
    assert parse_overrides(words) == {
        "a.b": "2",
        "c.d": "x=y",
        "e.f": "",
        "g.h": "-1",
        "i.j": "--k",
    }
    assert parse_overrides([]) == {}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["x"], "'x': not understood; settings are --section.key value"),
        (["--a.b", "1", "2"], "'2': not understood"),
        (["-a.b", "1"], "'-a.b': not understood"),
        (["--a.b"], "--a.b: a value is missing"),
    ],
)
def test_words_that_are_no_overrides(words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_overrides(words)
    assert str(raised.value).startswith(expected)
