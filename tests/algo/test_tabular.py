"""What each estimator estimates: exact expected gradients on a policy that can be enumerated.

`g` is the gradient of the mean over prompts of the expected reward. UNBIASED and OFF_POLICY_EXACT
say which estimators have an expectation that is a constant times g, whatever the policy and the
rewards are; BIASED and OFF_POLICY_BIASED have the cosine to g of those that have not, in this one
world, where prompts differ strongly in the spread of their rewards. So a cosine says that there is
a bias, not how large it is elsewhere. Without further notice the loss is taken at ratio 1, the
ratio is that of the token and the average is "constant" (over rollouts x max_tokens, here 2).
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import pytest
import torch

from reroll.algo.advantage import dr_grpo, gae, grpo, reinforce_pp, rloo, whiten
from reroll.algo.baseline import Running
from reroll.algo.correct import Anchor, decoupled, truncated, uncorrected
from reroll.algo.loss import KL_ESTIMATORS, kl_k1
from tests.algo.tabular import (
    PROMPTS,
    TOKENS,
    Batch,
    Credit,
    Policy,
    World,
    by_group,
    cosine,
    distance,
    expected_gradient,
    expected_weights,
    flat,
    groups,
    groups_in_company,
    lengths_of,
    numbers,
    one_of_each,
    policy_gradient,
    rewards_at_the_end,
    sequence_kl,
    state_kl,
)

WORLD, ONE_STEP = World(steps=2), World(steps=1)
POLICY = Policy.draw(2)
STALE = Policy.draw(3, near=POLICY, distance=1.0)
"""the behaviour policy of the off-policy rows"""
NEAR = Policy.draw(4, near=POLICY, distance=0.3)
"""another, whose ratios are below 2: logits 0.3 apart at most give exp(2 * 0.3) = 1.83 at most"""
REFERENCE = Policy.draw(5, near=POLICY, distance=1.0)
"""for the KL"""
LAW = POLICY.law(WORLD).detach()
STALE_LAW = STALE.law(WORLD).detach()
G = policy_gradient(POLICY, WORLD)

EXACT = 1e-9
"""largest relative distance of what is exact (rounding is near 1e-15)"""

estimate = partial(expected_gradient, POLICY, WORLD)


@cache
def group(n: int) -> list[Batch]:
    return groups(WORLD, LAW, n)


@cache
def stale_group() -> list[Batch]:
    return groups(WORLD, STALE_LAW, 2)


# ---- credit ------------------------------------------------------------------------------------


def no_baseline(rewards: Sequence[float | None]) -> list[float]:
    return [r for r in rewards if r is not None]


def exact_values(world: World, policy: Policy) -> torch.Tensor:
    """Expected reward before each token `[P, O, S]`."""
    law_PO = policy.law(world).detach()
    start_P1 = (law_PO * world.rewards_PO).sum(-1, keepdim=True)
    firsts = torch.tensor([reply[0] for reply in world.replies])
    same_OO = (firsts[:, None] == firsts).double()
    after_first_PO = (law_PO * world.rewards_PO) @ same_OO / (law_PO @ same_OO)
    return torch.stack([start_P1.expand_as(after_first_PO), after_first_PO], -1)


def wrong_values(world: World) -> torch.Tensor:
    """Any number at each state `[P, O, S]`, as large as rewards are."""
    table = 4 * numbers(6, PROMPTS, 1 + TOKENS)
    firsts = torch.tensor([reply[0] for reply in world.replies])
    return torch.stack([table[:, :1].expand(PROMPTS, len(firsts)), table[:, 1 + firsts]], -1)


def critic(values_POS: torch.Tensor, lam: float) -> Credit:
    def credit(world: World, batches: Sequence[Batch]) -> torch.Tensor:
        values_T = values_POS.flatten()[torch.tensor(world.places(flat(batches)))]
        rewards_T = rewards_at_the_end(world, batches)
        return gae(rewards_T, values_T, lengths_of(world, batches), 1.0, lam)

    return credit


def whitened(inner: Credit) -> Credit:
    def credit(world: World, batches: Sequence[Batch]) -> torch.Tensor:
        sizes = [sum(lengths_of(world, [batch])) for batch in batches]
        parts = inner(world, batches).split(sizes)
        return torch.cat([whiten(part, torch.ones_like(part)) for part in parts])

    return credit


def plus_plus(world: World, batches: Sequence[Batch]) -> torch.Tensor:
    parts = []
    for batch in batches:
        rewards_T = rewards_at_the_end(world, [batch])
        lengths = lengths_of(world, [batch])
        parts.append(reinforce_pp(rewards_T, lengths, torch.ones_like(rewards_T)))
    return torch.cat(parts)


def running(world: World, batches: Sequence[Batch]) -> torch.Tensor:
    """Of each batch after the same history, which knows the prompts wrongly, and one not at all."""
    given = []
    for batch in batches:
        history = Running(2.0, 0.9, [5.0, 7.0], {0: [1.5, -1.0], 2: [0.5, 3.0]})
        rewards = [world.rewards[p][o] for p, o in batch.rollouts]
        rows = [p for p, _ in batch.rollouts]
        values = history.advantages(rewards, rows, [1.0] * len(rows))
        for value, length in zip(values, lengths_of(world, [batch]), strict=True):
            given += [value] * length
    return torch.tensor(given, dtype=torch.float64)


RIGHT, WRONG = exact_values(WORLD, POLICY), wrong_values(WORLD)


# ---- the tables --------------------------------------------------------------------------------

Estimate = Callable[[], torch.Tensor]

UNBIASED: dict[str, tuple[float, Estimate]] = {
    # name: (constant c, expected gradient, which is c g)
    "REINFORCE without baseline": (1 / 2, lambda: estimate(group(1), by_group(no_baseline))),
    "RLOO (product ratio, sequence average), n=2": (
        1,
        lambda: estimate(group(2), by_group(rloo), ratio="product", average="sequence"),
    ),
    "RLOO (product ratio, sequence average), n=3": (
        1,
        lambda: estimate(group(3), by_group(rloo), ratio="product", average="sequence"),
    ),
    "leave-one-out, token ratio, n=2": (1 / 2, lambda: estimate(group(2), by_group(rloo))),
    "running baseline, 3 prompts x 1": (1 / 2, lambda: estimate(one_of_each(WORLD, LAW), running)),
    "running baseline, n=2": (1 / 2, lambda: estimate(group(2), running)),
    "Dr. GRPO, n=2: (n - 1) / n": (1 / 2 / 2, lambda: estimate(group(2), by_group(dr_grpo))),
    "Dr. GRPO, n=3: (n - 1) / n": (2 / 3 / 2, lambda: estimate(group(3), by_group(dr_grpo))),
    "GAE, lambda 1, wrong values": (1 / 2, lambda: estimate(group(1), critic(WRONG, 1.0))),
    "GAE, lambda 0, exact values": (1 / 2, lambda: estimate(group(1), critic(RIGHT, 0.0))),
    "GAE, lambda 0.5, exact values": (1 / 2, lambda: estimate(group(1), critic(RIGHT, 0.5))),
}

BIASED: dict[str, tuple[float, Estimate]] = {
    # name: (cosine to g, expected gradient)
    "GRPO's deviation alone, n=2": (0.610, lambda: estimate(group(2), by_group(grpo))),
    "GRPO's deviation alone, n=3": (0.636, lambda: estimate(group(3), by_group(grpo))),
    "GRPO's sequence average alone, n=2": (
        0.965,
        lambda: estimate(group(2), by_group(dr_grpo), average="sequence"),
    ),
    "GRPO (both), n=2": (0.562, lambda: estimate(group(2), by_group(grpo), average="sequence")),
    "GRPO (both), n=3": (0.597, lambda: estimate(group(3), by_group(grpo), average="sequence")),
    "GSPO (on policy), n=2": (
        0.562,
        lambda: estimate(group(2), by_group(grpo), ratio="sequence", average="sequence"),
    ),
    "DAPO's token average alone, n=2": (
        0.999,
        lambda: estimate(groups_in_company(WORLD, LAW, 2), by_group(rloo), average="token"),
    ),
    "DAPO, n=2": (
        0.611,
        lambda: estimate(groups_in_company(WORLD, LAW, 2), by_group(grpo), average="token"),
    ),
    "REINFORCE++, 3 prompts x 1": (
        0.970,
        lambda: estimate(one_of_each(WORLD, LAW), plus_plus, average="token"),
    ),
    "REINFORCE++, 3 prompts x 1, constant average": (
        0.980,
        lambda: estimate(one_of_each(WORLD, LAW), plus_plus),
    ),
    "GAE, lambda 0, wrong values": (0.751, lambda: estimate(group(1), critic(WRONG, 0.0))),
    "GAE, lambda 0.5, wrong values": (0.912, lambda: estimate(group(1), critic(WRONG, 0.5))),
    "PPO (lambda 1, exact values, whitened, token average), 3 prompts x 1": (
        0.949,
        lambda: estimate(one_of_each(WORLD, LAW), whitened(critic(RIGHT, 1.0)), average="token"),
    ),
}


def stale(anchor: Callable[..., Anchor] | None, **settings) -> torch.Tensor:
    """Leave-one-out groups of two that STALE drew."""
    chosen = {} if anchor is None else {"anchor": anchor}
    return estimate(stale_group(), by_group(rloo), behaviour=STALE, **chosen, **settings)


def as_drawn(now_T: torch.Tensor, behaviour_T: torch.Tensor) -> Anchor:
    return uncorrected(behaviour_T)


def tis(cap: float) -> Callable[..., Anchor]:
    return lambda now_T, behaviour_T: truncated(now_T, behaviour_T, torch.ones_like(now_T), cap)


def first_step(cap: float) -> Callable[..., Anchor]:
    """decoupled at the batch's first optimizer step: proximal = present."""
    return lambda now_T, behaviour_T: decoupled(now_T, behaviour_T, torch.ones_like(now_T), cap)


def later_step(cap: float) -> Callable[..., Anchor]:
    """decoupled where the proximal policy is neither the present one nor the behaviour's."""
    proximal_T = NEAR.packed(WORLD, flat(stale_group())).detach()
    return lambda now_T, behaviour_T: decoupled(
        proximal_T, behaviour_T, torch.ones_like(now_T), cap
    )


OFF_POLICY_EXACT: dict[str, tuple[float, Estimate]] = {
    # the baseline is independent of the rollout, so E[ratio b grad log pi] = b E[grad log pi] = 0
    "RLOO (product ratio), no clip": (
        1,
        lambda: stale(as_drawn, ratio="product", average="sequence"),
    ),
}

OFF_POLICY_BIASED: dict[str, tuple[float, Estimate]] = {
    "staleness ignored": (0.899, lambda: stale(None)),
    "uncorrected, no clip": (0.953, lambda: stale(as_drawn)),
    "uncorrected, clip 0.2 (PPO)": (0.180, lambda: stale(as_drawn, clip=0.2)),
    "RLOO (product ratio), clip 0.2": (
        0.104,
        lambda: stale(as_drawn, ratio="product", average="sequence", clip=0.2),
    ),
    "RLOO (product ratio), decoupled, cap 0": (
        0.975,
        lambda: stale(first_step(0.0), ratio="product", average="sequence"),
    ),
    "RLOO (product ratio), decoupled, cap 2": (
        0.975,
        lambda: stale(first_step(2.0), ratio="product", average="sequence"),
    ),
    "tis, cap 1": (0.928, lambda: stale(tis(1.0))),
    "tis, cap 0": (0.953, lambda: stale(tis(0.0))),
    "tis, cap 2": (0.954, lambda: stale(tis(2.0))),
    "decoupled, cap 1": (0.928, lambda: stale(first_step(1.0))),
    "decoupled, cap 0": (0.953, lambda: stale(first_step(0.0))),
    "decoupled, cap 2": (0.954, lambda: stale(first_step(2.0))),
    "decoupled, cap 2, clip 0.2, later step": (0.954, lambda: stale(later_step(2.0), clip=0.2)),
}


# ---- on policy ---------------------------------------------------------------------------------


def test_the_enumeration_is_right():
    assert len(WORLD.replies) == 13 and len(ONE_STEP.replies) == 4
    for policy in (POLICY, STALE):
        for world in (WORLD, ONE_STEP):
            assert policy.law(world).sum(-1).tolist() == pytest.approx([1.0] * PROMPTS, rel=1e-12)
    assert (WORLD.rewards_PO < 0).any() and (WORLD.rewards_PO > 0).any()
    every = (groups(WORLD, LAW, 1), group(2), group(3))
    assert [len(batches) for batches in every] == [3 * 13, 3 * 13**2, 3 * 13**3]
    for batches in (*every, groups_in_company(WORLD, LAW, 2)):  # one group of each prompt
        assert math.fsum(b.probability for b in batches) == pytest.approx(PROMPTS, rel=1e-12)
    minibatches = one_of_each(WORLD, LAW)
    assert len(minibatches) == 13**3
    assert math.fsum(b.probability for b in minibatches) == pytest.approx(1.0, rel=1e-12)


def test_the_policy_gradient_is_that_of_finite_differences():
    step = 1e-6
    slopes = []
    for name, logits in enumerate(POLICY.parameters):
        for place in range(logits.numel()):
            sides = []
            for sign in (1, -1):
                moved = [p.detach().clone() for p in POLICY.parameters]
                moved[name].view(-1)[place] += sign * step
                sides.append((Policy(*moved).law(WORLD) * WORLD.rewards_PO).sum().item() / PROMPTS)
            slopes.append((sides[0] - sides[1]) / (2 * step))
    assert G.tolist() == pytest.approx(slopes, abs=1e-8)


def test_a_pack_of_batches_is_the_sum_of_them_one_by_one():
    # 6 groups of 2, of all prompts, in one tensor and alone: nothing of one may reach another
    settings = dict(ratio="sequence", average="sequence")
    some = group(2)[::97]
    assert len(some) == 6
    together = estimate(some, by_group(grpo), **settings)
    alone = [estimate([batch], by_group(grpo), **settings) for batch in some]
    assert distance(sum(alone), together) < EXACT
    # and one of them by the formula: probability A grad log pi / (rollouts x its tokens), summed
    batch = some[1]
    by_hand = torch.zeros_like(G)
    rewards = [WORLD.rewards[p][o] for p, o in batch.rollouts]
    for rollout, advantage in zip(batch.rollouts, grpo(rewards), strict=True):
        score = POLICY.gradient(POLICY.packed(WORLD, [rollout]).sum())
        share = batch.probability * advantage / (2 * PROMPTS * WORLD.lengths[rollout[1]])
        by_hand += share * score
    assert distance(alone[1], by_hand) < EXACT


@pytest.mark.parametrize(
    "name", UNBIASED, ids=[f"{n}: {c:.3f} g" for n, (c, _) in UNBIASED.items()]
)
def test_unbiased_up_to_a_constant(name):
    constant, expectation = UNBIASED[name]
    assert distance(expectation(), constant * G) < EXACT


@pytest.mark.parametrize(
    "name", BIASED, ids=[f"{n}: cosine {c:.3f}" for n, (c, _) in BIASED.items()]
)
def test_biased(name):
    named, expectation = BIASED[name]
    is_biased_by(named, cosine(expectation(), G))


def is_biased_by(named: float, measured: float) -> None:
    assert measured == pytest.approx(named, abs=6e-4)
    assert 1 - measured > 1e-4  # rounding is ten orders below: it is a bias


def test_on_policy_gspo_is_grpo():
    # the mean of the log-ratios shares the gradient out as the average over the tokens does
    gspo = estimate(group(2), by_group(grpo), ratio="sequence", average="sequence")
    assert distance(gspo, estimate(group(2), by_group(grpo), average="sequence")) < EXACT


def test_the_constant_is_all_that_the_critic_leaves_at_lambda_one():
    # exact values, wrong values and none: the same expectation
    right, wrong, none = (
        estimate(group(1), critic(values, 1.0)) for values in (RIGHT, WRONG, 0 * WRONG)
    )
    assert distance(right, none) < EXACT and distance(wrong, none) < EXACT


def test_reinforce_pp_loses_its_bias_as_the_batch_grows():
    # n rollouts of one prompt of one step: all 4^n batches
    law = POLICY.law(ONE_STEP).detach()
    wanted = policy_gradient(POLICY, ONE_STEP)
    wanted[TOKENS : TOKENS * PROMPTS] = 0  # that of the first prompt's logits
    biases = []
    for n in (2, 3, 4, 5):
        batches = [b for b in groups(ONE_STEP, law, n) if b.rollouts[0][0] == 0]
        found = expected_gradient(POLICY, ONE_STEP, batches, plus_plus)
        biases.append(1 - cosine(found, wanted))
    assert biases == sorted(biases, reverse=True)
    assert biases[0] > 50 * biases[-1] > 1e-4


# ---- stale rollouts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", OFF_POLICY_EXACT, ids=[f"{n}: {c:.3f} g" for n, (c, _) in OFF_POLICY_EXACT.items()]
)
def test_exact_off_policy(name):
    constant, expectation = OFF_POLICY_EXACT[name]
    assert distance(expectation(), constant * G) < EXACT


@pytest.mark.parametrize(
    "name",
    OFF_POLICY_BIASED,
    ids=[f"{n}: cosine {c:.3f}" for n, (c, _) in OFF_POLICY_BIASED.items()],
)
def test_biased_off_policy(name):
    named, expectation = OFF_POLICY_BIASED[name]
    is_biased_by(named, cosine(expectation(), G))


@pytest.mark.parametrize("cap", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("correction", [tis, first_step])
def test_a_correction_is_better_than_none(correction, cap):
    corrected = cosine(stale(correction(cap)), G)
    assert corrected > cosine(stale(None), G) + 0.02
    assert corrected > cosine(stale(as_drawn, clip=0.2), G) + 0.02


def test_decoupled_is_tis_at_the_first_step_and_without_bounds_at_any():
    assert distance(stale(first_step(2.0)), stale(tis(2.0))) < EXACT
    # now / proximal x proximal / behaviour
    assert distance(stale(later_step(0.0)), stale(tis(0.0))) < EXACT


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("correction", [tis, first_step])
def test_corrections_of_tokens_are_exact_for_replies_of_one_token(correction, cap):
    # no token before it, so nothing is left out; NEAR's ratios are all below the cap
    batches = groups(ONE_STEP, NEAR.law(ONE_STEP).detach(), 2)
    ratios = (POLICY.token_logprobs(ONE_STEP) - NEAR.token_logprobs(ONE_STEP)).exp()
    assert ratios.max() < 2
    settings = dict(behaviour=NEAR, anchor=correction(cap))
    found = expected_gradient(POLICY, ONE_STEP, batches, by_group(rloo), **settings)
    assert distance(found, policy_gradient(POLICY, ONE_STEP)) < EXACT
    # a cap that binds biases it
    settings = dict(behaviour=NEAR, anchor=correction(0.9))
    found = expected_gradient(POLICY, ONE_STEP, batches, by_group(rloo), **settings)
    assert 1 - cosine(found, policy_gradient(POLICY, ONE_STEP)) > 1e-4


# ---- the KL ------------------------------------------------------------------------------------

KL_OF_REPLIES = POLICY.gradient(sequence_kl(POLICY, REFERENCE, WORLD))
"""gradient of KL(policy || reference) of whole replies"""
KL_OF_STATES = POLICY.gradient(state_kl(POLICY, REFERENCE, POLICY))
"""of the KL at each state, the visits to the states held constant"""


def kl_in_loss(estimator: str, *, times_ratio: bool, drawn_by: Policy = POLICY) -> torch.Tensor:
    """Expected gradient of the estimator in the loss, per reply."""
    batches = groups(WORLD, drawn_by.law(WORLD).detach(), 1)
    rollouts = flat(batches)
    now_T = POLICY.packed(WORLD, rollouts)
    loss_T = KL_ESTIMATORS[estimator](now_T, REFERENCE.packed(WORLD, rollouts).detach())
    if times_ratio:
        loss_T = loss_T * (now_T - drawn_by.packed(WORLD, rollouts).detach()).exp()
    weights_T = expected_weights(WORLD, batches, "constant")
    return WORLD.steps * POLICY.gradient((loss_T * weights_T).sum())


KL_EXACT: dict[str, tuple[Estimate, Estimate]] = {
    # name: (expected gradient, the gradient of what)
    "k2 in the loss: KL(policy || reference) of the states": (
        lambda: kl_in_loss("k2", times_ratio=False),
        lambda: KL_OF_STATES,
    ),
    "k3 in the loss: KL(reference || policy) of the states": (
        lambda: kl_in_loss("k3", times_ratio=False),
        lambda: POLICY.gradient(state_kl(POLICY, REFERENCE, POLICY, reverse=True)),
    ),
    "k1 x ratio: KL(policy || reference) of the states": (
        lambda: kl_in_loss("k1", times_ratio=True),
        lambda: KL_OF_STATES,
    ),
    "k3 x ratio: KL(policy || reference) of the states": (
        lambda: kl_in_loss("k3", times_ratio=True),
        lambda: KL_OF_STATES,
    ),
    "k1 x ratio, stale: the same, of the states that the stale policy visits": (
        lambda: kl_in_loss("k1", times_ratio=True, drawn_by=STALE),
        lambda: POLICY.gradient(state_kl(POLICY, REFERENCE, STALE)),
    ),
    "k3 x ratio, stale: the same, of the states that the stale policy visits": (
        lambda: kl_in_loss("k3", times_ratio=True, drawn_by=STALE),
        lambda: POLICY.gradient(state_kl(POLICY, REFERENCE, STALE)),
    ),
    "k1 in the reward, returns to go: KL(policy || reference) of the replies": (
        lambda: -2 * estimate(group(1), k1_to_go),
        lambda: KL_OF_REPLIES,
    ),
    "k1 summed off the reward, RLOO: g - that": (
        lambda: expected_gradient(
            POLICY, penalised(), group(2), by_group(rloo), ratio="product", average="sequence"
        ),
        lambda: G - KL_OF_REPLIES,
    ),
}

KL_BIASED: dict[str, tuple[float, Estimate, Estimate]] = {
    # name: (cosine, expected gradient, the gradient that it is not)
    "k3 in the loss, for KL(policy || reference) of the states": (
        0.976,
        lambda: kl_in_loss("k3", times_ratio=False),
        lambda: KL_OF_STATES,
    ),
    "k2 x ratio, for KL(policy || reference) of the states": (
        0.984,
        lambda: kl_in_loss("k2", times_ratio=True),
        lambda: KL_OF_STATES,
    ),
    "k2 in the loss, for KL(policy || reference) of the replies": (
        0.993,
        lambda: kl_in_loss("k2", times_ratio=False),
        lambda: KL_OF_REPLIES,
    ),
    "k3 in the loss, for KL(policy || reference) of the replies": (
        0.977,
        lambda: kl_in_loss("k3", times_ratio=False),
        lambda: KL_OF_REPLIES,
    ),
}


def k1_to_go(world: World, batches: Sequence[Batch]) -> torch.Tensor:
    rollouts = flat(batches)
    with torch.no_grad():
        rewards_T = -kl_k1(POLICY.packed(world, rollouts), REFERENCE.packed(world, rollouts))
    return gae(rewards_T, torch.zeros_like(rewards_T), lengths_of(world, batches), 1.0, 1.0)


def penalised() -> World:
    """WORLD with each reply's sum of k1 taken off its reward."""
    world = World(steps=2)
    with torch.no_grad():
        difference = POLICY.token_logprobs(world) - REFERENCE.token_logprobs(world)
        world.rewards = (world.rewards_PO - difference.sum(-1)).tolist()
    return world


@pytest.mark.parametrize("name", KL_EXACT)
def test_kl_exact(name):
    expectation, wanted = KL_EXACT[name]
    assert distance(expectation(), wanted()) < EXACT


@pytest.mark.parametrize(
    "name", KL_BIASED, ids=[f"{n}: cosine {c:.3f}" for n, (c, _, _) in KL_BIASED.items()]
)
def test_kl_biased(name):
    named, expectation, not_this = KL_BIASED[name]
    is_biased_by(named, cosine(expectation(), not_this()))


def test_k1_in_the_loss_does_nothing_in_expectation():
    assert kl_in_loss("k1", times_ratio=False).norm() < EXACT * KL_OF_STATES.norm()
