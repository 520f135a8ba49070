"""Votes at test time: how much a finished rollout's answer counts, by what pruning has learnt.

ARRoL, arXiv 2603.24840, votes with its head's score. Here it is the network that was trained on
finished rollouts beside the one that prunes (`Predictor.end`), calibrated.
"""

from collections.abc import Sequence

import numpy as np

from reroll.config import PruneSection
from reroll.engine.base import Probed
from reroll.rollout.decisions import StopsNone
from reroll.rollout.predict import Predictor
from reroll.rollout.signal import features
from reroll.rollout.unit import Member
from reroll.types import Prompt, Rollout, Watch


class Voter(StopsNone):
    """Looks at every rollout of a collect when it ends."""

    def __init__(
        self, config: PruneSection, predictor: Predictor, step_ids: frozenset[int]
    ) -> None:
        self.config, self.predictor, self.step_ids = config, predictor, step_ids
        self._read: dict[tuple[tuple[int, int, int], int], np.ndarray] = {}

    def watch(self, prompt: Prompt) -> Watch:
        """Their ends alone."""
        hidden = self.config.signal == "quality"
        return Watch(hidden=hidden, entropy=not hidden or self.config.statistics, last=True)

    def see(self, member: Member, probed: Probed) -> None:
        """One has ended."""
        config, rollout = self.config, member.rollout
        read = features(config.signal, probed, self.step_ids, config.statistics)
        self._read[rollout.prompt.identity, rollout.sample] = read

    def weights(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Calibrated chance of success of each, of the last collect."""
        read = np.stack([self._read[r.prompt.identity, r.sample] for r in rollouts])
        return self.predictor.end_bins.probabilities(self.predictor.end.scores(read))
