"""Groups by hand and by lot, the loss written out as a loop, and the gradients of a trainer."""

from collections.abc import Sequence
from itertools import chain

import torch
from transformers import PreTrainedModel

from reroll.algo.advantage import grpo
from reroll.config import AlgoSection, TrainSection
from reroll.train.batch import Credited
from reroll.train.trainer import Trainer
from reroll.types import Completion, Group, Prompt, Rollout
from tests.model.plain import plain
from tests.tiny import VOCABULARY


def rollout(
    prompt: Prompt,
    tokens: list[int],
    reward: float | None,
    *,
    logprobs: list[float] | None = None,
    version: int = 0,
    prefix: int = 0,
) -> Rollout:
    """A rollout whose first `prefix` tokens are given, the others drawn by `version`."""
    drawn = len(tokens) - prefix
    logs = [0.0] * prefix + (logprobs or [-1.0] * drawn)
    completion = Completion(
        request_id=0,
        token_ids=tokens,
        logprobs=logs,
        behaviour_logprobs=list(logs),
        versions=[-1] * prefix + [version] * drawn,
        loss_mask=[False] * prefix + [True] * drawn,
    )
    assert len(logs) == len(tokens)
    return Rollout(prompt, 0, 0, completion, reward=reward)


def group(
    row: int,
    rewards: Sequence[float | None],
    lengths: Sequence[int],
    *,
    prompt: int = 4,
    version: int = 0,
    prefix: int = 0,
) -> Group:
    """Random tokens, the same for the same `row`; stored log-probs of -1."""
    generator = torch.Generator().manual_seed(row)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    asked = Prompt(row, f"problem {row}", tuple(tokens(prompt)))
    made = [
        rollout(asked, tokens(length), reward, version=version, prefix=prefix)
        for reward, length in zip(rewards, lengths, strict=True)
    ]
    return Group(asked, made)


def credit(groups: Sequence[Group]) -> list[Credited]:
    """Groups with their advantages."""
    return [(g, grpo([r.reward for r in g.rollouts])) for g in groups]


def store(
    model: PreTrainedModel, credited: Sequence[Credited], noise: float, temperature: float = 1.0
) -> None:
    """Store the model's own log-probs for all drawn tokens, off by up to `noise`."""
    generator = torch.Generator().manual_seed(17)
    for made, _ in credited:
        for r in made.rollouts:
            c = r.completion
            with torch.no_grad():
                now = plain(model, list(made.prompt.token_ids), c.token_ids, temperature)[0]
            # float32 first: this is what a batch holds
            off = noise * (2 * torch.rand(len(now), generator=generator) - 1)
            stored = (now.float() + off).tolist()
            c.logprobs = [x if m else 0.0 for x, m in zip(stored, c.loss_mask, strict=True)]


def loop_loss(
    model: PreTrainedModel,
    credited: Sequence[Credited],
    algo: AlgoSection,
    *,
    temperature: float,
    fresh: int | None,
    reference: PreTrainedModel | None = None,
) -> torch.Tensor:
    """The minibatch's loss, token by token. fresh: version whose tokens have ratio 1."""
    rows = []
    for made, advantages in credited:
        for r, advantage in zip(made.rollouts, advantages, strict=True):
            if r.reward is None:
                continue
            # a batch holds advantages in float32
            credit_of_all = float(torch.tensor(advantage))
            c, context = r.completion, list(made.prompt.token_ids)
            now, entropy = plain(model, context, c.token_ids, temperature)
            with torch.no_grad():
                initial = plain(reference or model, context, c.token_ids, temperature)[0]
            losses = []
            for i in range(len(c.token_ids)):
                if not c.loss_mask[i]:
                    continue
                stored = torch.tensor(c.logprobs[i], dtype=now.dtype)
                old = now[i].detach() if c.versions[i] == fresh else stored
                ratio = (now[i] - old).exp()
                clipped = ratio.clamp(1 - algo.clip_low, 1 + algo.clip_high)
                loss = -torch.minimum(ratio * credit_of_all, clipped * credit_of_all)
                if reference is not None:
                    d = initial[i] - now[i]
                    loss = loss + algo.kl_coef * (d.exp() - d - 1)
                losses.append(loss - algo.entropy_coef * entropy[i])
            rows.append(losses)
    if algo.average == "token":
        everything = list(chain.from_iterable(rows))
        return torch.stack(everything).sum() / len(everything)
    zero = torch.zeros((), dtype=model.dtype)
    means = [torch.stack(losses).mean() if losses else zero for losses in rows]
    return torch.stack(means).sum() / len(rows)


def make_trainer(
    model: PreTrainedModel,
    *,
    algo: dict | None = None,
    temperature: float = 1.0,
    reference: PreTrainedModel | None = None,
    autocast: torch.dtype | None = None,
    **train,
) -> Trainer:
    """A trainer that leaves gradients as they are, unless told otherwise."""
    settings = dict(learning_rate=1e-2, max_grad_norm=1e12) | train
    return Trainer(
        model,
        AlgoSection(**(algo or {})),
        TrainSection(**settings),
        temperature=temperature,
        reference=reference,
        autocast=autocast,
    )


def gradients(
    trainer: Trainer, credited: Sequence[Credited]
) -> tuple[list[torch.Tensor], dict[str, float], list[int]]:
    """The gradient of each optimizer step, without taking it; and what `step` returns."""
    taken = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: taken.append(flat_gradient(trainer.model))
    try:
        metrics, forwarded = trainer.step(credited)
    finally:
        trainer.optimizer.step = step
    return taken, metrics, forwarded


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    """All parameters' gradients in one vector; zeros where there is none."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


def gradient_of(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """The same of a loss, without touching the parameters."""
    parameters = list(model.parameters())
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, parts, strict=True)
        ]
    )


def assert_same(got: torch.Tensor, expected: torch.Tensor, relative: float = 1e-10) -> None:
    """Equal up to a share of the expected norm, which must not be nothing."""
    assert expected.norm() > 1e-4, "nothing to compare"
    assert (got - expected).norm() <= relative * expected.norm()
