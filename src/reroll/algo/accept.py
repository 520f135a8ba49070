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


def lenient(
    log_ratio_RD: torch.Tensor,
    uniform_RD: torch.Tensor,
    factor: float | torch.Tensor,
    length_R: torch.Tensor,
) -> torch.Tensor:
    """Accepted draft tokens of each row under SPEC-RL's rule, int64 `[R]`. Not lossless.

    Token i is kept with chance min(1, factor * p_new / p_old), up to the first that is not
    (arXiv 2509.23232, eq. 3 and 4; their lenience is `factor`). What follows is sampled plainly,
    without the residual law of Leviathan et al., so even factor 1 does not give the law of the
    new policy: with p the old and q the new law of a token, its law comes out as
    min(p, factor q) + (1 - sum min(p, factor q)) q.

    log_ratio_RD: log p_new - log p_old of the draft's tokens; uniform_RD: in (0, 1); factor: one
    for all rows or `[R]`, inf keeps everything.
    """
    assert log_ratio_RD.shape == uniform_RD.shape and length_R.shape == log_ratio_RD.shape[:1]
    inside_RD = torch.arange(log_ratio_RD.shape[1], device=length_R.device) < length_R[:, None]
    factor_R1 = torch.as_tensor(factor, dtype=log_ratio_RD.dtype).reshape(-1, 1)
    kept_RD = uniform_RD.log() <= log_ratio_RD + factor_R1.log()
    return (kept_RD & inside_RD).long().cumprod(-1).sum(-1)


def random_cut(uniform_R: torch.Tensor, length_R: torch.Tensor) -> torch.Tensor:
    """SPEC-RL's ablation "random reuse": a cut drawn uniformly from 0, ..., length; int64 `[R]`."""
    return torch.minimum((uniform_R * (length_R + 1)).long(), length_R)
