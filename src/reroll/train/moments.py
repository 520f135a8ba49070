"""Optimizer state by parameter name, so that it can be saved as plain tensors and found again."""

from collections.abc import Mapping

import torch


def moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """`kind/name` -> tensor of everything that the optimizer remembers."""
    return {
        f"{kind}/{name}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    saved: Mapping[str, torch.Tensor],
) -> None:
    """Go on from `moments()`. Raises KeyError for a parameter that is not there."""
    for key, value in saved.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value.to("cpu" if kind == "step" else parameter.device)
