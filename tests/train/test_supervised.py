"""Supervised training on traces: the gradient of the whole batch, however it is cut."""

import copy
from typing import Any

import pytest
import torch

from reroll.config import SftSection
from reroll.train.forwards import FLAT, Forwards, Shares
from reroll.train.supervised import backward, supervise
from tests.model.plain import plain
from tests.tiny import VOCABULARY, tiny, wide
from tests.train.batches import assert_same, flat_gradient, make_trainer


def pairs(count: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and replies of all lengths; some share a prompt."""
    source = torch.Generator().manual_seed(3)

    def tokens(size: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (size,), generator=source).tolist()

    prompts = [tokens(4 + i % 3) for i in range(count // 2 + 1)]
    return [(prompts[i // 2], tokens(1 + (i * 5) % 11)) for i in range(count)]


def by_hand(model: Any, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean over all tokens of all replies, written out."""
    model.zero_grad()
    logprobs = [plain(model, prompt, reply, 1.0)[0] for prompt, reply in batch]
    loss = -torch.cat(logprobs).mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("shares", [FLAT, Shares(True)], ids=["flat", "trees"])
@pytest.mark.parametrize("rows", [8, 24, 10_000])
def test_a_batch_in_pieces_has_the_gradient_of_the_batch(rows: int, shares: Shares) -> None:
    """The defect of other stacks: only the last piece counts, or each piece counts alike."""
    model, batch = tiny("qwen3", torch.float64), pairs(9)
    with wide():
        expected = by_hand(model, batch)
        gradient = flat_gradient(model)
        model.zero_grad()
        trainer = make_trainer(model, microbatch_tokens=rows, shares=shares)
        loss = backward(trainer, Forwards(model.device, 1.0, None), batch)
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    assert_same(flat_gradient(model), gradient)
    assert rows == 10_000 or len(trainer.take_work()) > 1


def test_steps_are_adamw_s_on_shuffled_epochs() -> None:
    config = SftSection(epochs=2, batch=4, learning_rate=1e-3, warmup=3, weight_decay=0.1)
    model, data = tiny("qwen3", torch.float64), pairs(10)
    other = copy.deepcopy(model)
    trainer = make_trainer(model, max_grad_norm=1e9)
    losses = [loss for _, loss in supervise(trainer, data, config, seed=7)]
    assert len(losses) == 6  # 4 + 4 + 2, twice
    assert losses[-1] < losses[0]
    again = list(supervise(make_trainer(other, max_grad_norm=1e9), data, config, seed=7))
    assert [loss for _, loss in again] == losses
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert trainer.version == 0
    assert not trainer.optimizer.state  # of reinforcement learning, which begins afresh
    assert all(p.grad is None for p in model.parameters())


def test_it_learns_its_pairs_by_heart() -> None:
    config = SftSection(epochs=60, batch=5, learning_rate=1e-2, warmup=2)
    model, data = tiny("qwen3"), pairs(5)
    losses = [loss for _, loss in supervise(make_trainer(model), data, config, seed=0)]
    assert losses[-1] < 0.2 * losses[0]
