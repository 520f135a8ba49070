"""Low-rank adapters (LoRA, arXiv 2106.09685) through `peft`: the one file that imports it.

Adapters are put inside the module, which stays the same `transformers` class: the engine decodes
with it as it is, and with the adapters off it is the initial policy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reroll.config import LoraSection
from reroll.errors import UserError
from reroll.model.load import widen


def add_lora(
    model: PreTrainedModel, config: LoraSection, seed: int, folder: Path | None = None
) -> None:
    """Freeze `model` and give it trainable adapters: fresh ones, or (folder) a checkpoint's.

    Fresh adapters change nothing yet: their second factor is zero. They are float32 at least.
    Raises UserError where peft is not installed or a target names no layer.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError(
            f"lora.rank = {config.rank}: needs the package peft; pip install 'reroll[peft]'"
        ) from None
    if folder is not None:
        try:
            model.load_adapter(str(folder), is_trainable=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{folder}: its adapters cannot be loaded: {reason}") from None
        _restore_wide(model, folder / "adapter_model.safetensors")
        return
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    for target in config.targets:
        if not any(name.endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(
                f"lora.targets = {config.targets}: no linear layer is named {target!r}; there are "
                f"{known}"
            )
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=config.targets or "all-linear",
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.add_adapter(settings)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"lora.targets = {config.targets}: {reason}") from None
    widen(model)


def _restore_wide(model: PreTrainedModel, file: Path) -> None:
    """Widen adapters that were loaded in the model's dtype; read them again without rounding."""
    narrow = {n: p for n, p in model.named_parameters() if p.requires_grad and p.itemsize < 4}
    widen(model)
    saved = load_file(file) if narrow else {}
    for name, parameter in narrow.items():
        value = saved[f"base_model.model.{name.replace('.default.', '.')}"]
        parameter.data.copy_(value.to(parameter.device))


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """Compute without the adapters inside the block: the policy that training began with."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
