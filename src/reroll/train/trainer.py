"""Trainer: graded groups in, optimizer steps done on the very module that the engine uses.

`credit` turns rewards into credit per token, scoring the batch with reference, critic and policy
where the algorithm asks for it; `step` takes the optimizer steps. Old log-probs are those of
sampling. Tokens drawn by the current version, before the batch's first optimizer step, take old =
now (detached): the ratio is exactly 1, and float noise between differently shaped forwards cannot
leak into learning.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from reroll.algo.baseline import Running
from reroll.config import AlgoSection, CorrectSection, PruneSection, TrainSection
from reroll.model.attention import checkpoint_gradients
from reroll.model.layout import Layout, in_order, lay_out
from reroll.model.load import switch_off_dropout
from reroll.model.lora import adapters_off
from reroll.train.batch import Microbatch, Minibatch, minibatches
from reroll.train.credit import PREFIX, Credit, Scores, credit, graded
from reroll.train.critic import Critic
from reroll.train.forwards import FLAT, Forwards, Shares, Work
from reroll.train.metrics import Sums
from reroll.train.moments import load_moments, moments
from reroll.train.policy import PolicyLoss
from reroll.train.schedule import schedule
from reroll.types import Group

MAX_SKIPPED = 3
"""optimizer steps skipped in a row, for a loss or gradient that is not finite, that stop the run"""


class Diverged(RuntimeError):
    """Loss or gradient was not finite `MAX_SKIPPED` times in a row."""


class Trainer:
    """Owns the optimizers and the policy version; shares the module with the engine.

    temperature, max_tokens: those of sampling. reference: the KL's anchor, or None; a model with
    adapters is its own reference, with the adapters off. critic: for advantage = "gae". prune: how
    groups were thinned out. shares: whether what rollouts begin with alike is run once, and how.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        algo: AlgoSection,
        train: TrainSection,
        *,
        temperature: float,
        max_tokens: int,
        correct: CorrectSection | None = None,
        prune: PruneSection | None = None,
        autocast: torch.dtype | None = None,
        reference: PreTrainedModel | None = None,
        critic: Critic | None = None,
        shares: Shares = FLAT,
    ) -> None:
        assert (critic is not None) == (algo.advantage == "gae")
        assert (reference is not None) == (algo.kl_coef > 0)
        self.model, self.reference, self.critic = model, reference, critic
        self.algo, self.train, self.correct = algo, train, correct or CorrectSection()
        self.prune, self.max_tokens = prune, max_tokens
        self.forwards = Forwards(model.device, temperature, autocast)
        self.policy_loss = PolicyLoss(algo, self.correct, max_tokens, train.check_logprobs)
        self.wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        """dtype of losses, as `token_logprobs` returns"""
        self.rounds = autocast is not None or model.dtype not in (torch.float32, torch.float64)
        """whether forwards of other shapes differ by more than GSPO's clip range of 3e-4"""
        self.version = 0
        """optimizer steps tried, skipped ones included"""
        self.batches = 0
        """calls of `step`"""
        self.critic_steps = 0
        """optimizer steps of the critic tried"""
        self.skipped_in_a_row = 0
        self.running = Running(algo.running_weight, algo.running_decay)
        """rewards so far, for advantage = "running"; else empty"""
        switch_off_dropout(model)
        if train.gradient_checkpointing:
            checkpoint_gradients(model)
        self._share(shares)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        frozen = len(self.parameters) < len(list(model.parameters()))
        self.passes = (2 if frozen else 3) + train.gradient_checkpointing
        """forwards that training on a token costs as much as; frozen weights need no gradient"""
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay,
        )

    def _share(self, shares: Shares) -> None:
        """Decide how forwards are laid out; gradient checkpointing drops what leaves stand on."""
        self.shares, self.cost = shares, shares.cost(self.model)
        self.behind = shares.leaves and not self.train.gradient_checkpointing

    def learning_rate(self, version: int) -> float:
        """Rate of optimizer step `version` (from 0): warm-up, then decay towards 0 at the end."""
        waits = self.critic.config.warmup if self.critic is not None else 0
        return self.train.learning_rate * schedule(self.train, version, self.train.steps - waits)

    def credit(self, groups: Sequence[Group]) -> tuple[list[list[Credit]], dict[str, float]]:
        """Credit of every graded rollout, and metrics. See `train/credit.py`."""
        return credit(
            groups,
            self.algo,
            self.correct,
            max_tokens=self.max_tokens,
            version=self.version,
            scores=self._scores(groups),
            running=self.running,
            prune=self.prune,
        )

    @torch.no_grad()
    def _scores(self, groups: Sequence[Group]) -> Scores:
        """What the formulas need of the models about this batch, before it changes them."""
        rollouts = graded(groups)
        pairs = [(r.prompt.token_ids, r.completion.token_ids) for r in rollouts]
        fresh = {self.version, PREFIX}
        stale = any(not fresh.issuperset(r.completion.versions) for r in rollouts)
        # with one optimizer step a batch the proximal policy is that of its own forward
        several = self.train.epochs * self.train.minibatches > 1
        proximal = self.correct.mode == "decoupled" and several and stale
        if self.reference is None and self.critic is None and not proximal:
            return Scores()
        layouts = lay_out(pairs, self.train.microbatch_tokens, self.cost, self.behind)
        parts = [self._score(layout, proximal) for layout in layouts]
        return Scores(*in_order(layouts, parts, [len(completion) for _, completion in pairs]))

    def _score(self, layout: Layout, proximal: bool) -> Scores:
        """The same of the rollouts of one forward."""
        critic, shared = self.critic, self.critic is not None and self.critic.trunk is None
        reference_T = proximal_T = values_T = None
        if self.reference is not None:
            own = self.reference is self.model
            with adapters_off(self.model) if own else nullcontext():
                reference_T = self.forwards.logprobs(self.reference, layout).logprobs
            self.forwards.book(1, layout)
        if proximal or shared:
            now = self.forwards.logprobs(self.model, layout, hidden=shared)
            proximal_T = now.logprobs if proximal else None
            values_T = critic.values(layout, now.hidden) if critic is not None and shared else None
            self.forwards.book(1, layout)
        if critic is not None and not shared:
            with self.forwards.cast():
                values_T = critic.values(layout)
            self.forwards.book(1, layout)
        return Scores(reference_T, proximal_T, values_T)

    def step(self, groups: Sequence[list[Credit]]) -> dict[str, float]:
        """One optimizer step for each minibatch of each epoch; returns the batch's metrics.

        Every epoch takes the same minibatches in the same order. Raises Diverged after
        `MAX_SKIPPED` steps in a row with a non-finite loss or gradient.
        """
        algo, train = self.algo, self.train
        kl_in_loss = algo.kl_coef > 0 and algo.kl_in == "loss"
        skip_dead = not (kl_in_loss or algo.entropy_coef > 0 or self.critic)
        parts = minibatches(
            groups, train.minibatches, train.microbatch_tokens, skip_dead, self.cost, self.behind
        )
        sums, first = Sums(), True
        with self._training():
            if len(parts) * train.epochs > 1 and self.rounds:
                self._score_fresh(parts)
            for part in parts * train.epochs:
                stepped = self._optimizer_step(part, first, sums)
                first = first and not stepped
        self.batches += 1
        self.running.count()
        parts *= train.epochs
        return sums.metrics(parts) | {"learning_rate": self.optimizer.param_groups[0]["lr"]}

    @torch.no_grad()
    def _score_fresh(self, parts: Sequence[Minibatch]) -> None:
        """Old log-probs of fresh tokens from forwards of the shapes that training will run."""
        for part in parts:
            for microbatch in part.microbatches:
                microbatch.fresh = self.forwards.logprobs(self.model, microbatch.layout).logprobs
                self.forwards.book(1, microbatch.layout)

    def _optimizer_step(self, part: Minibatch, first: bool, sums: Sums) -> bool:
        """Whether the policy was changed. first: it is still the one that the batch found."""
        policy_waits = self.critic is not None and self.batches < self.critic.config.warmup
        self.optimizer.zero_grad(set_to_none=True)
        if self.critic is not None:
            self.critic.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for microbatch in part.microbatches:
            batch = microbatch.to(self.model.device, self.wide)
            total += self._backward(batch, part, first, policy_waits, sums)
        rate = self.learning_rate(self.version)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = critic_norm = 0.0
        if part.microbatches and not policy_waits:
            norm = torch.nn.utils.clip_grad_norm_(
                self.parameters.values(), self.train.max_grad_norm
            ).item()
        if part.microbatches and self.critic is not None:
            critic_norm = self.critic.clip_gradient()
            sums.critic_norms.append(critic_norm)
        sums.steps.append((total, norm))
        changed = False
        if not math.isfinite(total + norm + critic_norm):
            self._skip(total, norm + critic_norm, sums)
        else:
            self.skipped_in_a_row = 0
            changed = bool(part.microbatches) and not policy_waits
            if changed:
                self.optimizer.step()
            if part.microbatches and self.critic is not None:
                self.critic.step(schedule(self.train, self.critic_steps, self.train.steps))
        self.version += not policy_waits
        self.critic_steps += self.critic is not None
        return changed

    def _skip(self, loss: float, norm: float, sums: Sums) -> None:
        sums.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise Diverged(
                f"loss or gradient was not finite {MAX_SKIPPED} optimizer steps in a row (loss "
                f"{loss}, gradient norm {norm}); lower train.learning_rate, or check the model"
            )

    def _backward(
        self, batch: Microbatch, part: Minibatch, first: bool, policy_waits: bool, sums: Sums
    ) -> float:
        """Forward and backward of policy and critic; returns the share of the policy's loss."""
        critic, shared = self.critic, self.critic is not None and self.critic.trunk is None
        if critic is not None and not shared:
            with self.forwards.cast():
                value = critic.loss(batch, part, sums)
            value.backward()
            self.forwards.book(self.passes, batch.layout)
            if policy_waits:
                return 0.0
        now = self.forwards.logprobs(
            self.model, batch.layout, entropy=self.algo.entropy_coef > 0, hidden=shared
        )
        self.forwards.book(1 if policy_waits else self.passes, batch.layout)
        loss = whole = self.policy_loss(now, batch, part, first, sums)
        if critic is not None and shared:
            assert now.hidden is not None
            # the head learns from the whole value loss, the trunk from `coef` times it
            fixed_TH = now.hidden.detach()
            hidden_TH = fixed_TH + critic.config.coef * (now.hidden - fixed_TH)
            value = critic.loss(batch, part, sums, fixed_TH if policy_waits else hidden_TH)
            whole = value if policy_waits else loss + value
        whole.backward()
        return loss.item()

    def take_work(self) -> list[Work]:
        """What has been run since the last call, for the ledger."""
        return self.forwards.take_work()

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
        """Optimizer moments by parameter name, counters, and the critic's state."""
        return {
            "moments": moments(self.optimizer, self.parameters),
            "version": self.version,
            "batches": self.batches,
            "critic_steps": self.critic_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "shares": list(self.shares),
            "running": self.running.state(),
            "critic": self.critic.state() if self.critic is not None else {},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.version, self.batches = state["version"], state["batches"]
        self.critic_steps, self.skipped_in_a_row = state["critic_steps"], state["skipped_in_a_row"]
        # the start-up check may say otherwise of these weights; a run keeps its forwards
        self._share(Shares(*state["shares"]))
        if "running" in state:  # not in checkpoints of before there was such a baseline
            self.running.load_state(state["running"])
        load_moments(self.optimizer, self.parameters, state["moments"])
        if self.critic is not None:
            self.critic.load_state(state["critic"])
