"""Sums of a batch's metrics over tokens, microbatches and optimizer steps."""

from collections.abc import Sequence

import torch

from reroll.algo.correct import effective_sample_size
from reroll.train.batch import Minibatch

OLDEST = 8
"""tokens of this lag and more are reported together"""


class Sums:
    """Token-weighted sums; `[T]` packed tokens, mask_T 1.0 where trained."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[float, float]] = {}
        self.steps: list[tuple[float, float]] = []
        """(loss, gradient norm) of each optimizer step"""
        self.critic_norms: list[float] = []
        self.skipped = 0
        self.largest_difference = -1.0
        self.by_lag: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        """lag -> (log-ratio, whether the clip binds) of its trained tokens"""
        self.returns: list[tuple[torch.Tensor, torch.Tensor]] = []
        """(values, returns) of the trained tokens"""

    def add(self, name: str, values_T: torch.Tensor, mask_T: torch.Tensor) -> None:
        """Add the masked values of one microbatch."""
        total, count = self.totals.get(name, (0.0, 0.0))
        # what is masked may be infinite: a given token's stored log-prob is 0, its own anything
        value = (values_T.detach() * mask_T)[mask_T > 0].sum().item()
        self.totals[name] = (total + value, count + mask_T.sum().item())

    def difference(self, now_T: torch.Tensor, old_T: torch.Tensor, mask_T: torch.Tensor) -> None:
        """Compare recomputed with sampling log-probs (`train.check_logprobs`)."""
        gap_T = (now_T.detach() - old_T).abs() * mask_T
        self.add("logprob_difference_mean", gap_T, mask_T)
        self.largest_difference = max(self.largest_difference, gap_T.max().item())

    def lags(
        self,
        lag_T: torch.Tensor,
        mask_T: torch.Tensor,
        log_ratio_T: torch.Tensor,
        binds_T: torch.Tensor,
    ) -> None:
        """Figures by lag K, told if any trained token is stale. log_ratio_T: now - behaviour.

        `tokens_lag_K`, `log_ratio_lag_K`, `clip_fraction_lag_K` and `ess_lag_K`.
        """
        trained = mask_T > 0
        capped_T = lag_T.clamp(max=OLDEST)
        for lag in capped_T[trained].unique().tolist():
            here = trained & (capped_T == lag)
            self.by_lag.setdefault(lag, []).append((log_ratio_T.detach()[here], binds_T[here]))

    def critic(
        self,
        values_T: torch.Tensor,
        returns_T: torch.Tensor,
        binds_T: torch.Tensor,
        mask_T: torch.Tensor,
    ) -> None:
        """How well the critic predicts the returns."""
        self.add("value_loss", (values_T - returns_T) ** 2 / 2, mask_T)
        self.add("value_clip_fraction", binds_T.to(mask_T.dtype), mask_T)
        trained = mask_T > 0
        self.returns.append((values_T[trained], returns_T[trained]))

    def metrics(self, parts: Sequence[Minibatch]) -> dict[str, float]:
        """Means over tokens, means over optimizer steps, counts. parts: as run."""
        out = {name: total / max(count, 1.0) for name, (total, count) in self.totals.items()}
        out |= self._stale_metrics()
        if self.largest_difference >= 0:
            out["logprob_difference_max"] = self.largest_difference
        if self.returns:
            values, returns = (torch.cat(x) for x in zip(*self.returns, strict=True))
            if len(returns):
                spread = returns.var(correction=0).clamp(min=1e-9)
                left = (returns - values).var(correction=0) / spread
                out["explained_variance"] = 1 - left.item()
            out["critic_grad_norm"] = sum(self.critic_norms) / max(len(self.critic_norms), 1)
        groups = sum(part.groups for part in parts)
        layouts = [m.layout for part in parts for m in part.microbatches]
        return out | {
            "loss": sum(loss for loss, _ in self.steps) / max(len(self.steps), 1),
            "grad_norm": sum(norm for _, norm in self.steps) / max(len(self.steps), 1),
            "skipped_steps": float(self.skipped),
            "live_groups": sum(part.live_groups for part in parts) / max(groups, 1),
            "tokens_trained": float(sum(sum(m.lengths) for p in parts for m in p.microbatches)),
            "tree_tokens_ratio": (
                sum(x.nodes for x in layouts) / sum(x.flat for x in layouts) if layouts else 1.0
            ),
        }

    def _stale_metrics(self) -> dict[str, float]:
        joined = {
            lag: tuple(torch.cat(stream) for stream in zip(*parts, strict=True))
            for lag, parts in sorted(self.by_lag.items())
        }
        tokens = sum(len(ratios) for ratios, _ in joined.values())
        stale = sum(len(ratios) for lag, (ratios, _) in joined.items() if lag > 0)
        out = {"offpolicy_tokens": stale / max(tokens, 1)}
        for lag, (log_ratios, binds) in joined.items() if stale else ():
            out[f"tokens_lag_{lag}"] = len(log_ratios) / tokens
            out[f"log_ratio_lag_{lag}"] = log_ratios.abs().mean().item()
            out[f"clip_fraction_lag_{lag}"] = binds.double().mean().item()
            # of any scale: relative to the largest they are finite
            weights = (log_ratios - log_ratios.max()).exp()
            out[f"ess_lag_{lag}"] = effective_sample_size(weights)
        return out
