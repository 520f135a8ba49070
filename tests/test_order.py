import pytest

from reroll.order import batch_of
from reroll.types import Prompt

PROMPTS = [Prompt(row, f"problem {row}", (row,)) for row in range(10)]


def drawn(steps: range, size: int, prompts: list[Prompt], seed: int) -> list[tuple[int, int]]:
    """(row, visit) in the order in which the steps draw them."""
    pairs = []
    for step in steps:
        chosen, visits, _ = batch_of(step, size, prompts, seed)
        assert len(chosen) == len(visits) == size
        pairs += [(prompt.row, visit) for prompt, visit in zip(chosen, visits, strict=True)]
    return pairs


@pytest.mark.parametrize(("size", "steps"), [(1, 30), (3, 10), (5, 6), (10, 3), (30, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_prompt_comes_once_an_epoch(size: int, steps: int, seed: int) -> None:
    pairs = drawn(range(1, steps + 1), size, PROMPTS, seed)
    for epoch in range(3):
        part = pairs[epoch * 10 : (epoch + 1) * 10]
        assert sorted(row for row, _ in part) == list(range(10))
        assert {visit for _, visit in part} == {epoch}


def test_the_order_is_the_same_however_it_is_cut_into_steps() -> None:
    assert drawn(range(1, 31), 1, PROMPTS, 0) == drawn(range(1, 11), 3, PROMPTS, 0)
    assert drawn(range(1, 3), 15, PROMPTS, 0) == drawn(range(1, 11), 3, PROMPTS, 0)


def test_a_step_is_a_function_of_its_number_alone() -> None:
    forwards = [batch_of(step, 4, PROMPTS, 7) for step in range(1, 9)]
    backwards = [batch_of(step, 4, PROMPTS, 7) for step in range(8, 0, -1)]
    assert forwards == backwards[::-1]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [
        tuple(row for row, _ in drawn(range(3 * epoch + 1, 3 * epoch + 4), 10, PROMPTS, seed))
        for seed in (0, 1, 2)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 6
    assert tuple(range(10)) not in {order[:10] for order in orders}


def test_a_batch_may_span_two_epochs() -> None:
    chosen, visits, epoch = batch_of(4, 3, PROMPTS, 0)
    assert visits == [0, 1, 1]
    assert epoch == 0
    assert batch_of(5, 3, PROMPTS, 0)[2] == 1
    last = drawn(range(1, 4), 3, PROMPTS, 0)
    assert chosen[0].row not in [row for row, _ in last]
