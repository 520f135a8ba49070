"""Every setting but those of the algorithm and its training: sections, bounds, descriptions."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        """Python's is, and a number's setting would take it."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise PydanticCustomError("truth", "Should not be true or false")
        return value


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
        description="task, math, derivation (sums, every step), or module:function with "
        "f(prompt, completion, answer, **columns)"
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
    timeline: int = Field(
        default=8,
        ge=0,
        description="first steps whose slots are shown in timeline.png (timeline.jsonl)",
    )
