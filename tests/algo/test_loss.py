"""Policy and value losses, by hand and by enumeration of small laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reroll.algo.loss import (
    KL_ESTIMATORS,
    clipped_surrogate,
    kl_k1,
    kl_k2,
    kl_k3,
    level_ratio,
    rollout_sums,
    token_weights,
    value_loss,
)

LOG2 = math.log(2)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slope(loss_T: torch.Tensor, of: torch.Tensor) -> list[float]:
    """Gradient of the sum."""
    return torch.autograd.grad(loss_T.sum(), of)[0].tolist()


# ---- clipped surrogate -------------------------------------------------------------------------


def test_clipped_surrogate_by_hand():
    # ratios 0.5, 1, 2 against bounds 0.8 and 1.3, with both signs and without credit
    ratio = tensor(*[0.5, 1.0, 2.0] * 3)
    advantages = tensor(*[3.0] * 3, *[-3.0] * 3, *[0.0] * 3)
    log_ratio = ratio.log().requires_grad_()
    loss, binds = clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.3)
    # A > 0: the smaller of r A and clip(r) A: 1.5, 3, 3.9. A < 0: -2.4, -3, -6
    expected = [-1.5, -3.0, -3.9, 2.4, 3.0, 6.0, 0.0, 0.0, 0.0]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)
    assert binds.tolist() == [False, False, True, True, False, False, False, False, False]
    # d loss / d logprob is -r A, and 0 where the clip binds
    slopes = [-1.5, -3.0, 0.0, 0.0, 3.0, 6.0, 0.0, 0.0, 0.0]
    assert slope(loss, log_ratio) == pytest.approx(slopes, abs=1e-12)


def test_the_bounds_of_the_clip_are_its_two_settings():
    log_ratio = tensor(0.71, 0.69, 1.29, 1.31).log()
    advantages = tensor(-1.0, -1.0, 1.0, 1.0)
    _, binds = clipped_surrogate(log_ratio, advantages, clip_low=0.3, clip_high=0.3)
    assert binds.tolist() == [False, True, False, True]
    _, binds = clipped_surrogate(log_ratio, advantages, clip_low=0.28, clip_high=0.32)
    assert binds.tolist() == [True, True, False, False]


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-3, 3)), min_size=1, max_size=8),
    st.floats(0.01, 0.5),
    st.floats(0.01, 0.9),
)
def test_the_clip_binds_where_the_gradient_is_gone(rows, low, high):
    log_ratio = tensor(*[x for x, _ in rows]).requires_grad_()
    advantages = tensor(*[a for _, a in rows])
    loss, binds = clipped_surrogate(log_ratio, advantages, low, high)
    wanted = [
        0.0 if bound else -math.exp(x) * a
        for (x, a), bound in zip(rows, binds.tolist(), strict=True)
    ]
    assert slope(loss, log_ratio) == pytest.approx(wanted, abs=1e-9)
    # never below the unclipped one: the surrogate is a lower bound of what is gained
    assert (loss >= -log_ratio.exp() * advantages).all()


# ---- level of the ratio ------------------------------------------------------------------------

LENGTHS = [3, 2, 3]
MASK = tensor(0, 1, 1, 1, 1, 0, 0, 0)
"""rollouts of 3, 2 and 3 tokens, of which 2, 2 and 0 are trained on"""


def test_level_ratio_by_hand():
    log_ratio = tensor(9.0, 1.0, 2.0, -0.5, 0.25, 5.0, 6.0, 7.0)
    assert level_ratio(log_ratio, MASK, LENGTHS, "token").tolist() == log_ratio.tolist()
    # sums over trained tokens: 1 + 2, -0.5 + 0.25, nothing; at all tokens of the rollout
    product = level_ratio(log_ratio, MASK, LENGTHS, "product")
    assert product.tolist() == [3.0, 3.0, 3.0, -0.25, -0.25, 0.0, 0.0, 0.0]
    # and divided by 2, 2 and (nothing to divide by) 1
    mean = level_ratio(log_ratio, MASK, LENGTHS, "sequence")
    assert mean.tolist() == [1.5, 1.5, 1.5, -0.125, -0.125, 0.0, 0.0, 0.0]


def test_a_level_that_is_none_is_refused():
    with pytest.raises(AssertionError, match="reply"):
        level_ratio(tensor(0.0), tensor(1.0), [1], "reply")


def test_ratios_of_one_trained_token_are_the_same_at_all_levels():
    log_ratio = tensor(0.5, -0.25, 0.125)
    for level in ("token", "sequence", "product"):
        found = level_ratio(log_ratio, torch.ones(3, dtype=torch.float64), [1, 1, 1], level)
        assert found.tolist() == log_ratio.tolist()


def test_gradient_of_the_gspo_surrogate_by_hand():
    # rollout 1: log-ratios log 2 and log 8 trained, mean log 4, ratio 4, A = 3, clip at 5:
    # weights 1/2 each of loss -12; d / d log-ratio = -12 times 1/2. The third is not trained.
    # rollout 2: log 4 and 0, mean log 2, A = -1: loss 2, slopes 1. Rollout 3 is above the clip
    log_ratio = tensor(LOG2, 3 * LOG2, 9.0, 2 * LOG2, 0.0, 7.0).requires_grad_()
    mask = tensor(1, 1, 0, 1, 1, 1)
    advantages = tensor(3, 3, 3, -1, -1, 1)
    level = level_ratio(log_ratio, mask, [3, 2, 1], "sequence")
    loss, binds = clipped_surrogate(level, advantages, 0.2, 4.0)
    weights = token_weights(mask, [3, 2, 1], "sequence", tokens=5, rollouts=1)
    assert loss.tolist() == pytest.approx([-12, -12, -12, 2, 2, -5], rel=1e-12)
    assert binds.tolist() == [False] * 5 + [True]
    assert slope(loss * weights, log_ratio) == pytest.approx([-6, -6, 0, 1, 1, 0], rel=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence", "product"])
@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_gradients_at_every_level_are_those_of_finite_differences(level, average):
    generator = torch.Generator().manual_seed(1)
    lengths = [4, 1, 3, 2]
    log_ratio = 0.3 * torch.randn(10, dtype=torch.float64, generator=generator)
    advantages = torch.randn(4, dtype=torch.float64, generator=generator).repeat_interleave(
        torch.tensor(lengths)
    )
    mask = tensor(1, 1, 0, 1, 1, 0, 0, 0, 1, 1)
    weights = token_weights(mask, lengths, average, tokens=6, rollouts=4, max_tokens=4)

    def loss(at: torch.Tensor) -> torch.Tensor:
        level_T = level_ratio(at, mask, lengths, level)
        return (clipped_surrogate(level_T, advantages, 0.2, 0.28)[0] * weights).sum()

    wanted = []
    for t in range(10):
        step = torch.zeros(10, dtype=torch.float64)
        step[t] = 1e-6
        wanted.append(((loss(log_ratio + step) - loss(log_ratio - step)) / 2e-6).item())
    log_ratio.requires_grad_()
    found = slope(loss(log_ratio), log_ratio)
    assert found == pytest.approx(wanted, abs=1e-8)
    assert any(found) and all(s == 0 for s, m in zip(found, mask.tolist(), strict=True) if m == 0)


# ---- KL ----------------------------------------------------------------------------------------


def test_kl_estimators_by_hand():
    # reference / policy: 2, 1, 1/2
    policy = tensor(-2.0, -1.0, -3.0)
    reference = policy + tensor(2.0, 1.0, 0.5).log()
    assert kl_k1(policy, reference).tolist() == pytest.approx([-LOG2, 0, LOG2], abs=1e-12)
    halves = [LOG2**2 / 2, 0, LOG2**2 / 2]
    assert kl_k2(policy, reference).tolist() == pytest.approx(halves, abs=1e-12)
    # d = log 2, 0, -log 2; exp(d) - d - 1
    k3 = kl_k3(policy, reference).tolist()
    assert k3 == pytest.approx([1 - LOG2, 0, LOG2 - 0.5], abs=1e-12)


def test_kl_estimators_have_their_names():
    assert {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3} == KL_ESTIMATORS


LOGITS = tensor(0.9, -0.4, 0.1, -1.3)
REFERENCE = tensor(0.1, 0.2, 0.3, 0.4)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    # their means under the policy, against the KL divergence
    policy = LOGITS.softmax(-1)
    kl = (policy * (policy / REFERENCE).log()).sum().item()
    means = {
        name: (policy * estimator(policy.log(), REFERENCE.log())).sum().item()
        for name, estimator in KL_ESTIMATORS.items()
    }
    assert means["k1"] == pytest.approx(kl, rel=1e-12)
    assert means["k3"] == pytest.approx(kl, rel=1e-12)
    assert abs(means["k2"] / kl - 1) > 0.01


@given(st.floats(-8, 0), st.floats(-8, 0))
def test_k2_and_k3_are_never_negative(policy, reference):
    assert kl_k2(tensor(policy), tensor(reference)).item() >= 0
    assert kl_k3(tensor(policy), tensor(reference)).item() >= -1e-15


def expected_slope(estimator: str, times_ratio: bool) -> list[float]:
    """Of the estimator as a loss with respect to the logits, the sampling law held constant."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    loss = KL_ESTIMATORS[estimator](logprobs, REFERENCE.log())
    if times_ratio:
        loss = loss * (logprobs - logprobs.detach()).exp()
    return slope(loss * logprobs.detach().exp(), logits)


def kl_slope(reverse: bool = False) -> list[float]:
    """Of KL(policy || reference), or of KL(reference || policy)."""
    logits = LOGITS.clone().requires_grad_()
    policy = logits.softmax(-1)
    forward = policy * (policy / REFERENCE).log()
    return slope(REFERENCE * (REFERENCE / policy).log() if reverse else forward, logits)


def test_expected_gradients_of_the_estimators_as_losses():
    assert expected_slope("k1", False) == pytest.approx([0.0] * 4, abs=1e-15)
    assert expected_slope("k2", False) == pytest.approx(kl_slope(), rel=1e-12)
    assert expected_slope("k3", False) == pytest.approx(kl_slope(reverse=True), rel=1e-12)
    # and those two are no more alike than this
    assert max(abs(a - b) for a, b in zip(kl_slope(), kl_slope(True), strict=True)) > 0.05


def test_the_ratio_makes_the_gradients_of_k1_and_k3_exact():
    # DeepSeek-V3.2's correction, which is one for unbiased estimators: k2's was exact without
    assert expected_slope("k1", True) == pytest.approx(kl_slope(), rel=1e-12)
    assert expected_slope("k3", True) == pytest.approx(kl_slope(), rel=1e-12)
    spoilt = expected_slope("k2", True)
    assert max(abs(a - b) for a, b in zip(spoilt, kl_slope(), strict=True)) > 0.05


# ---- value loss --------------------------------------------------------------------------------


def test_value_loss_by_hand():
    # old 1, clip 1/4: values are held to 0.75 .. 1.25
    #   v     R   (v - R)^2 / 2   (held - R)^2 / 2
    #   1.5   2   0.125           0.28125            the clip binds
    #   1.5   0   1.125           0.78125
    #   0.5   0   0.125           0.28125            binds
    #   0.5   2   1.125           0.78125
    #   1.25  2   0.28125         the same: at the bound
    #   1     3   2               the same: inside
    values = tensor(1.5, 1.5, 0.5, 0.5, 1.25, 1.0).requires_grad_()
    returns = tensor(2.0, 0.0, 0.0, 2.0, 2.0, 3.0)
    loss, binds = value_loss(values, torch.ones(6, dtype=torch.float64), returns, clip=0.25)
    assert loss.tolist() == [0.28125, 1.125, 0.28125, 1.125, 0.28125, 2.0]
    assert binds.tolist() == [True, False, True, False, False, False]
    # v - R, and none where the clip binds; the fifth is a kink
    slopes = slope(loss, values)
    assert slopes[:4] == [0.0, 1.5, 0.0, -1.5] and slopes[5] == -2.0


def test_value_loss_without_clip():
    values = tensor(1.5, 0.5, -3.0).requires_grad_()
    loss, binds = value_loss(values, tensor(1.0, 1.0, 9.0), tensor(2.0, 0.0, 0.0), clip=0)
    assert loss.tolist() == [0.125, 0.125, 4.5]
    assert binds.tolist() == [False] * 3 and binds.dtype == torch.bool
    assert slope(loss, values) == [-0.5, 0.5, -3.0]


# ---- token weights -----------------------------------------------------------------------------


def test_token_weights_per_token():
    weights = token_weights(MASK, LENGTHS, "token", tokens=10, rollouts=4)
    assert weights.tolist() == pytest.approx([0, 0.1, 0.1, 0.1, 0.1, 0, 0, 0])


def test_token_weights_per_sequence():
    # each rollout 1/4, shared by its trained tokens; the third has none
    weights = token_weights(MASK, LENGTHS, "sequence", tokens=10, rollouts=4)
    assert weights.tolist() == pytest.approx([0, 1 / 8, 1 / 8, 1 / 8, 1 / 8, 0, 0, 0])
    mask = tensor(1, 1, 1, 0, 1, 1, 0, 0)
    weights = token_weights(mask, LENGTHS, "sequence", tokens=5, rollouts=3)
    assert weights.tolist() == pytest.approx([1 / 9, 1 / 9, 1 / 9, 0, 1 / 3, 1 / 3, 0, 0])


def test_token_weights_with_a_constant():
    # 1 / (4 rollouts * 5 tokens), however many there are
    weights = token_weights(MASK, LENGTHS, "constant", tokens=10, rollouts=4, max_tokens=5)
    assert weights.tolist() == pytest.approx([0, 0.05, 0.05, 0.05, 0.05, 0, 0, 0])


def test_token_weights_of_weighted_rollouts():
    # weights 3, 0.5 and 1; rollouts 4.5 in all, tokens 3 * 2 + 0.5 * 2 = 7
    given = dict(tokens=7.0, rollouts=4.5, max_tokens=4, weights_R=tensor(3, 0.5, 1))
    weights = token_weights(MASK, LENGTHS, "token", **given)
    assert weights.tolist() == pytest.approx([0, 3 / 7, 3 / 7, 1 / 14, 1 / 14, 0, 0, 0])
    # 3 / (2 * 4.5) and 0.5 / (2 * 4.5)
    weights = token_weights(MASK, LENGTHS, "sequence", **given)
    assert weights.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 18, 1 / 18, 0, 0, 0])
    # 3 / (4.5 * 4) and 0.5 / (4.5 * 4)
    weights = token_weights(MASK, LENGTHS, "constant", **given)
    assert weights.tolist() == pytest.approx([0, 1 / 6, 1 / 6, 1 / 36, 1 / 36, 0, 0, 0])


BATCH = st.lists(
    st.tuples(
        st.lists(st.booleans(), min_size=1, max_size=5),
        st.sampled_from([0.5, 1.0, 3.0]),
    ),
    min_size=1,
    max_size=6,
)
"""mask and weight of each rollout"""


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@given(batch=BATCH, cut=st.integers(0, 6))
def test_microbatches_add_up_to_the_minibatch(average, batch, cut):
    whole = dict(
        tokens=sum(sum(mask) * w for mask, w in batch),
        rollouts=sum(w for _, w in batch),
        max_tokens=5,
    )

    def weights(part: list) -> list[float]:
        mask_T = tensor(*[float(m) for mask, _ in part for m in mask])
        lengths = [len(mask) for mask, _ in part]
        weights_R = tensor(*[w for _, w in part])
        return token_weights(mask_T, lengths, average, weights_R=weights_R, **whole).tolist()

    found = weights(batch)
    assert weights(batch[:cut]) + weights(batch[cut:]) == found
    trained = [any(mask) for mask, _ in batch]
    total = {
        "token": float(any(trained)),
        # a rollout without trained tokens counts in the average, with a loss of 0
        "sequence": sum(w for (_, w), t in zip(batch, trained, strict=True) if t)
        / whole["rollouts"],
        "constant": whole["tokens"] / (whole["rollouts"] * 5),
    }
    assert sum(found) == pytest.approx(total[average], abs=1e-12)


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_rollout_weights_of_one_change_nothing(average):
    given = dict(tokens=10, rollouts=4, max_tokens=3)
    plain = token_weights(MASK, LENGTHS, average, **given)
    ones = token_weights(MASK, LENGTHS, average, weights_R=tensor(1, 1, 1), **given)
    assert torch.equal(plain, ones)


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_nothing_to_train_on_gives_zeros(average):
    weights = token_weights(torch.zeros(3), [2, 1], average, tokens=0, rollouts=0)
    assert weights.tolist() == [0.0, 0.0, 0.0]


def test_an_average_that_is_none_is_refused():
    with pytest.raises(AssertionError, match="median"):
        token_weights(MASK, LENGTHS, "median", tokens=4, rollouts=3)


def test_rollout_sums():
    values = tensor(1, 2, 4, 8, 16, 32, 64, 128).requires_grad_()
    sums = rollout_sums(values, LENGTHS)
    assert sums.tolist() == [7.0, 24.0, 224.0]
    # a rollout without tokens has a sum, of 0; and gradients pass
    assert rollout_sums(values, [3, 0, 5]).tolist() == [7.0, 0.0, 248.0]
    assert rollout_sums(tensor(), []).tolist() == []
    assert slope(sums * tensor(1, 2, 3), values) == [1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_ratio_past_all_bounds_is_finite(advantage):
    # two tokens of log-ratio 50: their product is past float32, and infinity times 0 would be nan
    log_ratio = torch.full((2,), 50.0, requires_grad=True)
    product = level_ratio(log_ratio, torch.ones(2), [2], "product")
    loss, binds = clipped_surrogate(product, torch.full((2,), advantage), 0.2, 0.2)
    loss.sum().backward()
    assert log_ratio.grad is not None
    assert loss.isfinite().all() and torch.equal(log_ratio.grad, torch.zeros(2))
    assert binds.all() == (advantage > 0)
