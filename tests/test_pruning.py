"""What a run says that pruning did and earns: unbiased means, and rivals tried by brute force."""

import itertools
import math
import random
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any

import pytest

from reroll.algo.survive import tilt, widest
from reroll.config import PruneSection
from reroll.pruning import ARMS, earnings, expected_rewards, prune_metrics, rivals
from reroll.rollout.prune import Pruner
from reroll.types import Completion, Finish, Group, Look, Prompt, Rollout
from tests.algo.thinning import over_uniform

PROMPT = Prompt(3, "", (1,))


def rollout(length: int, reward: float | None, *looks: Look, stopped: bool = False) -> Rollout:
    finish = Finish.ABORT if stopped else Finish.STOP
    done = Completion(0, [1] * length, [-1.0] * length, finish=finish)
    one = Rollout(PROMPT, 0, 0, done, reward=reward)
    one.looks = list(looks)
    return one


def look(
    probability: float, survival: float = 1.0, kept: bool = True, ended: bool = False, at: int = 4
) -> Look:
    return Look(at, None if ended else 0.5, probability, survival, kept, ended, 1)


def pruner(**settings: Any) -> Pruner:
    settings = dict(least=2, when="tokens", at=[4], keep=[0.5]) | settings
    return Pruner(PruneSection(on=True, **settings), max_tokens=64, seed=1)


# --- mean rewards ---------------------------------------------------------------------------------


def test_the_mean_reward_is_that_of_all_that_were_started() -> None:
    """Over every outcome of the lot, with guesses that are wrong; some had ended before it."""
    rewards = [1.0, 0.0, 1.0, 0.0, 0.3, 1.0]
    ended = [False, False, True, False, False, True]
    guesses = [0.9, 0.8, 1.0, 0.1, 0.2, 1.0]
    survival = [0.6, 0.25, 0.5, 0.9, 0.5, 0.25]
    order = [3, 1, 5, 0, 2, 4]
    estimates, survivors, chance = [0.0] * 6, 0.0, 0.0
    for share, kept in over_uniform(survival, order):
        every = [
            rollout(9, r if k or e else None, look(p, s, k, e))
            for r, p, s, k, e in zip(rewards, guesses, survival, kept, ended, strict=True)
        ]
        group = Group(
            PROMPT,
            [x for x, k in zip(every, kept, strict=True) if k],
            [x for x, k in zip(every, kept, strict=True) if not k],
        )
        places = [i for i, k in enumerate(kept) if k] + [i for i, k in enumerate(kept) if not k]
        for place, found in zip(places, expected_rewards(group), strict=True):
            estimates[place] += share * found
        survivors += share * fmean(r for r, k in zip(rewards, kept, strict=True) if k)
        chance += share
    assert chance == pytest.approx(1)
    assert estimates == pytest.approx(rewards, abs=1e-6)
    assert abs(survivors - fmean(rewards)) > 0.02  # of survivors alone it is another one


def test_what_is_known_of_a_group_that_was_not_thinned() -> None:
    plain = Group(PROMPT, [rollout(5, 1.0), rollout(5, None), rollout(5, 0.25)])
    assert expected_rewards(plain) == [1.0, 0.25]
    whole = Group(PROMPT, [rollout(5, 1.0, look(0.4)), rollout(5, 0.0, look(0.1))])
    assert expected_rewards(whole) == pytest.approx([1.0, 0.0], abs=1e-15)
    assert expected_rewards(Group(PROMPT, [rollout(5, None)])) == []


# --- figures of a batch ---------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    kept = [rollout(9, 1.0, look(0.5, 0.5)), rollout(7, 0.5, look(0.4, 0.5))]
    out = [
        rollout(5, None, look(0.3, 0.5, kept=False), stopped=True),
        rollout(3, 0.0, look(0.0, 0.5, kept=False, ended=True)),
    ]
    out[0].saved = 6.5
    mine = pruner()
    found = prune_metrics([Group(PROMPT, kept, out), Group(PROMPT, [rollout(5, None)])], mine)
    seconds = found.pop("seconds_head")
    assert seconds == 0.0
    assert found == {
        "pruned": 2 / 5, "pruned_running": 1 / 5, "tokens_pruned_saved": 6.5,
        "reward_survivors": 0.75, "head_version": 0.0, "pruning": 0.0,
        "whole_groups": 0.0,
    }  # fmt: skip
    assert prune_metrics([Group(PROMPT, [rollout(5, None)])], pruner(signal="random")) == {
        "pruned": 0.0, "pruned_running": 0.0, "tokens_pruned_saved": 0.0, "reward_survivors": 0.0,
        "seconds_head": 0.0, "whole_groups": 0.0,
    }  # fmt: skip


def whole_group(seed: int, n: int = 6, stages: int = 1) -> Group:
    source = random.Random(seed)
    rollouts = []
    for _ in range(n):
        length, reward = source.randrange(2, 20), float(source.random() < 0.4)
        looks = []
        for stage in range(stages):
            at = 4 * (stage + 1)
            early = length <= at
            guess = reward if early else round(source.random(), 3)
            looks.append(look(guess, ended=early, at=length if early else at))
        rollouts.append(rollout(length, reward, *looks))
    return Group(PROMPT, rollouts)


def figures(rewards: Sequence[float], lengths: Sequence[int]) -> tuple[float, float, float]:
    """(live, variance, tokens trained on) of a set."""
    live = float(len(set(rewards)) > 1)
    return live, variance(rewards) if len(rewards) > 1 else 0.0, live * sum(lengths)


def sets_of(group: Group, keep: int) -> list[tuple[float, float, float, float]]:
    """Of each way to start so many: (live, variance, drawn, trained)."""
    found = []
    for some in itertools.combinations(group.rollouts, keep):
        rewards = [r.reward for r in some if r.reward is not None]
        lengths = [len(r.completion.token_ids) for r in some]
        live, spread, trained = figures(rewards, lengths)
        found.append((live, spread, float(sum(lengths)), trained))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_rivals_by_brute_force(seed: int) -> None:
    group, mine = whole_group(seed), pruner()
    rewards = [r.reward for r in group.rollouts if r.reward is not None]
    lengths = [len(r.completion.token_ids) for r in group.rollouts]
    found = rivals([group], mine)
    assert found["whole_groups"] == 1 and len(found) == 17

    def of(arm: str) -> tuple[float, ...]:
        return tuple(found[f"{name}_{arm}"] for name in ("live", "variance", "drawn", "trained"))

    live, spread, trained = figures(rewards, lengths)
    assert of("all") == pytest.approx((live, spread, sum(lengths), trained))
    # three of six: all ways to start them, alike
    live, spread, drawn, trained = (fmean(x) for x in zip(*sets_of(group, 3), strict=True))
    assert of("fewer")[:3] == pytest.approx((live, spread, drawn))
    # an approximation: which rollouts there are and whether they have signal is taken as apart
    assert of("fewer")[3] == pytest.approx(drawn * live)
    assert abs(drawn * live - trained) <= 0.25 * sum(lengths)
    # all are drawn, three are trained on
    chosen = widest(rewards, 3)
    kept = [i for i in range(6) if chosen[i]]
    live, spread, trained = figures([rewards[i] for i in kept], [lengths[i] for i in kept])
    assert of("pods") == pytest.approx((live, spread, sum(lengths), trained))
    # no three vary more
    assert spread == pytest.approx(max(x for _, x, _, _ in sets_of(group, 3)))


def exactly(group: Group, keeps: Sequence[int]) -> list[float]:
    """(live, variance, drawn, trained) over all lots of a first and a second probe."""
    lengths = [len(r.completion.token_ids) for r in group.rollouts]
    exact = [0.0] * 4

    def stage(k: int, left: list[int], drawn: list[int], chance: float) -> None:
        if k == len(keeps):
            rewards = [group.rollouts[i].reward or 0.0 for i in left]
            live, spread, trained = figures(rewards, [lengths[i] for i in left])
            for i, value in enumerate((live, spread, float(sum(drawn)), trained)):
                exact[i] += chance * value
            return
        looks = [group.rollouts[i].looks[k] for i in left]
        guesses = [one.probability for one in looks]
        last = max((one.position for one in looks if not one.ended), default=0)
        survival = tilt(guesses, keeps[k], 0.5, 0.2)
        order = sorted(range(len(left)), key=lambda i: guesses[i])
        for share, kept in over_uniform(survival, order):
            after = list(drawn)
            for i, one, stays in zip(left, looks, kept, strict=True):
                if not stays and not one.ended:
                    after[i] = min(after[i], last)
            stage(k + 1, [i for i, s in zip(left, kept, strict=True) if s], after, chance * share)

    stage(0, list(range(len(lengths))), list(lengths), 1.0)
    return exact


NAMES = [f"{name}_pruned" for name in ("live", "variance", "drawn", "trained")]


@pytest.mark.parametrize("seed", range(4))
def test_what_pruning_would_have_done_is_its_rule_over_all_lots(seed: int) -> None:
    group = whole_group(seed, 8)
    total = sum(len(r.completion.token_ids) for r in group.rollouts)
    found, exact = rivals([group], pruner()), exactly(group, [4])
    # of 32 lots spread evenly each of at most 9 pieces is off by 1 at most
    for name, value, size in zip(NAMES, exact, (1.0, 0.5, total, total), strict=True):
        assert abs(found[name] - value) < size * 9 / 32 / 2
    assert found["drawn_pruned"] < found["drawn_all"]


def test_two_probes_are_tried_one_after_the_other() -> None:
    """The lot of the second is another one than that of the first."""
    gaps = []
    for seed in range(30):
        group = whole_group(seed, 8, stages=2)
        found = rivals([group], pruner(at=[4, 8], keep=[0.75, 0.5]))
        exact = exactly(group, [6, 4])
        total = sum(len(r.completion.token_ids) for r in group.rollouts)
        gaps.append([
            (found[name] - value) / size
            for name, value, size in zip(NAMES, exact, (1.0, 0.5, total, total), strict=True)
        ])  # fmt: skip
    # 32 draws at random would be off by a sixth of a deviation, which is at most a half of each
    for column in zip(*gaps, strict=True):
        assert math.sqrt(fmean(x * x for x in column)) < 0.5 / math.sqrt(32)


def test_only_groups_left_whole_are_compared() -> None:
    good = whole_group(0)
    thinned = whole_group(1)
    thinned.pruned = [thinned.rollouts.pop()]
    spared = whole_group(2)
    spared.rollouts[0].looks = [look(0.5, 0.5)]
    ungraded = whole_group(3)
    ungraded.rollouts[0].reward = None
    unseen = whole_group(4)
    unseen.rollouts[0].looks = []
    alone = Group(PROMPT, [rollout(4, 1.0, look(0.5))])
    found = rivals([good, thinned, spared, ungraded, unseen, alone], pruner())
    assert found == rivals([good], pruner()) and found["whole_groups"] == 1
    assert rivals([thinned], pruner()) == {"whole_groups": 0.0}
    both = rivals([good, whole_group(5)], pruner())
    other = rivals([whole_group(5)], pruner())
    assert both["whole_groups"] == 2
    for arm in ARMS:
        key = f"variance_{arm}"
        assert both[key] == pytest.approx((found[key] + other[key]) / 2)


# --- over a run -----------------------------------------------------------------------------------


def step(whole: float, scale: float = 1.0, **seconds: float) -> dict[str, Any]:
    record: dict[str, Any] = {
        "tokens_decode": 1000, "tokens_trained": 500, "seconds_prefill": 1.0, "seconds_verify": 0.0,
        "seconds_decode": 3.0, "seconds_score": 0.5, "seconds_train": 1.5,
    }  # fmt: skip
    if whole:
        record |= {"whole_groups": whole}
        for i, arm in enumerate(ARMS):
            figures_ = dict(live=0.5, variance=0.1 * i, drawn=100.0 * (i + 1), trained=50.0)
            record |= {f"{name}_{arm}": value * scale for name, value in figures_.items()}
    return record | seconds


def test_earnings_by_hand() -> None:
    steps = [step(1.0), step(0.0, seconds_decode=7.0), step(3.0, 2.0)]
    rows = earnings(steps)
    assert [row["arm"] for row in rows] == list(ARMS)
    # 16 seconds for 3000 tokens drawn, 6 for 1500 trained on; the third step counts three times
    for i, row in enumerate(rows):
        assert row["live"] == pytest.approx((0.5 + 3 * 1.0) / 4)
        assert row["variance"] == pytest.approx(0.1 * i * (1 + 6) / 4)
        drawn, trained = 100 * (i + 1) * 7 / 4, 50 * 7 / 4
        assert (row["drawn"], row["trained"]) == pytest.approx((drawn, trained))
        assert row["seconds"] == pytest.approx(
            drawn * 17 / 3000 + trained * 6 / 1500 - drawn / 3000
        )
    assert all(math.isfinite(row["seconds"]) for row in rows)


def test_no_whole_group_no_table() -> None:
    assert earnings([]) == [] and earnings([step(0.0), {"whole_groups": 0.0, **step(0.0)}]) == []
