"""Cuts: where a trace ends for the rollout that starts from it."""

import math
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from reroll.config import PrefixSection
from reroll.rollout.prefix import (
    cut_at,
    drawn_share,
    first_share,
    frozen_cuts,
    limit,
    next_share,
    scheduled_share,
    step_ends,
    with_prefix,
)
from reroll.rollout.traces import Trace, trace_id
from reroll.types import Prompt


def trace(length: int = 100, answer_at: int | None = None, row: int = 3) -> Trace:
    ids = tuple(range(length))
    return Trace(
        trace_id(f"{row}", ids), row, f"{row}", ids, "", length if answer_at is None else answer_at,
        "collected", 0, 1, "{}", "", "", "", 1.0, 0.0,
    )  # fmt: skip


def section(**changes: object) -> PrefixSection:
    return PrefixSection.model_validate({"on": True, "least": 1, **changes})


def test_uniform_cuts_are_frozen_and_lie_in_their_bounds() -> None:
    config, found = section(), []
    for row in range(400):
        cuts = frozen_cuts(trace(1000, row=row), config, 0, ())
        assert cuts == frozen_cuts(trace(1000, row=row), config, 0, ()) == sorted(set(cuts))
        assert len(cuts) in (2, 3)  # two may fall together
        assert all(400 <= cut <= 800 for cut in cuts)
        found += cuts
    # uniform on [400, 800]: mean 600, deviation 400 / sqrt(12); 4 standard errors
    bound = 4 * 400 / math.sqrt(12 * len(found))
    assert abs(sum(found) / len(found) - 600) < bound
    others = [frozen_cuts(trace(1000, row=row), config, 1, ()) for row in range(20)]
    assert others != [frozen_cuts(trace(1000, row=row), config, 0, ()) for row in range(20)]


def test_no_cut_gives_the_answer_away() -> None:
    assert limit(trace(100, answer_at=30), section()) == 30
    assert limit(trace(100, answer_at=30), section(guard=False)) == 99
    assert limit(trace(100), section(least=8)) == 92
    assert limit(trace(100), section(most=20)) == 20
    assert frozen_cuts(trace(100, answer_at=30), section(), 0, ()) == [30]
    with pytest.raises(ValueError, match="problem 3: nothing"):
        frozen_cuts(trace(100, answer_at=0), section(), 0, ())
    for share in (0.0, 0.2, 0.9):
        assert cut_at(trace(100, answer_at=30), section(), share) == min(round(share * 100), 30)
    assert cut_at(trace(4), section(least=8), 0.5) == 0


def test_steps_are_not_cut_in_two() -> None:
    ends = [10, 45, 62]
    cuts = frozen_cuts(trace(100), section(cut="step", per_trace=64), 0, ends)
    assert cuts == [10, 45, 62]  # what was drawn from 40 to 44 goes back to 10
    early = frozen_cuts(trace(100), section(cut="step", low=0.01, high=0.05), 0, ends)
    assert all(1 <= cut <= 5 for cut in early)  # before any end: where it was drawn
    letters = {i: "ab\n"[i % 3] for i in range(9)}
    said = step_ends(trace(9), "\n", lambda ids: "".join(letters[i] for i in ids))
    assert said == [3, 6, 9]


def test_resampled_cuts_are_new_at_every_visit() -> None:
    config = section(cut="resample", low=0.2, high=0.6)
    shares = [drawn_share(config, 0, 5, visit) for visit in range(50)]
    assert len(set(shares)) == 50
    assert all(0.2 <= share <= 0.6 for share in shares)
    assert shares == [drawn_share(config, 0, 5, visit) for visit in range(50)]


def test_the_schedule_falls_from_high_to_nothing() -> None:
    config = section(cut="schedule", high=0.7, until=0.5)
    shares = [scheduled_share(config, i / 100) for i in range(101)]
    assert shares[0] == pytest.approx(0.7)
    assert scheduled_share(config, 0.25) == pytest.approx(0.35)
    assert all(a >= b for a, b in pairwise(shares))
    assert shares[50:] == [0.0] * 51


@pytest.mark.parametrize("goal", [0.3, 0.5, 0.7])
def test_target_holds_success_where_it_is_wanted_and_goes_to_nothing(goal: float) -> None:
    """Against a policy whose success grows with the share given, and then gets better."""
    config, rng = section(cut="target", success=goal, high=0.9), random.Random(4)
    share, skill, held = first_share(config), 0.0, []
    for step in range(600):
        chance = min(1.0, share + skill)
        wins = sum(rng.random() < chance for _ in range(8))
        share = next_share(config, share, wins / 8, wins in (0, 8))
        assert 0 <= share <= 0.9
        if 50 <= step < 350:
            held.append(wins / 8)
        if step >= 350:
            skill = min(1.0, skill + 0.01)
    # 300 groups of 8; steering makes neighbours alike, but its errors take each other back
    assert abs(sum(held) / len(held) - goal) < 4 * math.sqrt(goal * (1 - goal) / (300 * 8))
    assert share == 0.0


def test_minimal_looks_for_the_least_that_helps() -> None:
    config = section(cut="minimal")
    share, seen = first_share(config), []
    for _ in range(20):
        seen.append(share)
        solved = share > 0.45  # all or nothing
        share = next_share(config, share, float(solved), True)
    assert seen[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert {round(s, 6) for s in seen[5:]} == {0.4, 0.5}
    # unequal rewards: this is the place
    assert next_share(config, 0.3, 0.25, False) == 0.3


def test_a_prefix_is_the_trace_s_own_tokens() -> None:
    prompt, given = Prompt(3, "2 + 2 =", (7, 8), "4"), trace(10)
    made = with_prefix(prompt, given, 4)
    assert made.prefix_ids == (0, 1, 2, 3)
    assert (made.token_ids, made.text, made.answer) == ((7, 8), "2 + 2 =", "4")
    assert made.identity == (3, given.id, 4)
    assert with_prefix(prompt, given, 0) is prompt
    rest: Sequence[int] = given.token_ids[made.cut :]
    assert (*made.prefix_ids, *rest) == given.token_ids
