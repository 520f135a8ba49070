"""Slot cache: memory is known before it is taken; what does not fit is refused with a remedy."""

import pytest
import torch

from reroll.engine.local import LocalEngine
from reroll.engine.slots import LayerShape, SlotCache, check_fits, slot_bytes
from reroll.errors import UserError
from tests.tiny import tiny

SHAPES = [
    LayerShape(2, 8, 8, torch.float32, torch.float32),
    LayerShape(1, 8, 4, torch.float32, torch.bfloat16),
]


def test_bytes_of_a_token_by_hand() -> None:
    assert slot_bytes(SHAPES) == 2 * 16 * 4 + 8 * 4 + 4 * 2


def test_memory_line_is_what_is_allocated() -> None:
    line = check_fits(SHAPES, slots=4, capacity=10, bound_gb=1)
    cache = SlotCache(SHAPES, 4, 10, torch.device("cpu"))
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert taken == 4 * 10 * slot_bytes(SHAPES)
    assert "4 slots x 10 tokens x 168 bytes" in line


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    bound = 100 * slot_bytes(SHAPES) / 2**30  # room for 100 tokens
    with pytest.raises(
        UserError, match=r"engine.cache_gb.*10 slots of 10 tokens.*20 slots of 5 tok"
    ):
        check_fits(SHAPES, slots=20, capacity=10, bound_gb=bound)
    check_fits(SHAPES, slots=10, capacity=10, bound_gb=bound)


def test_engine_refuses_before_it_allocates() -> None:
    with pytest.raises(UserError, match=r"what would fit: 0 slots"):
        LocalEngine(tiny("llama"), slots=2, capacity=10**6, cache_gb=0.001)


def test_move_and_load_copy_only_the_length_in_use() -> None:
    cache = SlotCache(SHAPES, 3, 4, torch.device("cpu"))
    for layer in cache.layers:
        layer.keys.copy_(torch.arange(3)[:, None, None, None].expand_as(layer.keys))
    cache.move(2, 0, 3)
    for layer in cache.layers:
        assert layer.keys[0, 0, :, 0].tolist() == [2, 2, 2, 0]
        assert layer.keys[1, 0, :, 0].tolist() == [1, 1, 1, 1]
