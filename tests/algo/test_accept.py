"""How much of a draft survives, by hand."""

import torch

from reroll.algo.accept import lossless


def test_a_draft_is_kept_up_to_the_first_difference():
    choice = torch.tensor([[5, 6, 7, 8]] * 6)
    draft = torch.tensor(
        [
            [5, 6, 7, 8],
            [5, 6, 0, 8],  # what agrees again behind a difference does not count
            [0, 6, 7, 8],
            [5, 6, 7, 0],
            [5, 0, 0, 0],
            [0, 0, 0, 0],
        ]
    )
    accepted = lossless(draft, choice, torch.full((6,), 4))
    assert accepted.dtype == torch.int64
    assert accepted.tolist() == [4, 2, 0, 3, 1, 0]


def test_padding_is_never_accepted():
    # token 0 is both the padding and a token that may be drawn
    draft = torch.tensor([[5, 0, 0], [5, 0, 0], [0, 0, 0], [5, 6, 7]])
    choice = torch.tensor([[5, 0, 0], [5, 0, 0], [0, 0, 0], [5, 6, 7]])
    assert lossless(draft, choice, torch.tensor([1, 2, 0, 3])).tolist() == [1, 2, 0, 3]


def test_an_empty_draft():
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert lossless(empty, empty, torch.tensor([0, 0])).tolist() == [0, 0]
