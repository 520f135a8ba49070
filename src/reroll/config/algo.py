"""Settings of the algorithm and its training; the one place that says what each algorithm is.

`ALGORITHMS` maps a name to its advantage (a function of `algo/advantage.py`), its loss (level of
the ratio and average, `algo/loss.py`) and its other defaults. A name fills in whatever the user
left out, so that config.toml shows what ran; any part can be set by itself.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from reroll.config.sections import Section

_GROUP: dict[str, Any] = {"kl_in": "loss", "kl_estimator": "k3"}
_REWARD: dict[str, Any] = {"kl_in": "reward", "kl_estimator": "k1"}

ALGORITHMS: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300
    "grpo": dict(advantage="grpo", ratio="token", average="sequence", **_GROUP),
    # arXiv 2503.20783
    "dr_grpo": dict(advantage="dr_grpo", ratio="token", average="constant", **_GROUP),
    # arXiv 2503.14476
    "dapo": dict(
        advantage="grpo",
        ratio="token",
        average="token",
        clip_high=0.28,
        dynamic_sampling=True,
        overlong=0.2,
        **_GROUP,
    ),
    # arXiv 2507.18071, clip range of its section 5.1
    "gspo": dict(
        advantage="grpo",
        ratio="sequence",
        average="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
        **_GROUP,
    ),
    # arXiv 2402.14740
    "rloo": dict(advantage="rloo", ratio="product", average="sequence", **_REWARD),
    # arXiv 2402.14740, against what went before as well as siblings
    "rloo_running": dict(advantage="running", ratio="token", average="constant", **_REWARD),
    # arXiv 2501.03262
    "reinforce_pp": dict(advantage="reinforce_pp", ratio="token", average="token", **_REWARD),
    # arXiv 1707.06347
    "ppo": dict(advantage="gae", ratio="token", average="token", **_REWARD),
}
"""algorithm -> settings of [algo] that differ from the defaults below"""

GROUP_ADVANTAGES = ("grpo", "dr_grpo", "rloo")
"""advantages that compare the rollouts of a group, so that it needs at least two"""


class AlgoSection(Section):
    """Advantages and the policy loss."""

    name: Literal[
        "grpo", "dr_grpo", "dapo", "gspo", "rloo", "rloo_running", "reinforce_pp", "ppo"
    ] = Field(default="grpo", description="algorithm; sets the defaults of this section")
    advantage: Literal["grpo", "dr_grpo", "rloo", "running", "reinforce_pp", "gae"] = Field(
        default="grpo",
        description="reward minus group mean over deviation; no deviation; leave-one-out mean; "
        "minus the prompt's running mean; normalised over the batch; from a critic (by algorithm)",
    )
    running_weight: float = Field(
        default=4.0,
        gt=0,
        description="running: rollouts that the mean over all prompts counts as, in a prompt's own",
    )
    running_decay: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="running: what a reward still counts one batch later (in its prompt's mean: "
        "one batch with that prompt)",
    )
    ratio: Literal["token", "sequence", "product"] = Field(
        default="token",
        description="importance ratio of a token; of its reply, geometric mean; of its reply, "
        "product (by algorithm)",
    )
    average: Literal["token", "sequence", "constant"] = Field(
        default="sequence",
        description="average of the loss: all tokens alike, all rollouts alike, or over "
        "rollouts x rollout.max_tokens (by algorithm)",
    )
    clip_low: float = Field(
        default=0.2, gt=0, lt=1, description="ratio clipped below at 1 - this (by algorithm)"
    )
    clip_high: float = Field(
        default=0.2, gt=0, description="ratio clipped above at 1 + this (by algorithm)"
    )
    dynamic_sampling: bool = Field(
        default=False,
        description="leave out groups of equal rewards and refill with new prompts (by algorithm)",
    )
    generation_bound: float = Field(
        default=4.0,
        ge=1,
        description="dynamic sampling starts at most this many times rollout.prompts in a step",
    )
    overlong: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="last share of rollout.max_tokens over which the reward falls by up to 1 "
        "(by algorithm)",
    )
    kl_coef: float = Field(
        default=0.0,
        ge=0,
        description="weight of the KL to the initial policy; 0 keeps no reference",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="estimator of the KL at a token (by algorithm)"
    )
    kl_in: Literal["loss", "reward"] = Field(
        default="loss", description="where the KL stands (by algorithm)"
    )
    kl_unbiased: bool = Field(
        default=False,
        description="multiply the loss's k1 or k3 by the ratio: exact gradient (DeepSeek-V3.2)",
    )
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount per token")
    lam: float = Field(default=1.0, ge=0, le=1, description="lambda of GAE, per token")
    whiten: bool = Field(
        default=True, description="normalise advantages of GAE over the batch's tokens"
    )
    entropy_coef: float = Field(default=0.0, ge=0, description="weight of the entropy bonus")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Defaults of the algorithm for what was left out."""
        if not isinstance(values, dict):
            return values
        name = values.get("name", "grpo")
        return ALGORITHMS.get(name, {}) | values if isinstance(name, str) else values


class CriticSection(Section):
    """The value function of PPO (advantage = "gae")."""

    trunk: Literal["own", "shared"] = Field(
        default="own", description="a copy of the policy, or the policy's own last hidden state"
    )
    learning_rate: float = Field(
        default=1e-5, gt=0, description="of the critic's own optimizer (shared: of its head)"
    )
    clip: float = Field(
        default=0.2, ge=0, description="values move at most this far from the old ones; 0: freely"
    )
    coef: float = Field(
        default=0.1, gt=0, description="weight of the value loss in the policy (shared trunk)"
    )
    warmup: int = Field(default=0, ge=0, description="first steps that train the critic alone")


class CorrectSection(Section):
    """Stale tokens, drawn by an earlier version of the policy."""

    mode: Literal["none", "tis", "mask", "decoupled"] = Field(
        default="none",
        description="as they are; truncated importance sampling; left out; decoupled PPO",
    )
    cap: float = Field(
        default=2.0, ge=0, description="largest weight of a token (tis, decoupled); 0: no cap"
    )
    max_lag: int = Field(
        default=4, ge=0, description="oldest tokens trained on under mask, in optimizer steps"
    )


class LoraSection(Section):
    """Train low-rank adapters instead of all weights (needs the package peft)."""

    rank: int = Field(default=0, ge=0, description="rank of the adapters; 0 trains all weights")
    alpha: float = Field(default=32.0, gt=0, description="adapters are scaled by alpha / rank")
    targets: list[str] = Field(
        default_factory=list,
        description="names of the layers that get one; empty: every linear layer but the head",
    )


class TrainSection(Section):
    """The optimizer and its steps."""

    steps: int = Field(default=100, ge=1, description="collects (one batch of rollouts each)")
    flops: float = Field(
        default=0.0,
        ge=0,
        description="end after the step with which flops_total_paper (traces, rollouts, training) "
        "has reached this, train.steps at the latest, by which schedules go all the same; 0: never",
    )
    minibatches: int = Field(
        default=1, ge=1, description="optimizer steps a batch and epoch; groups stay whole"
    )
    epochs: int = Field(default=1, ge=1, description="passes over each batch")
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
        default=16384,
        ge=1,
        description="tokens of one training forward, padding included",
    )
    trees: bool = Field(
        default=True,
        description="compute what rollouts begin with alike once, where that is cheaper; the same "
        "up to rounding",
    )
    flex: bool = Field(
        default=True,
        description="on CUDA, wide rows of trees attend through flex attention, which is compiled "
        "at the first step; false: under dense masks",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, more time"
    )
    check_logprobs: bool = Field(
        default=False, description="recompute the old log-probs and report the difference"
    )
