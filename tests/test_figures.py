"""A step's figures, by hand."""

from typing import Any

import pytest

from reroll.engine.base import Stats
from reroll.figures import (
    lengths,
    refill_metrics,
    rollout_metrics,
    samples,
    speculation_metrics,
)
from reroll.rollout.collected import Collected
from reroll.types import Completion, Finish, Group, Prompt, Rollout

PROMPTS = [Prompt(row, f"p{row}", (row,), answer=f"a{row}") for row in range(3)]


def rollout(
    prompt: Prompt, size: int, reward: float | None, cut: bool = False, **changes: Any
) -> Rollout:
    completion = Completion(
        0,
        token_ids=[1] * size,
        logprobs=[-0.5] * size,
        finish=Finish.LENGTH if cut else Finish.STOP,
    )
    rewards = {} if reward is None else {"one": reward, "two": 2 * reward}
    made: dict[str, Any] = {"text": f"{size} tokens", "reward": reward, "rewards": rewards}
    return Rollout(prompt, 0, 0, completion, **made | changes)


GROUPS = [
    Group(PROMPTS[0], [rollout(PROMPTS[0], 2, 1.0), rollout(PROMPTS[0], 4, 0.0, cut=True)]),
    Group(PROMPTS[1], [rollout(PROMPTS[1], 3, None), rollout(PROMPTS[1], 1, 0.5)]),
    Group(PROMPTS[2], [rollout(PROMPTS[2], 4, 1.0, cut=True), rollout(PROMPTS[2], 4, 1.0)]),
]


def test_rollouts_by_hand() -> None:
    collected = Collected(GROUPS, ungraded=1, truncated=2)
    assert rollout_metrics(collected) == pytest.approx(
        {
            "reward": 3.5 / 5,
            "reward_one": 3.5 / 5,
            "reward_two": 7 / 5,
            "length": 3,
            "length_max": 4,
            "truncated": 2 / 6,
            "stopped": 4 / 6,
            "ungraded": 1,
            "entropy": 0.5,
        }
    )
    assert lengths(GROUPS) == [2, 4, 3, 1, 4, 4]


def test_a_step_without_a_grade_has_figures_all_the_same() -> None:
    group = Group(PROMPTS[0], [rollout(PROMPTS[0], 3, None)])
    figures = rollout_metrics(Collected([group], ungraded=1))
    assert (figures["reward"], figures["ungraded"], figures["length"]) == (0, 1, 3)
    assert "reward_one" not in figures


def test_refills_by_hand() -> None:
    collected = Collected(GROUPS)
    assert refill_metrics(collected, GROUPS[:1]) == pytest.approx(
        {
            "groups_started": 3,
            "groups_trained": 1,
            "live_groups": 1 / 3,
            "small_groups": 1,
        }
    )


def test_speculation_by_hand() -> None:
    before = Stats(
        ticks=3, tokens_reused=10, tokens_redrafted=4, tokens_redraft_reused=2, nodes_offered=50,
        trees_offered=5, trees_skipped=5, tokens_verified=9,
    )  # fmt: skip
    after = Stats(
        ticks=10, tokens_reused=30, tokens_redrafted=9, tokens_redraft_reused=5, nodes_offered=90,
        trees_offered=9, trees_skipped=6, tokens_verified=40,
    )  # fmt: skip
    assert speculation_metrics(before, after) == {
        "ticks": 7,
        "tokens_reused": 20,
        "tokens_redrafted": 5,
        "tokens_redraft_reused": 3,
        "nodes_offered": 40,
        "trees_skipped": 0.25,
    }
    assert set(speculation_metrics(before, before).values()) == {0.0}


def test_samples_are_the_first_rollouts_of_the_first_groups() -> None:
    shown = samples(4, GROUPS, 2)
    assert shown == [
        {
            "step": 4, "row": 0, "prompt": "p0", "completion": "2 tokens", "answer": "a0",
            "reward": 1.0, "finish": "stop",
        },
        {
            "step": 4, "row": 1, "prompt": "p1", "completion": "3 tokens", "answer": "a1",
            "reward": None, "finish": "stop",
        },
    ]  # fmt: skip
    assert samples(4, GROUPS, 0) == []
    assert len(samples(4, GROUPS, 99)) == 3
