"""The typed run configuration: TOML file, then `--section.key value` flags, then checks.

Every mistake raises `UserError` with one line that names the file, the key, the value and, for
an unknown key, the nearest valid one. A configuration is frozen; derived numbers are properties.
"""

import difflib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reroll.errors import UserError


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(Section):
    """Where the run lives and what makes it repeatable."""

    out: str = Field(
        default="runs/run", description="run directory; starting again with it resumes"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of the data order and of every noise key"
    )
    threads: int = Field(default=0, ge=0, description="CPU threads; 0 leaves the choice to torch")


class ModelSection(Section):
    """The policy."""

    path: str = Field(
        default="demo", description="Hugging Face name or folder; 'demo' is the packaged policy"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        default="float32", description="dtype of the weights"
    )
    autocast: Literal["auto", "off", "bfloat16"] = Field(
        default="auto",
        description="of engine and trainer alike; auto: bfloat16 on CUDA devices that have it",
    )
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the model"
    )


class GraderSection(Section):
    """One grader and its weight in the reward."""

    name: str = Field(
        description="task, math, or module:function with f(prompt, completion, answer, **columns)"
    )
    weight: float = Field(default=1.0, description="weight in the sum of rewards")


class TaskSection(Section):
    """Where problems and their graders come from."""

    source: Literal["reasoning_gym", "jsonl", "datasets"] = Field(
        default="reasoning_gym",
        description="reasoning_gym: by name; jsonl: a file; datasets: Hub name or folder",
    )
    name: str = Field(
        default="chain_sum",
        description="reasoning-gym dataset, JSONL file, or datasets name or folder",
    )
    params: dict[str, Any] = Field(
        default_factory=dict,
        description="reasoning-gym parameters, or keyword arguments of load_dataset",
    )
    eval_name: str = Field(
        default="", description="JSONL file of the held-out split; empty: split off from the first"
    )
    train_split: str = Field(default="train", description="split of a datasets source")
    eval_split: str = Field(
        default="", description="held-out split; empty: split off from train_split"
    )
    train_size: int = Field(default=320, ge=1, description="training problems (at most, for files)")
    eval_size: int = Field(default=128, ge=1, description="held-out problems (at most, for files)")
    seed: int = Field(default=0, ge=0, description="seed of generated problems and of splits")
    prompt_column: str = Field(default="prompt", description="column with the problem")
    answer_column: str = Field(default="answer", description="column with the reference answer")
    template: str = Field(
        default="",
        description="prompt text with {column} fields; empty: the problem and a newline",
    )
    system: str = Field(
        default="", description="system message, for tokenizers with a chat template"
    )
    chat: Literal["auto", "off"] = Field(
        default="auto", description="auto: use the tokenizer's chat template if any"
    )
    answer_pattern: str = Field(
        default="",
        description="regex; its last match's first group is the answer; empty: the grader's way",
    )
    max_prompt_tokens: int = Field(
        default=512, ge=1, description="longer prompts are dropped and counted"
    )
    graders: list[GraderSection] = Field(
        default_factory=list, description="empty: the task's own scorer, or math-verify for files"
    )


class GradingSection(Section):
    """Worker processes that run the graders."""

    workers: int = Field(default=1, ge=1, description="grader processes")
    seconds: float = Field(
        default=10.0, gt=0, description="time limit of one grading; a hanging grader is killed"
    )
    memory_gb: float = Field(default=4.0, gt=0, description="memory limit of one grader process")
    max_failures: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of ungraded rollouts in a step that stops the run",
    )


class RolloutSection(Section):
    """What is sampled in a step."""

    prompts: int = Field(default=32, ge=1, description="prompts a step")
    samples: int = Field(default=8, ge=1, description="rollouts of each prompt (the group)")
    max_tokens: int = Field(default=256, ge=1, description="limit of new tokens")
    temperature: float = Field(
        default=1.0, gt=0, description="sampling temperature; the trainer divides by the same"
    )
    truncated: Literal["keep", "mask", "zero", "penalty"] = Field(
        default="keep",
        description="what a rollout cut by the limit earns: as graded, no gradient, 0, less",
    )
    penalty: float = Field(
        default=0.5, ge=0, description="taken off a truncated rollout under truncated = 'penalty'"
    )


class EngineSection(Section):
    """The embedded engine."""

    slots: int = Field(default=64, ge=1, description="sequences that run at once")
    cache_gb: float = Field(
        default=4.0, gt=0, description="bound on the memory of the key/value slots, in GiB"
    )
    prefill_tokens: int = Field(
        default=4096, ge=1, description="tokens of one prefill forward, padding included"
    )
    prefill_rows: int = Field(default=32, ge=1, description="sequences of one prefill forward")


class AlgoSection(Section):
    """Advantages and the policy loss (GRPO)."""

    advantage: Literal["grpo"] = Field(
        default="grpo", description="reward minus group mean, over group deviation"
    )
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="ratio clipped below at 1 - this")
    clip_high: float = Field(default=0.2, gt=0, description="ratio clipped above at 1 + this")
    average: Literal["token", "sequence"] = Field(
        default="token",
        description="average of the loss: all tokens alike, or all rollouts alike",
    )
    kl_coef: float = Field(
        default=0.0,
        ge=0,
        description="weight of the KL to the initial policy; 0 keeps no reference",
    )
    entropy_coef: float = Field(default=0.0, ge=0, description="weight of the entropy bonus")


class TrainSection(Section):
    """The optimizer and its steps."""

    steps: int = Field(default=100, ge=1, description="collects (one batch of rollouts each)")
    minibatches: int = Field(
        default=1, ge=1, description="optimizer steps a batch; groups stay whole"
    )
    learning_rate: float = Field(default=1e-6, gt=0, description="peak learning rate of AdamW")
    warmup: int = Field(default=0, ge=0, description="optimizer steps of linear warm-up")
    decay: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="after warm-up"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW beta 1")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW beta 2")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="gradients are scaled down to this norm"
    )
    microbatch_tokens: int = Field(
        default=16384, ge=1, description="tokens of one training forward, padding included"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, more time"
    )
    check_logprobs: bool = Field(
        default=False, description="recompute the old log-probs and report the difference"
    )


class EvalSection(Section):
    """Held-out evaluation."""

    every: int = Field(
        default=10, ge=0, description="steps between evaluations; 0: only before and after"
    )
    samples: int = Field(default=4, ge=1, description="samples of each problem at temperature")
    temperature: float = Field(
        default=1.0, gt=0, description="of the sampled part; the greedy part comes beside it"
    )
    greedy: bool = Field(default=True, description="evaluate greedy decoding too")
    correct_at: float = Field(
        default=1.0, description="reward from which a rollout counts as correct in pass@k and maj@k"
    )


class CheckpointSection(Section):
    """When the state of a run is written, and what is kept."""

    every: int = Field(
        default=10, ge=1, description="steps between checkpoints; the last step is always written"
    )
    keep_last: int = Field(default=2, ge=1, description="newest checkpoints kept")
    keep_best: int = Field(
        default=1, ge=0, description="checkpoints kept for their held-out reward"
    )


class LogSection(Section):
    """What the run shows while it runs."""

    display: Literal["auto", "rich", "plain", "off"] = Field(
        default="auto", description="auto: rich on a terminal"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="also log there; the package must be installed"
    )
    samples: int = Field(
        default=2, ge=0, description="rollouts of each step written to samples.jsonl"
    )


class Config(Section):
    """A whole run."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    task: TaskSection = TaskSection()
    grading: GradingSection = GradingSection()
    rollout: RolloutSection = RolloutSection()
    engine: EngineSection = EngineSection()
    algo: AlgoSection = AlgoSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _make_sense_together(self) -> "Config":
        if self.rollout.samples < 2:
            raise ValueError(
                f"rollout.samples = {self.rollout.samples}: GRPO compares rollouts of a group, "
                "so it needs at least 2"
            )
        if self.train.minibatches > self.rollout.prompts:
            raise ValueError(
                f"train.minibatches = {self.train.minibatches}: groups stay whole, "
                f"so at most rollout.prompts = {self.rollout.prompts} minibatches"
            )
        return self


def load_config(path: str | Path | None, overrides: dict[str, str] | None = None) -> Config:
    """Read `path` (TOML; None: all defaults), apply `overrides` (`section.key` -> text), check.

    Raises UserError for a missing or malformed file, unknown keys, wrong types and ranges.
    """
    name, values = str(path or "defaults"), {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
    for key, text in (overrides or {}).items():
        _set(values, key, _parse(key, text), flag=f"--{key}")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, name, set(overrides or {}))) from None


def save_config(config: Config, path: Path) -> None:
    """Write the whole configuration, defaults included, as TOML."""
    path.write_text(tomli_w.dumps(config.model_dump()), encoding="utf-8")


def differences(old: Config, new: Config) -> list[str]:
    """Keys (`section.key: old -> new`) in which two configurations differ."""
    before, after = dict(settings(old)), dict(settings(new))
    return [
        f"{key}: {before[key]!r} -> {after[key]!r}" for key in before if before[key] != after[key]
    ]


def settings(config: Config) -> Iterator[tuple[str, Any]]:
    """(`section.key`, value) of every setting."""
    for section, values in config.model_dump().items():
        for key, value in values.items():
            yield f"{section}.{key}", value


def describe() -> Iterator[tuple[str, str, str, str]]:
    """(`section.key`, type, default, description) of every setting, for `--help`."""
    for section, outer in Config.model_fields.items():
        for key, inner in outer.annotation.model_fields.items():  # type: ignore[union-attr]
            choices = get_args(inner.annotation) if "Literal" in str(inner.annotation) else ()
            kind = "|".join(map(str, choices)) if choices and isinstance(choices[0], str) else ""
            default = inner.get_default(call_default_factory=True)
            yield (
                f"{section}.{key}",
                kind or type(default).__name__,
                repr(default),
                inner.description or "",
            )


def _parse(key: str, text: str) -> Any:
    """A flag's text as TOML would read it; as it stands if that is no value, or text is wanted."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    is_text = any(name == key and kind == "str" for name, kind, *_ in describe())
    return value if isinstance(value, str) or not is_text else text


def _set(values: dict[str, Any], key: str, value: Any, flag: str) -> None:
    *path, last = key.split(".")
    if not path:
        raise UserError(f"{flag}: settings are --section.key value{_nearest(key, _all_keys())}")
    table, place = values, ""
    for part in path:
        table, place = table.setdefault(part, {}), f"{place}{part}."
        if not isinstance(table, dict):
            raise UserError(f"{flag}: {place[:-1]} = {table!r} is not a table")
    table[last] = value


def _explain(error: ValidationError, name: str, flags: set[str]) -> str:
    """The first mistake as one line: file or flag, key, value, remedy."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":  # of settings that do not go together: it names the key
        text = str(first.get("ctx", {})["error"])
        return f"--{text}" if text.partition(" ")[0] in flags else f"{name}: {text}"
    flag = next((f for f in sorted(flags) if _overlap(f, key)), None)
    where = f"--{flag}" if flag else f"{name}: {key}"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown setting{_nearest(flag or key, _all_keys())}"
    return f"{where} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _overlap(one: str, other: str) -> bool:
    """Whether a dotted key is another one, or stands inside or around it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _all_keys() -> list[str]:
    return [key for key, *_ in describe()] + list(Config.model_fields)


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        tails = {name.partition(".")[2]: name for name in known}
        close = [
            tails[t]
            for t in difflib.get_close_matches(key.rpartition(".")[2], list(tails), n=1, cutoff=0.6)
        ]
    return f"; did you mean {close[0]}?" if close else "; `reroll train --help` lists them all"
