"""The policy's gradient is that of the loss written out, for every choice of its formulas.

Each comparison is made at a batch's first optimizer step and at a second one, which starts from
other weights: there the ratio is against stored log-probs, and decoupled PPO's proximal policy is
the one that the batch found.
"""

import itertools
import math

import pytest
import torch

from reroll.config import AlgoSection, CorrectSection
from reroll.types import Group
from tests.model.plain import plain
from tests.tiny import tiny
from tests.train.batches import (
    MAX_TOKENS,
    assert_same,
    credit,
    forwarded,
    gradient_of,
    gradients,
    group,
    loop_loss,
    make_trainer,
    store,
    walk,
)

VERSION, TEMPERATURE = 9, 0.8


def stale_batch(mixed: bool = True) -> list[Group]:
    """Tokens of lags 0, 2, 5 and 9, given and masked ones, weights; at VERSION.

    mixed: several versions in one rollout.
    """
    groups = [
        group(0, [0.0, 1.0, 0.5], [5, 9, 3], version=9, weights=[1.0, 0.5, 2.0]),
        group(1, [1.0, 1.0], [4, 4], version=9),  # dead
        group(2, [1.0, None, 0.0], [6, 2, 7], prefix=2, version=4, weights=[0.25, 1.0, 3.0]),
        group(4, [0.25, 1.0], [8, 1], prompt=7, version=7),
        group(5, [0.0, 2.0, 1.5], [6, 6, 7], version=0),
        group(6, [0.0, 1.0], [7, 8], version=9),
    ]
    groups[4].rollouts[0].completion.loss_mask = [False] * 6
    groups[4].rollouts[1].completion.loss_mask[2:4] = [False] * 2
    if mixed:
        groups[0].rollouts[1].completion.versions[:4] = [4, 4, 7, 7]
        groups[2].rollouts[2].completion.versions[-2:] = [9, 9]
        groups[4].rollouts[2].completion.versions[:3] = [4, 7, 9]
    return groups


def stored_batch(model, mixed: bool = True) -> list[Group]:
    """The same with log-probs off by up to 2, and a law drawn from up to 0.3 above them."""
    groups = stale_batch(mixed)
    store(model, groups, noise=2.0, temperature=TEMPERATURE, truncated=0.3)
    return groups


def two_steps(model, algo: dict, correct: dict, reference=None, mixed: bool = True):
    """A trainer at VERSION, what it was given, and two optimizer steps on it."""
    trainer = make_trainer(
        model,
        algo=algo,
        correct=CorrectSection(**correct),
        temperature=TEMPERATURE,
        reference=reference,
        epochs=2,
        learning_rate=2e-4,
        microbatch_tokens=90,
    )
    trainer.version = VERSION
    groups = stored_batch(model, mixed)
    credited, _ = trainer.credit(groups)
    return trainer, credited, walk(trainer, credited)


def compare(algo: dict, correct: dict, reference=None, mixed: bool = True) -> None:
    """Both optimizer steps against the loop."""
    trainer, credited, taken = two_steps(tiny("llama"), algo, correct, reference, mixed)
    assert len(taken) == 2
    for first, (policy, gradient) in zip((True, False), taken, strict=True):
        loss = loop_loss(
            policy,
            credited,
            trainer.algo,
            temperature=TEMPERATURE,
            version=VERSION,
            first=first,
            correct=trainer.correct,
            proximal=taken[0].model,
            reference=reference,
        )
        assert_same(gradient, gradient_of(policy, loss))


LEVELS = {
    "GRPO": dict(average="sequence", clip_low=0.1, clip_high=0.3),
    "DAPO": dict(average="token", clip_low=0.1, clip_high=0.3),
    "Dr. GRPO": dict(average="constant"),
    "GSPO": dict(average="sequence", ratio="sequence", clip_low=0.2, clip_high=0.3),
    "RLOO": dict(advantage="rloo", average="sequence", ratio="product"),
}
MODES = {
    "none": dict(mode="none"),
    "tis": dict(mode="tis", cap=2),
    "tis uncapped": dict(mode="tis", cap=0),
    "mask": dict(mode="mask", max_lag=2),
    "decoupled": dict(mode="decoupled", cap=2),
    "decoupled uncapped": dict(mode="decoupled", cap=0),
}


def mixes(level: str, mode: str) -> bool:
    """Whether rollouts may mix versions: one ratio of the whole would mean nothing."""
    return LEVELS[level].get("ratio", "token") == "token" or mode.startswith("decoupled")


@pytest.mark.parametrize(
    "level, mode",
    [
        (level, mode)
        for level, mode in itertools.product(LEVELS, MODES)
        # truncated importance sampling weights single tokens; the configuration refuses the rest
        if LEVELS[level].get("ratio", "token") == "token" or not mode.startswith("tis")
    ],
)
def test_the_gradient_is_that_of_the_loss_written_out(level, mode):
    compare(LEVELS[level], MODES[mode], mixed=mixes(level, mode))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_the_gradient_of_the_kl_in_the_loss(estimator, unbiased):
    algo = dict(kl_coef=0.3, kl_estimator=estimator, kl_unbiased=unbiased)
    compare(algo, {}, reference=tiny("llama", seed=1))


@pytest.mark.parametrize("mode", ["tis", "mask", "decoupled"])
@pytest.mark.parametrize("level", ["DAPO", "GSPO"])
def test_the_gradient_with_kl_and_entropy(level, mode):
    if (level, mode) != ("GSPO", "tis"):
        # under correction the KL's own ratio is still that to the policy of sampling
        kl = dict(kl_coef=0.3, kl_unbiased=level == "DAPO")
        algo = LEVELS[level] | kl | dict(entropy_coef=0.2)
        compare(algo, MODES[mode], tiny("llama", seed=1), mixed=mixes(level, mode))


def test_a_kl_in_the_reward_adds_nothing_to_the_loss():
    # what it does to the advantages is the business of train/credit.py
    algo = dict(name="reinforce_pp", kl_coef=0.3)
    compare(algo, {}, reference=tiny("llama", seed=1))


def test_the_formulas_differ():
    # every two of them have other gradients on this very batch: the comparison tells them apart
    for cases in (
        {mode: (LEVELS["DAPO"], correct, True) for mode, correct in MODES.items()},
        {level: (algo, {}, False) for level, algo in LEVELS.items()},
    ):
        found = {
            name: [step.gradient for step in two_steps(tiny("llama"), algo, correct, mixed=m)[2]]
            for name, (algo, correct, m) in cases.items()
        }
        for (one, ones), (other, others) in itertools.combinations(found.items(), 2):
            if {one, other} in ({"tis", "decoupled"}, {"tis uncapped", "decoupled uncapped"}):
                # where the proximal policy is the present one these two are the same formula
                assert_same(ones[0], others[0])
                ones, others = ones[1:], others[1:]
            for a, b in zip(ones, others, strict=True):
                assert (a - b).norm() > 1e-3 * a.norm(), (one, other)


def test_the_clip_and_the_cap_bind_somewhere_but_not_everywhere():
    model = tiny("llama")
    for level, algo in LEVELS.items():
        trainer = make_trainer(model, algo=algo, temperature=TEMPERATURE)
        trainer.version = VERSION
        _, metrics = gradients(trainer, stored_batch(model, mixed=False))
        assert 0.05 < metrics["clip_fraction"] < 0.95, level
    ratios = []
    for r in (r for made in stored_batch(model) for r in made.rollouts):
        c = r.completion
        with torch.no_grad():
            now, _ = plain(model, list(r.prompt.token_ids), c.token_ids, TEMPERATURE)
        ratios += [
            math.exp(a - b)
            for a, b, v, m in zip(
                now.tolist(), c.behaviour_logprobs, c.versions, c.loss_mask, strict=True
            )
            if m and v != VERSION
        ]
    assert 0.05 < sum(ratio > 2 for ratio in ratios) / len(ratios) < 0.95


# --- nothing stale ------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_without_stale_tokens_all_corrections_are_none(level):
    def steps(correct: dict) -> list[torch.Tensor]:
        model = tiny("llama")
        groups = stale_batch(mixed=False)
        for r in (r for made in groups for r in made.rollouts):
            r.completion.versions = [-1 if v == -1 else 0 for v in r.completion.versions]
        store(model, groups, noise=0.6, truncated=0.3)
        trainer = make_trainer(
            model,
            algo=LEVELS[level],
            correct=CorrectSection(**correct),
            epochs=2,
            learning_rate=2e-4,
        )
        return [taken.gradient for taken in walk(trainer, trainer.credit(groups)[0])]

    first, second = steps({})
    assert second.norm() > 1e-3 and not torch.equal(first, second)
    for mode in ("tis", "mask", "decoupled"):
        one, other = steps(dict(mode=mode) | (dict(max_lag=0) if mode == "mask" else {}))
        assert torch.equal(one, first), mode
        assert_same(other, second, 1e-12)


# --- forwards of the proximal policy ------------------------------------------------------------


@pytest.mark.parametrize(
    "correct, stale, settings, scoring, training",
    [
        ("decoupled", True, dict(epochs=2), 1, 2),
        ("decoupled", True, dict(minibatches=2), 1, 2),
        ("decoupled", True, dict(epochs=2, microbatch_tokens=1), 4, 8),  # the same budget
        ("decoupled", True, {}, 0, 1),  # its one step's own forward is that of the proximal policy
        ("decoupled", False, dict(epochs=2), 0, 2),
        ("tis", True, dict(epochs=2), 0, 2),
        ("mask", True, dict(epochs=2), 0, 2),
        ("none", True, dict(epochs=2), 0, 2),
    ],
)
def test_the_proximal_policy_is_scored_only_where_it_must_be(
    correct, stale, settings, scoring, training
):
    model = tiny("llama")
    groups = [group(0, [0.0, 1.0], [5, 7], prefix=2), group(1, [1.0, 0.0], [4, 4])]
    if stale:
        groups[1].rollouts[0].completion.versions[1] = -2
    trainer = make_trainer(model, correct=CorrectSection(mode=correct), **settings)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    credited, _ = trainer.credit(groups)
    assert len(calls) == scoring
    assert forwarded(trainer, scoring=True) == ([8, 8, 9, 11] if scoring else [])
    scored = [one.proximal is not None for part in credited for one in part]
    assert scored == [scoring > 0] * 4
    trainer.step(credited)
    assert len(calls) == scoring + training


def test_the_proximal_logprobs_are_those_before_the_first_step():
    model = tiny("llama")
    groups = stored_batch(model)
    trainer = make_trainer(
        model, temperature=TEMPERATURE, correct=CorrectSection(mode="decoupled"), epochs=2
    )
    trainer.version = VERSION
    for one in (one for part in trainer.credit(groups)[0] for one in part):
        r = one.rollout
        with torch.no_grad():
            now, _ = plain(model, list(r.prompt.token_ids), r.completion.token_ids, TEMPERATURE)
        assert one.proximal is not None
        torch.testing.assert_close(one.proximal, now, rtol=0, atol=1e-12)


# --- figures by lag -----------------------------------------------------------------------------


def offset_batch(model) -> list[Group]:
    """Ten trained tokens at version 20 whose log-ratios to their behaviour are known.

    Their lags, log-ratios and whose advantage is positive:
        rollout 0 (-): 0, 0 | 2: +0.5, -0.5, +0.125
        rollout 1 (+): 2: +0.25 | 8: -0.25 | 11: +0.75, +0.125 | 0
    """
    made = group(3, [0.0, 1.0], [6, 5], version=20)
    one, other = (r.completion for r in made.rollouts)
    one.versions[2:] = [18, 18, 18, 18]
    one.loss_mask[5] = False  # not trained on: counts nowhere
    other.versions[:4] = [18, 12, 9, 9]
    store(model, [made], noise=0.0)
    for c, off in (
        (one, [9.0, 9.0, 0.5, -0.5, 0.125, 7.0]),
        (other, [0.25, -0.25, 0.75, 0.125, 9.0]),
    ):
        c.logprobs = [x - o for x, o in zip(c.logprobs, off, strict=True)]
        c.behaviour_logprobs = list(c.logprobs)
    return [made]


def test_figures_by_lag():
    model = tiny("llama")
    trainer = make_trainer(model, algo=dict(clip_low=0.2, clip_high=0.2))
    trainer.version = 20
    _, metrics = gradients(trainer, offset_batch(model))
    e = math.exp

    def ess(*ratios: float) -> float:
        return sum(ratios) ** 2 / (len(ratios) * sum(x * x for x in ratios))

    expected = {
        "offpolicy_tokens": 7 / 10,
        "tokens_lag_0": 3 / 10,
        "tokens_lag_2": 4 / 10,
        "tokens_lag_8": 3 / 10,  # 8 and more
        "log_ratio_lag_0": 0.0,
        "log_ratio_lag_2": (0.5 + 0.5 + 0.125 + 0.25) / 4,
        "log_ratio_lag_8": (0.25 + 0.75 + 0.125) / 3,
        # a negative advantage binds below 0.8 = e^-0.22, a positive one above 1.2 = e^0.18
        "clip_fraction_lag_0": 0.0,
        "clip_fraction_lag_2": 2 / 4,
        "clip_fraction_lag_8": 1 / 3,
        "ess_lag_0": 1.0,
        "ess_lag_2": ess(e(0.5), e(-0.5), e(0.125), e(0.25)),
        "ess_lag_8": ess(e(-0.25), e(0.75), e(0.125)),
        "clip_fraction": 3 / 10,
    }
    by_lag = {k: v for k, v in metrics.items() if "_lag_" in k or k in expected}
    assert by_lag == pytest.approx(expected, abs=1e-10)


def test_figures_by_lag_are_of_the_law_drawn_from():
    # truncated sampling: the importance ratio is to what was drawn from, the clip to the full law
    model = tiny("llama")
    groups = offset_batch(model)
    for c in (r.completion for r in groups[0].rollouts):
        c.behaviour_logprobs = [x + 1.0 for x in c.behaviour_logprobs]
    trainer = make_trainer(model, algo=dict(clip_low=0.2, clip_high=0.2))
    trainer.version = 20
    _, metrics = gradients(trainer, groups)
    assert metrics["log_ratio_lag_2"] == pytest.approx((0.5 + 1.5 + 0.875 + 0.75) / 4)
    assert metrics["log_ratio_lag_0"] == 0.0
    assert metrics["clip_fraction_lag_2"] == 2 / 4


@pytest.mark.parametrize("stale_first", [False, True])
def test_figures_by_lag_do_not_depend_on_microbatches(stale_first):
    # one group without stale tokens, one with
    model = tiny("llama")
    groups = offset_batch(model)
    fresh = [group(7, [0.0, 1.0], [5, 7], version=20)]
    store(model, fresh, noise=0.0)
    groups = groups + fresh if stale_first else fresh + groups
    found = []
    for budget in (1000, 1):
        trainer = make_trainer(model, microbatch_tokens=budget)
        trainer.version = 20
        found.append(gradients(trainer, groups)[1])
    whole, split = ({k: v for k, v in one.items() if "lag" in k or "off" in k} for one in found)
    # 10 tokens as above and 12 more of lag 0
    assert whole["offpolicy_tokens"] == pytest.approx(7 / 22)
    assert whole["tokens_lag_0"] == pytest.approx(15 / 22)
    assert whole["tokens_lag_2"] == pytest.approx(4 / 22)
    assert split == pytest.approx(whole, abs=1e-10)


def test_no_figures_by_lag_where_nothing_is_stale():
    model = tiny("llama")
    _, metrics = gradients(make_trainer(model), [group(0, [0.0, 1.0], [5, 7], prefix=3)])
    assert metrics["offpolicy_tokens"] == 0.0
    assert not [name for name in metrics if "_lag_" in name]


# --- what a loss is an average of ---------------------------------------------------------------


def test_the_constant_average_is_over_the_limit():
    # 3 and 5 tokens at ratio 1 and advantages of -1/2 and 1/2 over 2 rollouts of the limit
    made = group(0, [0.0, 1.0], [3, 5])
    for limit in (MAX_TOKENS, 8):
        trainer = make_trainer(tiny("llama"), algo=dict(name="dr_grpo"), max_tokens=limit)
        _, metrics = gradients(trainer, [made])
        assert metrics["loss"] == pytest.approx(-(3 * -0.5 + 5 * 0.5) / (2 * limit))


def test_weights_count_like_copies():
    # a rollout of weight 2 is two of weight 1, in every average and every group statistic
    model = tiny("llama")
    groups = [group(0, [0.0, 1.0, 0.25], [5, 7, 3], version=-9, weights=[2.0, 1.0, 1.0])]
    store(model, groups, noise=0.6)
    twice = [Group(groups[0].prompt, [groups[0].rollouts[0], *groups[0].rollouts])]
    for average in ("token", "sequence", "constant"):
        algo = dict(advantage="dr_grpo", average=average)
        (weighted,), metrics = gradients(make_trainer(model, algo=algo), groups)
        for r in twice[0].rollouts:
            r.weight = 1.0
        (copied,), same = gradients(make_trainer(model, algo=algo), twice)
        groups[0].rollouts[0].weight = 2.0
        assert_same(weighted, copied)
        assert metrics["loss"] == pytest.approx(same["loss"])


def test_settings_of_a_credit_are_those_of_its_algorithm():
    # the helper of these tests, with which parts of a batch are credited
    made = group(0, [0.0, 1.0, 0.25], [5, 7, 3])
    trainer = make_trainer(tiny("llama"), algo=dict(name="rloo"))
    one, other = trainer.credit([made])[0][0], credit([made], name="rloo")[0]
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.advantages, b.advantages)
    assert AlgoSection(name="rloo") == trainer.algo
