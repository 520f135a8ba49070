"""Attention in blocks against torch's own under the same masks."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from reroll.engine.selfcheck import trains_on_trees
from reroll.model.attention import (
    BLOCK,
    FLEX_BLOCK,
    NAME,
    attention_in_blocks,
    in_blocks,
    takes_blocks,
    takes_flex,
)
from reroll.model.flops import CostModel
from reroll.model.logprobs import token_logprobs
from tests.model.test_layout import ragged
from tests.tiny import ATTENTION_FREE, flex, tiny

LAYER = torch.nn.Module()
LAYER.num_key_value_groups = 2  # type: ignore[assignment]
SCALE = 0.3


def inputs(queries: int, before: int) -> tuple[torch.Tensor, ...]:
    """Query, key, value (four and two heads) and a mask that shows every token itself and a third
    of what stands before it."""
    lot = torch.Generator().manual_seed(queries)
    count = before + queries
    query, key, value = (
        torch.randn(2, heads, n, 8, generator=lot, dtype=torch.float64).requires_grad_()
        for heads, n in ((4, queries), (2, count), (2, count))
    )
    seen = torch.rand(2, 1, queries, count, generator=lot) < 0.3
    seen[..., before:] |= torch.eye(queries).bool()
    seen = seen.tril(before)
    mask = torch.zeros(seen.shape, dtype=torch.float64)
    return query, key, value, mask.masked_fill_(~seen, torch.finfo(torch.float64).min)


def whole(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    return scaled_dot_product_attention(query, key, value, mask, scale=SCALE).transpose(1, 2)


@pytest.mark.parametrize("queries", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("before", [0, 5, BLOCK + 3])
def test_blocks_say_what_the_whole_says(queries: int, before: int) -> None:
    query, key, value, mask = inputs(queries, before)
    got, _ = attention_in_blocks(LAYER, query, key, value, mask, scaling=SCALE)
    expected = whole(query, key, value, mask)
    assert got.shape == (2, queries, 4, 8) and (got - expected).abs().max() < 1e-13
    weights = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view(got.shape)
    pair = [
        torch.autograd.grad((weights * out).sum(), (query, key, value)) for out in (got, expected)
    ]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*pair, strict=True))


def test_what_comes_after_a_block_is_not_looked_at() -> None:
    query, key, value, mask = inputs(2 * BLOCK, 0)
    with torch.no_grad():
        key[:, :, BLOCK:], value[:, :, BLOCK:] = torch.nan, torch.nan
    got, _ = attention_in_blocks(LAYER, query, key, value, mask, scaling=SCALE)
    assert got[:, :BLOCK].isfinite().all() and got[:, BLOCK:].isnan().all()


@pytest.mark.parametrize("special", ["position_bias", "softcap", "cache"])
def test_what_it_does_not_know_is_left_to_transformers(special: str) -> None:
    query, key, value, mask = inputs(2 * BLOCK, 0)
    with patch("reroll.model.attention.sdpa_attention_forward") as plain:
        attention_in_blocks(LAYER, query, key, value, mask, **{special: 3.0})
        attention_in_blocks(LAYER, query, key, value, None)
    assert plain.call_count == 2 and plain.call_args_list[0].kwargs[special] == 3.0


def test_only_forwards_within_are_in_blocks() -> None:
    model = tiny("llama")
    with pytest.raises(ZeroDivisionError), in_blocks(model):
        assert model.config._attn_implementation == NAME
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with in_blocks(model):
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("takes", [takes_blocks, takes_flex])
def test_models_that_see_to_it_themselves_are_left_alone(
    takes: Callable[[PreTrainedModel], bool],
) -> None:
    model = tiny("llama")
    with flex():
        assert takes(model)
        model._supports_attention_backend = False  # looks its attention up some other way
        assert not takes(model)
        del model._supports_attention_backend
        model.config.index_topk = 5  # picks what it attends to
        assert not takes(model)


def test_flex_attention_is_for_cuda_and_models_that_take_it() -> None:
    model = tiny("llama")
    assert not takes_flex(model)
    with flex():
        assert takes_flex(model)
        model._supports_flex_attn = False
        assert not takes_flex(model)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_flex_attention_says_what_the_mask_says(kind: torch.dtype) -> None:
    query, key, value, mask = inputs(2 * FLEX_BLOCK + 9, 0)
    seen = mask[:, 0] == 0

    def formula(row: Any, head: Any, at: Any, other: Any) -> torch.Tensor:
        return seen[row, at, other]

    blocks = create_block_mask(formula, 2, None, *seen.shape[1:], device="cpu")
    expected = whole(query, key, value, mask)
    with flex():
        # under autocast the rotated ones stay wider than the values
        got, _ = attention_in_blocks(LAYER, query, key, value.to(kind), blocks, scaling=SCALE)
    assert got.dtype == kind
    assert (got - expected).abs().max() < (1e-13 if kind == torch.float64 else 0.05)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
@pytest.mark.parametrize("name", ["llama", "qwen3_window"])
def test_flex_attention_compiled(name: str) -> None:
    """Rows of two widths and two batch sizes, with gradients, on the device it is for."""
    model = tiny(name, dtype=torch.float32).cuda()
    assert trains_on_trees(model, flex=True)
    cost = CostModel(1.0, 0.0, flex_from=20)
    for pairs in (ragged(), ragged(1) * 2, ragged() + ragged(2)):
        found = []
        for kind in (None, cost):
            logprobs = token_logprobs(model, pairs, cost=kind).logprobs
            weight = model.get_input_embeddings().weight
            (grad,) = torch.autograd.grad(logprobs.square().sum(), weight)
            found.append((logprobs.detach(), grad))
        (flat, flat_grad), (tree, tree_grad) = found
        assert (flat - tree).abs().max() < 1e-3
        assert (flat_grad - tree_grad).norm() < 1e-3 * flat_grad.norm()


def test_trees_go_in_blocks_and_single_texts_do_not() -> None:
    model = tiny("llama")
    with (
        patch("reroll.model.attention.BLOCK", 4),
        patch(
            "reroll.model.attention.scaled_dot_product_attention",
            wraps=scaled_dot_product_attention,
        ) as called,
    ):
        token_logprobs(model, ragged())
        assert called.call_count == 0
        token_logprobs(model, ragged(), cost=ATTENTION_FREE)
        assert called.call_count > len(model.model.layers)
