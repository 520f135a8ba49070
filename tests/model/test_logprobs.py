"""Padded and chunked forwards say what plain ones say."""

import math
from types import SimpleNamespace

import pytest
import torch

from reroll.model.layout import in_order, lay_out
from reroll.model.logprobs import layout_states, token_logprobs
from tests.model.plain import plain
from tests.tiny import MIXTURES, SERVED, VOCABULARY, tiny


def pairs(shapes: list[tuple[int, int]], seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Random (context, continuation) of these lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    return [(tokens(a), tokens(b)) for a, b in shapes]


SHAPES = [(3, 7), (1, 1), (12, 2), (2, 14), (5, 5), (1, 9)]
"""contexts of one token, continuations of one, rows from 2 to 16 tokens"""


SINGLE = {*MIXTURES, "gemma2"}
"""computed in float32; of Gemma 2 only the softmax of its attention is"""


@pytest.mark.parametrize("name", SERVED)
def test_equals_plain_forwards(name):
    model, sequences = tiny(name), pairs(SHAPES)
    with torch.no_grad():
        got = token_logprobs(model, sequences, temperature=0.7, entropy=True)
        each = [plain(model, *pair, temperature=0.7) for pair in sequences]
    assert got.entropy is not None
    assert got.logprobs.shape == got.entropy.shape == (sum(b for _, b in SHAPES),)
    # padding changes the shapes of matrix products, and so how they round: sums of 64 numbers
    # around 1 differ by some 1e-15 in float64 and 1e-6 in float32; the logits are around 10
    close = dict(rtol=0, atol=2e-5 if name in SINGLE else 1e-12)
    torch.testing.assert_close(got.logprobs, torch.cat([a for a, _ in each]), **close)
    torch.testing.assert_close(got.entropy, torch.cat([b for _, b in each]), **close)
    assert got.logprobs.std() > 0.1  # far from a model that finds everything equally likely


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2_moe", "opt"])
def test_gradient_equals_that_of_plain_forwards(name):
    model, sequences = tiny(name), pairs(SHAPES)
    weights = torch.linspace(-1, 2, sum(b for _, b in SHAPES), dtype=model.dtype)
    got = token_logprobs(model, sequences, temperature=1.3, entropy=True)
    assert got.entropy is not None
    together = gradient(model, (weights * (got.logprobs + 0.5 * got.entropy)).sum())
    each = [plain(model, *pair, temperature=1.3) for pair in sequences]
    value = torch.cat([a + 0.5 * b for a, b in each])
    apart = gradient(model, (weights * value).sum())
    assert apart.norm() > 1
    bound = 1e-5 if name in SINGLE else 1e-12
    assert (together - apart).norm() < bound * apart.norm()


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def test_no_entropy_and_no_states_unless_asked_for():
    got = token_logprobs(tiny("llama"), pairs(SHAPES))
    assert got.entropy is None and got.hidden is None


@pytest.mark.parametrize("max_tokens", [1, 16, 30, 48, 10_000])
def test_chunks_change_nothing(max_tokens):
    model, sequences = tiny("qwen3"), pairs(SHAPES)
    wanted = dict(temperature=0.7, entropy=True, hidden=True)
    with torch.no_grad():
        whole = token_logprobs(model, sequences, **wanted)
        got = token_logprobs(model, sequences, **wanted, max_tokens=max_tokens)
    torch.testing.assert_close(got, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_tokens", [None, 30])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2_moe", "opt"])
def test_states_are_what_enters_the_head_before_each_token(name, max_tokens):
    model, sequences = tiny(name), pairs(SHAPES)
    expected = []
    with torch.no_grad():
        got = token_logprobs(model, sequences, hidden=True, max_tokens=max_tokens)
        layouts = lay_out(sequences, max_tokens)
        lengths = [len(b) for _, b in sequences]
        ran = [layout_states(model.base_model, layout) for layout in layouts]
        (states,) = in_order(layouts, [(part,) for part in ran], lengths)
        for context, continuation in sequences:
            row = torch.tensor([[*context, *continuation]])
            layers = model(input_ids=row, output_hidden_states=True).hidden_states
            # position i predicts token i + 1; after the last token nothing is asked for
            expected.append(layers[-1][0, len(context) - 1 : -1])
    close = dict(rtol=0, atol=2e-5 if name in SINGLE else 1e-12)
    for found in (got.hidden, states):
        assert found is not None and found.shape == (sum(b for _, b in SHAPES), 32)
        torch.testing.assert_close(found, torch.cat(expected), **close)
    assert states is not None and states.std() > 0.1


def test_states_make_the_logprobs():
    model, sequences = tiny("llama"), pairs(SHAPES)
    with torch.no_grad():
        got = token_logprobs(model, sequences, temperature=0.7, hidden=True)
        assert got.hidden is not None
        laws = (got.hidden @ model.get_output_embeddings().weight.T / 0.7).log_softmax(-1)
    drawn = torch.tensor([token for _, continuation in sequences for token in continuation])
    made = laws[torch.arange(len(drawn)), drawn]
    torch.testing.assert_close(got.logprobs, made, rtol=0, atol=1e-12)


def test_states_carry_the_gradient_of_a_plain_forward():
    # GPT-2: float64 throughout, so that sums of gradients do not depend on their order
    model, sequences = tiny("gpt2"), pairs(SHAPES)
    weights = torch.linspace(-1, 2, sum(b for _, b in SHAPES), dtype=model.dtype)
    got = token_logprobs(model, sequences, hidden=True)
    assert got.hidden is not None
    value = (weights * got.hidden.pow(2).sum(-1)).sum() + (weights * got.logprobs).sum()
    together = gradient(model, value)
    states, logs = [], []
    for context, continuation in sequences:
        row = torch.tensor([[*context, *continuation]])
        layers = model(input_ids=row, output_hidden_states=True).hidden_states
        states.append(layers[-1][0, len(context) - 1 : -1])
        logs.append(plain(model, context, continuation)[0])
    apart = (weights * torch.cat(states).pow(2).sum(-1)).sum() + (weights * torch.cat(logs)).sum()
    expected = gradient(model, apart)
    assert (together - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize(
    "max_tokens, widths",
    [
        # the shortest first; single rows may be longer
        (1, [(1, 2), (1, 10), (1, 10), (1, 10), (1, 14), (1, 16)]),
        (20, [(2, 10), (2, 10), (1, 14), (1, 16)]),
        (30, [(3, 10), (2, 14), (1, 16)]),
        (40, [(4, 10), (2, 16)]),
        (None, [(6, 16)]),
    ],
)
def test_forwards_stay_within_max_tokens(max_tokens, widths, monkeypatch):
    monkeypatch.setattr("reroll.model.cut.FULL", 0.0)  # whatever is left to padding
    model, seen = tiny("llama"), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with torch.no_grad():
        token_logprobs(model, pairs(SHAPES), max_tokens=max_tokens)
    assert seen == widths


class Bigrams(torch.nn.Module):
    """A model whose logits after token t are a fixed row of a table."""

    device = torch.device("cpu")

    def __init__(self, table_VV: torch.Tensor) -> None:
        super().__init__()
        self.table = table_VV

    def forward(self, input_ids, use_cache, logits_to_keep):
        return SimpleNamespace(logits=self.table[input_ids][logits_to_keep])


def test_by_hand():
    # after 0: laws 1/2, 1/2; after 1: 3/4, 1/4
    table = torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=torch.float64).log()
    model = Bigrams(table)
    got = token_logprobs(model, [([0], [1, 0]), ([1, 1, 0], [0]), ([1], [1])], entropy=True)
    log = math.log
    assert got.logprobs.tolist() == pytest.approx([log(0.5), log(0.75), log(0.5), log(0.25)])
    skewed = -0.75 * log(0.75) - 0.25 * log(0.25)
    assert got.entropy is not None
    assert got.entropy.tolist() == pytest.approx([log(2), skewed, log(2), skewed])
    # temperature 1/2 squares probabilities: 9/16 against 1/16
    got = token_logprobs(model, [([1], [0, 1])], temperature=0.5)
    assert got.logprobs.tolist() == pytest.approx([log(0.9), log(0.5)])


def test_low_precision_logits_are_normalised_in_float32():
    # 1,000 equal logits: log 1000 = 6.9078 is 6.90625 in bfloat16
    model = Bigrams(torch.zeros(1000, 1000, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        got = token_logprobs(model, [([1], [2, 3])], entropy=True)
    assert got.entropy is not None
    assert got.logprobs.dtype == torch.float32
    assert got.logprobs.tolist() == pytest.approx([-math.log(1000)] * 2, abs=1e-6)
    assert got.entropy.tolist() == pytest.approx([math.log(1000)] * 2, abs=1e-5)
