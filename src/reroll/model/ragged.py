"""Ragged token lists to padded tensors and back. The one file that pads them.

Rows are padded on the right, so under a causal mask no real token ever sees a pad, position i of
a row is its i-th token, and plain forwards need neither a mask nor position ids.

`R` rows, `N` padded width, `T` packed tokens (row after row, pads left out).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Padded(NamedTuple):
    """`tokens` int64 `[R, N]`, pads 0; `wanted` bool `[R, N]`: where a prediction is asked for."""

    tokens: torch.Tensor
    wanted: torch.Tensor


def pad(
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    ends: Sequence[int],
    device: torch.device | str = "cpu",
) -> Padded:
    """Pad `rows`; the model's outputs are wanted at tokens `starts[r] <= i < ends[r]` of row r."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    index = torch.arange(width)
    wanted = (index >= torch.tensor(starts)[:, None]) & (index < torch.tensor(ends)[:, None])
    return Padded(tokens.to(device), wanted.to(device))
