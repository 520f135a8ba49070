"""Noise is a function of (key, position, token), and that function looks random everywhere."""

import itertools
import math

import pytest
import torch
from scipy import stats

from reroll.algo.noise import (
    _mix,
    _squares,
    _to_gumbel,
    gumbel,
    gumbel_at,
    make_key,
    uniform,
    uniform_bits,
)
from tests.algo.laws import ALPHA, even

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def finaliser(x: int) -> int:
    """SplitMix64's output function, in Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def squares32(counter: int, key: int) -> int:
    """The listing of arXiv 2004.06278, in Python integers."""
    y = x = (counter * key) & WORD
    z = (y + key) & WORD
    for added in (y, z, y):
        x = (x * x + added) & WORD
        x = (x >> 32) | ((x << 32) & WORD)
    return ((x * x + z) & WORD) >> 32


def reference_bits(key: int, position: int, token: int) -> int:
    inner = (finaliser(key & WORD) + (position + 1) * GOLDEN) & WORD
    return squares32(token, finaliser(inner) | 1)


def keys(count: int, visit: int = 0) -> torch.Tensor:
    return torch.tensor([make_key(0, "train", row, 0, visit) for row in range(count)])


def bits(keys_B: torch.Tensor, position: int, size: int) -> torch.Tensor:
    return uniform_bits(keys_B, torch.full_like(keys_B, position), size)


def bits_at(keys_N: torch.Tensor, positions_N: torch.Tensor, token: int) -> torch.Tensor:
    """Bits of one token, back from its noise: exp(-exp(-g)) = (bits + 1/2) / 2^32."""
    noise_N = gumbel_at(keys_N, positions_N, torch.full_like(keys_N, token))
    return noise_N.neg().exp().neg().exp().mul(2**32).long()


# --- the functions are what they say ------------------------------------------------------------


def test_make_key_is_stable():
    # a run resumed with a later version of the package must draw the same tokens
    assert make_key(0, "train", 0, 0, 0) == 3892579132388382601
    assert make_key(7, "train", 123, 4, 5) == -8039616266695241947
    assert make_key(1, "eval", 2, 3, 4, trace=5, cut=6) == -6859775313682106555


def test_make_key_differs_in_every_argument():
    base = dict(seed=1, purpose="train", row=2, sample=3, visit=4, trace=5, cut=6)
    variants = [base] + [base | {name: 9} for name in base if name != "purpose"]
    variants += [base | {"purpose": other} for other in ("eval", "audit", "collect", "trai")]
    # the same numbers in another order are another rollout
    names = ("row", "sample", "visit", "trace", "cut")
    for first, second in itertools.combinations(names, 2):
        variants.append(base | {first: base[second], second: base[first]})
    assert len({make_key(**variant) for variant in variants}) == len(variants) == 21


def test_make_key_takes_and_gives_signed_64_bits():
    made = [make_key(2**63 - 1, "eval", row, 0, 0) for row in range(200)]
    assert -(2**63) <= min(made) < -(2**61) and 2**61 < max(made) < 2**63


def test_the_bits_are_stable():
    key = torch.tensor([make_key(0, "train", 0, 0, 0)])
    assert bits(key, 0, 4).tolist() == [[2705876593, 623741539, 2247261267, 1583129291]]
    assert bits(key, 1, 4).tolist() == [[3348818499, 1450187990, 4108148042, 1176407030]]


def test_mix_gives_the_published_output_of_splitmix64():
    # seed 1234567, the vector that Rosetta Code lists for SplitMix64
    states = [signed((1234567 + i * GOLDEN) & WORD) for i in range(1, 6)]
    assert [int(x) & WORD for x in _mix(torch.tensor(states))] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


EXTREMES = [0, 1, 2, 3, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, WORD - 1, WORD, GOLDEN]


def test_mix_and_squares_equal_integer_arithmetic():
    numbers = torch.tensor([signed(x) for x in EXTREMES])
    assert [int(x) & WORD for x in _mix(numbers)] == [finaliser(x) for x in EXTREMES]
    expected = [[squares32(counter, key) for counter in EXTREMES] for key in EXTREMES]
    assert _squares(numbers[None], numbers[:, None]).tolist() == expected


def test_uniform_bits_equal_integer_arithmetic():
    some = [signed(x) for x in EXTREMES] + keys(5).tolist()
    positions = [0, 1, 7, 1000, 2**31]
    pairs = list(itertools.product(some, positions))
    got = uniform_bits(*torch.tensor(pairs).T, 6)
    assert got.dtype == torch.int64
    expected = [[reference_bits(k, p, token) for token in range(6)] for k, p in pairs]
    assert got.tolist() == expected


def test_gumbel_at_equals_gumbel():
    generator = torch.Generator().manual_seed(0)
    keys_B, size = keys(50), 1000
    positions_B = torch.randint(10_000, (50,), generator=generator)
    tokens_B = torch.randint(size, (50,), generator=generator)
    full = gumbel(keys_B, positions_B, size)
    assert full.dtype == torch.float64 and full.shape == (50, size)
    assert torch.equal(gumbel_at(keys_B, positions_B, tokens_B), full[range(50), tokens_B])


def test_the_batch_does_not_matter():
    keys_B, positions_B = keys(20), torch.arange(20) * 3
    full = gumbel(keys_B, positions_B, 100)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gumbel(keys_B[shuffled], positions_B[shuffled], 40), full[shuffled, :40])
    assert torch.equal(gumbel(keys_B[7:8], positions_B[7:8], 100), full[7:8])


def test_to_gumbel_at_the_extremes():
    # -log(-log u) at u = 2^-33, at 1/2 + 2^-33 and at 1 - 2^-33 (nearly 33 log 2)
    low, middle, high = _to_gumbel(torch.tensor([0, 2**31, 2**32 - 1])).tolist()
    assert low == pytest.approx(-3.12999464, abs=1e-8)
    assert middle == pytest.approx(0.36651292, abs=1e-8)  # -log(log 2)
    assert high == pytest.approx(22.87385696, abs=1e-8)


def test_the_upper_tail_goes_beyond_that_of_float32():
    # the largest float32 below 1 is 1 - 2^-24, whose Gumbel is 24 log 2 = 16.6
    tail = _to_gumbel(2**32 - torch.tensor([1, 2, 3, 10, 50, 100]))
    assert (tail > 17).all() and (tail.diff() < 0).all()


# --- and they look random -----------------------------------------------------------------------


@pytest.mark.parametrize("token", [0, 1, 2, 3, 17, 50_000, 150_000])
def test_bits_are_uniform_over_keys(token):
    # token 0 is the generator's weak counter: the first of its rounds squares nothing
    keys_N = keys(40_000)
    position = torch.zeros_like(keys_N)
    value = gumbel_at(keys_N, position, torch.full_like(keys_N, token)).neg().exp().neg().exp()
    values = (value * 2**32).long()  # back from noise to its 32 bits
    for shift in (0, 8, 16, 24):
        assert even((values >> shift) & 255, 256)
    assert even(values >> 22, 1024)


@pytest.mark.parametrize("token", [0, 1, 60_000])
def test_bits_are_uniform_over_counting_keys(token):
    # keys need not be hashes: neighbouring integers do as well
    keys_N = torch.arange(-20_000, 20_000)
    values = bits_at(keys_N, torch.full_like(keys_N, 5), token)
    for shift in (0, 8, 16, 24):
        assert even((values >> shift) & 255, 256)


@pytest.mark.parametrize("token", [0, 1, 60_000])
def test_bits_are_uniform_over_positions(token):
    positions_N = torch.arange(40_000)
    values = bits_at(keys(1).expand(40_000), positions_N, token)
    for shift in (0, 8, 16, 24):
        assert even((values >> shift) & 255, 256)
    assert even(values >> 22, 1024)


@pytest.mark.parametrize("row", range(4))
def test_bits_are_uniform_over_the_vocabulary(row):
    values = bits(keys(4)[row : row + 1], 3, 150_000)[0]
    for shift in (0, 8, 16, 24):
        assert even((values >> shift) & 255, 256)
    assert even(values >> 22, 1024)
    assert even(values[::2] >> 24, 256)  # even tokens alone
    assert even(values[::64] >> 28, 16)  # and those whose low bits are all 0


SAMPLES = {
    "over keys": lambda: gumbel(keys(20_000), torch.zeros(20_000, dtype=torch.long), 8),
    "over positions": lambda: gumbel(keys(1).expand(20_000), torch.arange(20_000), 8),
    "over tokens": lambda: gumbel(keys(1), torch.zeros(1, dtype=torch.long), 160_000),
}


@pytest.mark.parametrize("over", SAMPLES)
def test_noise_has_the_gumbel_law(over):
    # n = 160,000: Kolmogorov's distance is seen from 2.8 / sqrt(n) = 0.007 on (at ALPHA)
    assert stats.kstest(SAMPLES[over]().flatten().numpy(), "gumbel_r").pvalue > ALPHA


def test_the_largest_of_many_has_the_gumbel_law():
    # max of V standard Gumbels - log V is a standard Gumbel: the upper tail, where tokens are won
    keys_B = keys(5_000)
    largest = gumbel(keys_B, torch.full_like(keys_B, 2), 1024).amax(-1) - math.log(1024)
    assert stats.kstest(largest.numpy(), "gumbel_r").pvalue > ALPHA


def neighbours(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits of 40,000 or more pairs that differ by one step in one argument."""
    if name == "token":
        values = bits(keys(200), 0, 401)
        return values[:, :-1], values[:, 1:]
    if name == "position":
        positions = torch.arange(40_001)
        values = uniform_bits(keys(1).expand(40_001), positions, 2)
        return values[:-1, 1], values[1:, 1]
    if name == "token against position":  # (position, token + 1) with (position + 1, token)
        values = uniform_bits(keys(1).expand(201), torch.arange(201), 201)
        return values[:-1, 1:], values[1:, :-1]
    if name == "integer key":
        values = bits(torch.arange(-20_000, 20_001), 0, 2)
        return values[:-1, 1], values[1:, 1]
    if name == "integer key against position":
        counting, zeros = torch.arange(-20_000, 20_000), torch.zeros(40_000, dtype=torch.long)
        later = uniform_bits(counting, zeros + 1, 2)
        return later[:, 1], uniform_bits(counting + 1, zeros, 2)[:, 1]
    if name == "sample":
        made = [[make_key(0, "train", row, s, 0) for row in range(10_000)] for s in (0, 1)]
    elif name == "visit":
        made = [[make_key(0, "train", row, 0, v) for row in range(10_000)] for v in (0, 1)]
    elif name == "row":
        made = [[make_key(0, "train", row + d, 0, 0) for row in range(10_000)] for d in (0, 1)]
    else:
        assert name == "seed"
        made = [[make_key(seed, "train", row, 0, 0) for row in range(10_000)] for seed in (0, 1)]
    first, second = (bits(torch.tensor(part), 0, 4) for part in made)
    return first, second


ARGUMENTS = [
    "token",
    "position",
    "token against position",
    "integer key",
    "integer key against position",
    "sample",
    "visit",
    "row",
    "seed",
]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_neighbours_are_independent(name):
    first, second = (values.flatten() for values in neighbours(name))
    count = len(first)
    assert count >= 40_000
    # correlations of n independent pairs have standard deviation 1 / sqrt(n); 5 of them are
    # passed by chance once in two million
    for part in (lambda x: x, lambda x: x & 0xFFFF, lambda x: (x >> 8) & 1, lambda x: x & 1):
        pair = torch.stack([part(first), part(second)]).double()
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 / math.sqrt(count)
    # high and low hexadecimal digits, jointly: sees dependence that has no correlation
    assert even((first >> 28) * 16 + (second >> 28), 256)
    assert even((first & 15) * 16 + (second & 15), 256)
    # exclusive or: sees a step that flips bits in a pattern
    assert even(((first ^ second) >> 24) & 255, 256)


def test_neighbouring_noise_is_uncorrelated():
    noise = gumbel(keys(200), torch.zeros(200, dtype=torch.long), 401)
    pair = torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()])
    assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 / math.sqrt(80_000)


# --- the uniform of lenient acceptance ----------------------------------------------------------


def test_uniform_is_the_bits_of_a_token_that_no_vocabulary_has():
    some = [signed(x) for x in EXTREMES] + keys(5).tolist()
    pairs = torch.tensor(list(itertools.product(some, [0, 1, 7, 1000])))
    got = uniform(pairs[:, 0], pairs[:, 1])
    assert got.dtype == torch.float64 and got.shape == (len(pairs),)
    bits_N = [reference_bits(key, position, WORD) for key, position in pairs.tolist()]
    assert got.tolist() == [(bits + 0.5) / 2**32 for bits in bits_N]
    table = uniform(pairs[:, 0].view(-1, 4), pairs[:, 1].view(-1, 4))  # any shape
    assert torch.equal(table.flatten(), got)


UNIFORMS = {
    "over keys": lambda: uniform(keys(40_000), torch.zeros(40_000, dtype=torch.long)),
    "over positions": lambda: uniform(keys(1).expand(40_000), torch.arange(40_000)),
    "over counting keys": lambda: uniform(torch.arange(-20_000, 20_000), torch.full((40_000,), 3)),
}


@pytest.mark.parametrize("over", UNIFORMS)
def test_uniform_has_the_uniform_law(over):
    values = UNIFORMS[over]()
    assert values.min() > 0 and values.max() < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > ALPHA
    assert even((values * 1024).long(), 1024)
    assert even((values * 2**32).long() & 255, 256)


@pytest.mark.parametrize("token", [0, 1, 2, 60, 150_000])
def test_uniform_is_independent_of_the_noise_at_the_same_place(token):
    """Else those who refuse a draft would draw the next token from a bent law."""
    count = 40_000
    keys_N, zeros = keys(count), torch.zeros(count, dtype=torch.long)
    chance = uniform(keys_N, zeros)
    noise = gumbel_at(keys_N, zeros, torch.full_like(keys_N, token))
    other = noise.neg().exp().neg().exp()  # back to a uniform
    # correlations of n independent pairs have standard deviation 1 / sqrt(n)
    for one, two in ((chance, noise), (chance, other), (chance.log(), other)):
        assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1].item()) < 4 / math.sqrt(count)
    # jointly, and of the next position and the one before
    assert even((chance * 16).long() * 16 + (other * 16).long(), 256)
    for step in (1, 2):
        later = uniform(keys_N, zeros + step)
        assert even((later * 16).long() * 16 + (other * 16).long(), 256)
        assert even((later * 16).long() * 16 + (chance * 16).long(), 256)
