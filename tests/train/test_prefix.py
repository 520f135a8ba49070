"""Given tokens in training: they are read, never learnt, and never counted."""

import copy
from typing import Any

import pytest
import torch

from reroll.model.flops import cost_model
from reroll.train.batch import minibatches
from reroll.train.forwards import FLAT, Shares
from reroll.types import Group
from tests.tiny import tiny
from tests.train.batches import credit, gradients, group, make_trainer, store

ALGOS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"},
    "dapo": {"name": "dapo", "dynamic_sampling": False},
    "dr_grpo": {"name": "dr_grpo"},
    "rloo": {"name": "rloo"},
    "reinforce_pp": {"name": "reinforce_pp"},
    "gspo": {"name": "gspo"},
}
GIVEN = 4


def groups(model: Any) -> list[Group]:
    """Two groups that start from a prefix each, and one that does not; stale, so that what is
    stored of every token matters where it is read at all."""
    made = [
        group(0, [1.0, 0.0, 0.0], [9, 7, 8], prefix=GIVEN),
        group(1, [0.0, 1.0, 1.0], [6, 9, 5], prefix=GIVEN),
        group(2, [1.0, 0.0], [6, 5]),
    ]
    for one in made[:2]:  # of one group: the same prefix
        given = one.rollouts[0].completion.token_ids[:GIVEN]
        for rollout in one.rollouts:
            rollout.completion.token_ids[:GIVEN] = given
    store(model, made, 0.1)
    return made


def gradient(model: Any, made: list[Group], algo: dict[str, Any], shares: Shares) -> torch.Tensor:
    """Of a batch of tokens that are one version old."""
    trainer = make_trainer(model, algo=algo, shares=shares)
    trainer.version = 1
    (found,), _ = gradients(trainer, made)
    return found


@pytest.mark.parametrize("shares", [FLAT, Shares(True)], ids=["flat", "trees"])
@pytest.mark.parametrize("name", ALGOS)
def test_labels_of_given_tokens_change_nothing_and_their_content_does(
    name: str, shares: Shares
) -> None:
    """Bit for bit: nothing that is stored of them takes part."""
    model, algo = tiny("qwen3", torch.float64), ALGOS[name]
    plain = groups(model)
    before = gradient(model, plain, algo, shares)
    assert before.abs().max() > 0
    labelled = copy.deepcopy(plain)
    for one in labelled[:2]:
        for rollout in one.rollouts:
            rollout.completion.logprobs[:GIVEN] = [-7.0, 3.0, -0.1, 1.0]
            rollout.completion.behaviour_logprobs[:GIVEN] = [2.0, -9.0, 0.5, -0.3]
    assert torch.equal(gradient(model, labelled, algo, shares), before)
    other = copy.deepcopy(plain)
    for rollout in other[0].rollouts:
        rollout.completion.token_ids[0] ^= 1
    assert not torch.allclose(gradient(model, other, algo, shares), before)


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_given_tokens_are_not_counted(average: str) -> None:
    """A longer prefix leaves every denominator, and so its own gradient, as it is."""
    model = tiny("qwen3", torch.float64)
    algo = {"name": "grpo", "average": average}
    credited = credit(groups(model), version=1, **algo)
    drawn = sum(sum(one.mask) for part in credited for one in part)
    assert drawn == 24 - 3 * GIVEN + 20 - 3 * GIVEN + 11
    (part,) = minibatches(credited, 1, 10_000, False, cost_model(model), False)
    assert part.tokens == drawn


def test_groups_of_one_problem_with_other_prefixes_are_not_compared() -> None:
    """A success from a prefix must not push down a failure without one."""
    model = tiny("qwen3", torch.float64)
    made = groups(model)
    for part in credit(made, version=1, name="rloo"):
        rewards = [one.rollout.reward for one in part]
        for one in part:
            others = (sum(rewards) - one.rollout.reward) / (len(rewards) - 1)
            value = one.rollout.reward - others
            assert torch.equal(one.advantages, torch.full_like(one.advantages, value))
