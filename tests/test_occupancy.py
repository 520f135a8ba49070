"""Figures of a schedule, by hand and against what was simulated."""

import math
import random

import pytest

from reroll.engine.base import Stats
from reroll.occupancy import lag_metrics, length_bias, oldest, schedule_metrics
from reroll.rollout.collected import Collected
from reroll.rollout.policies import sorted_by_length
from reroll.types import Completion, Group, Prompt, Request, Rollout
from tests.rollout.simulation import Simulation

PROMPT = Prompt(0, "", (1,))


def group(*versions: list[int]) -> Group:
    rollouts = [
        Rollout(PROMPT, i, 0, Completion(i, token_ids=[1] * len(v), versions=v))
        for i, v in enumerate(versions)
    ]
    return Group(PROMPT, rollouts)


def test_by_hand() -> None:
    # 4 slots: 10 seconds of all of them, 5 of one
    before = Stats(capacity=4, slot_seconds=100.0, tokens_resumed=7)
    after = Stats(capacity=4, slot_seconds=145.0, tokens_resumed=10)
    before.seconds, after.seconds = {"decode": 3.0}, {"decode": 16.0, "prefill": 2.0}
    groups = [group([3, 3], [2, 2, 3, 3]), group([1, 3, 3, 3])]
    found = Collected(
        groups, live=groups[:1], tokens_dropped=2, cut=[2], lost=[6], restarts=1, waits=[0, 3]
    )
    assert schedule_metrics(found, before, after, 20.0, 3) == pytest.approx(
        {
            "goodput": 6 / 20,
            "bubble": 1 - 45 / 60,
            "waste": 1 - 6 / 12,
            "reprefill": 3 / 6,
            # ends 2, 4 and 6, one cut at 2: four are there at 2, two at 4, one at 6
            "length_bias": 3 / (2 + 3 / 4 * 2 + 3 / 8 * 2),
            "wait": 1.5,
            "wait_max": 3,
            "restarts": 1,
            "lag_max": 1,
            "versions_max": 2,
        }
    )


def test_nothing_to_measure() -> None:
    found = schedule_metrics(Collected([]), Stats(), Stats(), 0.0, 0)
    assert all(math.isfinite(value) for value in found.values())
    assert length_bias([], [3]) == length_bias([4, 9], []) == 1


def test_lags_by_hand() -> None:
    groups = [group([5, 5, 3], [4, -1]), group([0, 0, 0, 0, 0])]
    assert lag_metrics(groups, 9) == pytest.approx(
        {
            "offpolicy_tokens": 9 / 10,  # a given token is not stale
            "tokens_lag_0": 0.1,
            "tokens_lag_4": 0.2,
            "tokens_lag_5": 0.1,
            "tokens_lag_6": 0.1,
            "tokens_lag_8": 0.5,
        }
    )
    assert lag_metrics([group([2, 2])], 2) == {"offpolicy_tokens": 0.0}
    assert lag_metrics([], 2) == {"offpolicy_tokens": 0.0}
    assert oldest(groups, 9) == {"lag_max": 9, "versions_max": 2}


def test_the_mean_of_censored_lengths_is_found_again() -> None:
    lot = random.Random(3)
    lengths = [lot.expovariate(1 / 100) for _ in range(40_000)]
    stops = [lot.uniform(0, 300) for _ in lengths]
    ended = [int(1000 * n) for n, stop in zip(lengths, stops, strict=True) if n < stop]
    cut = [int(1000 * stop) for n, stop in zip(lengths, stops, strict=True) if n >= stop]
    # up to the longest seen, about 300: 100 * (1 - exp(-3))
    expected = sum(ended) / len(ended) / (100_000 * (1 - math.exp(-3)))
    assert expected < 0.8
    assert length_bias(ended, cut) == pytest.approx(expected, rel=0.02)


def test_starting_anew_favours_the_short() -> None:
    def length(request: Request) -> int:
        return 1 + int(random.Random(request.key).expovariate(1 / 50))

    found = {}
    for keep in (True, False):
        schedule = sorted_by_length(4, keep=keep, refill=False)
        run = Simulation(schedule, length, batch=32, slots=64, b0=64.0).run(24)
        lengths = [[len(r.completion.token_ids) for r in batch] for batch in run.trained()]
        whole = sum(map(sum, lengths)) / sum(map(len, lengths))
        biases = [
            length_bias(some, one.cut, one.lost)
            for some, one in zip(lengths, run.batches, strict=True)
        ]
        found[keep] = (whole, sum(biases) / len(biases))
    # 24 * 32 lengths of sd 50
    assert abs(found[True][0] - 51) < 4 * 50 / math.sqrt(24 * 32)
    assert found[False][0] < 0.85 * found[True][0]
    assert found[False][1] < 0.85
