"""What a rollout's chance is taken for: what is learnt of whom, when to prune, and its state."""

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from reroll.config import PruneSection
from reroll.errors import UserError
from reroll.rollout.predict import FADE, HEAVIEST, LAST, Predictor
from reroll.rollout.unit import Member, State, Unit
from reroll.types import Completion, Finish, Look, Prompt, Request, Rollout, Sampling

GROUP = 8
ALIKE: list[dict[str, Any]] = [{}, dict(least_auc=0.99), dict(adaptive=False)]


def predictor(stages: int = 1, **settings: Any) -> Predictor:
    places: dict[str, Any] = dict(keep=[0.5] * stages, at=[0.25 * (1 + i) for i in range(stages)])
    return Predictor(PruneSection(**{"on": True, "warmup": 1} | places | settings), stages, 5)


def member(
    unit: Unit,
    reward: float | None,
    read: float = 0.0,
    *looks: Look,
    state: State = State.DONE,
    seen: bool = True,
) -> Member:
    """What was read of it is (read, 1), at the first probe and at its end."""
    sample = len(unit.members) + len(unit.pruned)
    stopped = state is State.PRUNED and reward is None
    completion = Completion(0, [1] * 9, finish=Finish.ABORT if stopped else Finish.STOP)
    rollout = Rollout(unit.prompt, sample, 0, completion, reward=reward, looks=list(looks))
    one = Member(unit, rollout, Request(0, (1,), 0, Sampling(9)), state)
    at = np.array([read, 1.0], np.float32)
    one.seen = {0: (4, at)} if seen else {}
    if not stopped:
        one.seen[LAST] = (9, at)
    (unit.pruned if state is State.PRUNED else unit.members).append(one)
    return one


def look(
    score: float | None = 0.0, survival: float = 1.0, kept: bool = True, ended: bool = False,
    probability: float = 0.5, head: int = 1,
) -> Look:  # fmt: skip
    return Look(4, score, probability, survival, kept, ended, head)


def unit(row: int = 0) -> Unit:
    return Unit(row, Prompt(row, "", (row,)), 0, GROUP, 0)


def batch(mine: Predictor, seed: int, tells: float, groups: int = 4) -> list[Unit]:
    """Whole groups, scored as the predictor scores them now."""
    source, units = random.Random(seed), []
    for row in range(groups):
        units.append(unit(row))
        for _ in range(GROUP):
            reward = float(source.random() < 0.5)
            read = tells * (2 * reward - 1) + source.uniform(-1, 1)
            (score,) = mine.judge([np.array([read, 1.0], np.float32)], 0)
            its = look(
                score.log_odds, probability=mine.reward(score.chance), head=mine.signal.version
            )
            member(units[-1], reward, read, its)
    return units


def test_nothing_is_known_at_first() -> None:
    mine = predictor()
    scores = list(mine.judge([np.zeros(2, np.float32)] * 3, 0))
    assert [s.log_odds for s in scores] == [0.0] * 3
    assert [s.chance for s in scores] == pytest.approx([0.5] * 3)
    assert list(mine.judge([], 0)) == []


def test_it_learns_to_tell_them_apart() -> None:
    mine = predictor()
    for step in range(8):
        mine.learn(batch(mine, step, tells=0.7))
    low, high = mine.judge([np.array([x, 1.0], np.float32) for x in (-1.5, 1.5)], 0)
    assert low.log_odds < 0 < high.log_odds and low.chance < 0.2 and high.chance > 0.8
    figures = mine.metrics()
    assert figures["head_version"] == 8 and figures["pruning"] == 1
    # that of what was read itself is 1 - .6^2 / 8 = .955
    assert 0.9 < figures["within_auc"] < 1 and 0 < figures["within_auc_error"] < 0.05
    assert 0 <= figures["calibration_error"] < 0.25


def test_the_spared_count_for_those_that_were_not() -> None:
    """Half of all fail; of the failures one in four was spared, of the successes all were."""
    mine, heavy = predictor(adaptive=False), predictor(adaptive=False)
    for step in range(25):
        for one, survival in ((mine, 0.25), (heavy, 1.0)):
            some = unit(step)
            for _ in range(8):
                member(some, 1.0, 0.0, look(0.1, 1.0))
            for _ in range(2):
                member(some, 0.0, 0.0, look(0.1, survival))
            for _ in range(6):
                member(some, None, 0.0, look(0.1, 0.25, kept=False), state=State.PRUNED)
            one.learn([some])
    assert mine.rate[1] / mine.rate[0] == pytest.approx(0.5, abs=0.01)
    assert heavy.rate[1] / heavy.rate[0] == pytest.approx(0.8, abs=0.02)
    at = [np.array([0.0, 1.0], np.float32)]
    (found,), (naive,) = mine.signal.scores(np.stack(at)), heavy.signal.scores(np.stack(at))
    assert 1 / (1 + math.exp(-found)) == pytest.approx(0.5, abs=0.05)
    assert 1 / (1 + math.exp(-naive)) == pytest.approx(0.8, abs=0.05)
    assert mine.bins[0].probability(0.1) == pytest.approx(0.5, abs=0.03)
    assert heavy.bins[0].probability(0.1) == pytest.approx(0.8, abs=0.05)
    assert mine.signal.examples[2].max() == 4.0


def test_no_one_counts_too_much() -> None:
    mine = predictor()
    some = unit()
    member(some, 1.0, 0.0, look(0.1, 0.01))
    member(some, 0.0, 0.0, look(0.1, 0.5))
    mine.learn([some])
    assert mine.signal.examples[2].tolist() == [HEAVIEST, 2.0]


def test_who_is_learnt_from() -> None:
    mine = predictor()
    some = unit()
    member(some, 1.0, 1.0, look(0.3))
    member(some, None, 2.0, look(0.3))  # ungraded
    member(some, 0.0, 3.0, look(None, 0.5, ended=True), seen=False)  # ended before
    member(some, 1.0, 4.0, look(None, 0.5, False, ended=True), state=State.PRUNED, seen=False)
    member(some, 1.0, 5.0, look(0.3, 0.5, False), state=State.PRUNED)  # since its probe
    member(some, None, 6.0, look(0.3, 0.5, False), state=State.PRUNED)
    member(some, 1.0, 7.0, state=State.DROPPED)
    mine.learn([some])
    # on its way one was seen that was kept to its end; of ends there are three
    assert mine.signal.examples[0][:, 0].tolist() == [1.0]
    assert mine.end.examples[0][:, 0].tolist() == [1.0, 3.0, 4.0]
    assert mine.end.examples[1].tolist() == [1.0, 0.0, 1.0]
    assert mine.end.examples[2].tolist() == [1.0, 1.0, 1.0]
    # the first of 1, which fades, and these three
    assert mine.rate == pytest.approx([FADE + 3, 0.5 * FADE + 2])


def test_areas_are_of_whole_groups_alone() -> None:
    def group(scores: list[float], rewards: list[float], survival: float = 1.0) -> Unit:
        some = unit()
        for score, reward in zip(scores, rewards, strict=True):
            member(some, reward, 0.0, look(score, survival, probability=reward))
        return some

    mine = predictor(adaptive=False)
    mine.learn([group([0.1, 0.4, 0.2, 0.3], [0, 1, 1, 0]), group([1.0, 2.0], [1.0, 1.0])])
    assert mine.areas[0].auc == 0.75 and len(mine.audited) == 6
    thinned, pruned = group([1.0, 0.0], [0, 1], 0.5), group([1.0, 0.0], [0, 1])
    member(pruned, None, 0.0, look(0.5, 1.0, kept=False), state=State.PRUNED)
    unscored = unit()
    for reward in (0.0, 1.0):
        member(unscored, reward, 0.0, look(reward, head=0))  # no head yet
        member(unscored, reward, 0.0, look(None, ended=True))
    mine.learn([thinned, pruned, unscored])
    assert mine.areas[0].auc == 0.75 and len(mine.audited) == 6


def test_each_probe_has_an_area_and_bins_of_its_own() -> None:
    mine = predictor(2, adaptive=False)
    some = unit()
    for first, second, reward in ((0.1, 0.9, 1.0), (0.2, 0.1, 0.0), (0.3, 0.5, 0.0)):
        one = member(some, reward, first, look(first), look(second))
        one.seen[1] = (8, np.array([second, 1.0], np.float32))
    mine.learn([some])
    assert [area.auc for area in mine.areas] == [0.0, 1.0]
    assert len(mine.signal.examples[0]) == 6
    assert [bins.counts.sum() for bins in mine.bins] == [3, 3]
    assert {"within_auc", "within_auc_2", "pruning", "pruning_2"} <= mine.metrics().keys()


def test_when_it_prunes() -> None:
    mine = predictor(warmup=3)
    for step in range(3):
        assert not mine.ready(0)
        mine.learn(batch(mine, step, tells=2.0))
    assert mine.ready(0) and mine.said == []
    for step in range(12):
        mine.learn(batch(mine, 100 + step, tells=0.0))
        if not mine.ready(0):
            break
    assert not mine.ready(0)
    (said,) = mine.said
    assert said.startswith("prune: stands down, area inside whole groups ")
    mine.said = []
    for step in range(20):
        mine.learn(batch(mine, 200 + step, tells=2.0))
    assert mine.ready(0) and mine.said[-1].endswith(": prunes")


def test_an_area_worth_it_is_asked_for() -> None:
    """Surely above chance and yet under the bound that the user sets."""
    lax, strict, blind = (predictor(1, warmup=2, **how) for how in ALIKE)
    for step in range(10):
        for mine, tells in ((lax, 0.6), (strict, 0.6), (blind, 0.0)):
            mine.learn(batch(mine, step, tells))
    assert 0.6 < lax.areas[0].auc < 0.97 and lax.ready(0)
    assert not strict.ready(0) and "under prune.least_auc = 0.99" in strict.said[0]
    assert blind.ready(0) and blind.said == []


def test_a_probe_stands_down_by_itself() -> None:
    mine = predictor(2)
    source = random.Random(3)
    for _ in range(12):
        units = []
        for row in range(4):
            units.append(unit(row))
            for _ in range(GROUP):
                reward = float(source.random() < 0.5)
                member(
                    units[-1], reward, 0.0, look(source.random()), look(reward + source.random())
                )
        mine.learn(units)
    assert (mine.ready(0), mine.ready(1)) == (False, True)
    assert mine.said[0].startswith("prune at probe 1: stands down")


def test_controls_go_by_the_rate_of_success() -> None:
    mine = predictor(signal="random")
    for _ in range(40):
        some = unit()
        for reward in (1.0, 0.0, 0.0, 0.0):
            member(some, reward, 0.0, look(0.0), seen=False)
        mine.learn([some])
    scores = list(mine.judge([np.zeros(0, np.float32)] * 2, 0))
    assert [s.log_odds for s in scores] == [0.0, 0.0]
    assert [s.chance for s in scores] == pytest.approx([0.25] * 2, abs=0.02)
    assert mine.metrics() == {} and mine.signal.version == mine.end.version == 0


def test_rewards_in_other_units() -> None:
    mine = predictor(low=-1.0, high=3.0)
    prompt = Prompt(4, "", (4,))
    for reward, success in ((-1.0, 0.0), (0.0, 0.25), (3.0, 1.0), (3.0 + 1e-12, 1.0)):
        assert mine.success(Rollout(prompt, 0, 0, reward=reward)) == pytest.approx(success)
        assert mine.reward(success) == pytest.approx(reward)
    for reward in (-1.01, 3.01):
        with pytest.raises(UserError, match=r"prune\.low = -1, prune\.high = 3: problem 4 earned"):
            mine.success(Rollout(prompt, 0, 0, reward=reward))
    some = unit()
    for reward in (-1.0, 0.0, 3.0):
        member(some, reward, reward, look(0.1))
    mine.learn([some])
    assert mine.signal.examples[1].tolist() == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("after", [0, 1, 5])
def test_it_goes_on_from_what_was_saved(after: int) -> None:
    """Through JSON and tensors, bit for bit, lines to say and decisions included."""
    whole, part = predictor(2), predictor(2)
    for step in range(9):
        if step == after:
            state = part.state()
            tensors = {name: value.clone() for name, value in state.pop("tensors").items()}
            text = json.dumps(state)
            part = predictor(2)
            part.load_state(json.loads(text) | {"tensors": tensors})
            again = part.state()
            assert again.pop("tensors").keys() == tensors.keys()
            assert json.dumps(again) == text
        for mine in (whole, part):
            mine.said = []
            mine.learn(batch(mine, step, tells=0.0 if step > 5 else 1.0))
        assert part.said == whole.said
    ours, theirs = part.state(), whole.state()
    a, b = ours.pop("tensors"), theirs.pop("tensors")
    assert ours == theirs
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert {name.split(".")[0] for name in a} == {"signal", "end"}
