"""The start-up self-check serves what works and refuses, with the reason, what does not."""

from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.integrations.flex_attention import flex_attention_forward

import reroll.engine.runner as runner
from reroll.engine.selfcheck import check_servable, takes_trees, trains_on_trees
from reroll.errors import UserError
from reroll.model.masks import MaskStyle
from tests.tiny import VOCABULARY, flex, tiny

RECURRENT = {
    "mamba": dict(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2),
    "falcon_h1": dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4,
        mamba_d_head=8, mamba_d_state=8,
    ),
    "qwen3_next": dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "bloom": dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
}  # fmt: skip


@pytest.mark.parametrize("model_type", RECURRENT)
def test_other_kinds_of_state_are_refused(model_type: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **RECURRENT[model_type])
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        UserError, match=rf"cannot serve this model \({model_type}\).*use a decoder"
    ):
        check_servable(model)


def test_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="encoder-decoder"):
        check_servable(T5ForConditionalGeneration(config))


def test_a_wrong_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mistral_window")
    monkeypatch.setattr(runner, "mask_style", lambda config: MaskStyle(None, False, False))
    with pytest.raises(UserError, match="differs from plain forwards"):
        check_servable(model)


def test_a_long_window_is_tried_short_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3_window")
    model.config.sliding_window = 200
    assert check_servable(model) < 1e-9
    assert model.config.sliding_window == 200
    honest = runner.mask_style
    monkeypatch.setattr(runner, "mask_style", lambda c: honest(c)._replace(window=None))
    with pytest.raises(UserError, match=r"differs from plain forwards|forward failed"):
        check_servable(model)


def test_bfloat16_autocast_is_served_within_its_noise() -> None:
    model = tiny("qwen3", dtype=torch.float32)
    difference = check_servable(model, autocast=torch.bfloat16)
    assert 1e-6 < difference < 0.25


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mistral_window", "gemma3", "mixtral"])
def test_ordinary_models_take_trees(name: str) -> None:
    model = tiny(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    window = getattr(model.config, "sliding_window", None)
    assert takes_trees(model) is trains_on_trees(model) is True
    assert trains_on_trees(model, leafy=True) is True
    assert getattr(model.config, "sliding_window", None) == window
    assert not model.training
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["qwen3", "mistral_window", "gemma3"])
def test_flex_attention_is_tried_with_its_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    with flex():
        assert trains_on_trees(model, flex=True) is True

        def mistaken(*inputs: Any, **options: Any) -> tuple[torch.Tensor, None]:
            out, _ = flex_attention_forward(*inputs, **options)
            return 2 * out - out.detach(), None  # right, but for its gradient

        monkeypatch.setattr("reroll.model.attention.flex_attention_forward", mistaken)
        assert trains_on_trees(model, flex=True) is False
    # refused by torch, as on a device that cannot have it
    monkeypatch.setattr("reroll.model.attention.FLEX_ON", "cpu")
    assert trains_on_trees(model, flex=True) is False
    assert trains_on_trees(model) is True


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_no_leaves_where_positions_depend_on_the_longest(kind: str) -> None:
    model = tiny("llama")
    for found in ({"rope_type": kind}, {"full_attention": {"rope_type": kind}}):
        model.config.rope_parameters = found
        assert trains_on_trees(model) is True  # its rotary embedding was made before
        assert trains_on_trees(model, leafy=True) is False


def test_trees_are_taken_within_the_noise_of_autocast() -> None:
    for check in (takes_trees, trains_on_trees, partial(trains_on_trees, leafy=True)):
        assert check(tiny("qwen3", dtype=torch.float32), torch.bfloat16) is True
        assert check(tiny("qwen3", dtype=torch.bfloat16)) is True


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_what_makes_a_tree_takes_none(
    ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may serve all the same: plain prefills need neither."""
    model = tiny("qwen3")
    forward = model.forward

    def deaf(**inputs: Any) -> Any:
        # a tick of one token has its mask and position; several queries do without
        if inputs["input_ids"].shape[1] > 1:
            inputs.pop(ignored, None)
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", deaf)
    assert check_servable(model) < 1e-9
    assert takes_trees(model) is trains_on_trees(model) is False
    assert trains_on_trees(model, leafy=True) is False


def test_a_model_whose_forward_fails_on_trees_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3")
    forward = model.forward

    def brittle(**inputs: Any) -> Any:
        if inputs.get("attention_mask") is not None and inputs["input_ids"].shape[1] > 1:
            raise RuntimeError("masks of several queries are not implemented")
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", brittle)
    assert check_servable(model) < 1e-9
    assert takes_trees(model) is trains_on_trees(model) is False
    assert trains_on_trees(model, leafy=True) is False
