"""Settings of `reroll simulate`: machines, model, reply lengths, updates, schedules to compare.

One flat table: in the file and as flags, `slots = 256` is `--slots 256`. Where several values are
taken, one will do, and flags take them with commas: `--over 1.5,2`.
"""

from typing import Any, Literal, get_origin

from pydantic import Field, ValidationInfo, field_validator, model_validator

from reroll.config.sections import Section

GPUS = {
    # terabytes a second of memory, dense bf16 TFLOP/s (no sparsity), from the makers' data sheets:
    # NVIDIA H100 SXM, H200 SXM, A100 80GB SXM, L4; AMD Instinct MI300X
    "h100": (3.35, 989.0),
    "h200": (4.8, 989.0),
    "a100": (2.039, 312.0),
    "l4": (0.3, 121.0),
    "mi300x": (5.3, 1307.0),
}
"""(TB/s, TFLOP/s) of each GPU by name"""

Kind = Literal[
    "sync",
    "sync_split",
    "longest_first",
    "oracle",
    "sorted_on_policy",
    "sorted_strict",
    "sorted",
    "april",
    "tail_batch",
    "async",
]
_LAW = ("median", "spread", "prompt_share", "cap", "problems")
"""settings that a recorded run takes the place of"""
_MACHINE = ("gpu", "bandwidth", "flops", "parameters", "layers", "kv_heads", "head_dim", "overhead")
"""settings of the roofline"""


class SimulateConfig(Section):
    """What is simulated. Every machine (replica) ticks by itself; all are fed from one queue."""

    gpu: Literal["h100", "h200", "a100", "l4", "mi300x"] = Field(
        default="h100", description="its data sheet's bandwidth and FLOP/s; one GPU a replica"
    )
    bandwidth: float = Field(
        default=0.0, ge=0, description="of a replica's memory, TB/s; 0: that of the gpu"
    )
    flops: float = Field(
        default=0.0, ge=0, description="of a replica, dense bf16 TFLOP/s; 0: those of the gpu"
    )
    bandwidth_efficiency: float = Field(
        default=0.7, gt=0, le=1, description="share of the bandwidth that is reached: an assumption"
    )
    compute_efficiency: float = Field(
        default=0.5, gt=0, le=1, description="share of the FLOP/s that is reached: an assumption"
    )
    overhead: float = Field(
        default=0.0, ge=0, description="seconds that a tick takes besides reading and computing"
    )
    parameters: float = Field(default=7.6e9, gt=0, description="that a token passes, in bf16")
    layers: int = Field(default=28, ge=1, description="of the model")
    kv_heads: int = Field(default=4, ge=1, description="heads of keys and values in each layer")
    head_dim: int = Field(default=128, ge=1, description="their width")
    tick_base: float = Field(
        default=0.0, ge=0, description="above 0: instead of a GPU, a tick takes so many seconds ..."
    )
    tick_per_request: float = Field(
        default=0.0, ge=0, description="... and so many for each running request"
    )
    costs: str = Field(
        default="", description="instead of a GPU: run directory with a measured costs.json"
    )
    replicas: list[int] = Field(
        default=[1], min_length=1, description="machines side by side; several: a table row each"
    )
    slots: int = Field(default=256, ge=1, description="requests that a replica runs at once")

    median: float = Field(default=1500.0, gt=0, description="of the replies' lengths, tokens")
    spread: float = Field(
        default=0.8, ge=0, le=10, description="standard deviation of the lengths' logarithm"
    )
    prompt_share: float = Field(
        default=0.5, ge=0, le=1, description="share of its variance that lies between prompts"
    )
    cap: int = Field(default=16384, ge=1, description="limit of a reply's length, tokens")
    problems: int = Field(
        default=0, ge=0, description="that come round and round; 0: every prompt is a new one"
    )
    run: str = Field(
        default="", description="instead of such a law: run directory whose rollouts.sqlite says"
    )
    prompt_tokens: int = Field(default=256, ge=1, description="of each prompt")

    prompts: int = Field(default=64, ge=1, description="prompts an update")
    samples: int = Field(default=8, ge=1, description="rollouts of each prompt")
    updates: int = Field(default=16, ge=1, description="updates that are measured")
    warmup: int = Field(default=4, ge=0, description="updates before those")
    train_tokens_per_second: float = Field(
        default=0.0,
        ge=0,
        description="trained tokens a second of a replica, in an update; 0: with a GPU 6 FLOPs for "
        "each parameter and token, else updates take no time",
    )
    sync_seconds: float = Field(
        default=0.0, ge=0, description="from each batch to the next one beside the training"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of all lengths")

    schedules: list[Kind] = Field(
        default=[
            "sync", "sync_split", "longest_first", "sorted_on_policy", "sorted_strict", "sorted",
            "april", "tail_batch",
        ],
        min_length=1,
        description="to compare, of these, async and oracle (longest first, were lengths known)",
    )  # fmt: skip
    batches: list[int] = Field(
        default=[4],
        min_length=1,
        description="updates of a group (sorted...) or of a batch (sync_split); a table row each",
    )
    over: list[float] = Field(
        default=[1.5, 2.0], min_length=1, description="april: batches under way; a table row each"
    )
    tail_over: list[float] = Field(
        default=[1.25],
        min_length=1,
        description="tail_batch: prompts and samples started over those needed; a table row each",
    )
    max_lag: int = Field(
        default=4, ge=0, description="updates that a rollout may wait from start to training"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any, info: ValidationInfo) -> Any:
        if get_origin(cls.model_fields[str(info.field_name)].annotation) is not list:
            return value
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value if isinstance(value, list) else [value]

    @model_validator(mode="after")
    def _make_sense_together(self) -> "SimulateConfig":
        if text := _contradiction(self):
            raise ValueError(text)
        return self

    @property
    def hardware(self) -> tuple[float, float]:
        """(bytes a second, FLOPs a second) that a replica reaches."""
        bandwidth, flops = GPUS[self.gpu]
        return (
            (self.bandwidth or bandwidth) * 1e12 * self.bandwidth_efficiency,
            (self.flops or flops) * 1e12 * self.compute_efficiency,
        )

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token, all layers, in bf16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


def _contradiction(config: SimulateConfig) -> str | None:
    """The first contradiction as one line, or None."""
    given = config.model_fields_set
    for key, least in (("replicas", 1), ("batches", 1), ("over", 1), ("tail_over", 1)):
        for value in getattr(config, key):
            if value < least:
                return f"{key} = {value}: at least {least}"
    constant = config.tick_base > 0
    if constant and config.costs:
        return (
            f"tick_base = {config.tick_base}: costs says what a tick takes; leave one of them out"
        )
    if config.tick_per_request and not constant:
        return f"tick_per_request = {config.tick_per_request}: without tick_base it has no effect"
    instead = "tick_base" if constant else "costs" if config.costs else ""
    if instead and (key := next((key for key in _MACHINE if key in given), None)):
        return f"{key} = {getattr(config, key)}: {instead} takes the place of a GPU and its model"
    sorts = any(name.startswith("sorted") for name in config.schedules)
    if sorts and max(config.batches) > config.max_lag + 1:
        return f"batches = {max(config.batches)}: more than max_lag = {config.max_lag} allows"
    if "april" in config.schedules and max(config.over) > config.max_lag + 1:
        return f"over = {max(config.over)}: more than max_lag = {config.max_lag} allows"
    if config.run and (key := next((key for key in _LAW if key in given), None)):
        return f"{key} = {getattr(config, key)}: run = {config.run!r} says how long replies are"
    return None
