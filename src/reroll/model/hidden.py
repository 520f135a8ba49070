"""The last hidden state, in any architecture: what enters the output head."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def hidden_states(model: PreTrainedModel, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """Collect them from each forward inside the block, shaped as the head gets them."""
    states: list[torch.Tensor] = []
    if not wanted:
        yield states
        return
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    try:
        yield states
    finally:
        hook.remove()
