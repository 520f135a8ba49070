"""Corrections of stale tokens: by hand, and whole losses against plain arithmetic."""

import math
import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reroll.algo.correct import (
    Anchor,
    decoupled,
    effective_sample_size,
    truncated,
    uncorrected,
    within_lag,
)
from reroll.algo.loss import clipped_surrogate, level_ratio

LOG2, LOG3 = math.log(2), math.log(3)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- by hand -----------------------------------------------------------------------------------


def test_uncorrected_is_the_behaviour_policy():
    old, weights = uncorrected(tensor(-1.0, -2.0))
    assert old.tolist() == [-1.0, -2.0] and weights.tolist() == [1.0, 1.0]


NOW = tensor(-1.0, -1.0, -2.0, -3.0)
BEHAVIOUR = NOW - tensor(LOG3, LOG3, -LOG2, LOG2)
"""now / behaviour: 3, 3, 1/2, 2"""
LAGS = torch.tensor([0, 1, 2, 3])


def weights_are(anchor: Anchor, *wanted: float) -> None:
    assert anchor.weights_T.tolist() == pytest.approx(list(wanted), rel=1e-12)


def test_truncated_by_hand():
    anchor = truncated(NOW, BEHAVIOUR, LAGS, cap=2.5)
    # the fresh token keeps its ratio of 3 in the surrogate; the others' is 1, and they are weighted
    assert anchor.old_T.tolist() == [BEHAVIOUR[0].item(), -1.0, -2.0, -3.0]
    weights_are(anchor, 1, 2.5, 0.5, 2)
    weights_are(truncated(NOW, BEHAVIOUR, LAGS, cap=1.0), 1, 1, 0.5, 1)
    weights_are(truncated(NOW, BEHAVIOUR, LAGS, cap=0.25), 1, 0.25, 0.25, 0.25)
    weights_are(truncated(NOW, BEHAVIOUR, LAGS, cap=0), 1, 3, 0.5, 2)


def test_decoupled_by_hand():
    # NOW as the proximal policy: the clip is around it at fresh tokens, too
    anchor = decoupled(NOW, BEHAVIOUR, LAGS, cap=2.5)
    assert anchor.old_T.tolist() == NOW.tolist()
    weights_are(anchor, 1, 2.5, 0.5, 2)
    weights_are(decoupled(NOW, BEHAVIOUR, LAGS, cap=1.0), 1, 1, 0.5, 1)
    weights_are(decoupled(NOW, BEHAVIOUR, LAGS, cap=0), 1, 3, 0.5, 2)


def test_within_lag():
    assert within_lag([0, 3, 4, 5], 4) == [True, True, True, False]
    assert within_lag([0, 1], 0) == [True, False]
    assert within_lag([], 0) == []


def test_effective_sample_size_by_hand():
    # (1 + 3)^2 / (2 * (1 + 9)) = 16 / 20
    assert effective_sample_size(tensor(1, 3)) == pytest.approx(0.8, rel=1e-12)
    # all weight on one of four
    assert effective_sample_size(tensor(0, 0, 5, 0)) == pytest.approx(0.25, rel=1e-12)
    assert effective_sample_size(tensor(7)) == 1.0


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.floats(0.01, 100))
def test_effective_sample_size_is_a_share(weights, scale):
    share = effective_sample_size(tensor(*weights))
    assert 1 / len(weights) - 1e-12 <= share <= 1 + 1e-12
    scaled = effective_sample_size(scale * tensor(*weights))
    assert scaled == pytest.approx(share, rel=1e-9)
    assert effective_sample_size(tensor(*[scale] * len(weights))) == pytest.approx(1.0, rel=1e-12)


# ---- whole losses against plain arithmetic -----------------------------------------------------

CLIP_LOW, CLIP_HIGH = 0.2, 0.28


class Batch(NamedTuple):
    """Log-probs, advantages and lags of some tokens, as plain numbers."""

    now: list[float]
    proximal: list[float]
    behaviour: list[float]
    advantages: list[float]
    lags: list[int]


def some_tokens(seed: int, lags: tuple[int, ...] = (0, 1, 2, 3)) -> Batch:
    source = random.Random(seed)
    behaviour = [source.uniform(-4, -0.1) for _ in range(200)]
    # ratios up to exp(1.5) = 4.5, so that every cap and both bounds of the clip come up
    proximal = [b + source.uniform(-1, 1) for b in behaviour]
    now = [p + source.uniform(-0.5, 0.5) for p in proximal]
    advantages = [source.choice([0.0, source.uniform(-2, 2)]) for _ in range(200)]
    return Batch(now, proximal, behaviour, advantages, [source.choice(lags) for _ in range(200)])


def reference(batch: Batch, mode: str, cap: float) -> tuple[list[float], list[float], list[bool]]:
    """Each token's loss, its slope in the present log-prob, and where the clip binds."""
    losses, slopes, binds = [], [], []
    for now, proximal, behaviour, advantage, lag in zip(*batch, strict=True):
        weight = 1.0
        if mode == "none":
            ratio = math.exp(now - behaviour)
        elif mode == "tis":
            ratio = math.exp(now - behaviour) if lag == 0 else 1.0
            if lag > 0:
                weight = math.exp(now - behaviour)
        else:
            ratio = math.exp(now - proximal)
            if lag > 0:
                weight = math.exp(proximal - behaviour)
        if lag > 0 and cap > 0 and weight > cap and mode != "none":
            weight = cap
        held = min(max(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH)
        losses.append(-weight * min(ratio * advantage, held * advantage))
        bound = held * advantage < ratio * advantage
        slopes.append(0.0 if bound else -weight * ratio * advantage)
        binds.append(bound)
    return losses, slopes, binds


def library(batch: Batch, mode: str, cap: float) -> tuple[list[float], list[float], list[bool]]:
    """The same, as the trainer puts the functions together."""
    now_T = tensor(*batch.now).requires_grad_()
    behaviour_T, lag_T = tensor(*batch.behaviour), torch.tensor(batch.lags)
    if mode == "none":
        anchor = uncorrected(behaviour_T)
    elif mode == "tis":
        anchor = truncated(now_T, behaviour_T, lag_T, cap)
    else:
        anchor = decoupled(tensor(*batch.proximal), behaviour_T, lag_T, cap)
    assert not anchor.old_T.requires_grad and not anchor.weights_T.requires_grad
    mask_T = torch.ones_like(behaviour_T)
    log_ratio_T = level_ratio(now_T - anchor.old_T, mask_T, [len(mask_T)], "token")
    loss_T, binds_T = clipped_surrogate(log_ratio_T, tensor(*batch.advantages), CLIP_LOW, CLIP_HIGH)
    loss_T = loss_T * anchor.weights_T
    (slope_T,) = torch.autograd.grad(loss_T.sum(), now_T)
    return loss_T.tolist(), slope_T.tolist(), binds_T.tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("cap", [2.0, 0.0, 0.5])
@pytest.mark.parametrize("mode", ["none", "tis", "decoupled"])
def test_losses_and_gradients_are_those_of_plain_arithmetic(mode, cap, seed):
    batch = some_tokens(seed)
    losses, slopes, binds = library(batch, mode, cap)
    wanted_losses, wanted_slopes, wanted_binds = reference(batch, mode, cap)
    assert losses == pytest.approx(wanted_losses, rel=1e-12, abs=1e-12)
    assert slopes == pytest.approx(wanted_slopes, rel=1e-12, abs=1e-12)
    assert binds == wanted_binds
    assert 5 < sum(binds) < 150  # the clip was there, and not everywhere


@pytest.mark.parametrize("mode", ["tis", "decoupled"])
def test_the_caps_of_the_reference_all_matter(mode):
    # else the test above would not see a cap that is forgotten
    losses = [reference(some_tokens(0), mode, cap)[0] for cap in (2.0, 0.0, 0.5)]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        differ = [a != b for a, b in zip(losses[one], losses[other], strict=True)]
        assert sum(differ) > 10


@pytest.mark.parametrize("cap", [2.0, 0.0, 0.5])
@pytest.mark.parametrize("mode", ["tis", "decoupled"])
def test_without_lag_a_correction_does_nothing(mode, cap):
    batch = some_tokens(3, lags=(0,))
    batch = batch._replace(proximal=batch.behaviour)  # a fresh token's two policies are one
    assert library(batch, mode, cap) == library(batch, "none", cap)  # bit for bit


@pytest.mark.parametrize("mode", ["tis", "decoupled"])
def test_how_stale_a_token_is_does_not_matter_beyond_zero(mode):
    batch = some_tokens(5)
    older = batch._replace(lags=[7 * lag for lag in batch.lags])
    assert library(older, mode, 2.0) == library(batch, mode, 2.0)


def test_weights_and_anchor_carry_no_gradient():
    # truncated is the one that is given the present policy, with its graph
    now_T = NOW.clone().requires_grad_()
    for anchor in (truncated(now_T, BEHAVIOUR, LAGS, cap=0), truncated(now_T, NOW, LAGS, cap=2)):
        assert not anchor.old_T.requires_grad and not anchor.weights_T.requires_grad
    # so the whole gradient of a stale token is that of -weight x log-prob x A: -3, -1/2, -2
    anchor = truncated(now_T, BEHAVIOUR, LAGS, cap=0)
    loss_T, _ = clipped_surrogate(now_T - anchor.old_T, tensor(1, 1, 1, 1), 0.2, 0.2)
    (slope_T,) = torch.autograd.grad((loss_T * anchor.weights_T).sum(), now_T)
    assert slope_T.tolist() == pytest.approx([0, -3, -0.5, -2], rel=1e-12)  # fresh: 3 is clipped
