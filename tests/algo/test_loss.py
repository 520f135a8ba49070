"""Policy losses, by hand."""

import math

import pytest
import torch

from reroll.algo.loss import clipped_surrogate, kl_k3, token_weights


def test_clipped_surrogate_by_hand():
    # ratios 0.5, 1, 2 against bounds 0.8 and 1.3, with both signs and without credit
    ratio = torch.tensor([0.5, 1.0, 2.0] * 3, dtype=torch.float64)
    advantages = torch.tensor([3.0] * 3 + [-3.0] * 3 + [0.0] * 3, dtype=torch.float64)
    old = torch.linspace(-3, -1, 9, dtype=torch.float64)
    logprobs = (old + ratio.log()).requires_grad_()
    loss, binds = clipped_surrogate(logprobs, old, advantages, clip_low=0.2, clip_high=0.3)
    # A > 0: the smaller of r A and clip(r) A: 1.5, 3, 3.9. A < 0: -2.4, -3, -6
    expected = [-1.5, -3.0, -3.9, 2.4, 3.0, 6.0, 0.0, 0.0, 0.0]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)
    assert binds.tolist() == [False, False, True, True, False, False, False, False, False]
    # d loss / d logprob is -r A, and 0 where the clip binds
    loss.sum().backward()
    assert logprobs.grad is not None
    slopes = [-1.5, -3.0, 0.0, 0.0, 3.0, 6.0, 0.0, 0.0, 0.0]
    assert logprobs.grad.tolist() == pytest.approx(slopes, abs=1e-12)


def test_the_bounds_of_the_clip_are_its_two_settings():
    old = torch.zeros(4)
    logprobs = torch.tensor([0.71, 0.69, 1.29, 1.31]).log()
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    _, binds = clipped_surrogate(logprobs, old, advantages, clip_low=0.3, clip_high=0.3)
    assert binds.tolist() == [False, True, False, True]
    _, binds = clipped_surrogate(logprobs, old, advantages, clip_low=0.28, clip_high=0.32)
    assert binds.tolist() == [True, True, False, False]


def test_kl_k3_by_hand():
    # d = reference - policy: log 2, 0, -log 2; exp(d) - d - 1
    policy = torch.tensor([-2.0, -1.0, -3.0], dtype=torch.float64)
    reference = policy + torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64).log()
    log2 = math.log(2)
    assert kl_k3(policy, reference).tolist() == pytest.approx([1 - log2, 0, log2 - 0.5])


def test_kl_k3_is_unbiased():
    # its mean under the policy is the KL divergence
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    estimate = (policy * kl_k3(policy.log(), reference.log())).sum()
    assert estimate.item() == pytest.approx((policy * (policy / reference).log()).sum().item())


MASK = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
LENGTHS = [3, 2, 3]
"""rollouts of 3, 2 and 3 tokens, of which 2, 2 and 0 are trained on"""


def test_token_weights_per_token():
    weights = token_weights(LENGTHS, MASK, "token", tokens=10, rollouts=4)
    assert weights.tolist() == pytest.approx([0, 0.1, 0.1, 0.1, 0.1, 0, 0, 0])


def test_token_weights_per_sequence():
    # each rollout 1/4, shared by its trained tokens; the third has none
    weights = token_weights(LENGTHS, MASK, "sequence", tokens=10, rollouts=4)
    assert weights.tolist() == pytest.approx([0, 1 / 8, 1 / 8, 1 / 8, 1 / 8, 0, 0, 0])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    weights = token_weights(LENGTHS, mask, "sequence", tokens=5, rollouts=3)
    assert weights.tolist() == pytest.approx([1 / 9, 1 / 9, 1 / 9, 0, 1 / 3, 1 / 3, 0, 0])


def test_weights_of_everything_sum_to_one():
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    for average in ("token", "sequence"):
        weights = token_weights(LENGTHS, mask, average, tokens=5, rollouts=3)
        assert weights.sum().item() == pytest.approx(1.0)
        # and microbatches of it sum to the same weights
        parts = [
            token_weights(LENGTHS[:1], mask[:3], average, tokens=5, rollouts=3),
            token_weights(LENGTHS[1:], mask[3:], average, tokens=5, rollouts=3),
        ]
        assert torch.equal(torch.cat(parts), weights)


def test_nothing_to_train_on_gives_zeros():
    for average in ("token", "sequence"):
        weights = token_weights([2, 1], torch.zeros(3), average, tokens=0, rollouts=0)
        assert weights.tolist() == [0.0, 0.0, 0.0]
