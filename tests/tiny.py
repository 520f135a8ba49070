"""Small models with random weights, one for each architecture that the engine must serve."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from reroll.model.flops import CostModel

VOCABULARY = 61
ATTENTION_FREE = CostModel(per_token=1.0, per_context=0.0)
"""by which whatever is worth sharing at all is shared, in rows as wide as may be"""
_SIZE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_GPT2 = dict(
    vocab_size=VOCABULARY,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=256,
    bos_token_id=None,
    eos_token_id=None,
)
_OPT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    ffn_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    word_embed_proj_dim=32,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=1,
)
_MIXTURE = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    decoder_sparse_step=1,
)
_EVERY_OTHER = ["sliding_attention", "full_attention"]

DENSE = {
    "llama": ("llama", _SIZE),
    "qwen2": ("qwen2", _SIZE),
    "qwen3": ("qwen3", _SIZE | {"head_dim": 8}),
    "mistral": ("mistral", _SIZE | {"sliding_window": None}),
    "gemma": ("gemma", _SIZE | {"head_dim": 8}),
    "phi3": ("phi3", _SIZE | {"sliding_window": None, "pad_token_id": 0}),
    "olmo2": ("olmo2", _SIZE),
    "granite": ("granite", _SIZE),
    "stablelm": ("stablelm", _SIZE),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _SIZE),
    "starcoder2": ("starcoder2", _SIZE | {"sliding_window": None}),
    "cohere2": ("cohere2", _SIZE | {"sliding_window": 256, "layer_types": ["full_attention"] * 2}),
    "smollm3": ("smollm3", _SIZE),
    "opt": ("opt", _OPT),
}
"""dense models of the foundation's list: they run in float64, where argmax cannot flip by noise"""

WINDOWED = {
    "mistral_window": ("mistral", _SIZE | {"sliding_window": 6}),
    "phi3_window": ("phi3", _SIZE | {"sliding_window": 6, "pad_token_id": 0}),
    "qwen3_window": (
        "qwen3",
        _SIZE
        | {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": _EVERY_OTHER,
        },
    ),
    "gemma2": ("gemma2", _SIZE | {"head_dim": 8, "sliding_window": 6}),
    "gemma3": (
        "gemma3_text",
        _SIZE | {"head_dim": 8, "sliding_window": 6, "layer_types": _EVERY_OTHER},
    ),
    "cohere2_window": ("cohere2", _SIZE | {"sliding_window": 6, "layer_types": _EVERY_OTHER}),
}
"""models whose layers see a window shorter than the tests' sequences"""

MIXTURES = {
    "qwen2_moe": ("qwen2_moe", _SIZE | _MIXTURE),
    "mixtral": (
        "mixtral",
        _SIZE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}
"""mixtures of experts: no float64 kernels"""

SERVED = DENSE | WINDOWED | MIXTURES


def tiny(name: str, dtype: torch.dtype | None = None, seed: int = 0) -> PreTrainedModel:
    """A fresh model; float64 unless it is a mixture. Weights wide enough that argmax is clear."""
    model_type, settings = SERVED[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    if dtype is None:
        dtype = torch.float32 if name in MIXTURES else torch.float64
    return model.to(dtype).eval()


@contextmanager
def wide() -> Iterator[None]:
    """float64 stays float64 inside: many models' norms compute in float32 whatever comes in, and
    what is rounded there makes a gradient depend on the order of its sums."""
    to, narrow = torch.Tensor.to, torch.Tensor.float

    def kept(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        moved = to(self, *args, **kwargs)
        return self if (self.dtype, moved.dtype) == (torch.float64, torch.float32) else moved

    torch.Tensor.to = kept  # type: ignore[method-assign]
    torch.Tensor.float = lambda self: kept(self, torch.float32)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = to, narrow  # type: ignore[method-assign]


@contextmanager
def flex() -> Iterator[None]:
    """Flex attention as on CUDA, but uncompiled, on the CPU."""
    with (
        patch("reroll.model.attention.FLEX_ON", "cpu"),
        # torch has the gradient on CPUs, but refuses it
        patch("torch.nn.attention.flex_attention._validate_device"),
        patch("torch.nn.attention.flex_attention._warn_once"),  # that it is uncompiled
        torch.compiler.set_stance("force_eager"),
    ):
        yield
