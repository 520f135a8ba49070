"""What a rollout's chance of success is taken for, learnt from those that have been graded.

A signal's score goes through a calibrator to a probability. Scores are counted in the calibrators
as they were when they were used, before the network had seen what came of them. How well they tell
the rollouts of one prompt apart is measured on whole groups alone: nothing was selected there.
Rollouts that were spared by lot count 1 / survival in all that is learnt.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from reroll.algo.calibrate import Bins
from reroll.algo.separation import WithinAuc, calibration_error
from reroll.config import PruneSection
from reroll.engine.watch import LAST
from reroll.errors import UserError
from reroll.rollout.decisions import Earned
from reroll.rollout.lengths import represents
from reroll.rollout.signal import Signal
from reroll.rollout.unit import Member, State, Unit
from reroll.types import Rollout

FADE = 0.9
"""what a batch counts one batch later, in calibrators and areas"""
HEAVIEST = 10.0
"""weight of a graded rollout in what is learnt, at most"""
SURE = 1.645
"""standard errors by which an area must lie above chance: 95 %, one-sided"""
AUDITED = 512
"""latest rollouts of whole groups that the calibration error is taken over"""


class Score(NamedTuple):
    """What a signal says of a rollout."""

    log_odds: float
    chance: float
    """calibrated chance of success"""


class Predictor:
    """Owns the networks, calibrators and areas. stages: probes of a rollout."""

    def __init__(self, config: PruneSection, stages: int, seed: int) -> None:
        self.config = config
        made = config.head_width, config.head_rate, config.head_memory
        self.signal, self.end = Signal(*made, seed), Signal(*made, seed + 1)
        """of rollouts that run, and of those that have ended (for votes)"""
        self.bins, self.end_bins = [Bins() for _ in range(stages)], Bins()
        self.areas = [WithinAuc() for _ in range(stages)]
        self.worth = [True] * stages
        """whether the signal tells rollouts apart at each probe"""
        self.batches = 0
        """learnt from"""
        self.rate = [1.0, 0.5]
        """decayed (count, successes) of graded rollouts: what is judged by no signal"""
        self.audited: list[tuple[float, float]] = []
        """(probability, success) of probed rollouts of whole groups"""
        self.said: list[str] = []
        """lines for the user since they were last taken"""

    def judge(self, read: Sequence[np.ndarray], stage: int) -> Iterator[Score]:
        """Scores of rollouts of which this was read at a probe."""
        if not self.config.learns:
            rate = self.rate[1] / self.rate[0]
            return iter([Score(0.0, rate)] * len(read))
        scores = self.signal.scores(np.stack(read)) if read else []
        return map(Score, scores, self.bins[stage].probabilities(scores))

    def ready(self, stage: int) -> bool:
        """Whether to prune at this probe: enough was seen, and it is worth it."""
        return self.batches >= self.config.warmup and self.worth[stage]

    # --- rewards ----------------------------------------------------------------------------------

    def success(self, rollout: Rollout, earned: Earned = lambda rollout: rollout.reward) -> float:
        """Its reward as a share of the way from the least to the greatest.

        Raises UserError for one outside.
        """
        reward = earned(rollout)
        assert reward is not None
        low, high = self.config.low, self.config.high
        if not low - 1e-9 <= reward <= high + 1e-9:
            raise UserError(
                f"prune.low = {low:g}, prune.high = {high:g}: problem {rollout.prompt.row} earned "
                f"{reward:g}; set them to the least and the greatest reward there is"
            )
        return self.share(reward)

    def share(self, reward: float) -> float:
        """The same of any reward, or expected one."""
        low, high = self.config.low, self.config.high
        return min(max((reward - low) / (high - low), 0.0), 1.0)

    def reward(self, success: float) -> float:
        """Back again."""
        return self.config.low + success * (self.config.high - self.config.low)

    # --- after a batch ----------------------------------------------------------------------------

    def learn(self, units: Sequence[Unit]) -> None:
        """Take in what came of a batch's units, graded and settled."""
        for each in (*self.bins, self.end_bins, *self.areas):
            each.decay(FADE)
        known = [member for unit in units for member in _known(unit)]
        self.rate = [FADE * x for x in self.rate]
        for member in known:
            weight = represents(member.rollout)
            self.rate[0] += weight
            self.rate[1] += weight * self.success(member.rollout)
        self.batches += 1
        if not self.config.learns:
            return
        for unit in units:
            self._compare(unit)
        self._train(self.signal, known, range(len(self.bins)))
        self._train(self.end, known, [LAST])
        self._stand()

    def _compare(self, unit: Unit) -> None:
        """Count a whole unit's scores against its rewards."""
        if any(look.survival < 1 for m in unit.members for look in m.rollout.looks) or unit.pruned:
            return
        graded = [m for m in unit.members if m.state is State.DONE and m.rollout.reward is not None]
        for stage, area in enumerate(self.areas):
            rows = [
                (look.score, self.share(look.probability), self.success(member.rollout))
                for member in graded
                for look in member.rollout.looks[stage : stage + 1]
                if look.score is not None and look.head
            ]
            area.add([score for score, _, _ in rows], [success for _, _, success in rows])
            self.audited += [(chance, success) for _, chance, success in rows]
        self.audited = self.audited[-AUDITED:]

    def _train(self, signal: Signal, known: Sequence[Member], places: Sequence[int]) -> None:
        """Count scores at these places in their bins, then let the network learn."""
        rows: list[tuple[np.ndarray, float, float]] = []
        for place in places:
            seen = [member for member in known if place in member.seen]
            read = [member.seen[place][1] for member in seen]
            scores = signal.scores(np.stack(read)) if seen else []
            for member, score, one in zip(seen, scores, read, strict=True):
                looks, success = member.rollout.looks, self.success(member.rollout)
                weight = min(represents(member.rollout), HEAVIEST)
                if place == LAST:
                    if signal.version:
                        self.end_bins.add(score, success, weight)
                elif len(looks) > place and (used := looks[place]).head and used.score is not None:
                    self.bins[place].add(used.score, success, weight)
                rows.append((one, success, weight))
        if rows:
            read, targets, weights = zip(*rows, strict=True)
            signal.learn(np.stack(read), targets, weights)

    def _stand(self) -> None:
        """Whether to prune at each probe from now on."""
        if not self.config.adaptive or self.batches < self.config.warmup:
            return
        for stage, area in enumerate(self.areas):
            sure = area.auc - SURE * area.error > 0.5  # not so if there is no area yet
            worth = sure and area.auc >= self.config.least_auc
            if worth != self.worth[stage]:
                self.said.append(self._line(stage, worth))
            self.worth[stage] = worth

    def _line(self, stage: int, worth: bool) -> str:
        place = f" at probe {stage + 1}" if len(self.areas) > 1 else ""
        area = self.areas[stage]
        if math.isnan(area.auc):
            return f"prune{place}: keeps everything: nothing is known of its signal yet"
        found = f"area inside whole groups {area.auc:.3f} +- {area.error:.3f}"
        if worth:
            return f"prune{place}: {found}: prunes"
        least = f"prune.least_auc = {self.config.least_auc:g}"
        return f"prune{place}: stands down, {found}: under {least}, or not surely above .5"

    def metrics(self) -> dict[str, float]:
        """Figures after a batch; see docs/glossary.md."""
        if not self.config.learns:
            return {}
        found = {"head_version": float(self.signal.version)}
        for stage, area in enumerate(self.areas):
            end = f"_{stage + 1}" if stage else ""
            if not math.isnan(area.auc):
                found[f"within_auc{end}"] = area.auc
            if math.isfinite(area.error):
                found[f"within_auc_error{end}"] = area.error
            found[f"pruning{end}"] = float(self.ready(stage))
        if self.audited:
            chances, successes = zip(*self.audited, strict=True)
            found["calibration_error"] = calibration_error(chances, successes, [1.0] * len(chances))
        return found

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON, and under `tensors` those of the networks."""
        nets = {"signal": self.signal, "end": self.end}
        return {
            "tensors": {
                f"{of}.{k}": v for of, net in nets.items() for k, v in net.tensors().items()
            },
            "versions": {of: net.version for of, net in nets.items()},
            "bins": [one.state() for one in self.bins],
            "end_bins": self.end_bins.state(),
            "areas": [one.state() for one in self.areas],
            "worth": list(self.worth),
            "batches": self.batches,
            "rate": list(self.rate),
            "audited": [list(pair) for pair in self.audited],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        for of, net in (("signal", self.signal), ("end", self.end)):
            mine = {
                k.removeprefix(f"{of}."): v
                for k, v in state["tensors"].items()
                if k.startswith(f"{of}.")
            }
            net.load(mine, state["versions"][of])
        self.end_bins.load_state(state["end_bins"])
        for name, ours in (("bins", self.bins), ("areas", self.areas)):
            for one, saved in zip(ours, state[name], strict=True):
                one.load_state(saved)
        self.worth, self.batches = list(state["worth"]), state["batches"]
        self.rate = list(state["rate"])
        self.audited = [(chance, success) for chance, success in state["audited"]]


def _known(unit: Unit) -> list[Member]:
    """Members whose rewards say something of all that were started: those kept to their end, and
    those that were left out after it, judged by that reward."""
    ended = [m for m in unit.pruned if m.rollout.looks and m.rollout.looks[-1].ended]
    return [
        member
        for member in (*unit.members, *ended)
        if member.state in (State.DONE, State.PRUNED) and member.rollout.reward is not None
    ]
