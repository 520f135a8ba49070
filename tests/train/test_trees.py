"""What rollouts begin with alike is run once, and no algorithm notices."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from reroll.config import CorrectSection, LoraSection
from reroll.model.flops import CostModel, cost_model
from reroll.model.load import switch_off_dropout
from reroll.model.lora import add_lora
from reroll.train.batch import minibatches
from reroll.train.forwards import Shares
from reroll.train.trainer import Trainer
from reroll.types import Group, Prompt
from tests.tiny import ATTENTION_FREE, VOCABULARY, flex, tiny, wide
from tests.train.batches import assert_same, credit, gradients, make_trainer, rollout, store
from tests.train.test_critic import make_ppo, walk


def ragged() -> list[Group]:
    """Groups whose rollouts begin alike, identical and one-token rollouts, one of n = 1, given,
    masked and stale tokens, an ungraded rollout."""
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    def made(row: int, replies: list[list[int]], rewards: list[float | None], **how) -> Group:
        prompt = Prompt(row, f"problem {row}", (7, *tokens(4)))
        pairs = zip(replies, rewards, strict=True)
        return Group(prompt, [rollout(prompt, ids, reward, **how) for ids, reward in pairs])

    begun, other = tokens(6), tokens(5)
    same = [*begun, *tokens(2)]
    groups = [
        made(0, [same, same, [*begun, *tokens(4)], tokens(1)], [1.0, 0.0, 0.5, 0.0]),
        made(1, [[*other, *tokens(3)], [*other, *tokens(1)], other], [0.0, None, 1.0], prefix=2),
        made(2, [tokens(7), tokens(5)], [1.0, 0.0], weight=0.5),
        made(3, [tokens(9)], [1.0]),
    ]
    groups[0].rollouts[2].completion.loss_mask[1:3] = [False] * 2
    return groups


def shared(trainer: Trainer, scored: bool = False) -> bool:
    """Whether what was run since the last call ran something once for several rollouts."""
    work = [layout for passes, layout in trainer.take_work() if (passes == 1) == scored]
    assert work
    return any(layout.nodes < layout.flat for layout in work)


COSTS = {"flat": None, "trees": ATTENTION_FREE, "leaves": CostModel(1.0, 0.05)}


@pytest.fixture(autouse=True)
def _wide():
    # leaves that cost nothing but themselves
    with wide(), patch.multiple("reroll.model.cut", LEAF=0, COPY=0):
        yield


ALGORITHMS = {
    "grpo": dict(),
    "dr_grpo": dict(name="dr_grpo"),
    "dapo": dict(name="dapo"),
    "gspo": dict(name="gspo", clip_low=0.2, clip_high=0.2),
    "rloo": dict(name="rloo"),
    "reinforce_pp": dict(name="reinforce_pp"),
    "KL and entropy": dict(kl_coef=0.2, entropy_coef=0.1),
}


@pytest.mark.parametrize("name", ["llama", "qwen3_window"])
@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("budget", [10_000, 40])
def test_gradients_of_every_algorithm(name, algo, budget):
    model, groups = tiny(name), ragged()
    store(model, groups, noise=0.05)
    found = []
    for cost in COSTS.values():
        settings = ALGORITHMS[algo]
        reference = tiny(name, seed=1) if "kl_coef" in settings else None
        trainer = make_trainer(
            model, algo=settings, reference=reference, temperature=0.8, epochs=2,
            microbatch_tokens=budget,
        )  # fmt: skip
        trainer.cost = cost
        trainer.rounds = True  # old log-probs are scored again, on the same forwards
        found.append(gradients(trainer, groups))
    (flat, flat_metrics), *others = found
    for arm, metrics in others:
        assert flat_metrics["tree_tokens_ratio"] == 1 > metrics["tree_tokens_ratio"]
        assert len(flat) == len(arm) == 2
        for one, other in zip(arm, flat, strict=True):
            assert_same(one, other)
        for key in flat_metrics.keys() - {"tree_tokens_ratio"}:
            assert metrics[key] == pytest.approx(flat_metrics[key], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("mode", ["tis", "decoupled", "mask"])
def test_gradients_of_stale_tokens(mode):
    model, groups = tiny("llama"), ragged()
    groups[0].rollouts[0].completion.versions[3:5] = [-2] * 2
    groups[2].rollouts[1].completion.versions[:2] = [-3] * 2
    store(model, groups, noise=0.3)
    found = []
    for cost in COSTS.values():
        trainer = make_trainer(model, correct=CorrectSection(mode=mode), minibatches=2)
        trainer.cost = cost
        found.append(gradients(trainer, groups)[0])
        assert shared(trainer) is (cost is not None)
    for arm in found[1:]:
        for one, other in zip(arm, found[0], strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_gradients_of_policy_and_critic(trunk, checkpointing):
    found = []
    for cost in COSTS.values():
        model, groups = tiny("gpt2"), ragged()
        switch_off_dropout(model)
        store(model, groups, noise=0.05)
        trainer = make_ppo(model, trunk, gradient_checkpointing=checkpointing)
        trainer.cost = cost
        credited, _ = trainer.credit(groups)
        assert shared(trainer, scored=True) is (cost is not None)
        values = torch.cat([c.values for part in credited for c in part if c.values is not None])
        ((_, _, policy, critic),) = walk(trainer, credited, move=False)
        assert shared(trainer) is (cost is not None)
        found.append((values, policy, critic))
    for arm in found[1:]:
        for one, other in zip(arm, found[0], strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_lora_on_trees(kl_coef):
    found = []
    for cost in COSTS.values():
        model, groups = tiny("llama"), ragged()
        add_lora(model, LoraSection(rank=2), 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # they begin at zero
                torch.nn.init.normal_(
                    parameter, std=0.1, generator=torch.Generator().manual_seed(1)
                )
        # without its adapters the model is its own reference
        reference = model if kl_coef else None
        trainer = make_trainer(model, algo=dict(kl_coef=kl_coef), reference=reference)
        trainer.cost = cost
        found.append(gradients(trainer, groups)[0][0])
        assert shared(trainer) is (cost is not None)
    for one in found[1:]:
        assert_same(one, found[0])


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_gradients_in_lower_precision(dtype, bound, monkeypatch):
    monkeypatch.setattr("reroll.model.attention.BLOCK", 4)
    found = []
    for cost in COSTS.values():
        model, groups = tiny("qwen3", dtype=torch.float32), ragged()
        autocast = dtype if dtype == torch.bfloat16 else None
        trainer = make_trainer(model, autocast=autocast)
        trainer.cost = cost
        found.append(gradients(trainer, groups)[0][0])
        assert shared(trainer) is (cost is not None)
    for one in found[1:]:
        assert_same(one, found[0], bound)


def test_microbatches_hold_nodes():
    # 5 tokens of prompt, 4 more that all begin with, 3 of each one's own
    prompt = Prompt(0, "", (1, 2, 3, 4, 5))
    replies = [[6, 7, 8, 9, 10 + k, 10 + k, 10 + k] for k in range(4)]
    made = Group(prompt, [rollout(prompt, ids, float(k)) for k, ids in enumerate(replies)])
    (part,) = minibatches(credit([made]), 1, 21, True, ATTENTION_FREE)
    (batch,) = part.microbatches
    assert batch.layout.nodes == batch.layout.tokens.numel() == 9 + 4 * 3
    assert batch.lengths == [7] * 4 and len(batch.mask) == 28
    (part,) = minibatches(credit([made]), 1, 20, True, ATTENTION_FREE)
    # a long group is split, and each piece carries the trunk
    assert sorted(m.layout.nodes for m in part.microbatches) in ([12, 18], [15, 15])


def test_leaves_are_there_but_not_under_checkpointing():
    groups = ragged()
    for checkpointing in (False, True):
        model = tiny("llama")
        trainer = make_trainer(model, gradient_checkpointing=checkpointing)
        trainer.cost = COSTS["leaves"]
        gradients(trainer, groups)
        there = [bool(layout.leaves) for _, layout in trainer.take_work()]
        assert any(there) is not checkpointing


def test_a_run_goes_on_with_the_forwards_it_began_with():
    model = tiny("llama")
    began = make_trainer(model, shares=Shares(trees=True, leaves=False))
    assert began.cost == cost_model(model) and not began.behind
    later = make_trainer(model)
    later.load_state(began.state())
    assert later.cost == began.cost and not later.behind
    later.load_state(make_trainer(model).state())
    assert later.cost is None


def test_what_is_run_again_attends_as_it_did(monkeypatch):
    monkeypatch.setattr("reroll.model.attention.BLOCK", 4)
    found, calls = [], []
    for checkpointing in (False, True):
        with patch(
            "reroll.model.attention.scaled_dot_product_attention",
            wraps=scaled_dot_product_attention,
        ) as called:
            trainer = make_trainer(tiny("llama"), gradient_checkpointing=checkpointing)
            trainer.cost = ATTENTION_FREE
            found.append(gradients(trainer, ragged())[0][0])
        assert shared(trainer)
        calls.append(called.call_count)
    assert calls[1] == 2 * calls[0] > 0
    assert_same(*found)


@pytest.mark.parametrize("name", ["llama", "qwen3_window", "mistral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_flex_attention(name, checkpointing):
    found = []
    with flex():
        for cost in (None, replace(ATTENTION_FREE, flex_from=20)):
            trainer = make_trainer(tiny(name), gradient_checkpointing=checkpointing)
            trainer.cost = cost
            found.append(gradients(trainer, ragged())[0][0])
    work = [layout for _, layout in trainer.take_work()]
    assert {layout.flex for layout in work if layout.columns is not None} == {True}
    assert_same(*found)
