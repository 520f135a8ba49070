"""The law of completion lengths where some were stopped, by known chances."""

import json
import math
import random

import pytest

from reroll.rollout.lengths import BATCHES, FADE, Lengths, represents
from reroll.types import Completion, Finish, Look, Prompt, Rollout

PROMPT = Prompt(0, "", (1,))


def made(tokens: int, *looks: tuple[float, bool, bool], stopped: bool = False) -> Rollout:
    """looks: (survival, kept, ended)."""
    finish = Finish.ABORT if stopped else Finish.STOP
    one = Rollout(PROMPT, 0, 0, Completion(0, [1] * tokens, finish=finish))
    one.looks = [Look(1, 0.0, 0.5, s, kept, ended, 1) for s, kept, ended in looks]
    return one


def test_whom_a_rollout_stands_for() -> None:
    assert represents(made(5)) == 1
    assert represents(made(5, (0.25, True, False))) == 4
    assert represents(made(5, (0.5, True, False), (0.25, True, False))) == 8
    # it would have been known anyway: it had ended before it was judged
    assert represents(made(5, (0.5, True, False), (0.25, True, True))) == 2
    assert represents(made(5, (0.5, True, False), (0.25, False, True))) == 2


def test_the_mean_by_hand() -> None:
    lengths = Lengths(64)
    assert lengths.mean == 64 and lengths.left(3) == 0
    lengths.add([])
    lengths.add([made(9, (0.5, False, False), stopped=True)])
    assert lengths.mean == 64  # nothing has ended
    lengths.add(
        [
            made(10, (0.5, True, False)),  # counts two
            made(40, (0.25, True, False)),  # four
            made(6, (0.75, False, True)),  # had ended before: itself
            made(4, (0.5, True, True)),  # likewise
            made(5, (0.5, False, False), stopped=True),
            # had ended since its probe and was left out: the kept stand for it
            made(30, (0.5, False, False)),
        ]
    )
    first = (20 + 160 + 6 + 4) / 8
    assert lengths.mean == pytest.approx(first)
    lengths.add([made(10)])
    assert lengths.mean == pytest.approx(FADE * first + (1 - FADE) * 10)
    # longer than 6: two of 10, four of 40, one of 10
    assert lengths.left(6) == pytest.approx((3 * 4 + 4 * 34) / 7)
    assert lengths.left(10) == pytest.approx(30) and lengths.left(40) == 0


def test_old_batches_are_forgotten() -> None:
    lengths = Lengths(64)
    lengths.add([made(50)])
    for _ in range(BATCHES - 1):
        lengths.add([made(10)])
    assert lengths.left(20) == 30
    lengths.add([])  # no batch
    assert lengths.left(20) == 30
    lengths.add([made(10)])
    assert lengths.left(20) == 0 and lengths.left(5) == 5


def test_a_state_is_all_there_is() -> None:
    lengths, other = Lengths(64), Lengths(64)
    source = random.Random(1)
    for _ in range(10):
        lengths.add([made(source.randrange(1, 30), (source.random() + 0.1, True, False))])
    other.load_state(json.loads(json.dumps(lengths.state())))
    for _ in range(3):
        assert other.state() == lengths.state() and other.left(7) == lengths.left(7)
        for one in (lengths, other):
            one.add([made(12), made(9, (0.3, True, False))])


def test_unbiased_under_chances_that_go_with_the_length() -> None:
    """Long ones are stopped most often; some end before they are judged, some since their probe."""
    source = random.Random(7)
    probe, lengths = 5, Lengths(64)
    naive: list[int] = []
    true: list[int] = []
    for _ in range(BATCHES):
        rollouts = []
        for _ in range(500):
            length = 1 + min(int(source.expovariate(1 / 15)), 60)
            true.append(length)
            survival = 0.8 if length < 15 else 0.25
            kept = source.random() < survival
            if length <= probe:
                rollouts.append(made(length, (survival, kept, True)))
            elif kept:
                rollouts.append(made(length, (survival, True, False)))
            else:
                since = length < 9  # ended while the others came to their probes
                drawn = length if since else 9
                rollouts.append(made(drawn, (survival, False, False), stopped=not since))
        lengths.add(rollouts)
        naive += [
            len(r.completion.token_ids) for r in rollouts if r.completion.finish is Finish.STOP
        ]
    whole = sum(true) / len(true)
    found = lengths.left(0)  # over all that is remembered
    # 4,000 rollouts; a kept long one counts four: variance over the thinning below 3 x mean square
    error = math.sqrt(3 * sum(n * n for n in true) / len(true) / len(true))
    assert error < 0.07 * whole
    assert abs(found - whole) < 3.5 * error
    assert abs(sum(naive) / len(naive) - whole) > 4 * error  # what was seen alone is too short
    left = [n - 9 for n in true if n > 9]
    assert abs(lengths.left(9) - sum(left) / len(left)) < 3.5 * error * 1.5
