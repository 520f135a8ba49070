"""The statistical tests can fail: they reject samples that are off by little."""

import torch

from tests.algo.laws import even, fits


def test_a_fair_die_fits():
    rolls = torch.randint(6, (60_000,), generator=torch.Generator().manual_seed(0))
    assert even(rolls, 6)


def test_a_die_loaded_by_a_twentieth_does_not_fit():
    # chi-square grows by n sum((p - q)^2 / q) = 60,000 * 2 * (1/120)^2 * 6 = 50, at 5 degrees
    law = torch.tensor([1 / 6 + 1 / 120, 1 / 6 - 1 / 120, 1 / 6, 1 / 6, 1 / 6, 1 / 6])
    assert not fits((law * 60_000).round().long(), torch.full((6,), 1 / 6))


def test_counts_that_are_too_even_do_not_fit():
    # 40 cells that are each within 1 of their expected 1,000: chi-square 0.04 at 39 degrees
    assert not fits(1_000 + torch.tensor([1, -1] * 20), torch.full((40,), 1 / 40))


def test_an_impossible_outcome_does_not_fit():
    assert not fits(torch.tensor([500, 499, 1]), torch.tensor([0.5, 0.5, 0.0]))


def test_rare_outcomes_share_a_cell():
    # expected 40, 40 and 20 times 1: the rare ones are 20 together, however they fall
    law = torch.tensor([0.4, 0.4, *[0.01] * 20])
    assert fits(torch.tensor([37, 41, 22, *[0] * 19]), law)
    assert not fits(torch.tensor([10, 10, *[4] * 20]), law)
