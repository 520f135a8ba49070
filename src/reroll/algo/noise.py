"""Counter-based Gumbel noise: a function of (key, position, token) and of nothing else.

The next token of a rollout is `argmax(logits / T + gumbel(key, position))` (the Gumbel-max
trick: an exact draw from softmax(logits / T)). There is no generator state, so batch order,
slot, interruption, resumption and speculation cannot change what is drawn.

The generator is Squares with four rounds (Widynski, arXiv 2004.06278), the vocabulary index as
its counter and a 64-bit key hashed from (key, position) by the SplitMix64 finaliser (Steele,
Lea and Flood 2014). 32 random bits make each uniform; logarithms are taken in float64, because
float32 cannot hold the upper tail (it would cap every Gumbel at about 16.6).
"""

import hashlib
import struct

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def make_key(
    seed: int, purpose: str, row: int, sample: int, visit: int, trace: int = 0, cut: int = 0
) -> int:
    """The signed 64-bit noise key of one rollout.

    seed: of the run; purpose: train, eval, audit, ...; row: dataset row; sample: index in the
    group; visit: grows with every new start; trace and cut: which prefix it starts from.
    """
    name = purpose.encode().ljust(16, b"\0")
    packed = struct.pack("<16s6q", name, seed, row, trace, cut, sample, visit)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little", signed=True)


def share(
    seed: int, purpose: str, row: int, sample: int, visit: int, trace: int = 0, cut: int = 0
) -> float:
    """A uniform number in [0, 1) for one rollout's decision; the names as in `make_key`."""
    return (make_key(seed, purpose, row, sample, visit, trace, cut) % 2**64) / 2**64


def gumbel(keys_B: torch.Tensor, positions_B: torch.Tensor, size: int) -> torch.Tensor:
    """Standard Gumbel noise `[B, V]` float64 of a whole vocabulary of `size` tokens.

    keys_B, positions_B: int64 `[B]`; position i is the i-th completion token, prefix included.
    """
    return _to_gumbel(uniform_bits(keys_B, positions_B, size))


def gumbel_at(
    keys_N: torch.Tensor, positions_N: torch.Tensor, tokens_N: torch.Tensor
) -> torch.Tensor:
    """The same noise at chosen (key, position, token) triples only: `[N]` float64."""
    return _to_gumbel(_squares(tokens_N, _row_keys(keys_N, positions_N)))


def uniform(keys_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """A uniform in (0, 1), `[N]` float64, independent of the Gumbel noise at the same place.

    For lenient acceptance. It is the bits of a token that no vocabulary has.
    """
    bits = _squares(torch.full_like(keys_N, -1), _row_keys(keys_N, positions_N))
    return (bits.double() + 0.5) * 0.5**32


def uniform_bits(keys_B: torch.Tensor, positions_B: torch.Tensor, size: int) -> torch.Tensor:
    """The 32 random bits behind `gumbel`, as int64 `[B, V]`."""
    tokens_V = torch.arange(size, device=keys_B.device)
    return _squares(tokens_V, _row_keys(keys_B, positions_B)[:, None])


def _row_keys(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One odd 64-bit Squares key for each (key, position)."""
    return _mix(_mix(keys) + (positions + 1) * _GOLDEN) | 1


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64 finaliser; int64 arithmetic wraps as uint64 does."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift (torch's is arithmetic on signed integers)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _swap(x: torch.Tensor) -> torch.Tensor:
    """Rotate by 32 bits: exchange the halves."""
    return _shift(x, 32).bitwise_or_(x << 32)


def _squares(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """squares32 of the paper: four rounds of square, add, exchange halves; 32 bits as int64."""
    y = counter * key
    z = y + key
    x = _swap(torch.addcmul(y, y, y))
    x = _swap(torch.addcmul(z, x, x))
    x = _swap(torch.addcmul(y, x, x))
    return _shift(torch.addcmul(z, x, x), 32)


def _to_gumbel(bits: torch.Tensor) -> torch.Tensor:
    """-log(-log u) with u = (bits + 1/2) / 2^32, strictly inside (0, 1)."""
    u = bits.double().add_(0.5).mul_(0.5**32)
    return u.log_().neg_().log_().neg_()
