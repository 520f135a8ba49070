"""Settings of prefixes: hard problems from the beginning of an old success, and how those are
collected."""

from typing import Literal

from pydantic import Field, field_validator

from reroll.config.sections import Section


class CollectSection(Section):
    """Sampling problems until each is solved once: which are hard, and the traces."""

    screen: int = Field(
        default=512, ge=0, description="attempts without success that make a problem a hard one"
    )
    cap: int = Field(default=2500, ge=1, description="attempts at one problem at most, whole waves")
    wave: int = Field(
        default=8,
        ge=1,
        description="attempts at a problem that are started together; the first success of them "
        "counts, not the one that ends first",
    )
    problems: int = Field(default=0, ge=0, description="training problems tried; 0: all of them")
    traces: int = Field(
        default=0,
        ge=0,
        description="traces of hard problems after which collecting ends, whole waves; 0: no such "
        "end. A few can do where problems are alike",
    )


class SftSection(Section):
    """Supervised training on the traces before the first step: the rival of prefixes."""

    epochs: int = Field(default=0, ge=0, description="over the traces; 0: none")
    batch: int = Field(default=16, ge=1, description="traces an optimizer step")
    learning_rate: float = Field(default=1e-4, gt=0, description="of this part alone")
    warmup: int = Field(default=2, ge=0, description="optimizer steps of warm-up")
    weight_decay: float = Field(default=0.0, ge=0, description="of this part alone")


class PrefixSection(Section):
    """Start hard problems from a prefix of an old success (PrefixRL)."""

    on: bool = Field(default=False, description="do so; needs traces, collected at the start")
    traces: str = Field(
        default="",
        description="file that `reroll collect` wrote; empty: traces.sqlite in run.out, collected "
        "first where it is not there",
    )
    cut: Literal["uniform", "resample", "step", "target", "minimal", "schedule"] = Field(
        default="uniform",
        description="how much of a trace is given: `per_trace` cuts between `low` and `high`, "
        "drawn once (PrefixRL); drawn anew each visit; at ends of steps; what holds success at "
        "`success`; the least that helps; from `high` down to nothing over the run",
    )
    low: float = Field(default=0.4, ge=0, lt=1, description="least share of a trace given")
    high: float = Field(default=0.8, gt=0, lt=1, description="largest share of a trace given")
    per_trace: int = Field(default=3, ge=1, description="uniform, step: cuts of each trace")
    boundary: str = Field(default="\n", min_length=1, description="step: text that ends a step")
    success: float = Field(
        default=0.5, gt=0, lt=1, description="target: success rate of prefixed groups aimed at"
    )
    gain: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="target: share of a trace more or less for a success rate that is off by one",
    )
    until: float = Field(
        default=0.6, gt=0, le=1, description="schedule: share of train.steps that prefixes last"
    )
    guard: bool = Field(default=True, description="never give a trace beyond where its answer is")
    least: int = Field(default=8, ge=1, description="tokens of a trace that are never given")
    most: int = Field(default=14_000, ge=1, description="tokens given at most")
    prefixed: int = Field(default=3, ge=0, description="mix: parts of a batch with a prefix")
    original: int = Field(default=1, ge=0, description="mix: parts, the same problems without")
    easy: int = Field(default=0, ge=0, description="mix: parts, problems that are not hard")
    untraced: bool = Field(
        default=False,
        description="the original part is also of problems without a trace: those that collecting "
        "did not solve, or did not try",
    )
    mode: Literal["always", "on_failure"] = Field(
        default="always",
        description="on_failure: a prefix only after a group without any success",
    )
    placement: Literal["continuation", "hint"] = Field(
        default="continuation",
        description="an unfinished reply that is gone on with; a hint at the end of the problem "
        "(POPE, QuestA), for comparison: the reply begins anew",
    )
    hint: str = Field(
        default="\n\nThe beginning of a solution:\n{fragment}\n\n",
        description="hint: text after the problem, with {fragment} in it",
    )
    retire: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="success rate without prefix from which a problem is left out; 1: never",
    )
    ladder: list[float] = Field(
        default=[0.0, 0.2, 0.4, 0.6, 0.8],
        description="shares of traces from which evaluations measure success; [] for none",
    )
    ladder_problems: int = Field(
        default=32, ge=1, description="hard problems that this is measured on"
    )
    refresh: bool = Field(
        default=False, description="successes without prefix take the place of their trace"
    )

    @field_validator("boundary", "hint")
    @classmethod
    def _from_a_shell(cls, text: str) -> str:
        """`--prefix.boundary '\\n'` means a new line."""
        return text.replace("\\n", "\n").replace("\\t", "\t")

    @property
    def steers(self) -> bool:
        """Whether cuts depend on what came of earlier ones."""
        return self.cut in ("target", "minimal")
