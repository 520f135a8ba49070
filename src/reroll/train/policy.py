"""The policy's loss on a microbatch: ratio, correction of stale tokens, clip, KL, entropy, average.

Which formulas is the configuration's choice (`config/algo.py`); each is a function of `algo/`.
"""

from dataclasses import dataclass

import torch

from reroll.algo.correct import Anchor, decoupled, truncated, uncorrected
from reroll.algo.loss import (
    KL_ESTIMATORS,
    LARGEST_LOG_RATIO,
    bounded_ratio,
    clipped_surrogate,
    kl_k3,
    level_ratio,
    token_weights,
)
from reroll.config import AlgoSection, CorrectSection
from reroll.model.logprobs import LogProbs
from reroll.train.batch import Microbatch, Minibatch
from reroll.train.metrics import Sums


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Settings of the loss; call it on what one forward said about a microbatch."""

    algo: AlgoSection
    correct: CorrectSection
    max_tokens: int
    """limit on new tokens, for average = "constant" """
    check_logprobs: bool = False

    def __call__(
        self, now: LogProbs, batch: Microbatch, part: Minibatch, first: bool, sums: Sums
    ) -> torch.Tensor:
        """The microbatch's share of the minibatch's loss, a scalar with gradient.

        first: the policy is still the one that the batch found. sums: takes the metrics.
        """
        algo, mask_T, logprobs_T = self.algo, batch.mask, now.logprobs
        fresh_T = (batch.lags == 0) & first
        stored_T, drawn_T = batch.logprobs, batch.behaviour
        if batch.fresh is not None:
            stored_T = torch.where(batch.lags == 0, batch.fresh, stored_T)
            drawn_T = torch.where(batch.lags == 0, batch.fresh, drawn_T)
        old_T = torch.where(fresh_T, logprobs_T.detach(), stored_T)
        behaviour_T = torch.where(fresh_T, logprobs_T.detach(), drawn_T)
        anchor = self._anchor(logprobs_T.detach(), old_T, behaviour_T, batch, first)
        log_ratio_T = level_ratio(logprobs_T - anchor.old_T, mask_T, batch.lengths, algo.ratio)
        loss_T, binds_T = clipped_surrogate(
            log_ratio_T, batch.advantages, algo.clip_low, algo.clip_high
        )
        loss_T = loss_T * anchor.weights_T
        sums.add("clip_fraction", binds_T.to(mask_T.dtype), mask_T)
        # KL(old, now), since the tokens are the old policy's
        bounded_T = old_T + (logprobs_T - old_T).clamp(max=LARGEST_LOG_RATIO)
        sums.add("approx_kl", kl_k3(old_T, bounded_T), mask_T)
        sums.lags(batch.lags, mask_T, logprobs_T - behaviour_T, binds_T)
        if self.check_logprobs and first:
            sums.difference(logprobs_T, batch.logprobs, mask_T * (batch.lags == 0))
        if batch.reference is not None and algo.kl_in == "loss":
            kl_T = KL_ESTIMATORS[algo.kl_estimator](logprobs_T, batch.reference)
            sums.add("kl", kl_T, mask_T)
            ratio_T = bounded_ratio(logprobs_T - old_T) if algo.kl_unbiased else 1.0
            loss_T = loss_T + algo.kl_coef * ratio_T * kl_T
        if now.entropy is not None:
            sums.add("entropy_exact", now.entropy, mask_T)
            loss_T = loss_T - algo.entropy_coef * now.entropy
        weights_T = token_weights(
            mask_T,
            batch.lengths,
            algo.average,
            tokens=part.tokens,
            rollouts=part.rollouts,
            max_tokens=self.max_tokens,
            weights_R=batch.weights,
        )
        return (loss_T * weights_T * batch.inverse).sum()

    def _anchor(
        self,
        now_T: torch.Tensor,
        old_T: torch.Tensor,
        behaviour_T: torch.Tensor,
        batch: Microbatch,
        first: bool,
    ) -> Anchor:
        """What the ratio is taken against, and the token weights, under `correct.mode`."""
        stale_T, cap = batch.lags > 0, self.correct.cap
        if self.correct.mode == "tis":
            anchor = truncated(now_T, behaviour_T, batch.lags, cap)
            # a fresh token's ratio is against the untruncated law, as everywhere
            return anchor._replace(old_T=torch.where(stale_T, anchor.old_T, old_T))
        if self.correct.mode == "decoupled":
            proximal_T = old_T
            if first:
                proximal_T = now_T
            elif batch.proximal is not None:
                proximal_T = torch.where(stale_T, batch.proximal, old_T)
            return decoupled(proximal_T, behaviour_T, batch.lags, cap)
        return uncorrected(old_T)
