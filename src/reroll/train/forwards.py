"""Forwards of policy, reference and critic: under the trainer's autocast, booked for the ledger."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from reroll.model.flops import CostModel, cost_model
from reroll.model.layout import Layout
from reroll.model.logprobs import LogProbs, layout_logprobs

Work = tuple[int, Layout]
"""(forwards that it costs as much as, what was run)"""


class Shares(NamedTuple):
    """Whether forwards share what rollouts begin with alike, and how."""

    trees: bool = False
    leaves: bool = True
    """in two stages, where that is cheaper"""
    flex: bool = True
    """through flex attention, where rows are wide and the device has it"""

    def cost(self, model: PreTrainedModel) -> CostModel | None:
        """What rows are chosen by; None: a row for each rollout."""
        if not self.trees:
            return None
        cost = cost_model(model)
        return cost if self.flex else replace(cost, flex_from=None)


FLAT = Shares()
"""each rollout alone"""


@dataclass(slots=True)
class Forwards:
    """How the trainer runs a model, and what it has run."""

    device: torch.device
    temperature: float
    """logits are divided by it"""
    autocast: torch.dtype | None
    work: list[Work] = field(default_factory=list)
    """what `take_work` has not handed out yet"""

    def logprobs(
        self, model: PreTrainedModel, layout: Layout, entropy: bool = False, hidden: bool = False
    ) -> LogProbs:
        """What the model says about the rollouts of a layout, with gradient where it is on."""
        with self.cast():
            return layout_logprobs(
                model, layout, temperature=self.temperature, entropy=entropy, hidden=hidden
            )

    def cast(self) -> torch.autocast:
        """The trainer's autocast."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def book(self, passes: int, layout: Layout) -> None:
        """A layout was run, at the cost of so many forwards."""
        self.work.append((passes, layout))

    def take_work(self) -> list[Work]:
        """What has been run since the last call."""
        work, self.work = self.work, []
        return work
