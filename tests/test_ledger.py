import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reroll.engine.base import Finished, Stats
from reroll.engine.local import LocalEngine
from reroll.ledger import CATEGORIES, Ledger
from reroll.model.flops import CostModel, cost_model
from reroll.model.layout import Layout, lay_out
from reroll.types import Draft, Request, Sampling
from tests.tiny import ATTENTION_FREE, VOCABULARY, tiny

HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS, WIDTH = 32, 64, 2, 4, 2, 8
ATTENTION = 2 * HIDDEN * HEADS * WIDTH + 2 * HIDDEN * KEY_HEADS * WIDTH
EMBEDDING = VOCABULARY * HIDDEN


def test_flops_of_a_dense_model_by_hand() -> None:
    norms = LAYERS * (2 * HIDDEN + 2 * WIDTH) + HIDDEN
    layer = ATTENTION + 3 * HIDDEN * INNER
    cost = cost_model(tiny("qwen3"))
    assert cost.per_token == 2 * (LAYERS * layer + norms + EMBEDDING)  # the head, tied or not
    assert cost.per_context == 4 * HEADS * WIDTH * LAYERS
    assert cost.flops(3, 6) == 3 * cost.per_token + 6 * cost.per_context


def test_a_tied_head_costs_what_an_untied_one_costs() -> None:
    tied, untied = tiny("gemma"), tiny("llama")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight
    assert cost_model(tied).per_token == cost_model(untied).per_token


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma", "mistral"])
def test_flops_of_a_dense_model_as_torch_counts_them(name: str) -> None:
    model, cost = tiny(name), cost_model(tiny(name))
    model.config._attn_implementation = "eager"
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    for tokens in (1, 5):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.ones(1, tokens, dtype=torch.long))
        # torch counts every pair of tokens, masked or not, and no multiplication by a norm's weight
        ours = cost.flops(tokens, tokens * tokens) - 2 * norms * tokens
        assert ours == counter.get_total_flops()


def test_flops_of_a_mixture_count_the_routed_experts_only() -> None:
    inner, experts, routed = 32, 4, 2
    cost = cost_model(tiny("qwen2_moe"))
    biases = (HEADS + 2 * KEY_HEADS) * WIDTH
    router, shared, gate = HIDDEN * experts, 3 * HIDDEN * 32, HIDDEN
    layer = ATTENTION + biases + router + shared + gate + routed * 3 * HIDDEN * inner + 2 * HIDDEN
    assert cost.per_token == 2 * (LAYERS * layer + HIDDEN + EMBEDDING)
    cost = cost_model(tiny("mixtral"))
    layer = ATTENTION + router + routed * 3 * HIDDEN * INNER + 2 * HIDDEN
    assert cost.per_token == 2 * (LAYERS * layer + HIDDEN + EMBEDDING)


def alone(*lengths: int) -> Layout:
    """A forward over texts that share nothing."""
    (layout,) = lay_out([([row], list(range(1, n))) for row, n in enumerate(lengths)])
    return layout


def test_what_is_shared_is_booked_once() -> None:
    # 2 tokens that two rollouts of 4 and 3 begin with, and each one's own
    pairs = [([5, 6], [7, 8]), ([5, 6], [9])]
    (layout,) = lay_out(pairs, cost=ATTENTION_FREE)
    ledger = Ledger()
    ledger.add_forwards("train", [(3, layout)], 1.0, CostModel(per_token=10.0, per_context=1.0))
    assert ledger.tokens["train"] == 5
    assert ledger.flops["train"] == 3 * (50 + (1 + 2 + 3 + 4) + 3)


@pytest.mark.parametrize("category", ["score", "train"])
def test_forwards_are_booked_by_their_passes(category: str) -> None:
    cost = CostModel(per_token=10.0, per_context=1.0)
    ledger = Ledger()
    ledger.add_forwards(category, [(3, alone(3, 2)), (1, alone(4))], 1.5, cost)
    first, second = 1 + 2 + 3 + 1 + 2, 1 + 2 + 3 + 4  # of sequences of 3 and 2 tokens, and of 4
    assert ledger.tokens == dict.fromkeys(CATEGORIES, 0) | {category: 5 + 4}
    assert ledger.flops[category] == 3 * (50 + first) + 1 * (40 + second)
    assert ledger.seconds == dict.fromkeys(CATEGORIES, 0) | {category: 1.5}
    ledger.add_forwards(category, [(2, alone(2))], 0.5, cost)
    assert ledger.tokens[category] == 11
    assert ledger.flops[category] == 3 * (50 + first) + 1 * (40 + second) + 2 * (20 + 3)
    assert ledger.seconds[category] == 2.0


def test_no_forwards_are_still_seconds() -> None:
    ledger = Ledger()
    ledger.add_forwards("score", [], 0.25, CostModel(10.0, 1.0))
    assert ledger.tokens == ledger.flops == dict.fromkeys(CATEGORIES, 0)
    assert ledger.seconds["score"] == 0.25


def test_engine_counters_are_booked_by_difference() -> None:
    before = Stats(tokens_prefilled=5, tokens_verified=1, tokens_decoded=7)
    after = Stats(tokens_prefilled=25, tokens_verified=6, tokens_decoded=10)
    before.context = {"prefill": 10, "verify": 20, "decode": 30}
    after.context = {"prefill": 11, "verify": 22, "decode": 33}
    before.seconds = {"prefill": 1.0, "decode": 2.0}
    after.seconds = {"prefill": 6.0, "decode": 4.5}
    ledger = Ledger()
    ledger.add_engine(before, after, CostModel(100.0, 1.0))
    assert ledger.tokens == dict.fromkeys(CATEGORIES, 0) | {
        "prefill": 20, "verify": 5, "decode": 3,
    }  # fmt: skip
    assert ledger.flops == dict.fromkeys(CATEGORIES, 0) | {
        "prefill": 2001, "verify": 502, "decode": 303,
    }  # fmt: skip
    # verification is a fifth of the tokens of the shared forwards
    assert ledger.seconds["prefill"] == pytest.approx(4.0)
    assert ledger.seconds["verify"] == pytest.approx(1.0)
    assert ledger.seconds["decode"] == pytest.approx(2.5)


def test_since_and_copy() -> None:
    ledger = Ledger()
    ledger.tokens["grade"] = 3.0
    earlier = ledger.copy()
    ledger.tokens["grade"] += 4.0
    ledger.seconds["sync"] += 0.5
    assert earlier.tokens["grade"] == 3.0
    spent = ledger.since(earlier)
    assert (spent.tokens["grade"], spent.seconds["sync"], spent.flops["train"]) == (4.0, 0.5, 0.0)
    metrics = spent.metrics()
    assert set(metrics) == {f"{k}_{c}" for k in ("tokens", "flops", "seconds") for c in CATEGORIES}
    assert (metrics["tokens_grade"], metrics["seconds_sync"]) == (4.0, 0.5)


def test_a_real_engines_counters_add_up() -> None:
    model = tiny("qwen3")
    engine = LocalEngine(model, slots=2, capacity=32)
    sampling = Sampling(max_tokens=6)
    prompts = [(1, 2, 3), (4, 5), (1, 2, 3)]  # the first and the last share a row
    for index, prompt in enumerate(prompts):
        engine.submit(Request(index, prompt, key=index, sampling=sampling))
    lengths = []
    while len(lengths) < 3:
        for event in engine.step():
            assert isinstance(event, Finished)
            lengths.append(len(event.completion.token_ids))
    ledger, cost = Ledger(), cost_model(model)
    ledger.add_engine(Stats(), engine.stats(), cost)
    assert lengths == [6, 6, 6]
    assert ledger.tokens["prefill"] == 3 + 2
    assert ledger.tokens["decode"] == 3 * 5  # the first token comes with the prefill
    context = sum(sum(range(n + 1, n + 6)) for n in (3, 2, 3))
    assert ledger.flops["decode"] == cost.flops(15, context)
    assert ledger.flops["prefill"] == cost.flops(5, 6 + 3)


def test_drafts_are_booked_as_verification() -> None:
    model = tiny("qwen3")
    engine = LocalEngine(model, slots=1, capacity=32)
    request = Request(0, (1, 2, 3), 7, Sampling(max_tokens=5), drafts=(Draft((9, 9, 9, 9)),))
    engine.submit(request)
    while not engine.step():
        pass
    ledger, cost = Ledger(), cost_model(model)
    ledger.add_engine(Stats(), engine.stats(), cost)
    assert (ledger.tokens["prefill"], ledger.tokens["verify"]) == (3, 4)
    assert ledger.flops["verify"] == cost.flops(4, 4 + 5 + 6 + 7)
    assert ledger.seconds["verify"] > 0
