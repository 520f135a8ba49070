"""Groups to minibatches (one optimizer step each) to microbatches (one forward each).

Groups stay whole throughout. Token-aligned streams are packed rollout after rollout; rows are
padded only inside `model/`. `T` packed completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from reroll.model.ragged import padded_size
from reroll.types import Group, Rollout


@dataclass(slots=True)
class Microbatch:
    """What one forward trains on; all tensors packed `[T]`."""

    pairs: list[tuple[tuple[int, ...], list[int]]]
    """(prompt, completion) token ids of each rollout"""
    lengths: list[int]
    """completion tokens of each rollout"""
    advantages: torch.Tensor
    logprobs: torch.Tensor
    """as sampled: old log-probs"""
    versions: torch.Tensor
    """policy version that drew each token, -1 for prefix tokens"""
    mask: torch.Tensor
    """1.0 where the policy gradient applies"""


@dataclass(slots=True)
class Minibatch:
    """What one optimizer step averages over."""

    microbatches: list[Microbatch]
    tokens: int
    """trained tokens of all its graded rollouts, also of groups left out for want of signal"""
    rollouts: int
    groups: int
    live_groups: int
    """groups with a non-zero advantage"""


Credited = tuple[Group, list[float]]
"""a group with the advantage of each of its rollouts"""


def minibatches(
    credited: Sequence[Credited], count: int, microbatch_tokens: int, skip_dead: bool
) -> list[Minibatch]:
    """Cut a batch into `count` minibatches of whole groups, as even as can be, in order.

    skip_dead: leave out groups without signal. They add nothing to the policy gradient, but still
    count in the averages, so the gradient is the same as if they had been run. (A minibatch of
    nothing but such groups takes no optimizer step at all.)
    """
    bounds = [round(i * len(credited) / count) for i in range(count + 1)]
    parts = [credited[a:b] for a, b in pairwise(bounds)]
    return [_minibatch(part, microbatch_tokens, skip_dead) for part in parts if part]


def _minibatch(part: Sequence[Credited], microbatch_tokens: int, skip_dead: bool) -> Minibatch:
    graded = [r for group, _ in part for r in group.rollouts if r.reward is not None]
    live = [c for c in part if any(c[1])]
    packs, pack, lengths = [], [], []
    for group, advantages in live if skip_dead else part:
        rows = [
            (rollout, advantage)
            for rollout, advantage in zip(group.rollouts, advantages, strict=True)
            if rollout.reward is not None and rollout.completion.token_ids
        ]
        sizes = [len(r.prompt.token_ids) + len(r.completion.token_ids) for r, _ in rows]
        if pack and padded_size(lengths + sizes) > microbatch_tokens:
            packs.append(pack)
            pack, lengths = [], []
        pack, lengths = pack + rows, lengths + sizes
    if pack:
        packs.append(pack)
    return Minibatch(
        [_pack(rows) for rows in packs],
        tokens=sum(sum(r.completion.loss_mask) for r in graded),
        rollouts=len(graded),
        groups=len(part),
        live_groups=len(live),
    )


def _pack(rows: Sequence[tuple[Rollout, float]]) -> Microbatch:
    completions = [rollout.completion for rollout, _ in rows]
    lengths = [len(c.token_ids) for c in completions]
    advantages = torch.tensor([advantage for _, advantage in rows])
    return Microbatch(
        pairs=[(rollout.prompt.token_ids, rollout.completion.token_ids) for rollout, _ in rows],
        lengths=lengths,
        advantages=advantages.repeat_interleave(torch.tensor(lengths)),
        logprobs=torch.tensor([x for c in completions for x in c.logprobs]),
        versions=torch.tensor([x for c in completions for x in c.versions]),
        mask=torch.tensor([float(x) for c in completions for x in c.loss_mask]),
    )
