from itertools import pairwise

import pytest

from reroll.order import stream
from reroll.types import Prompt

PROMPTS = [Prompt(row, f"problem {row}", (row,)) for row in range(10)]


def drawn(start: int, sizes: list[int], seed: int = 0) -> list[tuple[int, int]]:
    """(row, visit) of batches of these sizes, one after the other from `start`."""
    pairs, cursor = [], start
    for size in sizes:
        chosen, visits = stream(cursor, size, PROMPTS, seed)
        assert len(chosen) == len(visits) == size
        assert visits[0] == cursor // 10
        pairs += [(prompt.row, visit) for prompt, visit in zip(chosen, visits, strict=True)]
        cursor += size
    return pairs


@pytest.mark.parametrize("sizes", [[1] * 30, [3] * 10, [5] * 6, [10] * 3, [30], [7, 1, 19, 3]])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_prompt_comes_once_an_epoch(sizes: list[int], seed: int) -> None:
    pairs = drawn(0, sizes, seed)
    for epoch in range(3):
        part = pairs[epoch * 10 : (epoch + 1) * 10]
        assert sorted(row for row, _ in part) == list(range(10))
        assert {visit for _, visit in part} == {epoch}


def test_the_order_is_the_same_however_it_is_cut() -> None:
    whole = drawn(0, [30])
    for sizes in ([1] * 30, [3] * 10, [15, 15], [4, 9, 2, 11, 4]):
        assert drawn(0, sizes) == whole


def test_a_batch_is_a_function_of_its_place_alone() -> None:
    forwards = [stream(start, 4, PROMPTS, 7) for start in range(0, 40, 3)]
    backwards = [stream(start, 4, PROMPTS, 7) for start in reversed(range(0, 40, 3))]
    assert forwards == backwards[::-1]
    whole = stream(0, 43, PROMPTS, 7)
    for start, (chosen, visits) in zip(range(0, 40, 3), forwards, strict=True):
        assert chosen == whole[0][start : start + 4]
        assert visits == whole[1][start : start + 4]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [
        tuple(row for row, _ in drawn(10 * epoch, [10], seed))
        for seed in (0, 1, 2)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 6
    assert tuple(range(10)) not in orders


def test_a_batch_may_span_epochs() -> None:
    chosen, visits = stream(9, 3, PROMPTS, 0)
    assert visits == [0, 1, 1]
    assert chosen[0].row not in [row for row, _ in drawn(0, [9])]
    # a step that looks for signal may start every prompt more than once
    _, visits = stream(5, 27, PROMPTS, 0)
    assert visits == [0] * 5 + [1] * 10 + [2] * 10 + [3] * 2
    assert all(a <= b for a, b in pairwise(visits))
