"""How much of a draft survives.

Lossless acceptance: the sampler's own choice, under its own noise, is computed at every position
of the draft; the draft is kept up to the first token that differs from the choice made there. At
that place the right token is already known: it is the choice. So a draft changes the time and
never the tokens (the coupling of Gumbel-max sampling with itself; compare Leviathan et al.,
arXiv 2211.17192, whose rejection rule keeps the law but not the token).
"""

import torch


def lossless(
    draft_RD: torch.Tensor, choice_RD: torch.Tensor, length_R: torch.Tensor
) -> torch.Tensor:
    """Accepted draft tokens of each row, int64 `[R]`.

    draft_RD: guessed tokens, padded; choice_RD: what the sampler draws at the same positions
    given the draft before it; length_R: tokens of each draft.
    """
    assert draft_RD.shape == choice_RD.shape and length_R.shape == draft_RD.shape[:1]
    inside_RD = torch.arange(draft_RD.shape[1], device=draft_RD.device) < length_R[:, None]
    return ((draft_RD == choice_RD) & inside_RD).long().cumprod(-1).sum(-1)
