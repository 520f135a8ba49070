"""Credited groups to minibatches (one optimizer step each) to microbatches (one forward each).

Groups stay whole in a minibatch. In which microbatch a rollout is run changes nothing, since its
credit is known by then: the forwards are laid out as is cheapest (`model/layout.py`), and each of
them takes the credit of its rollouts along. Token-aligned streams are packed rollout after rollout.
`T` packed completion tokens, `R` rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from reroll.model.flops import CostModel
from reroll.model.layout import Layout, lay_out
from reroll.train.credit import Credit


@dataclass(slots=True)
class Microbatch:
    """What one forward trains on; all tensors packed `[T]` but `weights`."""

    layout: Layout
    lengths: list[int]
    """completion tokens of each rollout"""
    weights: torch.Tensor
    """`[R]` of the rollouts"""
    mask: torch.Tensor
    """1.0 where the policy gradient applies"""
    lags: torch.Tensor
    """optimizer steps between the draw of each token and the batch's first step"""
    logprobs: torch.Tensor
    """as sampled, untruncated: old log-probs"""
    behaviour: torch.Tensor
    """as sampled, under the law actually drawn from"""
    advantages: torch.Tensor
    inverse: torch.Tensor
    """inverse-probability weights of tokens of thinned groups, else 1"""
    reference: torch.Tensor | None
    proximal: torch.Tensor | None
    values: torch.Tensor | None
    returns: torch.Tensor | None
    fresh: torch.Tensor | None = None
    """log-probs before the batch's first optimizer step, where sampling's are too rough"""

    def to(self, device: torch.device, dtype: torch.dtype) -> "Microbatch":
        """The same on a device, with float streams in `dtype`."""
        moved = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                value = value.to(device, dtype if value.is_floating_point() else value.dtype)
            moved[name] = value
        return Microbatch(**moved)


@dataclass(slots=True)
class Minibatch:
    """What one optimizer step averages over."""

    microbatches: list[Microbatch]
    tokens: float
    """trained tokens of all its graded rollouts, also of groups left out for want of signal, each
    weighted as its rollout and by its inverse probability"""
    rollouts: float
    """sum of the weights of the same rollouts; of a thinned group, of all that were started"""
    groups: int
    live_groups: int
    """groups with a non-zero advantage"""


def minibatches(
    groups: Sequence[list[Credit]],
    count: int,
    microbatch_tokens: int,
    skip_dead: bool,
    cost: CostModel | None = None,
    behind: bool = True,
) -> list[Minibatch]:
    """Cut a batch into `count` minibatches of whole groups, as even as can be, in order.

    skip_dead: leave out groups without signal. They add nothing to the policy gradient, but still
    count in the averages, so the gradient is the same as if they had been run. (A minibatch of
    nothing but such groups takes no optimizer step at all.)
    cost: the model's, for running what rollouts begin with alike once; None: each runs alone.
    behind: see `lay_out`.
    """
    bounds = [round(i * len(groups) / count) for i in range(count + 1)]
    parts = [groups[a:b] for a, b in pairwise(bounds)]
    return [_minibatch(part, microbatch_tokens, skip_dead, cost, behind) for part in parts if part]


def _minibatch(
    part: Sequence[list[Credit]],
    microbatch_tokens: int,
    skip_dead: bool,
    cost: CostModel | None,
    behind: bool,
) -> Minibatch:
    live = [group for group in part if any(one.advantages.any() for one in group)]
    run = [one for group in (live if skip_dead else part) for one in group]
    pairs = [(one.rollout.prompt.token_ids, one.rollout.completion.token_ids) for one in run]
    every = [one for group in part for one in group]
    return Minibatch(
        [
            _pack([run[k] for k in layout.which], layout)
            for layout in lay_out(pairs, microbatch_tokens, cost, behind)
        ],
        tokens=sum(one.rollout.weight * one.tokens() for one in every),
        rollouts=sum(one.rollout.weight * one.counts for one in every),
        groups=len(part),
        live_groups=len(live),
    )


def _pack(credits: Sequence[Credit], layout: Layout) -> Microbatch:
    rollouts = [one.rollout for one in credits]
    completions = [rollout.completion for rollout in rollouts]

    def floats(streams: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.asarray(x, np.float64) for x in streams]))

    def joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        there = [part for part in parts if part is not None]
        return torch.cat(there) if there else None

    return Microbatch(
        layout=layout,
        lengths=[len(one.mask) for one in credits],
        weights=floats([[rollout.weight for rollout in rollouts]]),
        mask=floats([one.mask for one in credits]),
        lags=torch.tensor([lag for one in credits for lag in one.lags]),
        logprobs=floats([c.logprobs for c in completions]),
        behaviour=floats([c.behaviour_logprobs for c in completions]),
        advantages=torch.cat([one.advantages for one in credits]),
        inverse=torch.cat([one.weights() for one in credits]),
        reference=joined([one.reference for one in credits]),
        proximal=joined([one.proximal for one in credits]),
        values=joined([one.values for one in credits]),
        returns=joined([one.returns for one in credits]),
    )
