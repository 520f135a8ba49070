"""How much of a draft survives, by hand."""

import math

import torch

from reroll.algo.accept import lenient, lossless, random_cut


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


# --- SPEC-RL's rule -----------------------------------------------------------------------------


def logs(*numbers: float) -> list[float]:
    return [math.log(number) for number in numbers]


def test_lenient_keeps_up_to_the_first_refusal():
    ratio = torch.tensor([
        logs(0.5, 0.5, 0.5, 0.5),
        logs(0.5, 0.5, 0.5, 0.5),
        logs(2.0, 0.3, 1.0, 0.1),
        logs(0.1, 9.0, 9.0, 9.0),
        logs(1.0, 1.0, 1.0, 1.0),  # nothing has changed: everything is kept
    ], dtype=torch.float64)  # fmt: skip
    chance = torch.tensor([
        [0.49, 0.49, 0.49, 0.49],
        [0.49, 0.51, 0.01, 0.01],  # what would be kept behind a refusal does not count
        [0.99, 0.29, 0.99, 0.11],
        [0.11, 0.01, 0.01, 0.01],
        [1 - 2**-33] * 4,
    ], dtype=torch.float64)  # fmt: skip
    kept = lenient(ratio, chance, 1.0, torch.full((5,), 4))
    assert kept.dtype == torch.int64 and kept.tolist() == [4, 1, 3, 0, 4]


def test_the_factor_is_lenience():
    # kept with chance min(1, factor * ratio): here 0.25, 0.5, 0.75, 1 for a ratio of one half
    chance = torch.tensor([[0.24], [0.26], [0.49], [0.51], [0.74], [0.76], [0.999]]).double()
    ratio = torch.full((7, 1), math.log(0.5), dtype=torch.float64)
    length = torch.ones(7, dtype=torch.long)
    for factor, count in ((0.5, 1), (1.0, 3), (1.5, 5), (2.0, 7), (math.exp(0.5), 6)):
        assert lenient(ratio, chance, factor, length).tolist() == [1] * count + [0] * (7 - count)
    assert lenient(ratio, chance, math.inf, length).tolist() == [1] * 7


def test_lenient_never_keeps_padding():
    ratio, chance = torch.zeros(4, 3), torch.full((4, 3), 0.5)
    length = torch.tensor([0, 1, 2, 3])
    assert lenient(ratio, chance, 2.0, length).tolist() == [0, 1, 2, 3]
    assert lenient(ratio[:, :0], chance[:, :0], 2.0, torch.zeros(4).long()).tolist() == [0] * 4


def test_what_the_new_policy_forbids_is_never_kept():
    ratio = torch.tensor([[0.0, -torch.inf, 0.0]])
    chance = torch.full((1, 3), 2.0**-33, dtype=torch.float64)
    assert lenient(ratio, chance, 1e6, torch.tensor([3])).tolist() == [1]


def test_random_cut_by_hand():
    chance = torch.tensor([0.0001, 0.2499, 0.2501, 0.5001, 0.7499, 0.7501, 1 - 2**-33]).double()
    cuts = random_cut(chance, torch.full((7,), 3))
    assert cuts.dtype == torch.int64 and cuts.tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert random_cut(chance, torch.zeros(7).long()).tolist() == [0] * 7
    # a float32 uniform may round up to 1, which is no place beyond the end
    assert random_cut(torch.ones(2), torch.tensor([3, 0])).tolist() == [3, 0]
