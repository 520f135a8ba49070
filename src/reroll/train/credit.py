"""Groups with rewards in, credit for every token out: rewards, KL, critic and lag put together.

What the formulas need of the model (reference log-probs, values, proximal log-probs) comes in as
`Scores`; nothing here runs it. `T` packed tokens of all graded rollouts, rollout after rollout; `L`
tokens of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from reroll.algo import advantage
from reroll.algo.baseline import Running
from reroll.algo.correct import within_lag
from reroll.algo.loss import KL_ESTIMATORS, rollout_sums
from reroll.algo.reward import soft_overlong
from reroll.config import GROUP_ADVANTAGES, AlgoSection, CorrectSection
from reroll.errors import UserError
from reroll.types import Group, Rollout

PREFIX = -1
"""policy version of completion tokens that were given"""


class Scores(NamedTuple):
    """What the batch's first policy version says about its tokens, `[T]`; None: not needed."""

    reference_T: torch.Tensor | None = None
    """log-probs under the reference"""
    proximal_T: torch.Tensor | None = None
    """log-probs under the policy as the batch finds it"""
    values_T: torch.Tensor | None = None
    """the critic's, before each token is drawn"""


@dataclass(slots=True)
class Credit:
    """One graded rollout and what the losses need of it, token by token `[L]`, float64."""

    rollout: Rollout
    mask: list[bool]
    """tokens that the policy gradient applies to"""
    lags: list[int]
    """optimizer steps since each was drawn"""
    advantages: torch.Tensor
    reference: torch.Tensor | None = None
    proximal: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    def carries_gradient(self) -> bool:
        """Whether any token that is trained on has an advantage."""
        return bool(self.advantages[torch.tensor(self.mask)].any())


def graded(groups: Sequence[Group]) -> list[Rollout]:
    """The rollouts that can be trained on, in order."""
    return [
        r
        for group in groups
        for r in group.rollouts
        if r.reward is not None and r.completion.token_ids
    ]


def credit(
    groups: Sequence[Group],
    algo: AlgoSection,
    correct: CorrectSection,
    *,
    max_tokens: int,
    version: int,
    scores: Scores,
    running: Running | None = None,
) -> tuple[list[list[Credit]], dict[str, float]]:
    """Credit of each group's graded rollouts, and metrics of the batch.

    max_tokens: limit on new tokens, for the overlong punishment. version: of the policy now.
    running: the baseline of advantage = "running", which is told of this batch; None: nothing went
    before.
    Raises UserError for tokens of several versions in one rollout under a ratio of whole rollouts.
    """
    grouped = [[_uncredited(r, correct, version) for r in graded([group])] for group in groups]
    credits = [one for group in grouped for one in group]
    rollouts = [one.rollout for one in credits]
    if algo.ratio != "token" and correct.mode != "decoupled":
        _refuse_mixed_versions(credits, algo)
    lengths = [len(c.mask) for c in credits]
    shaped = [r.reward + _overlong(r, algo, max_tokens) for r in rollouts]  # type: ignore[operator]
    penalty_T, kl = _penalty(credits, algo, scores)
    if credits:
        running = running or Running(algo.running_weight, algo.running_decay)
        _advantages(grouped, algo, shaped, penalty_T, scores, running)
    for name, stream_T in zip(("reference", "proximal", "values"), scores, strict=True):
        if stream_T is not None:
            for one, part in zip(credits, stream_T.double().cpu().split(lengths), strict=True):
                setattr(one, name, part)
    metrics = {} if kl is None else {"kl": kl}
    if algo.overlong:
        given = [a - r.reward for a, r in zip(shaped, rollouts, strict=True)]  # type: ignore[operator]
        metrics["overlong"] = sum(given) / max(len(given), 1)
    if algo.advantage in GROUP_ADVANTAGES:
        metrics["small_groups"] = float(sum(len(group) < 2 for group in grouped))
    return grouped, metrics


def _uncredited(rollout: Rollout, correct: CorrectSection, version: int) -> Credit:
    completion = rollout.completion
    lags = [0 if v == PREFIX else version - v for v in completion.versions]
    mask = list(completion.loss_mask)
    if correct.mode == "mask":
        mask = [m and w for m, w in zip(mask, within_lag(lags, correct.max_lag), strict=True)]
    return Credit(rollout, mask, lags, torch.zeros(len(mask), dtype=torch.float64))


def _refuse_mixed_versions(credits: Sequence[Credit], algo: AlgoSection) -> None:
    for one in credits:
        versions = {lag for lag, m in zip(one.lags, one.mask, strict=True) if m}
        if len(versions) > 1:
            raise UserError(
                f"algo.ratio = {algo.ratio!r}: a rollout holds tokens of {len(versions)} policy "
                "versions, over which one ratio of the whole rollout means nothing; set "
                "correct.mode = 'decoupled', or algo.ratio = 'token'"
            )


def _overlong(rollout: Rollout, algo: AlgoSection, max_tokens: int) -> float:
    completion = rollout.completion
    drawn = len(completion.token_ids) - completion.versions.count(PREFIX)
    return soft_overlong(drawn, max_tokens, round(algo.overlong * max_tokens))


def _penalty(
    credits: Sequence[Credit], algo: AlgoSection, scores: Scores
) -> tuple[torch.Tensor, float | None]:
    """What a KL in the reward takes off at each token `[T]`, and the mean KL."""
    # of all tokens drawn, trained on or not: a masked rollout's reward stays in the statistics
    mask_T = torch.tensor(
        [float(v != PREFIX) for one in credits for v in one.rollout.completion.versions],
        dtype=torch.float64,
    )
    if algo.kl_in != "reward" or scores.reference_T is None:
        return torch.zeros_like(mask_T), None
    logprobs_T = torch.tensor(
        [x for one in credits for x in one.rollout.completion.logprobs], dtype=torch.float64
    )
    estimate = KL_ESTIMATORS[algo.kl_estimator]
    kl_T = estimate(logprobs_T, scores.reference_T.double().cpu()) * mask_T
    return algo.kl_coef * kl_T, (kl_T.sum() / mask_T.sum().clamp(min=1)).item()


def _advantages(
    grouped: Sequence[list[Credit]],
    algo: AlgoSection,
    shaped: Sequence[float],
    penalty_T: torch.Tensor,
    scores: Scores,
    running: Running,
) -> None:
    """Fill in the advantages (and the critic's returns) of all rollouts."""
    credits = [one for group in grouped for one in group]
    lengths = [len(one.mask) for one in credits]
    if algo.advantage in GROUP_ADVANTAGES or algo.advantage == "running":
        totals = rollout_sums(penalty_T, lengths).tolist()
        rewards = [reward - off for reward, off in zip(shaped, totals, strict=True)]
        given = _one_number_each(grouped, algo, rewards, running)
        for one, value in zip(credits, given, strict=True):
            one.advantages.fill_(value)
        return
    rewards_T = -penalty_T
    ends = torch.tensor(lengths, dtype=torch.long).cumsum(0) - 1
    rewards_T[ends] += torch.tensor(shaped, dtype=torch.float64)
    weights_T = _masks(credits) * torch.tensor(
        [one.rollout.weight for one in credits for _ in one.mask], dtype=torch.float64
    )
    if algo.advantage == "reinforce_pp":
        advantages_T = advantage.reinforce_pp(rewards_T, lengths, weights_T, algo.gamma)
    else:
        assert algo.advantage == "gae" and scores.values_T is not None
        values_T = scores.values_T.double().cpu()
        advantages_T = advantage.gae(rewards_T, values_T, lengths, algo.gamma, algo.lam)
        for one, returns in zip(credits, (advantages_T + values_T).split(lengths), strict=True):
            one.returns = returns
        if algo.whiten:
            advantages_T = advantage.whiten(advantages_T, weights_T)
    for one, part in zip(credits, advantages_T.split(lengths), strict=True):
        one.advantages = part


def _one_number_each(
    grouped: Sequence[list[Credit]],
    algo: AlgoSection,
    rewards: Sequence[float],
    running: Running,
) -> list[float]:
    """Advantages of whole rollouts, one after another."""
    if algo.advantage == "running":
        rollouts = [one.rollout for group in grouped for one in group]
        rows = [rollout.prompt.row for rollout in rollouts]
        return running.advantages(rewards, rows, [rollout.weight for rollout in rollouts])
    rule, rest, given = getattr(advantage, algo.advantage), iter(rewards), []
    for group in grouped:
        given += rule([next(rest) for _ in group], [one.rollout.weight for one in group])
    return given


def _masks(credits: Sequence[Credit]) -> torch.Tensor:
    return torch.tensor([float(m) for one in credits for m in one.mask], dtype=torch.float64)
