"""Faster matrix products for decoding on CPUs: oneDNN instead of the BLAS that torch links.

`torch.nn.functional.linear` in float32 calls the BLAS; where that is MKL on an AMD processor,
oneDNN took half the time at 64 rows (docs/log.md). The operator reads the module's own
dense weight, so there is still no copy to keep equal. It has no gradient, hence engine only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

Forward = Callable[[torch.Tensor], torch.Tensor]


def onednn_forwards(model: nn.Module) -> list[tuple[nn.Linear, Forward]]:
    """The float32 `nn.Linear` modules on a CPU, each with a forward by oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return []
    return [
        (module, _forward_of(module))
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
    ]


@contextmanager
def replaced(forwards: list[tuple[nn.Linear, Forward]]) -> Iterator[None]:
    """Let these modules compute with these forwards inside the block."""
    for module, forward in forwards:
        # past nn.Module.__setattr__, which would cost a microsecond a module and tick
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, _ in forwards:
            module.__dict__.pop("forward", None)


def _forward_of(module: nn.Linear) -> Forward:
    product = torch.ops.mkldnn._linear_pointwise

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        return product(inputs, module.weight, module.bias, "none", [], "")

    return forward
