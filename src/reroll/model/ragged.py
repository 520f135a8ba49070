"""Ragged token lists to padded tensors and back. The one file that pads them.

Rows are padded on the right, so under a causal mask no real token ever sees a pad, position i of
a row is its i-th token, and plain forwards need neither a mask nor position ids.

`R` rows, `N` padded width, `T` packed tokens (row after row, pads left out).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Padded(NamedTuple):
    """`tokens` int64 `[R, N]`, pads 0; `wanted` bool `[R, N]`: where a prediction is asked for."""

    tokens: torch.Tensor
    wanted: torch.Tensor


def pad(
    rows: Sequence[Sequence[int] | np.ndarray],
    starts: Sequence[int],
    ends: Sequence[int],
    device: torch.device | str = "cpu",
    least: int = 0,
) -> Padded:
    """Pad `rows`, at least to width `least`; the model's outputs are wanted at tokens
    `starts[r] <= i < ends[r]` of row r."""
    lengths = np.fromiter(map(len, rows), int, len(rows))
    width = max(int(lengths.max()), least)
    cells = np.zeros((len(rows), width), np.int64)
    cells[np.arange(width) < lengths[:, None]] = np.concatenate(
        [np.asarray(row, np.int64) for row in rows]
    )
    tokens, index = torch.from_numpy(cells), torch.arange(width)
    wanted = (index >= torch.tensor(starts)[:, None]) & (index < torch.tensor(ends)[:, None])
    return Padded(tokens.to(device), wanted.to(device))
