"""The trainer's gradient is that of the loss written out, whatever is done to make it cheap."""

import copy
import math
from collections import Counter

import pytest
import torch

from reroll.algo.advantage import grpo
from reroll.algo.noise import make_key
from reroll.config import AlgoSection
from reroll.engine.base import Finished
from reroll.engine.local import LocalEngine
from reroll.train import trainer as trainer_module
from reroll.train.credit import Credit
from reroll.train.trainer import MAX_SKIPPED, Diverged
from reroll.types import Group, Prompt, Request, Rollout, Sampling
from tests.model.plain import plain
from tests.tiny import VOCABULARY, tiny
from tests.train.batches import (
    assert_same,
    credit,
    flat_gradient,
    forwarded,
    gradient_of,
    gradients,
    group,
    loop_loss,
    make_trainer,
    store,
    walk,
)

AVERAGES = ["token", "sequence", "constant"]


def mixed_batch() -> list[Group]:
    """All that can stand in a batch: prefixes, stale tokens, dead groups, ungraded rollouts."""
    groups = [
        group(0, [0.0, 1.0, 0.5], [5, 9, 3]),
        group(1, [1.0, 1.0], [4, 4]),  # dead
        group(2, [1.0, None, 0.0], [6, 2, 7], prefix=2, version=-7),
        group(3, [None, None], [3, 3]),
        group(4, [0.25, 1.0], [8, 1], prompt=7),
        group(5, [0.0, 2.0], [6, 6]),
    ]
    # tokens of three policies in one rollout, as after interruptions
    groups[0].rollouts[1].completion.versions[:4] = [-5, -5, -3, -3]
    # a truncated rollout under rollout.truncated = "mask"
    groups[5].rollouts[0].completion.loss_mask = [False] * 6
    return groups


# --- the gradient -------------------------------------------------------------------------------


def test_a_step_makes_rewarded_tokens_likelier():
    model = tiny("llama")
    made = group(0, [0.0, 1.0], [5, 5])
    good, bad = (r.completion.token_ids for r in reversed(made.rollouts))
    context = list(made.prompt.token_ids)

    def margin() -> float:
        with torch.no_grad():
            return (plain(model, context, good)[0] - plain(model, context, bad)[0]).sum().item()

    before = margin()
    make_trainer(model, learning_rate=1e-3).step(credit([made]))
    assert margin() > before + 0.1


@pytest.mark.parametrize("average", AVERAGES)
def test_microbatches_change_nothing(average):
    model = tiny("qwen3")
    groups = mixed_batch()
    store(model, groups, noise=0.6)
    found, losses, counts = [], [], []
    for budget in (1_000_000, 70, 64, 1):
        calls = []
        hook = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer = make_trainer(model, algo=dict(average=average), microbatch_tokens=budget)
        (gradient,), metrics = gradients(trainer, groups)
        hook.remove()
        found.append(gradient)
        losses.append(metrics["loss"])
        counts.append(len(calls))
    assert counts == [1, 3, 3, 9]
    for gradient, loss in zip(found[1:], losses[1:], strict=True):
        assert_same(gradient, found[0])
        assert loss == pytest.approx(losses[0], rel=1e-10)


@pytest.mark.parametrize("average", AVERAGES)
def test_skipped_groups_change_nothing(average, monkeypatch):
    model = tiny("qwen3")
    groups = mixed_batch()
    store(model, groups, noise=0.6)
    trainer = make_trainer(model, algo=dict(average=average))
    (skipped,), metrics = gradients(trainer, groups)
    lengths = forwarded(trainer)
    original = trainer_module.minibatches
    monkeypatch.setattr(trainer_module, "minibatches", lambda *a: original(*a[:3], False, *a[4:]))
    trainer = make_trainer(model, algo=dict(average=average))
    (run,), all_metrics = gradients(trainer, groups)
    assert_same(skipped, run)
    # the two rollouts of group 1 of prompt + completion 8; ungraded ones are never run
    assert Counter(forwarded(trainer)) - Counter(lengths) == Counter({8: 2})
    assert len(lengths) == 9 and metrics["tokens_trained"] == 51
    assert metrics["live_groups"] == all_metrics["live_groups"] == 4 / 6


@pytest.mark.parametrize("algo", [dict(kl_coef=0.1), dict(entropy_coef=0.1)])
def test_dead_groups_are_run_where_they_have_a_gradient(algo):
    model = tiny("llama")
    reference = tiny("llama", seed=1) if "kl_coef" in algo else None
    trainer = make_trainer(model, algo=algo, reference=reference)
    (gradient,), _ = gradients(trainer, [group(1, [1.0, 1.0], [4, 4])])
    assert forwarded(trainer) == [8, 8]
    assert gradient.norm() > 1e-3


def test_a_batch_without_signal_takes_no_step():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(model, weight_decay=0.1)
    metrics = trainer.step(credit([group(1, [1.0, 1.0], [4, 4])]))
    assert trainer.version == 1 and trainer.take_work() == []
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped_steps"] == 0.0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_ungraded_rollouts_are_left_out():
    model = tiny("llama")
    made = group(0, [0.0, None, 1.0, None], [5, 6, 7, 8])
    fewer = copy.deepcopy(made)
    fewer.rollouts = [r for r in fewer.rollouts if r.reward is not None]
    for average in AVERAGES:
        trainer = make_trainer(model, algo=dict(average=average))
        (gradient,), _ = gradients(trainer, [made])
        assert forwarded(trainer) == [9, 11]
        trainer = make_trainer(model, algo=dict(average=average))
        assert_same(gradient, gradients(trainer, [fewer])[0][0])


@pytest.mark.parametrize("algo", [{}, dict(average="token"), dict(entropy_coef=0.5)])
def test_given_tokens_get_no_gradient(algo):
    # of each rollout only the last token is trained on: the gradient is that of these two alone
    model = tiny("llama")
    made = group(0, [0.0, 1.0], [5, 5], prefix=4)
    (gradient,), metrics = gradients(make_trainer(model, algo=algo), [made])
    loss = torch.zeros((), dtype=torch.float64)
    for r, advantage in zip(made.rollouts, grpo([0.0, 1.0]), strict=True):
        context = [*made.prompt.token_ids, *r.completion.token_ids[:4]]
        logprob, entropy = plain(model, context, r.completion.token_ids[4:])
        loss = loss - advantage * logprob.sum() / 2
        loss = loss - algo.get("entropy_coef", 0.0) * entropy.sum() / 2
    assert_same(gradient, gradient_of(model, loss))
    assert metrics["tokens_trained"] == 10  # forwarded, though not credited


# --- old log-probs ------------------------------------------------------------------------------


def test_tokens_of_the_current_version_have_ratio_one():
    # stored log-probs are wrong by a factor of e^3, and do not matter
    model = tiny("llama")
    groups = [group(0, [0.0, 1.0], [5, 7]), group(1, [1.0, 0.0], [3, 4])]
    store(model, groups, noise=3.0)
    trainer = make_trainer(model, algo=dict(average="token"))
    (gradient,), metrics = gradients(trainer, groups)
    assert metrics["clip_fraction"] == 0.0 and metrics["approx_kl"] == 0.0
    store(model, groups, noise=0.0)
    (expected,), _ = gradients(make_trainer(model, algo=dict(average="token")), groups)
    assert torch.equal(gradient, expected)
    # ratios of 1: the loss is -mean(advantage), token by token
    down, up = grpo([0.0, 1.0])
    assert metrics["loss"] == pytest.approx(-(5 * down + 7 * up + 3 * up + 4 * down) / 19)


@pytest.mark.parametrize("version, current", [(0, 0), (5, 5), (5, 0), (0, 5)])
def test_tokens_of_other_versions_take_stored_logprobs(version, current):
    model = tiny("llama")
    groups = [group(0, [0.0, 1.0], [5, 7], version=version)]
    store(model, groups, noise=0.6)
    trainer = make_trainer(model)
    trainer.version = current
    (gradient,), metrics = gradients(trainer, groups)
    loss = loop_loss(model, credit(groups), AlgoSection(), version=current)
    assert_same(gradient, gradient_of(model, loss))
    assert (metrics["clip_fraction"] > 0) == (version != current)


def test_later_minibatches_take_stored_logprobs():
    model = tiny("llama")
    groups = [group(row, [0.0, 1.0], [5, 7]) for row in range(3)]
    store(model, groups, noise=0.6)
    trainer = make_trainer(model, minibatches=3)
    taken, _ = gradients(trainer, groups)
    assert len(taken) == trainer.version == 3
    for index, gradient in enumerate(taken):
        part = credit(groups[index : index + 1])
        loss = loop_loss(model, part, AlgoSection(), first=index == 0)
        assert_same(gradient, gradient_of(model, loss))
    # however their versions are numbered
    for r in groups[2].rollouts:
        r.completion.versions = [2] * len(r.completion.versions)
    trainer = make_trainer(model, minibatches=3)
    taken, _ = gradients(trainer, groups)
    loss = loop_loss(model, credit(groups[2:]), AlgoSection(), first=False)
    assert_same(taken[2], gradient_of(model, loss))


def test_epochs_take_the_same_minibatches_again():
    # 2 epochs of 2 minibatches: 4 optimizer steps; only the first has ratio 1 throughout
    groups = [group(row, [0.0, 1.0], [5, 7]) for row in range(4)]
    model = tiny("llama")
    store(model, groups, noise=0.0)
    trainer = make_trainer(model, minibatches=2, epochs=2, learning_rate=3e-3)
    taken = walk(trainer, trainer.credit(groups)[0])
    assert len(taken) == trainer.version == 4
    halves = [credit(groups[:2]), credit(groups[2:])]
    for index, (policy, gradient) in enumerate(taken):
        loss = loop_loss(policy, halves[index % 2], AlgoSection(), first=index == 0)
        assert_same(gradient, gradient_of(policy, loss))
    # a third epoch would see ratios away from 1, and clips them
    other = make_trainer(copy.deepcopy(model))
    other.version = 4
    _, metrics = gradients(other, groups)
    assert metrics["approx_kl"] > 1e-3 and metrics["clip_fraction"] > 0.1
    assert len(forwarded(trainer)) == 2 * 8


def test_metrics_of_several_epochs_are_those_of_all_their_steps():
    model = tiny("llama")
    groups = [group(row, [0.0, 1.0], [5, 7]) for row in range(2)] + [group(2, [1.0, 1.0], [4, 4])]
    store(model, groups, noise=0.6)
    one = make_trainer(model, minibatches=1, epochs=2)
    taken, metrics = gradients(one, groups)  # the weights stay
    assert metrics["grad_norm"] == pytest.approx(sum(g.norm().item() for g in taken) / 2)
    assert metrics["tokens_trained"] == 2 * 24 and metrics["live_groups"] == 2 / 3
    # the first step has ratio 1, the second that of the stored log-probs
    for r in (r for made in groups for r in made.rollouts):
        r.completion.versions = [-9] * len(r.completion.versions)
    _, later = gradients(make_trainer(model), groups)
    assert metrics["clip_fraction"] == pytest.approx(later["clip_fraction"] / 2)
    assert later["clip_fraction"] > 0.1


# --- learning rate and clipping -----------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, rates",
    [
        (dict(steps=4), {0: 1.0, 3: 1.0, 99: 1.0}),
        (dict(steps=10, warmup=4), {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 1.0}),
        (dict(steps=4, decay="linear"), {0: 1.0, 1: 0.75, 2: 0.5, 3: 0.25, 4: 0.0, 9: 0.0}),
        # 5 steps of 2 minibatches: 10 optimizer steps, of which 2 warm up
        (
            dict(steps=5, minibatches=2, warmup=2, decay="linear"),
            {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.75, 6: 0.5, 9: 0.125, 10: 0.0},
        ),
        (
            dict(steps=6, decay="cosine"),
            {0: 1.0, 1: (1 + math.sqrt(0.75)) / 2, 2: 0.75, 3: 0.5, 4: 0.25, 6: 0.0, 8: 0.0},
        ),
        (dict(steps=2, warmup=4, decay="cosine"), {0: 0.25, 3: 1.0, 4: 1.0, 5: 0.0}),
        # 2 steps of 3 epochs of 2 minibatches: 12 optimizer steps
        (
            dict(steps=2, epochs=3, minibatches=2, decay="linear"),
            {0: 1.0, 3: 0.75, 6: 0.5, 9: 0.25, 11: 1 / 12, 12: 0.0},
        ),
    ],
)
def test_learning_rates(settings, rates):
    trainer = make_trainer(tiny("llama"), learning_rate=0.25, **settings)
    for version, share in rates.items():
        assert trainer.learning_rate(version) == pytest.approx(0.25 * share, abs=1e-12)


def test_steps_are_taken_at_the_learning_rate():
    # the first step of AdamW is rate * sign(gradient)
    model = tiny("llama")
    credited = credit([group(0, [0.0, 1.0], [5, 7])])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = make_trainer(model, learning_rate=0.01, warmup=4, steps=9)
    metrics = trainer.step(credited)
    assert metrics["learning_rate"] == pytest.approx(0.0025)
    moved = torch.cat([(v - before[k]).flatten() for k, v in model.state_dict().items()])
    assert moved.abs().max().item() == pytest.approx(0.0025, rel=1e-3)
    metrics = trainer.step(credited)
    assert metrics["learning_rate"] == pytest.approx(0.005)


def test_settings_reach_the_optimizer():
    trainer = make_trainer(tiny("llama"), beta1=0.7, beta2=0.8, weight_decay=0.3)
    (settings,) = trainer.optimizer.param_groups
    assert settings["betas"] == (0.7, 0.8) and settings["weight_decay"] == 0.3
    assert isinstance(trainer.optimizer, torch.optim.AdamW)


def test_gradients_are_scaled_down_to_their_limit():
    model = tiny("llama")
    groups = [group(0, [0.0, 1.0], [5, 7])]
    (whole,), metrics = gradients(make_trainer(model), groups)
    assert metrics["grad_norm"] == pytest.approx(whole.norm().item())
    (scaled,), metrics = gradients(make_trainer(model, max_grad_norm=0.125), groups)
    # torch divides by norm + 1e-6
    assert scaled.norm().item() == pytest.approx(0.125, rel=1e-5)
    assert_same(scaled * (whole.norm() / scaled.norm()), whole)
    assert metrics["grad_norm"] == pytest.approx(whole.norm().item())


# --- numbers that are not finite ----------------------------------------------------------------


def exploding() -> list[list[Credit]]:
    """One token of infinite discredit: an infinite loss, and a gradient that is no number."""
    credited = credit([group(0, [0.0, 1.0], [5, 7], version=-9)])
    credited[0][0].advantages[2] = -math.inf
    return credited


def good() -> list[list[Credit]]:
    return credit([group(1, [0.0, 1.0], [5, 7], version=-9), group(2, [1.0, 0.0], [3, 3])])


def snapshot(trainer) -> dict[str, torch.Tensor]:
    state = {f"model/{k}": v for k, v in trainer.model.state_dict().items()}
    return {k: v.clone() for k, v in (state | trainer.state()["moments"]).items()}


def assert_unchanged(trainer, before: dict[str, torch.Tensor]) -> None:
    after = snapshot(trainer)
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("microbatch_tokens", [1, 1000])
def test_an_infinite_loss_skips_the_step(microbatch_tokens):
    trainer = make_trainer(tiny("llama", torch.float32), microbatch_tokens=microbatch_tokens)
    metrics = trainer.step(good())
    assert metrics["skipped_steps"] == 0 and math.isfinite(metrics["loss"])
    before = snapshot(trainer)
    metrics = trainer.step([*exploding(), *good()])
    assert_unchanged(trainer, before)
    assert metrics["loss"] == math.inf and metrics["skipped_steps"] == 1
    assert (trainer.version, trainer.skipped_in_a_row) == (2, 1)
    # nothing of it is left in the next step: it is that of a trainer that never saw it
    other = make_trainer(copy.deepcopy(trainer.model), microbatch_tokens=microbatch_tokens)
    other.load_state(copy.deepcopy(trainer.state()))
    metrics = trainer.step(good())
    other.step(good())
    assert metrics["skipped_steps"] == 0 and trainer.skipped_in_a_row == 0
    assert_unchanged(other, snapshot(trainer))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(value):
    trainer = make_trainer(tiny("llama", torch.float32))
    trainer.step(good())
    before = snapshot(trainer)
    parameter = list(trainer.parameters.values())[3]
    spoilt = parameter.register_hook(lambda g: g.index_fill(0, torch.tensor(0), value))
    metrics = trainer.step(good())
    assert_unchanged(trainer, before)
    assert math.isfinite(metrics["loss"]) and not math.isfinite(metrics["grad_norm"])
    assert metrics["skipped_steps"] == 1
    spoilt.remove()
    metrics = trainer.step(good())
    assert metrics["skipped_steps"] == 0
    with pytest.raises(AssertionError):
        assert_unchanged(trainer, before)


def test_a_loss_that_is_not_finite_skips_the_step_whatever_its_gradient(monkeypatch):
    trainer = make_trainer(tiny("llama", torch.float32))
    before = snapshot(trainer)
    loss = trainer.policy_loss
    monkeypatch.setattr(trainer, "policy_loss", lambda *args: loss(*args) + math.nan)
    metrics = trainer.step(good())
    assert_unchanged(trainer, before)
    assert math.isfinite(metrics["grad_norm"]) and metrics["skipped_steps"] == 1


@pytest.mark.parametrize("algo", [{}, dict(name="rloo"), dict(name="gspo")])
def test_a_ratio_beyond_float32_is_no_infinity(algo):
    # a token that has become e^1000 times likelier, with credit of either sign
    groups = [group(0, [0.0, 1.0], [5, 7], version=-9), group(1, [1.0, 0.0], [4, 4], version=-9)]
    for made in groups:
        made.rollouts[0].completion.logprobs[2] = -1000.0
        made.rollouts[0].completion.behaviour_logprobs[2] = -1000.0
    trainer = make_trainer(tiny("llama", torch.float32), algo=algo)
    (gradient,), metrics = gradients(trainer, groups)
    assert gradient.isfinite().all() and gradient.norm() > 0
    assert metrics["skipped_steps"] == 0
    assert [name for name, value in metrics.items() if not math.isfinite(value)] == []


def test_the_third_skip_in_a_row_stops_the_run():
    trainer = make_trainer(tiny("llama", torch.float32))
    before = snapshot(trainer)
    trainer.step(exploding())
    trainer.step(exploding())
    with pytest.raises(Diverged, match=r"not finite 3 optimizer steps in a row \(loss inf"):
        trainer.step(exploding())
    assert_unchanged(trainer, before)
    assert MAX_SKIPPED == 3


def test_a_good_step_between_starts_the_count_again():
    trainer = make_trainer(tiny("llama", torch.float32))
    for batch in (exploding(), exploding(), good(), exploding(), exploding()):
        trainer.step(batch)
    assert trainer.skipped_in_a_row == 2
    # minibatches count one by one
    trainer = make_trainer(tiny("llama", torch.float32), minibatches=3)
    with pytest.raises(Diverged):
        trainer.step(exploding() * 3)
    trainer = make_trainer(tiny("llama", torch.float32), minibatches=3)
    metrics = trainer.step([*exploding(), *good()[:1], *exploding()])
    assert metrics["skipped_steps"] == 2 and trainer.skipped_in_a_row == 1


# --- gradient checkpointing ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt"])
def test_gradient_checkpointing_changes_nothing(name):
    model = tiny(name)
    if name == "gpt2":
        assert model.config.resid_pdrop == model.config.attn_pdrop == 0.1
    groups = mixed_batch()
    store(model, groups, noise=0.6)
    (expected,), _ = gradients(make_trainer(model), groups)
    trainer = make_trainer(tiny(name), gradient_checkpointing=True)
    inner = next(
        m for n, m in trainer.model.named_modules() if ".0." in n and not any(m.children())
    )
    calls = []
    inner.register_forward_hook(lambda *_: calls.append(1))
    (got,), _ = gradients(trainer, groups)
    assert len(calls) == 2  # once more in the backward pass
    assert not trainer.model.training  # it is the engine's module too
    # Gemma 2 has a softmax in float32
    assert_same(got, expected, 1e-6 if name == "gemma2" else 1e-10)


# --- KL and entropy -----------------------------------------------------------------------------


def test_kl_pulls_towards_the_reference():
    model, reference = tiny("llama"), tiny("llama", seed=1)
    made = group(0, [1.0, 1.0], [6, 8])  # dead: nothing but the KL term

    def distances() -> torch.Tensor:
        """k3, token by token."""
        parts = []
        for r in made.rollouts:
            pair = list(made.prompt.token_ids), r.completion.token_ids
            with torch.no_grad():
                initial = plain(reference, *pair)[0]
            d = initial - plain(model, *pair)[0]
            parts.append(d.exp() - d - 1)
        return torch.cat(parts)

    algo = dict(average="token", kl_coef=0.5)
    trainer = make_trainer(model, algo=algo, reference=reference, learning_rate=1e-3)
    (gradient,), metrics = gradients(trainer, [made])
    before = distances().mean()
    assert_same(gradient, gradient_of(model, 0.5 * before))
    assert metrics["kl"] == pytest.approx(before.item(), rel=1e-10)
    assert all(p.grad is None for p in reference.parameters())
    trainer.step(trainer.credit([made])[0])
    assert distances().mean() < before


def test_the_entropy_bonus_raises_entropy():
    model = tiny("llama")
    made = group(0, [1.0, 1.0], [6, 8])

    def entropy() -> torch.Tensor:
        context = list(made.prompt.token_ids)
        parts = [plain(model, context, r.completion.token_ids)[1] for r in made.rollouts]
        return torch.cat(parts).mean()

    algo = dict(average="token", entropy_coef=0.5)
    trainer = make_trainer(model, algo=algo, learning_rate=1e-3)
    (gradient,), metrics = gradients(trainer, [made])
    before = entropy()
    assert_same(gradient, gradient_of(model, -0.5 * before))
    assert metrics["entropy_exact"] == pytest.approx(before.item(), rel=1e-10)
    trainer.step(credit([made]))
    assert entropy() > before


# --- the engine's log-probs ---------------------------------------------------------------------


def engine_batch(model, autocast: torch.dtype | None = None, temperature=0.8) -> list[Group]:
    """Twelve rollouts drawn by the embedded engine, with its log-probs."""
    engine = LocalEngine(model, slots=5, capacity=64, autocast=autocast)
    sampling = Sampling(max_tokens=24, temperature=temperature, stop_ids=(0,))
    prompts = [
        Prompt(row, "", tuple((7 * row + 3 * i + 1) % VOCABULARY for i in range(3 + row)))
        for row in range(3)
    ]
    for number in range(12):
        row, index = divmod(number, 4)
        key = make_key(0, "train", row, index, 0)
        engine.submit(Request(number, prompts[row].token_ids, key, sampling))
    done = {}
    while len(done) < 12:
        for event in engine.step():
            assert isinstance(event, Finished)
            done[event.completion.request_id] = event.completion
    return [
        Group(
            prompt,
            [Rollout(prompt, i, 0, done[4 * prompt.row + i], reward=i % 2) for i in range(4)],
        )
        for prompt in prompts
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_engine_and_the_trainer_agree_in_float32(name):
    model = tiny(name, torch.float32)
    groups = engine_batch(model)
    trainer = make_trainer(model, temperature=0.8, check_logprobs=True, microbatch_tokens=200)
    _, metrics = gradients(trainer, groups)
    # logits up to 8 have spacing 5e-7; some tens of roundings go into each
    assert 0 < metrics["logprob_difference_mean"] < 5e-6
    assert metrics["logprob_difference_mean"] < metrics["logprob_difference_max"] < 5e-5
    # at another temperature, or off by one version of the weights, they do not
    other = make_trainer(model, temperature=1.0, check_logprobs=True)
    assert gradients(other, groups)[1]["logprob_difference_mean"] > 0.05


def test_the_difference_is_that_of_stored_and_recomputed():
    model = tiny("llama")
    groups = engine_batch(model)
    logprobs = groups[0].rollouts[1].completion.logprobs
    logprobs[3] += 0.25
    tokens = sum(len(r.completion.token_ids) for made in groups for r in made.rollouts)
    trainer = make_trainer(model, temperature=0.8, check_logprobs=True)
    _, metrics = gradients(trainer, groups)
    # the engine's log-probs are float32
    assert metrics["logprob_difference_max"] == pytest.approx(0.25, abs=1e-6)
    assert metrics["logprob_difference_mean"] == pytest.approx(0.25 / tokens, abs=1e-6)
    _, metrics = gradients(make_trainer(model, temperature=0.8), groups)
    assert "logprob_difference_max" not in metrics


def test_the_engine_and_the_trainer_agree_under_autocast():
    model = tiny("llama", torch.float32)
    groups = engine_batch(model, autocast=torch.bfloat16)
    # bfloat16 rounds logits between 2 and 4 by 2^-8 = 0.004 on average, in either forward, and
    # the temperature blows that up; the largest of 250 tokens has some more
    same = make_trainer(model, temperature=0.8, check_logprobs=True, autocast=torch.bfloat16)
    _, metrics = gradients(same, groups)
    assert 0 < metrics["logprob_difference_mean"] < 0.01
    assert metrics["logprob_difference_max"] < 0.1
    # a trainer in float32 would not meet that bound: it lacks what both round alike
    exact = make_trainer(model, temperature=0.8, check_logprobs=True)
    assert gradients(exact, groups)[1]["logprob_difference_mean"] > 0.01


# --- state --------------------------------------------------------------------------------------


def test_training_goes_on_from_its_state_bitwise():
    def batch(step: int) -> list[list[Credit]]:
        groups = [group(10 * step + row, [0.0, 1.0, 0.5], [5, 7, 2]) for row in range(4)]
        return credit(groups)

    settings = dict(steps=6, warmup=2, decay="cosine", weight_decay=0.1, minibatches=2)
    trainer = make_trainer(tiny("llama", torch.float32), **settings)
    for step in range(3):
        trainer.step(batch(step))
    trainer.skipped_in_a_row = 1
    weights = copy.deepcopy(trainer.model.state_dict())
    state = copy.deepcopy(trainer.state())
    trainer.skipped_in_a_row = 0
    assert (state["version"], state["batches"], state["skipped_in_a_row"]) == (6, 3, 1)
    names = {name for name, _ in trainer.model.named_parameters()}
    assert set(state["moments"]) == {
        f"{kind}/{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in names
    }

    other = make_trainer(tiny("llama", torch.float32, seed=5), **settings)
    other.model.load_state_dict(weights)
    other.load_state(state)
    assert (other.version, other.batches, other.skipped_in_a_row) == (6, 3, 1)
    for step in range(3, 6):
        assert trainer.step(batch(step)) == other.step(batch(step))
    assert_unchanged(other, snapshot(trainer))
    assert trainer.state().keys() == other.state().keys()


def test_the_state_of_a_new_trainer_is_empty():
    trainer = make_trainer(tiny("llama"))
    counters = dict(version=0, batches=0, critic_steps=0, skipped_in_a_row=0)
    shares = [False, True, True]
    nothing = {"moments": {}, "critic": {}, "running": {"every": [0.0, 0.0], "prompts": {}}}
    assert trainer.state() == counters | nothing | {"shares": shares}
    other = make_trainer(tiny("llama"))
    other.load_state(trainer.state())
    assert other.state() == trainer.state()


def test_frozen_parameters_stay_as_they_are():
    model = tiny("gpt2")
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    frozen = model.get_input_embeddings().weight.clone()
    trainer = make_trainer(model)
    trainer.step(credit([group(0, [0.0, 1.0], [5, 7])]))
    assert torch.equal(model.get_input_embeddings().weight, frozen)
    assert not any("wte" in name for name in trainer.state()["moments"])
    assert flat_gradient(model).norm() > 0


@pytest.mark.parametrize("name", ["gspo", "rloo", "grpo"])
def test_in_bfloat16_the_ratio_of_later_steps_is_not_rounding(name):
    # stored log-probs are off as those of other forwards are; the policy does not move
    model = tiny("llama", torch.float32)
    groups = [group(row, [0.0, 1.0], [15, 9]) for row in range(3)]
    store(model, groups, noise=0.05)
    made = credit(groups)
    settings = dict(algo=dict(name=name), minibatches=3, learning_rate=1e-30)
    trainer = make_trainer(model, autocast=torch.bfloat16, **settings)
    metrics = trainer.step(made)
    assert metrics["clip_fraction"] == metrics["approx_kl"] == 0.0
    passes = [count for count, _ in trainer.take_work()]
    assert passes == [1, 1, 1, 3, 3, 3]
    # one step a batch needs no such scoring; float32 takes the stored ones
    trainer = make_trainer(model, autocast=torch.bfloat16, **settings | dict(minibatches=1))
    trainer.step(made)
    assert [count for count, _ in trainer.take_work()] == [3]
    assert make_trainer(model, **settings).step(made)["approx_kl"] > 0


def test_a_minibatch_without_signal_leaves_the_next_one_first():
    model = tiny("llama")
    dead, live = group(0, [1.0, 1.0], [5, 7]), group(1, [0.0, 1.0], [5, 7])
    store(model, [dead, live], noise=0.6)
    made = credit([dead, live])
    trainer = make_trainer(model, minibatches=2)
    metrics = trainer.step(made)
    assert trainer.version == 2 and metrics["approx_kl"] == 0.0
