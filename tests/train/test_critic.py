"""The critic's values and gradients are those written out; it trains beside the policy or in it."""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from reroll.config import CorrectSection, LoraSection, ModelSection
from reroll.errors import UserError
from reroll.model.load import load_model, load_tokenizer, switch_off_dropout
from reroll.model.lora import add_lora
from reroll.train.checkpoint import load, save
from reroll.train.credit import Credit
from reroll.train.critic import Critic
from reroll.train.trainer import Trainer
from reroll.types import Group
from tests.tiny import MIXTURES, tiny
from tests.train.batches import (
    assert_same,
    flat_gradient,
    forwarded,
    gradient_of,
    group,
    loop_loss,
    make_trainer,
    store,
)

TRUNKS = ["own", "shared"]


def batch(step: int = 0) -> list[Group]:
    """Given, masked and stale tokens, weights, an ungraded rollout, a group of equal rewards."""
    groups = [
        group(10 * step, [0.0, 1.0, 0.5], [5, 9, 3], weights=[1.0, 0.5, 2.0]),
        group(10 * step + 1, [1.0, None, 0.0], [6, 2, 7], prefix=2, prompt=6, version=-3),
        group(10 * step + 2, [0.5, 0.5], [4, 4]),
    ]
    groups[0].rollouts[1].completion.loss_mask[3:5] = [False] * 2
    return groups


def make_ppo(model: PreTrainedModel, trunk: str, *, spread: float = 0.1, **settings) -> Trainer:
    """PPO with a head that is not zero any more."""
    algo = dict(name="ppo", gamma=0.95, lam=0.9) | settings.pop("algo", {})
    critic = dict(trunk=trunk) | settings.pop("critic", {})
    trainer = make_trainer(model, algo=algo, critic=critic, **settings)
    assert trainer.critic is not None
    generator = torch.Generator().manual_seed(3)
    head = trainer.critic.head
    with torch.no_grad():
        for p in (head.weight, head.bias):
            p.copy_(spread * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return trainer


def critic_of(trainer: Trainer) -> Critic:
    assert trainer.critic is not None
    return trainer.critic


def plain_values(
    trunk: PreTrainedModel, head: torch.nn.Linear, context: Sequence[int], tokens: Sequence[int]
) -> torch.Tensor:
    """The value before each token from one unpadded forward, with gradient."""
    rows = torch.tensor([[*context, *tokens]])
    states = trunk(input_ids=rows, use_cache=False, output_hidden_states=True).hidden_states[-1]
    return states[0, len(context) - 1 : -1] @ head.weight[0] + head.bias


def loop_value_loss(
    trunk: PreTrainedModel, head: torch.nn.Linear, credited: list[list[Credit]], clip: float
) -> torch.Tensor:
    """The mean over trained tokens, by weight, token by token."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0.0
    for one in (one for part in credited for one in part):
        r = one.rollout
        values = plain_values(trunk, head, r.prompt.token_ids, r.completion.token_ids)
        assert one.values is not None and one.returns is not None
        for i, trained in enumerate(r.completion.loss_mask):
            if trained:
                old, aim = one.values[i].item(), one.returns[i].item()
                loss = (values[i] - aim) ** 2
                if clip:
                    kept = values[i].clamp(old - clip, old + clip)
                    loss = torch.maximum(loss, (kept - aim) ** 2)
                total = total + r.weight * loss / 2
                tokens += r.weight
    return total / tokens


class Both(NamedTuple):
    """An optimizer step: policy and critic that it started from, and their gradients."""

    model: PreTrainedModel
    critic: Critic
    gradient: torch.Tensor
    critic_gradient: torch.Tensor


def walk(trainer: Trainer, credited: list[list[Credit]], move: bool = True) -> list[Both]:
    """Train on a batch (or only look at the gradients); the optimizer steps that it took."""
    critic, taken = critic_of(trainer), []
    policy_step, critic_step = trainer.optimizer.step, critic.optimizer.step

    def spy() -> None:
        gradient = flat_gradient(trainer.model)
        policy, twin = copy.deepcopy((trainer.model, critic))
        taken.append(Both(policy, twin, gradient, flat_gradient(critic)))
        if move:
            policy_step()

    trainer.optimizer.step = spy
    critic.optimizer.step = critic_step if move else lambda: None
    try:
        trainer.step(credited)
    finally:
        trainer.optimizer.step, critic.optimizer.step = policy_step, critic_step
    return taken


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "qwen2_moe", "gpt_neox"])
def test_values_are_those_of_a_plain_forward(name, trunk):
    model = tiny(name)
    trainer = make_ppo(model, trunk, microbatch_tokens=40)
    found, _ = trainer.credit(batch())
    single = name in MIXTURES or name == "gemma2"  # computed in float32, if only a softmax
    for one in (one for part in found for one in part):
        r = one.rollout
        with torch.no_grad():
            expected = plain_values(
                model, critic_of(trainer).head, r.prompt.token_ids, r.completion.token_ids
            )
        # hidden states around 1, 32 of them by weights of 0.1
        torch.testing.assert_close(
            one.values, expected.double(), rtol=0, atol=1e-5 if single else 1e-12
        )
        assert one.values is not None and one.values.std() > 0.01
    assert all(p.grad is None for p in (*model.parameters(), *critic_of(trainer).parameters()))


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_head_begins_at_zero(trunk):
    trainer = make_trainer(
        tiny("llama"), algo=dict(name="ppo", whiten=False), critic=dict(trunk=trunk)
    )
    assert not any(p.any() for p in critic_of(trainer).head.parameters())
    found, _ = trainer.credit(batch())
    for one in (one for part in found for one in part):
        assert one.values is not None and not one.values.any()
        # gamma = lam = 1: credit is the reward, at every token
        assert one.advantages.tolist() == pytest.approx([one.rollout.reward] * len(one.mask))


def test_an_own_trunk_is_a_copy_and_a_shared_one_is_none():
    model = tiny("llama")
    own, shared = (critic_of(make_ppo(model, trunk)) for trunk in TRUNKS)
    assert shared.trunk is None and {*shared.trained} == {"head.weight", "head.bias"}
    mine, theirs = dict(own.named_parameters()), dict(model.named_parameters())
    pairs = [
        (p, theirs["model" + n.removeprefix("trunk")]) for n, p in mine.items() if "head" not in n
    ]
    assert len(pairs) == len(theirs) - 1  # all but the output head
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_scoring_is_one_forward_within_the_budget():
    groups = batch()
    lengths = [9, 13, 7, 12, 13, 8, 8]
    for trunk, correct, budget, count in (
        ("own", "none", 1000, (0, 1)),
        ("shared", "none", 1000, (1, 0)),
        ("shared", "none", 1, (7, 0)),
        # the stale tokens' proximal log-probs come out of the same forward
        ("shared", "decoupled", 1000, (1, 0)),
        ("own", "decoupled", 1000, (1, 1)),
    ):
        model = tiny("llama")
        trainer = make_ppo(
            model, trunk, correct=CorrectSection(mode=correct), epochs=2, microbatch_tokens=budget
        )
        calls = []
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append("policy"))
        if trunk == "own":
            critic_of(trainer).trunk.register_forward_pre_hook(
                lambda *_, calls=calls: calls.append("critic")
            )
        found, _ = trainer.credit(groups)
        assert (calls.count("policy"), calls.count("critic")) == count
        times = 2 if sum(count) == 2 else 1
        assert forwarded(trainer, scoring=True) == sorted(lengths * times)
        assert (found[0][0].proximal is not None) == (correct == "decoupled")


# --- gradients ----------------------------------------------------------------------------------


def head_and_trunk(both: Both, trunk: str) -> tuple[PreTrainedModel, torch.nn.Linear]:
    """A policy whose hidden states the values are made of, and the head."""
    if trunk == "shared":
        return both.model, both.critic.head
    assert both.critic.trunk is not None
    return both.critic.trunk, both.critic.head


@pytest.mark.parametrize("clip", [0.0, 0.02])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_gradients_are_those_of_the_losses_written_out(trunk, clip):
    # two epochs: in the second, values have moved, and the old ones are those before the first;
    # GPT-2 is float64 throughout, while Llama's norms round gradients to float32, here a sum of
    # two and there each by itself
    model = tiny("gpt2")
    groups = batch()
    store(model, groups, noise=0.6)
    trainer = make_ppo(
        model,
        trunk,
        critic=dict(clip=clip, coef=0.3, learning_rate=1e-3),
        epochs=2,
        learning_rate=2e-4,
        microbatch_tokens=50,
    )
    credited, _ = trainer.credit(groups)
    taken = walk(trainer, credited)
    assert len(taken) == 2
    for both in taken:
        policy = gradient_of(
            both.model, loop_loss(both.model, credited, trainer.algo, first=both is taken[0])
        )
        base, head = head_and_trunk(both, trunk)
        whole, alone = torch.nn.ModuleList([base, head]), both.critic
        value = gradient_of(whole, loop_value_loss(base, head, credited, clip))
        if trunk == "own":
            # what the critic learns does not touch the policy
            assert_same(both.gradient, policy)
            assert [*whole.parameters()] == [*alone.parameters()]
            assert_same(both.critic_gradient, value)
        else:
            split = len(policy)
            assert_same(both.gradient, policy + 0.3 * value[:split])
            assert_same(both.critic_gradient, value[split:])  # the head: the whole loss
            assert value[:split].norm() > 1e-2 * policy.norm()
    if clip:  # it binds in the second epoch: the gradient is another one without it
        base, head = head_and_trunk(taken[1], trunk)
        free = gradient_of(head, loop_value_loss(base, head, credited, 0.0))
        bound = gradient_of(head, loop_value_loss(base, head, credited, clip))
        assert (free - bound).norm() > 1e-3 * free.norm()


@pytest.mark.parametrize("trunk", TRUNKS)
def test_microbatches_and_checkpointing_change_nothing(trunk):
    found = []
    for settings in (
        dict(microbatch_tokens=1000),
        dict(microbatch_tokens=1),
        dict(microbatch_tokens=1000, gradient_checkpointing=True),
    ):
        model = tiny("gpt2")
        switch_off_dropout(model)  # as `load_model` does
        trainer = make_ppo(model, trunk, **settings)
        ((_, _, policy, critic),) = walk(trainer, trainer.credit(batch())[0], move=False)
        found.append((policy, critic))
        passes = 4 if "gradient_checkpointing" in settings else 3
        parts = 7 if settings["microbatch_tokens"] == 1 else 1
        work = [n for n, _ in trainer.take_work() if n > 1]
        assert work == [passes] * (parts * (2 if trunk == "own" else 1))
        assert not trainer.model.training
    for policy, critic in found[1:]:
        assert_same(policy, found[0][0])
        assert_same(critic, found[0][1])


@pytest.mark.parametrize("trunk", TRUNKS)
def test_figures_of_the_critic(trunk):
    trainer = make_ppo(tiny("llama"), trunk, microbatch_tokens=50, critic=dict(clip=0.2))
    found, _ = trainer.credit(batch())
    metrics = trainer.step(found)
    rows = [
        (value, aim)
        for one in (one for part in found for one in part)
        for value, aim, m in zip(one.values.tolist(), one.returns.tolist(), one.mask, strict=True)
        if m
    ]
    count = len(rows)
    assert metrics["value_loss"] == pytest.approx(sum((v - r) ** 2 for v, r in rows) / 2 / count)

    def variance(xs: list[float]) -> float:
        mean = sum(xs) / count
        return sum((x - mean) ** 2 for x in xs) / (count - 1)

    left = variance([r - v for v, r in rows]) / variance([r for _, r in rows])
    assert metrics["explained_variance"] == pytest.approx(1 - left)
    assert metrics["value_clip_fraction"] == 0.0 and metrics["critic_grad_norm"] > 0
    # an untaught critic explains nothing; a second epoch far from the old values is clipped
    trainer = make_ppo(
        tiny("llama"), trunk, spread=0.0, epochs=2, critic=dict(clip=0.001, learning_rate=0.1)
    )
    metrics = trainer.step(trainer.credit(batch())[0])
    assert metrics["value_clip_fraction"] > 0.1
    trainer = make_ppo(tiny("llama"), trunk, spread=0.0)
    metrics = trainer.step(trainer.credit(batch())[0])
    assert metrics["explained_variance"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_groups_of_equal_rewards_teach_the_critic(trunk):
    trainer = make_ppo(tiny("llama"), trunk, spread=0.0, algo=dict(gamma=1, lam=1))
    found, _ = trainer.credit([group(0, [0.5, 0.5], [4, 6])])
    ((_, _, policy, critic),) = walk(trainer, found, move=False)
    assert critic.norm() > 1e-3
    assert not policy.any()  # whitened, nothing is left, and a head of zeros hands nothing down


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_a_batch_of_next_to_no_trained_tokens(trunk, tokens):
    # replies that were cut off may be left out altogether (rollout.truncated = "mask")
    made = group(0, [1.0, 0.5], [3, 4])
    for r in made.rollouts:
        r.completion.loss_mask = [False] * len(r.completion.token_ids)
    made.rollouts[1].completion.loss_mask[3] = tokens == 1
    trainer = make_ppo(tiny("llama"), trunk)
    found, metrics = trainer.credit([made])
    metrics |= trainer.step(found)
    assert [name for name, value in metrics.items() if not math.isfinite(value)] == []
    assert metrics["skipped_steps"] == 0


@pytest.mark.parametrize("trunk", TRUNKS)
def test_teaching_the_critic_alone_brings_values_to_returns(trunk):
    trainer = make_trainer(
        tiny("llama", torch.float32),
        algo=dict(name="ppo"),
        critic=dict(
            trunk=trunk, warmup=99, learning_rate=3e-3 if trunk == "own" else 3e-2, clip=0.0
        ),
    )
    losses = []
    for _ in range(20):
        metrics = trainer.step(trainer.credit(batch())[0])
        losses.append(metrics["value_loss"])
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["explained_variance"] > 0.3


# --- steps --------------------------------------------------------------------------------------


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_warm_up_trains_the_critic_alone(trunk):
    model = tiny("llama")
    trainer = make_ppo(model, trunk, critic=dict(warmup=2), epochs=2, minibatches=2)
    policy = weights(model)
    for step in range(2):
        before = weights(critic_of(trainer))
        found, _ = trainer.credit(batch(step))
        trainer.take_work()
        metrics = trainer.step(found)
        assert same(weights(model), policy)
        assert trainer.version == 0 and trainer.state()["moments"] == {}
        assert not same(weights(critic_of(trainer)), before)
        assert metrics["grad_norm"] == 0.0 and metrics["critic_grad_norm"] > 0
        # 2 epochs of 2 minibatches: the critic alone is run, or the policy without a backward
        passes = 3 if trunk == "own" else 1
        assert [n for n, _ in trainer.take_work()] == [passes] * 4
        assert trainer.critic_steps == 4 * (step + 1)
    metrics = trainer.step(trainer.credit(batch(2))[0])
    assert trainer.version == 4 and metrics["grad_norm"] > 0
    assert not same(weights(model), policy)


def test_a_shared_trunk_gets_no_gradient_in_warm_up():
    trainer = make_ppo(tiny("llama"), "shared", critic=dict(warmup=1, coef=0.3, clip=0.0))
    credited, _ = trainer.credit(batch())
    critic, taken = critic_of(trainer), []
    critic.optimizer.step = lambda: taken.append(flat_gradient(critic))
    trainer.step(credited)
    value = loop_value_loss(trainer.model, critic.head, credited, 0.0)
    assert_same(taken[0], gradient_of(critic.head, value))
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("trunk", TRUNKS)
def test_rates_of_critic_and_policy(trunk):
    # one schedule, of its own peak for each: 4 steps of warm-up, then down to 0 after 8
    trainer = make_ppo(
        tiny("llama"),
        trunk,
        critic=dict(learning_rate=0.04),
        learning_rate=0.01,
        warmup=4,
        decay="linear",
        steps=8,
    )
    for share in (0.25, 0.5, 0.75, 1.0, 1.0, 0.75):
        before = weights(critic_of(trainer).head)
        metrics = trainer.step(trainer.credit(batch())[0])
        (settings,) = critic_of(trainer).optimizer.param_groups
        assert settings["lr"] == pytest.approx(0.04 * share)
        assert metrics["learning_rate"] == pytest.approx(0.01 * share)
        if share == 0.25:  # the first step of AdamW is rate * sign(gradient)
            moved = critic_of(trainer).head.weight - before["weight"]
            assert moved.abs().max().item() == pytest.approx(0.01, rel=1e-3)


def test_rates_where_the_critic_starts_earlier():
    # 6 batches of 2 epochs: 12 steps of the critic, of which the policy has the last 8
    trainer = make_ppo(
        tiny("llama"),
        "shared",
        critic=dict(learning_rate=0.04, warmup=2),
        learning_rate=0.01,
        decay="linear",
        steps=6,
        epochs=2,
    )
    rates = []
    for step in range(6):
        metrics = trainer.step(trainer.credit(batch())[0])
        (settings,) = critic_of(trainer).optimizer.param_groups
        # as left by the second epoch
        assert settings["lr"] == pytest.approx(0.04 * (1 - (2 * step + 1) / 12))
        rates.append(metrics["learning_rate"])
    assert rates == pytest.approx([0.01 * x / 8 for x in (8, 8, 7, 5, 3, 1)])
    assert trainer.version == 8 and trainer.critic_steps == 12


def test_settings_reach_the_critic_s_optimizer():
    critic = critic_of(make_ppo(tiny("llama"), "own", beta1=0.7, beta2=0.8, weight_decay=0.3))
    (settings,) = critic.optimizer.param_groups
    assert settings["betas"] == (0.7, 0.8) and settings["weight_decay"] == 0.3
    assert len(settings["params"]) == len(list(critic.parameters()))


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_critic_s_gradient_is_scaled_down_by_itself(trunk):
    found = []
    for limit in (1e12, 0.125):
        trainer = make_ppo(tiny("llama"), trunk, max_grad_norm=limit)
        (both,) = walk(trainer, trainer.credit(batch())[0], move=False)
        found.append((both.gradient, both.critic_gradient))
    for whole, scaled in zip(*found, strict=True):
        assert whole.norm() > 0.125
        # torch divides by norm + 1e-6
        assert scaled.norm().item() == pytest.approx(0.125, rel=1e-5)
        assert_same(scaled * (whole.norm() / scaled.norm()), whole)


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("part", ["policy", "critic"])
def test_a_step_is_skipped_for_both(trunk, part):
    trainer = make_ppo(tiny("llama", torch.float32), trunk)
    before = weights(trainer.model), weights(critic_of(trainer))
    found, _ = trainer.credit(batch())
    one = found[0][0]
    assert one.returns is not None
    (one.advantages if part == "policy" else one.returns)[2] = -math.inf
    metrics = trainer.step(found)
    assert metrics["skipped_steps"] == 1 and trainer.version == 1
    assert same(weights(trainer.model), before[0])
    assert same(weights(critic_of(trainer)), before[1])


# --- dtypes and adapters ------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_under_autocast(trunk, checkpointing):
    exact, _ = make_ppo(tiny("llama", torch.float32), trunk).credit(batch())
    trainer = make_ppo(
        tiny("llama", torch.float32),
        trunk,
        autocast=torch.bfloat16,
        gradient_checkpointing=checkpointing,
        critic=dict(learning_rate=1e-3),
        learning_rate=1e-3,
        epochs=2,
    )
    critic = critic_of(trainer)
    found, _ = trainer.credit(batch())
    for one, other in zip(found[0], exact[0], strict=True):
        assert one.values is not None and other.values is not None
        # hidden states are rounded by 2^-9 in each of a dozen products
        assert 0 < (one.values - other.values).abs().max() < 0.1 < other.values.abs().max()
    before = weights(trainer.model), weights(critic)
    taken = walk(trainer, found)
    assert len(taken) == 2
    for both in taken:
        for gradient in (both.gradient, both.critic_gradient):
            assert gradient.dtype == torch.float32
            assert gradient.isfinite().all() and gradient.norm() > 1e-3
    for module, old in zip((trainer.model, critic), before, strict=True):
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())
        assert not same(weights(module), old)


def test_values_under_autocast_are_float32_of_either_trunk():
    # a copy of the policy has its hidden states, and the head is no place to round: log-probs
    # are not rounded either
    own, shared = (
        make_ppo(tiny("llama", torch.float32), trunk, autocast=torch.bfloat16).credit(batch())[0]
        for trunk in TRUNKS
    )
    for part, other in zip(own, shared, strict=True):
        for a, b in zip(part, other, strict=True):
            assert a.values is not None and b.values is not None
            torch.testing.assert_close(a.values, b.values, rtol=0, atol=1e-5)
            assert not torch.equal(a.values, a.values.bfloat16().double())


@pytest.mark.parametrize("trunk", TRUNKS)
def test_with_adapters_only_they_and_the_head_are_trained(trunk):
    model = tiny("llama", torch.float32)
    add_lora(model, LoraSection(rank=2, targets=["q_proj", "down_proj"]), seed=0)
    trainer = make_ppo(model, trunk, spread=0.0, critic=dict(learning_rate=1e-2))
    critic = critic_of(trainer)
    adapters = [n for n in critic.trained if "lora_" in n]
    assert {*critic.trained} - {*adapters} == {"head.weight", "head.bias"}
    assert len(adapters) == (2 * 2 * 2 if trunk == "own" else 0)
    assert set(critic.state()["weights"]) == {*critic.trained}
    before = weights(critic)
    for step in range(3):
        trainer.step(trainer.credit(batch(step))[0])
    after = weights(critic)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {*critic.trained}
    assert trainer.passes == 2  # no gradient for the frozen weights
    assert all(p.grad is None for n, p in critic.named_parameters() if n not in critic.trained)


# --- state --------------------------------------------------------------------------------------


def in_vocabulary(groups: list[Group], size: int = 16) -> list[Group]:
    """The same with tokens below `size`."""
    for made in groups:
        prompt = type(made.prompt)(
            made.prompt.row, "", tuple(t % size for t in made.prompt.token_ids)
        )
        for r in made.rollouts:
            r.prompt = prompt
            r.completion.token_ids = [t % size for t in r.completion.token_ids]
    return groups


def train(trainer: Trainer, step: int) -> dict[str, float]:
    return trainer.step(trainer.credit(in_vocabulary(batch(step)))[0])


SETTINGS = dict(minibatches=2, epochs=2, steps=8, warmup=3, decay="cosine", weight_decay=0.1)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_training_goes_on_from_the_state_bitwise(trunk):
    def make(seed: int) -> Trainer:
        model = tiny("llama", torch.float32, seed=seed)
        return make_ppo(model, trunk, spread=0.1 + seed, critic=dict(warmup=2), **SETTINGS)

    trainer = make(0)
    for step in range(3):
        train(trainer, step)
    state = copy.deepcopy(trainer.state())
    # 4 optimizer steps a batch, of which the policy has sat out two batches
    assert (state["version"], state["batches"], state["critic_steps"]) == (4, 3, 12)
    kinds = ("step", "exp_avg", "exp_avg_sq")
    names = critic_of(trainer).trained
    assert {*state["critic"]["moments"]} == {f"{k}/{n}" for k in kinds for n in names}
    other = make(1)
    other.model.load_state_dict(weights(trainer.model))
    other.load_state(state)
    for step in range(3, 5):
        assert train(trainer, step) == train(other, step)
    assert other.critic_steps == trainer.critic_steps == 20
    assert same(weights(other.model), weights(trainer.model))
    assert same(weights(critic_of(other)), weights(critic_of(trainer)))


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_checkpoint_has_the_critic_too(trunk, project_folder, tmp_path):
    config = ModelSection(path=str(project_folder / "policy"), device="cpu")
    settings = SETTINGS | dict(critic=dict(warmup=2))
    trainer = make_ppo(load_model(config), trunk, **settings)
    train(trainer, 0)  # half of the warm-up
    path = save(tmp_path, 1, trainer, load_tokenizer(config), {})
    assert {"critic_weights.safetensors", "critic_moments.safetensors"} <= {
        p.name for p in path.iterdir()
    }
    other = make_ppo(load_model(config, path), trunk, spread=9.0, **settings)
    load(path, other)
    assert (other.version, other.batches) == (0, 1)
    for step in range(1, 4):
        assert train(trainer, step) == train(other, step)
        assert same(weights(other.model), weights(trainer.model))
        assert same(weights(critic_of(other)), weights(critic_of(trainer)))
    assert trainer.version == other.version == 2 * 4


def test_a_checkpoint_with_adapters_has_the_critic_s(project_folder, tmp_path):
    config = ModelSection(path=str(project_folder / "policy"), device="cpu")
    lora = LoraSection(rank=2, targets=["q_proj"])

    def policy(folder=None) -> PreTrainedModel:
        model = load_model(config)
        add_lora(model, lora, 0, folder)
        return model.eval()

    trainer = make_ppo(policy(), "own", **SETTINGS)
    train(trainer, 0)
    train(trainer, 1)
    path = save(tmp_path, 1, trainer, load_tokenizer(config), {})
    other = make_ppo(policy(path), "own", spread=9.0, **SETTINGS)
    load(path, other)
    for step in range(2, 4):
        assert train(trainer, step) == train(other, step)
    assert same(weights(other.model), weights(trainer.model))
    assert same(weights(critic_of(other)), weights(critic_of(trainer)))


@pytest.mark.parametrize(
    "spoil",
    ["weights", "moments", "own for shared", "shared for own", "no critic", "cut short"],
)
def test_a_checkpoint_of_another_critic_is_named(spoil, project_folder, tmp_path):
    config = ModelSection(path=str(project_folder / "policy"), device="cpu")
    kinds = {"own for shared": ("own", "shared"), "shared for own": ("shared", "own")}
    written, wanted = kinds.get(spoil, ("shared", "shared"))
    if spoil == "no critic":
        trainer = make_trainer(load_model(config))
    else:
        trainer = make_ppo(load_model(config), written)
    train(trainer, 0)
    path = save(tmp_path, 1, trainer, load_tokenizer(config), {})
    if spoil in ("weights", "moments"):
        (path / f"critic_{spoil}.safetensors").unlink()
    if spoil == "cut short":
        file = path / "critic_weights.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"^{path}: not a whole checkpoint \(.*delete this folder"):
        load(path, make_ppo(load_model(config), wanted))
