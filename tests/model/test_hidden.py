"""What is collected is what enters the output head, and nothing of it is left behind."""

import pytest
import torch

from reroll.model.hidden import hidden_states
from tests.tiny import SERVED, tiny

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
WANTED = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 1]]).bool()


@pytest.mark.parametrize("name", SERVED)
def test_the_last_hidden_state_in_any_architecture(name):
    model = tiny(name)
    with torch.no_grad():
        expected = model(input_ids=TOKENS, output_hidden_states=True).hidden_states[-1]
        with hidden_states(model, True) as states:
            logits = model(input_ids=TOKENS).logits
            model(input_ids=TOKENS, logits_to_keep=WANTED)
    whole, kept = states
    # the very tensor, so not a bit differs; shaped as the head gets it
    assert torch.equal(whole, expected)
    assert torch.equal(kept, expected[WANTED])
    assert whole.shape == (*TOKENS.shape, 32) and logits.shape[:2] == TOKENS.shape


def test_the_head_s_own_forward_is_made_of_it():
    model = tiny("llama")
    with hidden_states(model, True) as states:
        logits = model(input_ids=TOKENS).logits
    weight = model.get_output_embeddings().weight
    torch.testing.assert_close(states[0] @ weight.T, logits, rtol=0, atol=1e-12)
    # with gradient, down to the embedding
    (gradient,) = torch.autograd.grad(states[0].sum(), model.get_input_embeddings().weight)
    assert gradient.norm() > 1e-3


def test_one_tensor_a_forward_and_none_afterwards():
    model = tiny("gpt2")
    with torch.no_grad():
        with hidden_states(model, True) as states:
            for length in (2, 5, 3):
                model(input_ids=TOKENS[:, :length])
        assert [x.shape[1] for x in states] == [2, 5, 3]
        model(input_ids=TOKENS)
        assert len(states) == 3
        with hidden_states(model, False) as states:
            model(input_ids=TOKENS)
        assert states == []


def test_the_hook_goes_when_the_forward_fails():
    model = tiny("gpt2")
    with pytest.raises(ZeroDivisionError), hidden_states(model, True) as states:
        raise ZeroDivisionError
    with torch.no_grad():
        model(input_ids=TOKENS)
    assert states == []
    assert not model.get_output_embeddings()._forward_pre_hooks
