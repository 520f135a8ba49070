"""Load a Hugging Face causal model and its tokenizer, on the device and in the dtype asked for.

What goes wrong is a UserError that names the setting. Weights are read from safetensors only and
code that comes with a model runs only if `trust_remote_code` says so.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reroll.config import ModelSection
from reroll.errors import UserError

JITTERS = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
"""noise that mixtures of experts put on their router's input in training mode"""


def model_folder(path: str) -> str:
    """`demo` is the policy shipped with the package; anything else stands for itself."""
    return str(resources.files("reroll") / "assets" / "demo_policy") if path == "demo" else path


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"model.device = {name!r}: not a device; use auto, cpu, cuda or cuda:N"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"model.device = {name!r}: reroll runs on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(
            f"model.device = {name!r}: not there ({found} CUDA devices found); use auto or cpu"
        )
    return device


def pick_autocast(name: str, device: torch.device) -> torch.dtype | None:
    """Autocast dtype shared by engine and trainer; None is none."""
    if name == "bfloat16":
        return torch.bfloat16
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if name == "auto" and able else None


def load_model(config: ModelSection, folder: str | Path | None = None) -> PreTrainedModel:
    """The policy, or (folder) a checkpoint of it, in eval mode with dropout switched off.

    Raises UserError for a missing path, a device that is not there, a model that is no causal
    language model, or weights that are not safetensors.
    """
    device = pick_device(config.device)
    path = str(folder or model_folder(config.path))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _explain(config.path if folder is None else path, error) from None
    switch_off_dropout(model)
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]


def load_tokenizer(config: ModelSection) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError as `load_model`, and when it has no end of text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_folder(config.path), trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise _explain(config.path, error) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path = {config.path!r}: its tokenizer has no end-of-text token to stop at"
        )
    return tokenizer


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """End-of-text ids of tokenizer and generation configuration (chat models have several)."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    return tuple(sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None}))


def embeddings(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the input embedding and of the output head `[V, H]` (one tensor if tied)."""
    parts: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return parts[0].weight, parts[1].weight


def switch_off_dropout(model: PreTrainedModel) -> None:
    """RL trains the law that sampled, and sampling has no dropout: set every rate to 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or name in JITTERS):
                setattr(module, name, 0.0)


def widen(model: torch.nn.Module) -> None:
    """Make trainable weights float32 at least: small optimizer steps vanish in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            parameter.data = parameter.data.float()


def _explain(path: str, error: Exception) -> UserError:
    local = path == "demo" or Path(path).expanduser().exists()
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if local:
        return UserError(f"model.path = {path!r}: cannot be loaded: {reason}")
    return UserError(
        f"model.path = {path!r}: no such folder, and not to be had from the Hub: {reason}"
    )
