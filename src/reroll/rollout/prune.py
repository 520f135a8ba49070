"""Prune: which rollouts of a group are stopped while they run, and which are left out after it.

ARRoL, arXiv 2603.24840. A group is judged as a whole, once the last of its rollouts that run has
come to the probe or ended; the others run on until then. Each is judged by what was known when it
came to its own probe, also if it has gone on or ended since: so what is drawn after the probe is as
the policy draws it. One that ended before any probe is judged by its reward. A rollout that was
wholly reused is not probed: there was nothing to save.

    probe -> features (`signal.py`) -> score, probability (`predict.py`)
          -> survival of each, and who is kept (`algo/survive.py`) -> a look on every rollout

Groups are left whole in the first batches, by lot (the audit share), and while the signal does not
tell the rollouts of whole groups apart. Nothing here decides by the clock.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reroll.algo.noise import share
from reroll.algo.survive import balanced, systematic, tilt, widest
from reroll.config import PruneSection
from reroll.engine.base import Probed
from reroll.engine.watch import LAST
from reroll.rollout.decisions import Earned
from reroll.rollout.lengths import Lengths
from reroll.rollout.predict import Predictor
from reroll.rollout.signal import features
from reroll.rollout.unit import Member, State, Unit
from reroll.types import Finish, Look, Prompt, Watch

SIGNAL = 0.5
"""chance of unequal rewards from which a group is given more samples"""


class Pruner:
    """Judges units; what was seen of a rollout is on its `Member`, what came of it on its looks.

    max_tokens: limit of a rollout. step_ids: tokens that end a step.
    """

    def __init__(
        self,
        config: PruneSection,
        *,
        max_tokens: int,
        seed: int,
        step_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.config, self.seed, self.step_ids = config, seed, step_ids
        self.stages = len(config.at) if config.probes else 1
        self.predictor = Predictor(config, self.stages, seed)
        self.lengths = Lengths(max_tokens)
        self._seconds = 0.0

    # --- while a unit runs ------------------------------------------------------------------------

    def watch(self, prompt: Prompt) -> Watch | None:
        """What the engine is to report of the members of a unit that is opened now; places are
        counted in tokens drawn."""
        config, given = self.config, prompt.prefix_ids
        if not config.probes:
            return None
        counts: tuple[int, ...] = ()
        if config.when == "share" and self.lengths.known:  # at other places it would learn amiss
            counts = tuple(max(1, round(at * self.lengths.mean)) for at in config.at)
        elif config.when == "tokens":
            counts = tuple(round(at) for at in config.at)
        counts = tuple(len(given) + count for count in counts)
        before = sum(token in self.step_ids for token in given)
        steps = tuple(before + round(at) for at in config.at) if config.when == "steps" else ()
        hidden = config.signal == "quality"
        return Watch(
            counts,
            steps,
            self.step_ids if steps else frozenset(),
            hidden=hidden,
            entropy=config.signal == "confidence" or (hidden and config.statistics),
            last=config.learns,
        )

    def see(self, member: Member, probed: Probed) -> None:
        """A member came to a probe."""
        began, at = time.perf_counter(), probed.position
        read = np.zeros(0, np.float32)
        if self.config.learns:
            config, probed = self.config, _drawn(probed, member.rollout.prompt)
            read = features(config.signal, probed, self.step_ids, config.statistics)
        place = LAST if probed.last else probed.place
        member.seen[place] = (at, read)
        self._seconds += time.perf_counter() - began

    def ended(self, member: Member) -> None:
        """A member ended by itself; what was seen on a draft up to its end does not count."""
        completion = member.rollout.completion
        if completion.walked >= member.tokens - 1:
            member.seen = {place: seen for place, seen in member.seen.items() if place == LAST}

    def due(self, unit: Unit) -> bool:
        """Whether a unit is to be judged now."""
        if unit.stage >= self.stages or (unit.watch is None and self.config.probes):
            return False
        if unit.complete or not self.config.probes:
            return unit.complete
        return all(
            unit.stage in member.seen or member.state is State.DONE
            for member in unit.members
            if not member.extra
        )

    def decide(self, unit: Unit, earned: Earned) -> list[Member]:
        """Judge a unit: its members get a look each, those that are to be left out are returned.

        All grades of those that have ended must be there. One that has ended without a grade is not
        judged. Raises UserError for a reward outside `prune.low` and `prune.high`.
        """
        began = time.perf_counter()
        stage, unit.stage = unit.stage, unit.stage + 1
        judged = [member for member in unit.members if self._is_judged(member, stage)]
        if unit.complete:  # whoever still runs has lost the race
            judged = [member for member in judged if member.state is State.DONE]
        predictor = self.predictor
        found = predictor.judge([m.seen[stage][1] for m in judged if stage in m.seen], stage)
        scores = [next(found) if stage in member.seen else None for member in judged]
        chances = [
            predictor.success(member.rollout, earned) if score is None else score.chance
            for member, score in zip(judged, scores, strict=True)
        ]
        keep = len(judged)
        if judged and not self._left_whole(unit, stage):
            ungraded = sum(member.state is State.DONE for member in unit.members) - sum(
                member.state is State.DONE for member in judged
            )
            keep = self.keep(unit.started, stage) - ungraded
        survival, kept = self._thin(unit, stage, judged, chances, keep)
        for i, member in enumerate(judged):
            score, seen = scores[i], member.seen.get(stage)
            look = Look(
                position=seen[0] if seen else len(member.rollout.completion.token_ids),
                score=score.log_odds if score else None,
                probability=predictor.reward(chances[i]),
                survival=survival[i],
                kept=kept[i],
                ended=seen is None,
                head=predictor.signal.version,
            )
            member.rollout.looks.append(look)
        self._seconds += time.perf_counter() - began
        return [member for member, stays in zip(judged, kept, strict=True) if not stays]

    def more(self, unit: Unit, dropped: int) -> int:
        """Samples to start in place of so many that were stopped, under `refill = "samples"`."""
        if self.config.refill != "samples" or unit.stage < self.stages or not dropped:
            return 0
        looks = [m.rollout.looks[-1] for m in unit.members if m.rollout.looks]
        chances = [self.predictor.share(look.probability) for look in looks]
        unequal = 1 - math.prod(chances) - math.prod(1 - p for p in chances)
        return dropped if unequal >= SIGNAL else 0

    def _is_judged(self, member: Member, stage: int) -> bool:
        if member.extra:
            return False
        return stage in member.seen or (
            member.state is State.DONE and member.rollout.reward is not None
        )

    def _left_whole(self, unit: Unit, stage: int) -> bool:
        config = self.config
        if not config.learns:
            return False
        if not self.predictor.ready(stage):
            return True
        return self._share("audit", unit, 0) < config.audit

    def keep(self, started: int, stage: int) -> int:
        """Members that stay at a probe, of so many that were started."""
        return min(started, max(self.config.least, round(self.config.keep[stage] * started)))

    def survival(self, chances: Sequence[float], keep: int) -> list[float]:
        """Chance of each to be among so many that are kept."""
        config, count = self.config, len(chances)
        if config.rule == "tilt" and config.signal != "random":
            return tilt(chances, keep, config.ratio, config.floor)
        # a control knows nothing, not even who is right already; and where the rest is no lot,
        # this is only the share that is kept
        return [1.0 if config.rule == "pods" else keep / count] * count

    def pick(
        self,
        chances: Sequence[float],
        survival: Sequence[float],
        keep: int,
        key: Sequence[Any],
        lot: float,
    ) -> list[bool]:
        """Who is kept. key: the order in which the lot runs over them."""
        if self.config.rule == "pods":
            return widest(chances, keep)
        if self.config.rule == "fixed":
            return balanced(chances, keep, self.config.ratio)
        return systematic(survival, sorted(range(len(key)), key=lambda i: key[i]), lot)

    def _thin(
        self, unit: Unit, stage: int, judged: Sequence[Member], chances: Sequence[float], keep: int
    ) -> tuple[list[float], list[bool]]:
        """Survival of each of the judged, and who is kept."""
        count = len(judged)
        if keep >= count:
            return [1.0] * count, [True] * count
        samples = [member.rollout.sample for member in judged]
        key: Sequence[Any] = list(zip(chances, samples, strict=True))
        if self.config.signal == "random":
            key = [self._share("order", unit, sample) for sample in samples]
        lot = self._share("", unit, stage)
        survival = self.survival(chances, max(keep, 1))
        return survival, self.pick(chances, survival, max(keep, 1), key, lot)

    def _share(self, what: str, unit: Unit, number: int) -> float:
        """A uniform number for a decision about a unit."""
        row, trace, cut = unit.prompt.identity
        purpose = f"prune {what}".strip()
        return share(self.seed, purpose, row, number, unit.visit, trace, cut)

    # --- after a batch ----------------------------------------------------------------------------

    def learn(self, units: Sequence[Unit]) -> None:
        """Take in what came of a batch's units, graded and settled; book what was saved."""
        began = time.perf_counter()
        self.predictor.learn(units)
        self.lengths.add([m.rollout for unit in units for m in (*unit.members, *unit.pruned)])
        for member in (member for unit in units for member in unit.pruned):
            stopped = member.rollout.completion.finish is Finish.ABORT
            member.rollout.saved = self.lengths.left(member.tokens) if stopped else 0.0
        self._seconds += time.perf_counter() - began

    def take_seconds(self) -> float:
        """Seconds spent here since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def said(self) -> list[str]:
        """Lines for the user since the last call."""
        lines, self.predictor.said = self.predictor.said, []
        return lines

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON, and under `tensors` those of the networks."""
        return {**self.predictor.state(), "lengths": self.lengths.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.predictor.load_state(state)
        self.lengths.load_state(state["lengths"])


def _drawn(probed: Probed, prompt: Prompt) -> Probed:
    """Without the prefix: what was given says nothing of what comes of it."""
    if not (given := len(prompt.prefix_ids)):
        return probed
    streams = {name: getattr(probed, name)[given:] for name in ("token_ids", "logprobs")}
    return replace(probed, **streams, entropies=probed.entropies[given:])
