"""Tokens are drawn from exactly the law that is asked for, whichever way they are drawn."""

import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from reroll.algo import sample
from reroll.algo.noise import gumbel, gumbel_at, make_key
from reroll.algo.sample import Law, choose, draw, pick, truncate
from tests.algo.laws import fits

LOGITS = torch.tensor([1.3, -0.4, 2.2, 0.0, -3.0, 1.9, 0.7, -1.1, 2.6, -0.2, 0.4, -2.0])
DRAWS = 20_000
# at 20,000 draws and 11 degrees chi-square rejects (ALPHA of tests/algo/laws.py: from 49 on) a law
# q for which sum((p - q)^2 / q) exceeds about 38 / 20,000: errors of 4 % in every probability


def keys(count: int) -> torch.Tensor:
    return torch.tensor([make_key(3, "train", row, 0, 0) for row in range(count)])


def law(rows: int, temperature=1.0, top_k=0, top_p=1.0, keys_B: torch.Tensor | None = None) -> Law:
    def column(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(rows)

    temperatures = column(temperature, torch.float32)
    ks, ps = column(top_k, torch.int64), column(top_p, torch.float32)
    keys_B = keys(rows) if keys_B is None else keys_B
    greedy, truncated = (temperatures == 0).any().item(), ((ks > 0) | (ps < 1)).any().item()
    return Law(keys_B, temperatures, ks, ps, bool(greedy), bool(truncated))


def expected_law(logits_V: torch.Tensor, temperature: float, top_k: int, top_p: float):
    """Hugging Face's warpers in `generate`'s order, in float64."""
    scores = logits_V.double()[None]
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores[0].softmax(-1)


TRUNCATIONS = [(0, 1.0), (5, 1.0), (0, 0.8), (6, 0.85)]


@pytest.mark.parametrize("over", ["keys", "positions"])
@pytest.mark.parametrize("top_k, top_p", TRUNCATIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("dense_up_to", [0, 4096])
def test_tokens_follow_their_law(over, top_k, top_p, temperature, dense_up_to, monkeypatch):
    monkeypatch.setattr(sample, "DENSE_VOCABULARY", dense_up_to)
    if over == "keys":
        keys_B, positions_B = keys(DRAWS), torch.full((DRAWS,), 4)
    else:
        keys_B, positions_B = keys(1).expand(DRAWS), torch.arange(DRAWS)
    drawn = draw(
        LOGITS.expand(DRAWS, -1), positions_B, law(DRAWS, temperature, top_k, top_p, keys_B)
    )
    expected = expected_law(LOGITS, temperature, top_k, top_p)
    assert (expected > 0).sum() > 2
    assert fits(drawn.tokens.bincount(minlength=len(LOGITS)), expected)


def test_the_law_test_can_fail():
    # the same draws against a temperature off by a twentieth
    drawn = draw(LOGITS.expand(DRAWS, -1), torch.zeros(DRAWS, dtype=torch.long), law(DRAWS))
    counts = drawn.tokens.bincount(minlength=len(LOGITS))
    assert fits(counts, expected_law(LOGITS, 1.0, 0, 1.0))
    assert not fits(counts, expected_law(LOGITS, 1.1, 0, 1.0))


def test_tokens_of_a_large_vocabulary_follow_their_law():
    # beyond DENSE_VOCABULARY; 8,192 tokens in 16 blocks of graded weight, 100 draws a block or more
    size, rows = 8192, 3_000
    assert size > sample.DENSE_VOCABULARY
    logits = torch.linspace(-1, 1, 16).repeat_interleave(size // 16)
    drawn = draw(logits.expand(rows, -1), torch.zeros(rows, dtype=torch.long), law(rows))
    blocks = drawn.tokens // (size // 16)
    assert fits(blocks.bincount(minlength=16), torch.linspace(-1, 1, 16).double().softmax(-1))


@pytest.mark.parametrize("top_k, top_p", [*TRUNCATIONS, (1, 1.0), (100, 0.9), (0, 0.01), (2, 0.5)])
def test_truncation_is_that_of_hugging_face(top_k, top_p):
    logits = torch.randn(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits *= 3
    kept = truncate(logits, torch.full((200,), top_k), torch.full((200,), top_p))
    expected = torch.stack([expected_law(row, 1.0, top_k, top_p) for row in logits])
    assert torch.equal(kept == -torch.inf, expected == 0)
    assert torch.equal(kept[kept > -torch.inf], logits[kept > -torch.inf])


def test_truncate_by_hand():
    # probabilities .5 .3 .15 .05: 0, .5, .8 and .95 stand before them
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64).log().expand(6, -1)
    kept = truncate(
        logits,
        torch.tensor([0, 1, 3, 0, 0, 3]),
        torch.tensor([1.0, 1.0, 1.0, 0.79, 0.81, 0.9]),
    )
    assert (kept > -torch.inf).tolist() == [
        [True, True, True, True],
        [False, True, False, False],
        [True, True, False, True],
        [False, True, False, True],
        [True, True, False, True],
        # of the three left .526 .316 .158, so .842 stands before the third
        [True, True, False, True],
    ]


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (0, 1e-6), (0, 0.0), (1, 1e-6)])
def test_truncate_keeps_the_likeliest(top_k, top_p):
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    kept = truncate(logits, torch.full((50,), top_k), torch.full((50,), top_p))
    assert torch.equal((kept > -torch.inf).sum(-1), torch.ones(50, dtype=torch.long))
    assert torch.equal(kept.argmax(-1), logits.argmax(-1))


def test_truncate_breaks_ties_by_the_lower_token():
    # exactly k are kept, as top-k promises, though Hugging Face would keep all that tie
    kept = truncate(torch.zeros(1, 6), torch.tensor([2]), torch.tensor([1.0]))
    assert (kept > -torch.inf).tolist() == [[True, True, False, False, False, False]]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.75])  # exact in float32
@pytest.mark.parametrize("top_k, top_p", TRUNCATIONS)
def test_logprobs_are_those_of_the_laws(dtype, tolerance, temperature, top_k, top_p):
    # float32: log-probs down to -16 have spacing 2^-20 = 1e-6, and two roundings
    rows = 100
    logits = 2 * torch.randn(rows, 40, generator=torch.Generator().manual_seed(2), dtype=dtype)
    drawn = draw(logits, torch.arange(rows), law(rows, temperature, top_k, top_p))
    tempered = logits.double() / temperature
    expected = tempered.log_softmax(-1)[range(rows), drawn.tokens]
    laws = torch.stack([expected_law(row, temperature, top_k, top_p) for row in logits])
    behaviour = laws.log()[range(rows), drawn.tokens]
    assert drawn.logprobs.dtype == dtype
    torch.testing.assert_close(drawn.logprobs.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(drawn.behaviour_logprobs.double(), behaviour, rtol=0, atol=tolerance)


def test_pick_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]], dtype=torch.float64)
    expected = [math.log(3 / 4), math.log(1 / 5)]
    assert pick(logits, torch.tensor([1, 1])).tolist() == pytest.approx(expected, abs=1e-15)


def test_greedy_rows_take_the_likeliest():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(3))
    drawn = draw(logits, torch.zeros(50, dtype=torch.long), law(50, temperature=0.0))
    assert torch.equal(drawn.tokens, logits.argmax(-1))
    expected = logits.double().log_softmax(-1).amax(-1)
    torch.testing.assert_close(drawn.logprobs.double(), expected, rtol=0, atol=2e-6)
    assert drawn.behaviour_logprobs.tolist() == [0.0] * 50


@pytest.mark.parametrize("size", [50, 5000])
def test_mixed_rows_equal_rows_alone(size):
    rows = 60
    logits = 2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(4))
    positions = torch.arange(rows) * 7
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.3]).repeat(15)
    top_k = torch.tensor([0, 0, 5, 0, 3, 0]).repeat(10)
    top_p = torch.tensor([1.0, 1.0, 0.8, 1.0, 0.9]).repeat(12)
    mixed = law(rows, temperature, top_k, top_p)
    together = draw(logits, positions, mixed)
    kinds = set()
    for row in range(rows):
        one = slice(row, row + 1)
        t, k, p = temperature[row].item(), top_k[row].item(), top_p[row].item()
        kinds.add((t == 0, k > 0, p < 1))
        alone = draw(logits[one], positions[one], law(1, t, k, p, mixed.keys[one]))
        assert alone.tokens.item() == together.tokens[row].item()
        assert alone.logprobs.item() == pytest.approx(together.logprobs[row].item(), abs=2e-6)
        assert alone.behaviour_logprobs.item() == pytest.approx(
            together.behaviour_logprobs[row].item(), abs=2e-6
        )
    assert len(kinds) == 8  # greedy or not, top-k or not, top-p or not: each happened


# --- the sparse way draws what the dense way draws ----------------------------------------------


def both_ways(logits_BV, keys_B, positions_B, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    size = logits_BV.shape[1]
    monkeypatch.setattr(sample, "DENSE_VOCABULARY", size)
    dense = choose(logits_BV, keys_B, positions_B)
    monkeypatch.setattr(sample, "DENSE_VOCABULARY", size - 1)
    return dense, choose(logits_BV, keys_B, positions_B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0, 40.0, 3000.0])
@pytest.mark.parametrize("size, rows", [(2, 3000), (31, 3000), (700, 1000), (5000, 150)])
def test_sparse_draws_equal_dense(dtype, scale, size, rows, monkeypatch):
    generator = torch.Generator().manual_seed(size)
    logits = scale * torch.randn(rows, size, generator=generator, dtype=dtype)
    # a third of the rows cut as top-p cuts them: some tokens, or all but one, at -inf
    cut = torch.rand(rows, size, generator=generator) < torch.rand(rows, 1, generator=generator)
    cut[::3] = False
    cut[1::30] = True
    cut[torch.arange(rows), torch.randint(size, (rows,), generator=generator)] = False
    logits = logits.masked_fill(cut, -torch.inf)
    dense, sparse = both_ways(logits, keys(rows), torch.arange(rows), monkeypatch)
    assert torch.equal(dense, sparse)
    assert not cut[torch.arange(rows), dense].any()


def test_the_sparse_way_is_taken_beyond_the_dense_vocabulary(monkeypatch):
    size = sample.DENSE_VOCABULARY
    monkeypatch.setattr(sample, "_choose_sparse", lambda *_: torch.tensor([-1]))
    key, position = keys(1), torch.zeros(1, dtype=torch.long)
    assert choose(torch.zeros(1, size), key, position).item() >= 0
    assert choose(torch.zeros(1, size + 1), key, position).item() == -1


def test_sparse_rows_do_not_share_anything():
    # more rows than are worked on at a time, with few and with many candidates
    size, rows = sample._CHUNK // 8, 21
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(5))
    logits *= torch.tensor([0.0, 1.0, 30.0]).repeat(7)[:, None]
    keys_B, positions_B = keys(rows), torch.arange(rows)
    together = choose(logits, keys_B, positions_B)
    expected = (gumbel(keys_B, positions_B, size) + logits).argmax(-1)
    assert torch.equal(together, expected)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_draws_hold_where_two_tokens_nearly_tie(dtype, offset):
    """The filter's bound is tight where a token of high noise wins or loses by one rounding.

    Two tokens have a chance: `high` has the largest noise of 8,192, `other` the larger logit.
    """
    size, rows = 8192, 200
    assert size > sample.DENSE_VOCABULARY
    keys_B, positions_B = keys(rows), torch.zeros(rows, dtype=torch.long)
    noise = gumbel(keys_B, positions_B, size)
    high = noise.argmax(-1)
    other = (high + 1) % size
    at = torch.arange(rows)
    start = torch.full((rows,), offset, dtype=dtype)
    to_beat = start.double() + noise[at, other]
    wins = (to_beat - noise[at, high]).to(dtype)
    up, down = torch.full_like(wins, torch.inf), torch.full_like(wins, -torch.inf)
    while (low := wins.double() + noise[at, high] <= to_beat).any():
        wins = torch.where(low, wins.nextafter(up), wins)
    loses = wins
    while (level := loses.double() + noise[at, high] >= to_beat).any():
        loses = torch.where(level, loses.nextafter(down), loses)
    assert (wins < start).all()
    for logit, expected in ((wins, high), (loses, other)):
        logits = torch.full((rows, size), -torch.inf, dtype=dtype)
        logits[at, other], logits[at, high] = start, logit
        assert torch.equal(choose(logits, keys_B, positions_B), expected)


def test_sparse_draws_break_ties_as_dense_ones():
    # found by search: under key 82095, tokens 7679 and 53315 have the same 32 bits, the largest
    # of 65,536 tokens; argmax takes the first
    key, position = torch.tensor([82095]), torch.tensor([0])
    tied = gumbel_at(key.expand(2), position.expand(2), torch.tensor([7679, 53315]))
    noise = gumbel(key, position, 65_536)
    assert tied[0] == tied[1] == noise.max()
    for logits in (torch.zeros(1, 65_536), torch.full((1, 65_536), 2.5, dtype=torch.float64)):
        assert choose(logits, key, position).tolist() == noise.argmax(-1).tolist() == [7679]
