"""Groups by hand and by lot, the loss written out as a loop, and the gradients of a trainer."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from reroll.config import AlgoSection, CorrectSection, CriticSection, TrainSection
from reroll.model.layout import Layout
from reroll.train.credit import Credit, Scores
from reroll.train.credit import credit as credit_of
from reroll.train.critic import Critic
from reroll.train.forwards import FLAT, Shares
from reroll.train.trainer import Trainer
from reroll.types import Completion, Group, Prompt, Rollout
from tests.model.plain import plain
from tests.tiny import VOCABULARY

MAX_TOKENS = 16
"""limit on new tokens in these tests"""


def rollout(
    prompt: Prompt,
    tokens: list[int],
    reward: float | None,
    *,
    logprobs: list[float] | None = None,
    version: int = 0,
    prefix: int = 0,
    weight: float = 1.0,
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
    return Rollout(prompt, 0, 0, completion, reward=reward, weight=weight)


def group(
    row: int,
    rewards: Sequence[float | None],
    lengths: Sequence[int],
    *,
    prompt: int = 4,
    version: int = 0,
    prefix: int = 0,
    weights: Sequence[float] | None = None,
) -> Group:
    """Random tokens, the same for the same `row`; stored log-probs of -1."""
    generator = torch.Generator().manual_seed(row)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    asked = Prompt(row, f"problem {row}", tuple(tokens(prompt)))
    made = [
        rollout(asked, tokens(length), reward, version=version, prefix=prefix, weight=weight)
        for reward, length, weight in zip(
            rewards, lengths, weights or [1.0] * len(lengths), strict=True
        )
    ]
    return Group(asked, made)


def credit(
    groups: Sequence[Group],
    correct: CorrectSection | None = None,
    *,
    version: int = 0,
    scores: Scores | None = None,
    **algo: Any,
) -> list[list[Credit]]:
    """Groups with their credit: that of GRPO unless told otherwise."""
    return credit_of(
        groups,
        AlgoSection(**algo),
        correct or CorrectSection(),
        max_tokens=MAX_TOKENS,
        version=version,
        scores=scores or Scores(),
    )[0]


def store(
    model: PreTrainedModel,
    groups: Sequence[Group],
    noise: float,
    temperature: float = 1.0,
    truncated: float = 0.0,
) -> None:
    """Store the model's own log-probs for all drawn tokens, off by up to `noise`.

    truncated: how far the law drawn from lies above them, at most (as under top-p).
    """
    generator = torch.Generator().manual_seed(17)
    for made in groups:
        for r in made.rollouts:
            c = r.completion
            with torch.no_grad():
                now = plain(model, list(made.prompt.token_ids), c.token_ids, temperature)[0]
            drawn = torch.tensor(c.versions) != -1
            off = noise * (2 * torch.rand(len(now), generator=generator, dtype=now.dtype) - 1)
            above = truncated * torch.rand(len(now), generator=generator, dtype=now.dtype)
            c.logprobs = ((now + off) * drawn).tolist()
            c.behaviour_logprobs = ((now + off + above) * drawn).tolist()


def loop_loss(
    model: PreTrainedModel,
    credited: Sequence[Sequence[Credit]],
    algo: AlgoSection,
    *,
    temperature: float = 1.0,
    version: int = 0,
    first: bool = True,
    correct: CorrectSection | None = None,
    proximal: PreTrainedModel | None = None,
    reference: PreTrainedModel | None = None,
) -> torch.Tensor:
    """A minibatch's loss, token by token, from its advantages and the streams of its rollouts.

    version: of the policy that the batch found; first: `model` is still that one. proximal: that
    policy, where it is not.
    """
    correct = correct or CorrectSection()
    rows: list[tuple[float, list[torch.Tensor]]] = []
    for one in (one for part in credited for one in part):
        c, context = one.rollout.completion, list(one.rollout.prompt.token_ids)
        now, entropy = plain(model, context, c.token_ids, temperature)
        with torch.no_grad():
            initial = plain(reference or model, context, c.token_ids, temperature)[0]
            found = plain(proximal or model, context, c.token_ids, temperature)[0]
        lags = [version - v for v in c.versions]
        trained = [
            i
            for i in range(len(c.token_ids))
            if c.loss_mask[i] and not (correct.mode == "mask" and lags[i] > correct.max_lag)
        ]
        log_ratios, factors, olds = {}, {}, {}
        for i in trained:
            old = behaviour = now[i].detach()
            if not (first and lags[i] == 0):
                old = torch.tensor(c.logprobs[i], dtype=now.dtype)
                behaviour = torch.tensor(c.behaviour_logprobs[i], dtype=now.dtype)
            against, factor = old, 1.0
            if correct.mode == "tis" and lags[i] > 0:
                against = now[i].detach()
                factor = (against - behaviour).exp().item()
            if correct.mode == "decoupled" and lags[i] > 0:
                against = now[i].detach() if first else found[i]
                factor = (against - behaviour).exp().item()
            factors[i] = min(factor, correct.cap) if correct.cap else factor
            log_ratios[i], olds[i] = now[i] - against, old
        if algo.ratio != "token" and trained:
            whole = torch.stack(list(log_ratios.values())).sum()
            whole = whole / len(trained) if algo.ratio == "sequence" else whole
            log_ratios = dict.fromkeys(trained, whole)
        losses = []
        for i in trained:
            advantage, ratio = one.advantages[i].item(), log_ratios[i].exp()
            clipped = ratio.clamp(1 - algo.clip_low, 1 + algo.clip_high)
            loss = -factors[i] * torch.minimum(ratio * advantage, clipped * advantage)
            if reference is not None and algo.kl_in == "loss":
                d = now[i] - initial[i]
                kl = {"k1": d, "k2": d * d / 2, "k3": (-d).exp() + d - 1}[algo.kl_estimator]
                if algo.kl_unbiased:
                    kl = (now[i] - olds[i]).exp() * kl
                loss = loss + algo.kl_coef * kl
            losses.append(loss - algo.entropy_coef * entropy[i])
        rows.append((one.rollout.weight, losses))
    total = torch.zeros((), dtype=model.dtype)
    rollouts = sum(weight for weight, _ in rows)
    tokens = sum(weight * len(losses) for weight, losses in rows)
    for weight, losses in rows:
        divisor = {
            "token": tokens,
            "sequence": len(losses) * rollouts,
            "constant": rollouts * MAX_TOKENS,
        }[algo.average]
        for loss in losses:
            total = total + weight * loss / divisor
    return total


def make_trainer(
    model: PreTrainedModel,
    *,
    algo: dict | None = None,
    temperature: float = 1.0,
    max_tokens: int = MAX_TOKENS,
    reference: PreTrainedModel | None = None,
    autocast: torch.dtype | None = None,
    correct: CorrectSection | None = None,
    critic: dict | None = None,
    shares: Shares = FLAT,
    **train: Any,
) -> Trainer:
    """A trainer that leaves gradients as they are, unless told otherwise."""
    settings = TrainSection(**(dict(learning_rate=1e-2, max_grad_norm=1e12) | train))
    return Trainer(
        model,
        AlgoSection(**(algo or {})),
        settings,
        temperature=temperature,
        max_tokens=max_tokens,
        reference=reference,
        autocast=autocast,
        correct=correct,
        critic=None if critic is None else Critic(model, CriticSection(**critic), settings),
        shares=shares,
    )


def gradients(
    trainer: Trainer, groups: Sequence[Group]
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """The gradient of each optimizer step on a batch, without taking it; and its metrics."""
    return gradients_of(trainer, trainer.credit(groups)[0])


def gradients_of(
    trainer: Trainer, credited: Sequence[list[Credit]]
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """The same of a credited batch."""
    taken = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: taken.append(flat_gradient(trainer.model))
    try:
        metrics = trainer.step(credited)
    finally:
        trainer.optimizer.step = step
    return taken, metrics


class Taken(NamedTuple):
    """An optimizer step: the policy that it started from, and its gradient."""

    model: PreTrainedModel
    gradient: torch.Tensor


def walk(trainer: Trainer, credited: Sequence[list[Credit]]) -> list[Taken]:
    """Train on a batch; the optimizer steps that it took."""
    taken = []
    step = trainer.optimizer.step

    def spy() -> None:
        taken.append(Taken(copy.deepcopy(trainer.model), flat_gradient(trainer.model)))
        step()

    trainer.optimizer.step = spy
    try:
        trainer.step(credited)
    finally:
        trainer.optimizer.step = step
    return taken


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


def forwarded(trainer: Trainer, scoring: bool = False) -> list[int]:
    """Lengths of the sequences that training (or scoring) ran since the last call, sorted."""
    work = trainer.take_work()
    ran = [row_lengths(layout) for passes, layout in work if (passes == 1) == scoring]
    return sorted(n for lengths in ran for n in lengths)


def row_lengths(layout: Layout) -> list[int]:
    """Lengths of a forward's texts."""
    assert layout.columns is None, "texts share rows"
    # the last token is not asked for anything
    return [int(row.nonzero()[-1]) + 2 for row in layout.wanted]


def assert_same(got: torch.Tensor, expected: torch.Tensor, relative: float = 1e-10) -> None:
    """Equal up to a share of the expected norm, which must not be nothing."""
    assert expected.norm() > 1e-4, "nothing to compare"
    assert (got - expected).norm() <= relative * expected.norm()
