"""The critic of PPO: the value of what stands before each token, from a linear head on a trunk.

The trunk is a copy of the policy as it was at the start, trained by the critic's own optimizer, or
the policy's own (shared): then the head reads the hidden states of the policy's forward and the
value loss also flows into the policy's weights. The head begins at zero. `T` packed tokens, `H`
hidden width.
"""

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from reroll.algo.loss import token_weights, value_loss
from reroll.config import CriticSection, TrainSection
from reroll.model.attention import checkpoint_gradients
from reroll.model.layout import Layout
from reroll.model.load import embeddings, widen
from reroll.model.logprobs import layout_states
from reroll.train.batch import Microbatch, Minibatch
from reroll.train.metrics import Sums
from reroll.train.moments import load_moments, moments


class Critic(nn.Module):
    """A value head, its trunk unless shared, and their optimizer."""

    def __init__(self, model: PreTrainedModel, config: CriticSection, train: TrainSection) -> None:
        super().__init__()
        self.config, self.train_config = config, train
        self.trunk: PreTrainedModel | None = None
        if config.trunk == "own":
            self.trunk = trunk = cast(PreTrainedModel, copy.deepcopy(model.base_model))
            widen(trunk)
            if train.gradient_checkpointing:
                checkpoint_gradients(trunk)
                trunk.train()
        weight = embeddings(model)[1]
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=wide)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=config.learning_rate,
            betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay,
        )

    def values(self, layout: Layout, hidden_TH: torch.Tensor | None = None) -> torch.Tensor:
        """Value before each continuation token, `[T]`, float32 or wider.

        hidden_TH: the policy's hidden states there, for a shared trunk.
        """
        if self.trunk is not None:
            hidden_TH = layout_states(self.trunk, layout)
        assert hidden_TH is not None, "a shared trunk needs the policy's hidden states"
        with torch.autocast(hidden_TH.device.type, enabled=False):
            return self.head(hidden_TH.to(self.head.weight.dtype)).squeeze(-1)

    def loss(
        self, batch: Microbatch, part: Minibatch, sums: Sums, hidden_TH: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The microbatch's share of the minibatch's value loss, a scalar with gradient.

        part: the minibatch, over whose trained tokens it is a mean. sums: takes the metrics.
        """
        assert batch.values is not None and batch.returns is not None
        values_T = self.values(batch.layout, hidden_TH)
        loss_T, binds_T = value_loss(values_T, batch.values, batch.returns, self.config.clip)
        weights_T = token_weights(
            batch.mask, batch.lengths, "token", tokens=part.tokens, rollouts=part.rollouts,
            weights_R=batch.weights,
        )  # fmt: skip
        sums.critic(values_T.detach(), batch.returns, binds_T, batch.mask)
        return (loss_T * weights_T).sum()

    def step(self, share: float) -> None:
        """One optimizer step at `share` of the peak learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * share
        self.optimizer.step()

    def clip_gradient(self) -> float:
        """Scale the gradient down to `train.max_grad_norm`; returns its norm before that."""
        parameters = self.trained.values()
        return nn.utils.clip_grad_norm_(parameters, self.train_config.max_grad_norm).item()

    def state(self) -> dict[str, dict[str, Any]]:
        """Weights that training changes, and optimizer moments."""
        weights = {name: p.detach() for name, p in self.trained.items()}
        return {"weights": weights, "moments": moments(self.optimizer, self.trained)}

    def load_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on from `state()`. Raises KeyError or RuntimeError for another critic's state."""
        if set(state["weights"]) != set(self.trained):
            raise KeyError("the critic's weights are those of another critic")
        with torch.no_grad():
            for name, value in state["weights"].items():
                self.trained[name].copy_(value)
        load_moments(self.optimizer, self.trained, state["moments"])
