"""A baseline that runs along with training, for rollouts that are not compared with siblings.

REINFORCE with a moving average for a baseline, made leave-one-out (cf. RLOO, arXiv 2402.14740): a
rollout's baseline is the mean reward of its prompt, earlier batches fading, with the mean over all
prompts standing in for a few rollouts. Its own reward is never in it, so on policy, with average =
"constant", the expected gradient is the policy gradient (over max_tokens), however wrong the
baseline is. That needs rollouts that are independent of earlier ones: not those of held noise or
lenient drafts. Works with one rollout a prompt, and with groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Running:
    """What is left of the rewards of earlier batches.

    weight: rollouts that the mean over all prompts counts as, in a prompt's own mean; more than 0.
    decay: what a reward still counts one batch later; in its prompt's mean, one batch that has the
    prompt.
    """

    weight: float
    decay: float
    every: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """decayed (count, sum of rewards) of all rollouts"""
    prompts: dict[int, list[float]] = field(default_factory=dict)
    """the same of each prompt, by row"""
    _next: tuple[list[float], dict[int, list[float]]] | None = None
    """both, with the last batch in them"""

    def advantages(
        self, rewards_B: Sequence[float], rows_B: Sequence[int], weights_B: Sequence[float]
    ) -> list[float]:
        """`r - baseline` of each of the batch's `B` rollouts. `count` then counts the batch.

        rows_B: of their prompts. weights_B: what each counts in means (1 as a rule). 0 for a
        rollout that is alone with no history.
        """
        own = {row: list(self.prompts.get(row, (0.0, 0.0))) for row in rows_B}
        every = list(self.every)
        batch = list(zip(rewards_B, rows_B, weights_B, strict=True))
        for reward, row, weight in batch:
            for sums in (own[row], every):
                sums[0] += weight
                sums[1] += weight * reward
        advantages = []
        for reward, row, weight in batch:
            others = every[0] - weight
            if others <= 0:
                advantages.append(0.0)
                continue
            mean = (every[1] - weight * reward) / others
            count, total = own[row][0] - weight, own[row][1] - weight * reward
            baseline = (self.weight * mean + total) / (self.weight + count)
            advantages.append(reward - baseline)
        faded = {row: [self.decay * x for x in sums] for row, sums in own.items()}
        self._next = [self.decay * x for x in every], faded
        return advantages

    def count(self) -> None:
        """The last batch has been trained on: from now on it is history."""
        if self._next is not None:
            self.every = self._next[0]
            self.prompts |= self._next[1]
            self._next = None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"every": self.every, "prompts": {str(k): v for k, v in self.prompts.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.every = state["every"]
        self.prompts = {int(row): sums for row, sums in state["prompts"].items()}
