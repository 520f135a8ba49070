"""Trainer: groups with advantages in, optimizer steps done on the very module that the engine uses.

Old log-probs are those of sampling. Tokens drawn by the current version, before the batch's first
optimizer step, take old = now (detached): the ratio is exactly 1, and float noise between
differently shaped forwards cannot leak into learning.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from reroll.algo.loss import clipped_surrogate, kl_k3, token_weights
from reroll.config import AlgoSection, TrainSection
from reroll.model.load import switch_off_dropout
from reroll.model.logprobs import LogProbs, token_logprobs
from reroll.train.batch import Credited, Microbatch, Minibatch, minibatches

MAX_SKIPPED = 3
"""optimizer steps skipped in a row, for a loss or gradient that is not finite, that stop the run"""


class Diverged(RuntimeError):
    """Loss or gradient was not finite `MAX_SKIPPED` times in a row."""


class Trainer:
    """Owns the optimizer and the policy version; shares the module with the engine.

    reference: frozen initial policy for the KL term, or None. temperature: that of sampling.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        algo: AlgoSection,
        train: TrainSection,
        *,
        temperature: float,
        autocast: torch.dtype | None = None,
        reference: PreTrainedModel | None = None,
    ) -> None:
        self.model, self.reference = model, reference
        self.algo, self.train, self.temperature = algo, train, temperature
        self.autocast = autocast
        self.version = 0
        """optimizer steps tried, skipped ones included"""
        self.skipped_in_a_row = 0
        switch_off_dropout(model)
        if train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay,
        )

    def learning_rate(self, version: int) -> float:
        """Rate of optimizer step `version` (from 0): warm-up, then decay towards 0 at the end."""
        train = self.train
        warm = min(1.0, (version + 1) / train.warmup) if train.warmup else 1.0
        total = train.steps * train.minibatches
        done = min(1.0, max(0, version - train.warmup) / max(1, total - train.warmup))
        left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return train.learning_rate * warm * left[train.decay]

    def step(self, credited: Sequence[Credited]) -> tuple[dict[str, float], list[int]]:
        """One optimizer step for each minibatch.

        Returns the batch's metrics and the lengths (prompt + completion) of what was forwarded.
        Raises Diverged after `MAX_SKIPPED` steps in a row with a non-finite loss or gradient.
        """
        skip_dead = self.algo.kl_coef == 0 and self.algo.entropy_coef == 0
        parts = minibatches(
            credited, self.train.minibatches, self.train.microbatch_tokens, skip_dead
        )
        sums = Sums()
        fresh_from = self.version
        with self._training():
            for part in parts:
                self._optimizer_step(part, fresh_from, sums)
        metrics = sums.metrics(parts) | {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        return metrics, [len(a) + len(b) for p in parts for m in p.microbatches for a, b in m.pairs]

    def _optimizer_step(self, part: Minibatch, fresh_from: int, sums: "Sums") -> None:
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for microbatch in part.microbatches:
            loss = self._loss(microbatch, part, self.version == fresh_from, sums)
            loss.backward()
            total += loss.item()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.version)
        norm = 0.0
        if part.microbatches:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.train.max_grad_norm).item()
        sums.steps.append((total, norm))
        if math.isfinite(total) and math.isfinite(norm):
            if part.microbatches:
                self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            sums.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= MAX_SKIPPED:
                raise Diverged(
                    f"loss or gradient was not finite {MAX_SKIPPED} optimizer steps in a row "
                    f"(loss {total}, gradient norm {norm}); lower train.learning_rate, or check "
                    "the model and its dtype"
                )
        self.version += 1

    def _loss(self, batch: Microbatch, part: Minibatch, first: bool, sums: "Sums") -> torch.Tensor:
        """The microbatch's share of the minibatch's loss, a scalar with gradient."""
        algo, device = self.algo, self.model.device
        now = self._logprobs(self.model, batch, entropy=algo.entropy_coef > 0)
        logprobs_T, dtype = now.logprobs, now.logprobs.dtype
        mask_T = batch.mask.to(device, dtype)
        stored_T = batch.logprobs.to(device, dtype)
        current_T = (batch.versions == self.version).to(device) & first
        old_T = torch.where(current_T, logprobs_T.detach(), stored_T)
        advantages_T = batch.advantages.to(device, dtype)
        loss_T, binds_T = clipped_surrogate(
            logprobs_T, old_T, advantages_T, algo.clip_low, algo.clip_high
        )
        weights_T = token_weights(batch.lengths, mask_T, algo.average, part.tokens, part.rollouts)
        sums.add("clip_fraction", binds_T.to(dtype), mask_T)
        sums.add("approx_kl", kl_k3(logprobs_T, old_T), mask_T)
        if self.train.check_logprobs and first:
            sums.difference(logprobs_T, stored_T, mask_T)
        if self.reference is not None:
            with torch.no_grad():
                reference_T = self._logprobs(self.reference, batch, entropy=False).logprobs
            kl_T = kl_k3(logprobs_T, reference_T)
            sums.add("kl", kl_T, mask_T)
            loss_T = loss_T + algo.kl_coef * kl_T
        if now.entropy is not None:
            sums.add("entropy_exact", now.entropy, mask_T)
            loss_T = loss_T - algo.entropy_coef * now.entropy
        return (loss_T * weights_T).sum()

    def _logprobs(self, model: PreTrainedModel, batch: Microbatch, entropy: bool) -> LogProbs:
        device = self.model.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return token_logprobs(model, batch.pairs, temperature=self.temperature, entropy=entropy)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Training mode only where gradient checkpointing asks for it (dropout is off anyway)."""
        was_training = self.model.training
        self.model.train(self.train.gradient_checkpointing)
        try:
            yield
        finally:
            self.model.train(was_training)

    def state(self) -> dict[str, Any]:
        """Optimizer moments by parameter name, and counters."""
        moments = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{key}/{name}"] = value
        return {
            "moments": moments,
            "version": self.version,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.version, self.skipped_in_a_row = state["version"], state["skipped_in_a_row"]
        by_name = dict(zip(self.names, self.parameters, strict=True))
        for key, value in state["moments"].items():
            kind, _, name = key.partition("/")
            parameter = by_name[name]
            place = "cpu" if kind == "step" else parameter.device
            self.optimizer.state[parameter][kind] = value.to(place)


class Sums:
    """Token-weighted sums of a batch's metrics."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[float, float]] = {}
        self.steps: list[tuple[float, float]] = []
        self.skipped = 0
        self.largest_difference = -1.0

    def add(self, name: str, values_T: torch.Tensor, mask_T: torch.Tensor) -> None:
        """Add the masked values of one microbatch."""
        total, count = self.totals.get(name, (0.0, 0.0))
        value = (values_T.detach() * mask_T).sum().item()
        self.totals[name] = (total + value, count + mask_T.sum().item())

    def difference(self, now_T: torch.Tensor, old_T: torch.Tensor, mask_T: torch.Tensor) -> None:
        """Compare recomputed with sampling log-probs (`train.check_logprobs`)."""
        gap_T = (now_T.detach() - old_T).abs() * mask_T
        self.add("logprob_difference_mean", gap_T, mask_T)
        self.largest_difference = max(self.largest_difference, gap_T.max().item())

    def metrics(self, parts: Sequence[Minibatch]) -> dict[str, float]:
        """Means over tokens, means over optimizer steps, counts."""
        out = {name: total / max(count, 1.0) for name, (total, count) in self.totals.items()}
        if self.largest_difference >= 0:
            out["logprob_difference_max"] = self.largest_difference
        groups = sum(part.groups for part in parts)
        return out | {
            "loss": sum(loss for loss, _ in self.steps) / max(len(self.steps), 1),
            "grad_norm": sum(norm for _, norm in self.steps) / max(len(self.steps), 1),
            "skipped_steps": float(self.skipped),
            "live_groups": sum(part.live_groups for part in parts) / max(groups, 1),
            "tokens_trained": float(sum(sum(m.lengths) for p in parts for m in p.microbatches)),
        }
