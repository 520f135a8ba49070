"""Does a sample follow its law? Shared by the tests of noise and sampling."""

import numpy as np
import torch
from scipy import stats

ALPHA = 1e-6
"""Smallest p-value that passes. Seeds are fixed, so a test passes always or never; a right
generator under a fresh seed would fall below this once in a million tests."""


def fits(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Pearson's chi-square test of `counts` against `probabilities`, ALPHA on either side.

    Outcomes of probability 0 must not occur at all; those expected fewer than 10 times share a
    cell, so that chi-square's law holds. The upper side catches counts that are too even.
    """
    observed, law = counts.double().numpy(), probabilities.double().numpy()
    assert observed.shape == law.shape and abs(law.sum() - 1) < 1e-5
    if observed[law == 0].any():
        return False
    expected = law / law.sum() * observed.sum()
    rare = expected < 10
    if expected[rare].sum() >= 10:
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    else:  # the rare ones join the smallest of the others
        smallest = np.where(rare, np.inf, expected).argmin()
        observed[smallest] += observed[rare].sum()
        expected[smallest] += expected[rare].sum()
        observed, expected = observed[~rare], expected[~rare]
    assert len(observed) > 1
    return bool(ALPHA < stats.chisquare(observed, expected).pvalue < 1 - ALPHA)


def even(values: torch.Tensor, cells: int) -> bool:
    """Whether integers in 0..cells-1 are uniform."""
    return fits(values.flatten().bincount(minlength=cells), torch.full((cells,), 1 / cells))
