"""The engine decodes with adapters inside the module as with any other weights."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from reroll.config import LoraSection
from reroll.engine.fastlinear import onednn_forwards
from reroll.engine.local import LocalEngine
from reroll.engine.selfcheck import check_servable
from reroll.model.lora import adapters_off, add_lora
from reroll.types import Completion, Request, Sampling
from tests.engine.helpers import finish
from tests.tiny import tiny

NAMES = ["qwen3", "gpt2", "llama"]
PROMPTS = [[1, 5, 9], [3, 4, 5, 6, 7, 8, 9, 10, 11], [2], [20, 21, 22, 23, 24, 25]]
NEW = 16


@pytest.fixture(autouse=True)
def quiet_conv1d() -> Iterator[None]:
    """What peft says of GPT-2's layers has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        yield


def adapted(name: str, dtype: torch.dtype, seed: int = 1) -> PreTrainedModel:
    """With adapters that have something to say."""
    model = tiny(name, dtype)
    add_lora(model, LoraSection(rank=4), 0)
    stir(model, seed)
    return model


def stir(model: PreTrainedModel, seed: int) -> None:
    """Adapters that move each weight by as much as the weights are (0.25), give or take."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def decoded(engine: LocalEngine, temperature: float, first: int = 0) -> list[Completion]:
    requests = [
        Request(first + i, tuple(prompt), key=first + i, sampling=Sampling(NEW, temperature))
        for i, prompt in enumerate(PROMPTS)
    ]
    done = finish(engine, requests)
    return [done[first + i] for i in range(len(PROMPTS))]


@torch.no_grad()
def laws(model: PreTrainedModel, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """Log-probs of the whole vocabulary before each token of a reply, by a plain forward."""
    logits = model(input_ids=torch.tensor([[*prompt, *reply]]), use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def assert_drawn_from(
    model: PreTrainedModel, completions: list[Completion], greedy: bool, atol: float
) -> None:
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        law = laws(model, prompt, completion.token_ids)
        chosen = law.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        logprobs = torch.tensor(completion.logprobs, dtype=law.dtype)
        torch.testing.assert_close(logprobs, chosen, rtol=0, atol=atol)
        if greedy:  # no token is likelier, up to the same noise
            assert (law.max(-1).values - chosen).max() <= atol


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize(
    ("dtype", "atol"),
    # sums of 64 products of order one, in logits around 10: as tests/engine/test_architectures.py
    [(torch.float64, 1e-10), (torch.float32, 1e-4)],
)
@pytest.mark.parametrize("name", NAMES)
def test_it_decodes_with_the_adapters(
    name: str, dtype: torch.dtype, atol: float, greedy: bool
) -> None:
    model = adapted(name, dtype)
    engine = LocalEngine(model, slots=3, capacity=9 + NEW)
    completions = decoded(engine, 0.0 if greedy else 1.0)
    assert_drawn_from(model, completions, greedy, atol)
    with adapters_off(model):
        of_base = [laws(model, p, c.token_ids) for p, c in zip(PROMPTS, completions, strict=True)]
    apart = [
        (torch.tensor(c.logprobs) - law.gather(-1, torch.tensor(c.token_ids)[:, None])[:, 0]).abs()
        for c, law in zip(completions, of_base, strict=True)
    ]
    assert min(gap.max() for gap in apart) > 0.1  # the base would have said something else


def test_greedy_equals_generate_token_for_token() -> None:
    model = adapted("qwen3", torch.float64)
    completions = decoded(LocalEngine(model, slots=2, capacity=9 + NEW), 0.0)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
    assert len({token for c in completions for token in c.token_ids}) > 3


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_one_dnn_computes_layers_and_adapters_alike(name: str) -> None:
    model = adapted(name, torch.float32)
    fast = [module for module, _ in onednn_forwards(model)]
    # 7 layers with two factors each, twice, and the head
    assert len(fast) == 2 * 7 * 3 + 1
    names = {module: n for n, module in model.named_modules()}
    assert sum("lora_" in names[module] for module in fast) == 2 * 7 * 2
    assert all(type(module) is nn.Linear for module in fast)
    completions = decoded(LocalEngine(model, slots=3, capacity=9 + NEW), 0.0)
    assert_drawn_from(model, completions, greedy=True, atol=1e-4)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_sees_adapters_change(dtype: torch.dtype) -> None:
    model = adapted("qwen3", dtype)
    engine = LocalEngine(model, slots=3, capacity=9 + NEW)
    before = decoded(engine, 0.0)
    stir(model, seed=2)  # as an optimizer step: in place
    engine.load_weights(1)
    after = decoded(engine, 0.0, first=10)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    assert_drawn_from(model, after, greedy=True, atol=1e-10 if dtype == torch.float64 else 1e-4)
    assert {v for c in after for v in c.versions} == {1}


@pytest.mark.parametrize("name", NAMES)
def test_the_self_check_passes(name: str) -> None:
    assert check_servable(adapted(name, torch.float64)) < 1e-10
    assert check_servable(adapted(name, torch.float32)) < 1e-3


def test_it_scores_with_the_adapters() -> None:
    model = adapted("llama", torch.float64)
    engine = LocalEngine(model, slots=2, capacity=9 + NEW)
    completions = decoded(engine, 1.0)
    scored = engine.score([(p, c.token_ids) for p, c in zip(PROMPTS, completions, strict=True)])
    for row, completion in zip(scored, completions, strict=True):
        assert row == pytest.approx(completion.logprobs, abs=1e-10)
