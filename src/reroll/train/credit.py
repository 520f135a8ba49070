"""Groups with rewards in, credit for every token out: rewards, KL, critic and lag put together.

What the formulas need of the model (reference log-probs, values, proximal log-probs) comes in as
`Scores`; nothing here runs it. `T` packed tokens of all graded rollouts, rollout after rollout; `L`
tokens of one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from reroll.algo import advantage, thinned
from reroll.algo.baseline import Running
from reroll.algo.correct import within_lag
from reroll.algo.loss import KL_ESTIMATORS, rollout_sums
from reroll.algo.reward import soft_overlong
from reroll.config import GROUP_ADVANTAGES, AlgoSection, CorrectSection, PruneSection
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
    inverse: torch.Tensor | None = None
    """inverse-probability weights, where its group was thinned out"""
    counts: float = 1.0
    """rollouts that it counts as in averages: with such weights, its share of all started"""

    def carries_gradient(self) -> bool:
        """Whether any token that is trained on has an advantage."""
        return bool(self.advantages[torch.tensor(self.mask)].any())

    def weights(self) -> torch.Tensor:
        """What each token counts beside the others of its group, `[L]`."""
        return torch.ones_like(self.advantages) if self.inverse is None else self.inverse

    def tokens(self) -> float:
        """Trained tokens, weighted likewise."""
        return (
            sum(self.mask)
            if self.inverse is None
            else self.inverse[torch.tensor(self.mask)].sum().item()
        )


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
    prune: PruneSection | None = None,
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
    thinning = prune if prune is not None and prune.on and prune.mode == "corrected" else None
    if thinning is not None:
        _weigh(groups, grouped, thinning, algo)
    if credits:
        running = running or Running(algo.running_weight, algo.running_decay)
        rest = groups if thinning is not None else ()
        rule = _Rule(algo, running, rest, thinning is not None and thinning.equal == "skip")
        _advantages(grouped, rule, shaped, penalty_T, scores)
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


@dataclass(frozen=True, slots=True)
class _Rule:
    """How advantages are made."""

    algo: AlgoSection
    running: Running
    thinned: Sequence[Group]
    """the groups, with what was left out of them; empty where nothing was or it is not corrected"""
    skip_equal: bool


def _advantages(
    grouped: Sequence[list[Credit]],
    rule: _Rule,
    shaped: Sequence[float],
    penalty_T: torch.Tensor,
    scores: Scores,
) -> None:
    """Fill in the advantages (and the critic's returns) of all rollouts."""
    algo, credits = rule.algo, [one for group in grouped for one in group]
    lengths = [len(one.mask) for one in credits]
    if algo.advantage in GROUP_ADVANTAGES or algo.advantage == "running":
        totals = rollout_sums(penalty_T, lengths).tolist()
        rewards = [reward - off for reward, off in zip(shaped, totals, strict=True)]
        given = _one_number_each(grouped, rule, rewards)
        for one, value in zip(credits, given, strict=True):
            one.advantages.fill_(value)
        return
    rewards_T = -penalty_T
    ends = torch.tensor(lengths, dtype=torch.long).cumsum(0) - 1
    rewards_T[ends] += torch.tensor(shaped, dtype=torch.float64)
    weights_T = _masks(credits) * torch.tensor(
        [_stands_for(one, rule) for one in credits for _ in one.mask], dtype=torch.float64
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
    grouped: Sequence[list[Credit]], rule: _Rule, rewards: Sequence[float]
) -> list[float]:
    """Advantages of whole rollouts, one after another."""
    algo, credits = rule.algo, [one for group in grouped for one in group]
    if algo.advantage == "running":
        rows = [one.rollout.prompt.row for one in credits]
        return rule.running.advantages(rewards, rows, [_stands_for(one, rule) for one in credits])
    plain, rest, given = getattr(advantage, algo.advantage), iter(rewards), []
    for index, group in enumerate(grouped):
        mine = [next(rest) for _ in group]
        if rule.thinned and any(one.rollout.looks for one in group):
            given += _against_all_started(rule, rule.thinned[index], group, mine)
        else:
            given += plain(mine, [one.rollout.weight for one in group])
    return given


def _against_all_started(
    rule: _Rule, group: Group, kept: Sequence[Credit], rewards: Sequence[float]
) -> list[float]:
    """Advantages of the graded rollouts of a group that was thinned out."""
    known = {id(one.rollout): reward for one, reward in zip(kept, rewards, strict=True)}
    every = [*group.rollouts, *group.pruned]
    given = thinned.advantages(
        rule.algo.advantage,  # type: ignore[arg-type]
        [looks_of(rollout) for rollout in every],
        [known.get(id(rollout)) for rollout in every],
        rule.skip_equal,
    )
    by_rollout = {id(rollout): a for rollout, a in zip(every, given, strict=True)}
    return [by_rollout[id(one.rollout)] for one in kept]


def _weigh(
    groups: Sequence[Group],
    grouped: Sequence[list[Credit]],
    prune: PruneSection,
    algo: AlgoSection,
) -> None:
    """Fill in the inverse-probability weights of groups that were thinned out."""
    where = prune.weigh
    if where == "auto":  # one ratio of a whole rollout takes one weight
        where = "prefix" if algo.ratio == "token" else "all"
    for group, kept in zip(groups, grouped, strict=True):
        if not group.pruned:
            continue
        every = [*group.rollouts, *group.pruned]
        lengths = [len(r.completion.token_ids) for r in every]
        given = thinned.weights([looks_of(r) for r in every], lengths, where, prune.cap)
        by_rollout = {id(r): weights for r, weights in zip(every, given, strict=True)}
        for one in kept:
            one.inverse = torch.tensor(by_rollout[id(one.rollout)], dtype=torch.float64)
            one.counts = 1.0 if where == "none" else len(every) / len(group.rollouts)


def _stands_for(one: Credit, rule: _Rule) -> float:
    """How many started rollouts one stands for in means over the batch."""
    spared = one.rollout.looks if rule.thinned else ()
    return one.rollout.weight / math.prod(look.survival for look in spared)


def looks_of(rollout: Rollout) -> list[thinned.Look]:
    """The looks at a rollout, as the estimators take them."""
    return [
        thinned.Look(look.position, look.probability, look.survival, look.kept, look.ended)
        for look in rollout.looks
    ]


def _masks(credits: Sequence[Credit]) -> torch.Tensor:
    return torch.tensor([float(m) for one in credits for m in one.mask], dtype=torch.float64)
