"""Advantages, by hand and against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reroll.algo.advantage import dr_grpo, gae, grpo, reinforce_pp, rloo, whiten

GROUP_RULES = [grpo, dr_grpo, rloo]
REWARDS = st.lists(st.integers(-20, 20).map(lambda i: i / 4), min_size=2, max_size=12)
WEIGHTED = st.lists(
    st.tuples(st.integers(-20, 20).map(lambda i: i / 4), st.sampled_from([0.5, 1.0, 2.0, 3.0])),
    min_size=2,
    max_size=8,
)
"""rewards with weights"""


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- groups: the three rules by hand -----------------------------------------------------------


def test_grpo_by_hand():
    # mean 2, squares 4 + 0 + 4 over n - 1 = 2: deviation 2
    assert grpo([0.0, 2.0, 4.0], epsilon=0.0) == [-1.0, 0.0, 1.0]
    # deviation sqrt(1/2) with Bessel's correction (1/2 without)
    assert grpo([1.0, 0.0], epsilon=0.0) == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    # mean 1/4, deviation 1/2
    assert grpo([0, 0, 0, 1], epsilon=0.0) == [-0.5, -0.5, -0.5, 1.5]


def test_epsilon_stands_beside_the_deviation():
    assert grpo([0.0, 2.0, 4.0], epsilon=2.0) == [-0.5, 0.0, 0.5]
    assert grpo([0.0, 2.0, 4.0])[2] == pytest.approx(2 / 2.0001, rel=1e-12)


def test_dr_grpo_by_hand():
    # mean 2
    assert dr_grpo([0.0, 2.0, 4.0]) == [-2.0, 0.0, 2.0]
    assert dr_grpo([1, 0, 0, 0]) == [0.75, -0.25, -0.25, -0.25]
    assert dr_grpo([-1.0, 0.5]) == [-0.75, 0.75]


def test_rloo_by_hand():
    # means of the others: 3, 2, 1
    assert rloo([0.0, 2.0, 4.0]) == [-3.0, 0.0, 3.0]
    # 1 - 0/3, and 0 - 1/3
    assert rloo([1, 0, 0, 0]) == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3], rel=1e-15)
    assert rloo([-1.0, 0.5]) == [-1.5, 1.5]


def test_ungraded_rollouts_stay_out():
    rewards = [None, 0.0, 2.0, None, 4.0]
    assert grpo(rewards, epsilon=0.0) == [0.0, -1.0, 0.0, 0.0, 1.0]
    assert dr_grpo(rewards) == [0.0, -2.0, 0.0, 0.0, 2.0]
    assert rloo(rewards) == [0.0, -3.0, 0.0, 0.0, 3.0]
    # with their weights, too: 9 belongs to no graded one
    weights = [9.0, 1.0, 1.0, 9.0, 1.0]
    assert grpo(rewards, weights, epsilon=0.0) == [0.0, -1.0, 0.0, 0.0, 1.0]
    assert dr_grpo(rewards, weights) == [0.0, -2.0, 0.0, 0.0, 2.0]
    assert rloo(rewards, weights) == [0.0, -3.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize("rule", GROUP_RULES)
@pytest.mark.parametrize(
    "rewards",
    [[], [1.0], [None], [None, None], [3.0, None], [1.0, 1.0], [0.1, 0.1, 0.1], [None, 0.7, 0.7]],
)
def test_groups_without_signal_give_zeros(rule, rewards):
    # 0.1 three times: their mean is not 0.1, so that a deviation of rounding errors would be
    # blown up to advantages near 1. Of rollouts alone nothing is known, not even for the first
    assert rule(rewards) == [0.0] * len(rewards)
    assert rule(rewards, [1.0, 3.0, 0.3][: len(rewards)]) == [0.0] * len(rewards)


# ---- groups: laws ------------------------------------------------------------------------------


@given(REWARDS, st.integers(-8, 8), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_shift_and_scale_of_the_rewards(rewards, shift, scale):
    moved = [scale * r + shift for r in rewards]
    assert grpo(moved, epsilon=0.0) == pytest.approx(grpo(rewards, epsilon=0.0), abs=1e-9)
    for rule in (dr_grpo, rloo):
        assert rule(moved) == pytest.approx([scale * a for a in rule(rewards)], abs=1e-9)


@given(REWARDS)
def test_advantages_are_centred_with_deviation_one(rewards):
    advantages = grpo(rewards, epsilon=0.0)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-9)
    spread = 0 if len(set(rewards)) == 1 else len(rewards) - 1
    assert sum(a * a for a in advantages) == pytest.approx(spread, abs=1e-9)
    assert sorted(range(len(rewards)), key=lambda i: (rewards[i], i)) == sorted(
        range(len(rewards)), key=lambda i: (round(advantages[i], 9), i)
    )


@given(REWARDS)
def test_rloo_is_dr_grpo_times_n_over_n_minus_one(rewards):
    n = len(rewards)
    wanted = [a * n / (n - 1) for a in dr_grpo(rewards)]
    assert rloo(rewards) == pytest.approx(wanted, abs=1e-12)


@given(REWARDS, st.integers(1, 20))
def test_the_own_reward_is_not_in_the_baseline_of_rloo(rewards, more):
    raised = [rewards[0] + more, *rewards[1:]]
    assert rloo(raised)[0] == pytest.approx(rloo(rewards)[0] + more, abs=1e-12)


@pytest.mark.parametrize("rule", GROUP_RULES)
@given(rewards=REWARDS)
def test_the_order_of_a_group_does_not_matter(rule, rewards):
    assert rule(rewards[::-1])[::-1] == pytest.approx(rule(rewards), abs=1e-12)


# ---- groups: weights of rollouts ---------------------------------------------------------------


def test_weights_by_hand():
    # mean (0 + 2 * 3) / 3 = 2; variance (1 * 4 + 2 * 1) / 3 * 2 / 1 = 4; the others: 3 and 0
    assert dr_grpo([0.0, 3.0], [1.0, 2.0]) == [-2.0, 1.0]
    assert grpo([0.0, 3.0], [1.0, 2.0], epsilon=0.0) == [-1.0, 0.5]
    assert rloo([0.0, 3.0], [1.0, 2.0]) == [-3.0, 3.0]
    # the others: (2 * 3 + 6) / 3 = 4, (0 + 6) / 2 = 3, (0 + 2 * 3) / 3 = 2
    assert rloo([0.0, 3.0, 6.0], [1.0, 2.0, 1.0]) == [-4.0, 0.0, 4.0]


@pytest.mark.parametrize("rule", GROUP_RULES)
@given(rewards=st.lists(st.none() | st.floats(-9, 9), max_size=9))
def test_weights_of_one_change_nothing(rule, rewards):
    assert rule(rewards, [1.0] * len(rewards)) == rule(rewards)  # bit for bit


@pytest.mark.parametrize("rule", GROUP_RULES)
@given(rows=WEIGHTED, scale=st.sampled_from([0.1, 3.0, 8.0]))
def test_the_scale_of_the_weights_does_not_matter(rule, rows, scale):
    rewards, weights = map(list, zip(*rows, strict=True))
    scaled = rule(rewards, [scale * w for w in weights])
    assert scaled == pytest.approx(rule(rewards, weights), abs=1e-9)


@given(REWARDS)
def test_weight_two_counts_a_rollout_twice(rewards):
    weights = [2.0] + [1.0] * (len(rewards) - 1)
    twice = [rewards[0], *rewards]
    assert dr_grpo(rewards, weights) == pytest.approx(dr_grpo(twice)[1:], abs=1e-12)
    # in the baselines of the others; its own leaves out all of it, not one of two copies
    assert rloo(rewards, weights)[1:] == pytest.approx(rloo(twice)[2:], abs=1e-12)
    others = sum(rewards[1:]) / len(rewards[1:])
    assert rloo(rewards, weights)[0] == pytest.approx(rewards[0] - others, abs=1e-12)


@given(WEIGHTED)
def test_weighted_advantages_are_centred_with_deviation_one(rows):
    rewards, weights = map(list, zip(*rows, strict=True))
    pairs = list(zip(weights, grpo(rewards, weights, epsilon=0.0), strict=True))
    assert sum(w * a for w, a in pairs) == pytest.approx(0.0, abs=1e-9)
    spread = 0 if len(set(rewards)) == 1 else (len(rewards) - 1) / len(rewards)
    assert sum(w * a * a for w, a in pairs) / sum(weights) == pytest.approx(spread, abs=1e-9)


# ---- gae ---------------------------------------------------------------------------------------


def test_gae_by_hand():
    # gamma 1/2, lambda 1/2; rollouts of 3 and 1 tokens
    # deltas: 1 + 4/2 - 2 = 1, 0 + 8/2 - 4 = 0, 8 + 0 - 8 = 0; then 5 - 1 = 4
    # advantages: 1 + (0 + 0 / 4) / 4 = 1
    values = tensor(2.0, 4.0, 8.0, 1.0)
    found = gae(tensor(1.0, 0.0, 8.0, 5.0), values, [3, 1], 0.5, 0.5)
    assert found.tolist() == [1.0, 0.0, 0.0, 4.0]
    # the last reward raised by 16: 16 there, 16/4 before it, 16/16 at the first
    found = gae(tensor(1.0, 0.0, 24.0, 5.0), values, [3, 1], 0.5, 0.5)
    assert found.tolist() == [2.0, 4.0, 16.0, 4.0]


def gae_by_definition(rewards, values, lengths, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, as two loops."""
    found, start = [], 0
    for length in lengths:
        r, v = rewards[start : start + length], [*values[start : start + length], 0.0]
        for t in range(length):
            total = 0.0
            for ahead in range(length - t):
                k = t + ahead
                total += (gamma * lam) ** ahead * (r[k] + gamma * v[k + 1] - v[k])
            found.append(total)
        start += length
    return found


NUMBER = st.integers(-40, 40).map(lambda i: i / 8)
ROLLOUTS = st.lists(
    st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=9), min_size=1, max_size=6
)
"""(reward, value) of each token of each rollout"""
DISCOUNT = st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99, 1.0])


def unpack(rollouts):
    rewards = [reward for rollout in rollouts for reward, _ in rollout]
    values = [value for rollout in rollouts for _, value in rollout]
    return rewards, values, [len(rollout) for rollout in rollouts]


@given(ROLLOUTS, DISCOUNT, DISCOUNT)
def test_gae_is_its_definition(rollouts, gamma, lam):
    rewards, values, lengths = unpack(rollouts)
    found = gae(tensor(*rewards), tensor(*values), lengths, gamma, lam)
    wanted = gae_by_definition(rewards, values, lengths, gamma, lam)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(wanted, abs=1e-9)


def test_gae_of_long_ragged_rollouts_is_its_definition():
    # lengths far apart and in no order, equal ones among them
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 60, 3, 60, 1, 17, 2, 41]
    rewards = torch.randn(sum(lengths), dtype=torch.float64, generator=generator)
    values = torch.randn(sum(lengths), dtype=torch.float64, generator=generator)
    for gamma, lam in [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.9, 1.0)]:
        wanted = gae_by_definition(rewards.tolist(), values.tolist(), lengths, gamma, lam)
        found = gae(rewards, values, lengths, gamma, lam)
        assert found.tolist() == pytest.approx(wanted, abs=1e-9)


@given(ROLLOUTS, ROLLOUTS, DISCOUNT, DISCOUNT)
def test_rollouts_do_not_leak_into_each_other(ones, others, gamma, lam):
    def credit(rollouts):
        rewards, values, lengths = unpack(rollouts)
        return gae(tensor(*rewards), tensor(*values), lengths, gamma, lam).tolist()

    assert credit(ones + others) == credit(ones) + credit(others)  # bit for bit


@given(ROLLOUTS, DISCOUNT)
def test_lambda_one_is_the_discounted_return_minus_the_value(rollouts, gamma):
    rewards, values, lengths = unpack(rollouts)
    found = gae(tensor(*rewards), tensor(*values), lengths, gamma, 1.0)
    wanted = [
        math.fsum(gamma**i * reward for i, (reward, _) in enumerate(rollout[t:])) - rollout[t][1]
        for rollout in rollouts
        for t in range(len(rollout))
    ]
    assert found.tolist() == pytest.approx(wanted, abs=1e-9)


@given(ROLLOUTS, DISCOUNT)
def test_lambda_zero_is_the_temporal_difference(rollouts, gamma):
    rewards, values, lengths = unpack(rollouts)
    found = gae(tensor(*rewards), tensor(*values), lengths, gamma, 0.0)
    wanted = [
        reward + gamma * (rollout[t + 1][1] if t + 1 < len(rollout) else 0.0) - value
        for rollout in rollouts
        for t, (reward, value) in enumerate(rollout)
    ]
    assert found.tolist() == wanted


def test_gae_of_nothing():
    assert gae(tensor(), tensor(), [], 1.0, 1.0).tolist() == []


# ---- reinforce++ and whitening -----------------------------------------------------------------


def over_deviation(centred: list[float], variance: float) -> list[float]:
    return pytest.approx([c / math.sqrt(variance + 1e-8) for c in centred], rel=1e-12)


def test_reinforce_pp_by_hand():
    # gamma 1/2; returns: 2 | -1, -2 | 1, 2, 4; mean 6/6 = 1
    # squares 1 + 4 + 9 + 0 + 1 + 9 = 24 over n - 1 = 5: variance 4.8
    rewards = tensor(2.0, 0.0, -2.0, 0.0, 0.0, 4.0)
    found = reinforce_pp(rewards, [1, 2, 3], torch.ones(6, dtype=torch.float64), gamma=0.5)
    assert found.tolist() == over_deviation([1, -2, -3, 0, 1, 3], 4.8)
    # no discount: 2 | -2, -2 | 4, 4, 4; mean 10/6, squares 60 - 100/6 over 5
    found = reinforce_pp(rewards, [1, 2, 3], torch.ones(6, dtype=torch.float64))
    centred = [r - 5 / 3 for r in (2, -2, -2, 4, 4, 4)]
    assert found.tolist() == over_deviation(centred, (60 - 100 / 6) / 5)


def test_reinforce_pp_with_a_penalty_at_every_token():
    # reward 1 and 4, less 1, 2 | 3, -1, 0 at the tokens:
    # rewards -1, -1 | -3, 1, 4, returns -2, -1 | 2, 5, 4; mean 8/5
    # squares 4 + 1 + 4 + 25 + 16 = 50, less 5 * (8/5)^2 = 12.8, over 4: 9.3
    rewards = tensor(-1.0, 1.0 - 2.0, -3.0, 1.0, 4.0 - 0.0)
    found = reinforce_pp(rewards, [2, 3], torch.ones(5, dtype=torch.float64))
    assert found.tolist() == over_deviation([-3.6, -2.6, 0.4, 3.4, 2.4], 9.3)


def test_reinforce_pp_with_a_masked_token():
    # returns 4, 4 | 0, of which the first is not trained on: mean 2, squares 4 + 4 over 1
    found = reinforce_pp(tensor(0.0, 4.0, 0.0), [2, 1], tensor(0.0, 1.0, 1.0))
    assert found.tolist() == over_deviation([2, 2, -2], 8)


def test_reinforce_pp_compares_across_prompts():
    # one rollout of each of four prompts, one token each: mean 1/2, squares 4/4 over 3
    found = reinforce_pp(tensor(1.0, 0.0, 1.0, 0.0), [1] * 4, torch.ones(4, dtype=torch.float64))
    assert found.tolist() == over_deviation([0.5, -0.5, 0.5, -0.5], 1 / 3)


def test_reinforce_pp_of_equal_rewards_is_zero():
    found = reinforce_pp(tensor(0.0, 0.1, 0.1), [2, 1], torch.ones(3, dtype=torch.float64))
    assert found.tolist() == [0.0, 0.0, 0.0]


def test_whiten_by_hand():
    # mean (1 * 0 + 3 * 4) / 4 = 3; (1 * 9 + 3 * 1) / 4 = 3, times 2 / (2 - 1)
    assert whiten(tensor(0.0, 4.0), tensor(1.0, 3.0)).tolist() == over_deviation([-3, 1], 6)
    # epsilon is added to the variance, under the root: 2 + 2
    found = whiten(tensor(0.0, 2.0), tensor(1.0, 1.0), epsilon=2.0)
    assert found.tolist() == [-0.5, 0.5]


@given(WEIGHTED, st.lists(NUMBER, max_size=3))
def test_whitened_tokens_have_mean_zero_and_variance_one(rows, silent):
    values, weights = map(list, zip(*rows, strict=True))
    n = len(values)
    found = whiten(tensor(*values, *silent), tensor(*weights, *[0.0] * len(silent)))
    pairs = list(zip(weights, found.tolist(), strict=False))
    assert sum(w * x for w, x in pairs) == pytest.approx(0.0, abs=1e-9)
    variance = sum(w * x * x for w, x in pairs) / sum(weights) * n / (n - 1)
    varied = len(set(values)) > 1
    assert variance == pytest.approx(1.0 if varied else 0.0, abs=1e-5)  # epsilon 1e-8
    # tokens of weight 0 have no say, and are moved by the same mean and deviation
    assert found.tolist()[:n] == pytest.approx(
        whiten(tensor(*values), tensor(*weights)).tolist(), abs=1e-12
    )
    for value, moved in zip(silent, found.tolist()[n:], strict=True):
        if value in values:
            assert moved == pytest.approx(found.tolist()[values.index(value)], abs=1e-12)


@given(WEIGHTED, st.sampled_from([0.1, 3.0, 8.0]))
def test_the_scale_of_whitening_weights_does_not_matter(rows, scale):
    values, weights = map(list, zip(*rows, strict=True))
    found = whiten(tensor(*values), scale * tensor(*weights))
    assert found.tolist() == pytest.approx(whiten(tensor(*values), tensor(*weights)).tolist())


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        ([], []),
        ([5.0], [1.0]),
        ([0.1, 0.1, 0.1], [1.0, 1.0, 1.0]),  # their mean is not 0.1
        ([0.1, 0.1, 0.1], [0.3, 0.7, 1.1]),
        ([0.1, 7.0, 0.1], [1.0, 0.0, 1.0]),  # only what has no say differs
        ([1.0, 2.0], [1.0, 0.0]),
        ([1.0, 2.0], [0.0, 0.0]),
    ],
)
def test_whitening_what_does_not_vary_gives_zeros(values, weights):
    assert whiten(tensor(*values), tensor(*weights)).tolist() == [0.0] * len(values)
