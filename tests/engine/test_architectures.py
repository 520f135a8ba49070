"""Every architecture of the list, unmodified, against `generate` of the same module."""

import pytest
import torch

from reroll.engine.local import LocalEngine
from reroll.engine.selfcheck import check_servable
from reroll.types import Request, Sampling
from tests.engine.helpers import finish
from tests.tiny import SERVED, VOCABULARY, tiny

PROMPTS = [[1, 5, 9], [3, 4, 5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23, 24, 25], [2], [7] * 12]
NEW = 20  # prompt + reply outgrow the windowed models' window of 6


@pytest.mark.parametrize("name", SERVED)
def test_greedy_equals_generate_token_for_token(name: str) -> None:
    model = tiny(name)
    check_servable(model)
    engine = LocalEngine(model, slots=3, capacity=max(map(len, PROMPTS)) + NEW)
    lengths = [NEW, NEW - 7, NEW, 1, NEW - 3]  # ragged: slots change hands
    requests = [
        Request(i, tuple(prompt), key=i, sampling=Sampling(length, temperature=0.0))
        for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]
    done = finish(engine, requests)
    for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert done[i].token_ids == expected
    # a model that says the same token for ever would prove nothing
    assert len({token for completion in done.values() for token in completion.token_ids}) > 3


@pytest.mark.parametrize("name", SERVED)
def test_sampling_logprobs_equal_a_plain_forward(name: str) -> None:
    model = tiny(name, dtype=torch.float32)
    temperature = 1.3
    engine = LocalEngine(model, slots=3, capacity=40)
    sampling = Sampling(NEW, temperature=temperature)
    requests = [Request(i, tuple(p), key=100 + i, sampling=sampling) for i, p in enumerate(PROMPTS)]
    done = finish(engine, requests)
    for i, prompt in enumerate(PROMPTS):
        row = torch.tensor([[*prompt, *done[i].token_ids]])
        with torch.no_grad():
            logits = model(input_ids=row).logits[0, len(prompt) - 1 : -1, :VOCABULARY]
        expected = (logits / temperature).log_softmax(-1)
        picked = expected.gather(-1, torch.tensor(done[i].token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(done[i].logprobs), picked, atol=1e-4, rtol=0)
        assert done[i].behaviour_logprobs == done[i].logprobs
