"""Products by oneDNN: the same numbers up to float noise, engine only, weights always current."""

import torch

from reroll.engine.fastlinear import onednn_forwards, replaced
from reroll.engine.runner import Runner
from tests.tiny import tiny

INPUT = torch.tensor([[3, 1, 4, 1, 5]])


def test_same_numbers_and_current_weights() -> None:
    model = tiny("qwen3", dtype=torch.float32)
    forwards = onednn_forwards(model)
    assert len(forwards) == 2 * 7 + 1  # q k v o gate up down of two layers, and the head
    for _ in range(2):
        with torch.no_grad():
            expected = model(input_ids=INPUT).logits
            with replaced(forwards):
                found = model(input_ids=INPUT).logits
            # sums of 64 products of order one: float32 keeps six digits
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)
            for parameter in model.parameters():
                parameter.mul_(1.1)  # as an optimizer step: in place


def test_the_trainer_keeps_its_own_forward() -> None:
    model = tiny("gpt2", dtype=torch.float32)
    with Runner(model, autocast=None).inference():
        pass
    assert not any("forward" in module.__dict__ for module in model.modules())
    loss = model(input_ids=INPUT).logits.sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_only_float32_modules_without_autocast() -> None:
    assert onednn_forwards(tiny("qwen3", dtype=torch.float64)) == []
    runner = Runner(tiny("qwen3", dtype=torch.float32), autocast=torch.bfloat16)
    assert runner._forwards == []


def test_training_flags_are_restored_one_by_one() -> None:
    model = tiny("qwen3")
    model.model.layers[1].train()
    before = [module.training for module in model.modules()]
    with Runner(model, autocast=None).inference():
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
