"""A policy so small that everything it can do is enumerated: expectations without sampling.

3 prompts, 4 tokens, replies of at most 2 tokens; token 0 stops at once. So a prompt has 1 + 3 * 4
= 13 replies, of 1 or 2 tokens (in the one-step world 4, of 1 token). `P` prompts, `O` replies
(outcomes) of a prompt, `V` tokens, `S` steps, `T` packed tokens, `N` parameters.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import NamedTuple

import torch

from reroll.algo.correct import Anchor
from reroll.algo.loss import clipped_surrogate, level_ratio, token_weights

PROMPTS, TOKENS = 3, 4
SCALES = [0.1, 1.0, 4.0]
"""spread of each prompt's rewards: far apart, so that what divides by the spread shows"""
NO_CLIP = 1e6
"""clip range that no ratio here leaves"""

Rollout = tuple[int, int]
"""prompt, and which of its replies"""


def numbers(seed: int, *shape: int) -> torch.Tensor:
    """Uniform in [-1, 1), the same everywhere and always (`random.Random.random` promises it)."""
    source = random.Random(seed)
    flat = [2 * source.random() - 1 for _ in range(math.prod(shape))]
    return torch.tensor(flat, dtype=torch.float64).reshape(shape)


class World:
    """All replies of all prompts, with a reward each: any number, positive or negative."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        pairs = [(a, b) for a in range(1, TOKENS) for b in range(TOKENS)]
        self.replies = [(0,), *pairs] if steps == 2 else [(a,) for a in range(TOKENS)]
        self.lengths = [len(reply) for reply in self.replies]
        shape = (PROMPTS, len(self.replies))
        self.rewards_PO = torch.tensor(SCALES)[:, None] * (0.3 + numbers(1, *shape))
        self.rewards = self.rewards_PO.tolist()

    def places(self, rollouts: Iterable[Rollout]) -> list[int]:
        """Where each token of packed rollouts lies in a flattened `[P, O, S]`."""
        count = len(self.replies)
        return [
            (p * count + o) * self.steps + step
            for p, o in rollouts
            for step in range(self.lengths[o])
        ]


class Policy:
    """Logits of the first token, and of the second after each first one: the parameters."""

    def __init__(self, first_PV: torch.Tensor, second_PVV: torch.Tensor) -> None:
        self.parameters = (first_PV.requires_grad_(), second_PVV.requires_grad_())

    @classmethod
    def draw(cls, seed: int, near: "Policy | None" = None, distance: float = 1.5) -> "Policy":
        """Random logits, at most `distance` from those of `near` (or from the uniform law)."""
        noise = numbers(seed, PROMPTS, 1 + TOKENS, TOKENS) * distance
        moved = [noise[:, 0].clone(), noise[:, 1:].clone()]
        if near is not None:
            moved = [a + b.detach() for a, b in zip(moved, near.parameters, strict=True)]
        return cls(*moved)

    def log_laws(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi(first) `[P, V]` and log pi(second | first) `[P, V, V]`."""
        first_PV, second_PVV = self.parameters
        return first_PV.log_softmax(-1), second_PVV.log_softmax(-1)

    def token_logprobs(self, world: World) -> torch.Tensor:
        """Log-prob of every token of every reply `[P, O, S]`, 0 where a reply has ended."""
        first_PV, second_PVV = self.log_laws()
        rows = []
        for reply in world.replies:
            steps = [first_PV[:, reply[0]]]
            steps += [second_PVV[:, reply[0], reply[1]]] if len(reply) == 2 else []
            steps += [torch.zeros(PROMPTS, dtype=torch.float64)] * (world.steps - len(steps))
            rows.append(torch.stack(steps, -1))
        return torch.stack(rows, 1)

    def packed(self, world: World, rollouts: Iterable[Rollout]) -> torch.Tensor:
        """Log-probs of the tokens of packed rollouts `[T]`."""
        return self.token_logprobs(world).flatten()[torch.tensor(world.places(rollouts))]

    def law(self, world: World) -> torch.Tensor:
        """Probability of every reply `[P, O]`."""
        return self.token_logprobs(world).sum(-1).exp()

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        """Of a scalar with respect to all parameters, `[N]`."""
        parts = torch.autograd.grad(
            value, self.parameters, allow_unused=True, materialize_grads=True
        )
        return torch.cat([part.flatten() for part in parts])


def policy_gradient(policy: Policy, world: World) -> torch.Tensor:
    """g*: the exact gradient of the mean over prompts of the expected reward, `[N]`."""
    return policy.gradient((policy.law(world) * world.rewards_PO).sum() / PROMPTS)


def sequence_kl(policy: Policy, reference: Policy, world: World) -> torch.Tensor:
    """Mean over prompts of KL(policy || reference) between whole replies."""
    law_PO = policy.law(world)
    return (law_PO * (law_PO.log() - reference.law(world).detach().log())).sum() / PROMPTS


def state_kl(
    policy: Policy, reference: Policy, visitor: Policy, reverse: bool = False
) -> torch.Tensor:
    """The KL at every state, weighted by how often `visitor` comes there, which is a constant.

    Of the two-step world. reverse: KL(reference || policy) instead of KL(policy || reference).
    """
    visits_PV = visitor.log_laws()[0].detach().exp()
    visits_PV = visits_PV * torch.tensor([0.0] + [1.0] * (TOKENS - 1))  # token 0 has no second
    total = torch.zeros((), dtype=torch.float64)
    for visits, now, there in zip(
        (torch.ones(PROMPTS), visits_PV), policy.log_laws(), reference.log_laws(), strict=True
    ):
        there = there.detach()
        kl = there.exp() * (there - now) if reverse else now.exp() * (now - there)
        total = total + (visits * kl.sum(-1)).sum()
    return total / PROMPTS


class Batch(NamedTuple):
    """Rollouts that belong to one minibatch, all or some of its, and how often they come up."""

    probability: float
    rollouts: tuple[Rollout, ...]
    tokens: float
    """of the whole minibatch; nan where the average does not need it"""
    size: int
    """rollouts of the whole minibatch"""


def groups(world: World, law_PO: torch.Tensor, n: int) -> list[Batch]:
    """All groups of n rollouts of a prompt; a minibatch has one group of each prompt.

    What a minibatch's other groups are does not matter here, so they are left out.
    """
    found = []
    for p, law in enumerate(law_PO.tolist()):
        for outcomes in product(range(len(law)), repeat=n):
            chance = math.prod(law[o] for o in outcomes)
            rollouts = tuple((p, o) for o in outcomes)
            found.append(Batch(chance, rollouts, math.nan, n * PROMPTS))
    return found


def groups_in_company(world: World, law_PO: torch.Tensor, n: int) -> list[Batch]:
    """The same, once for each number of tokens that the minibatch's other groups can have.

    They matter through that number alone (average = "token"), so this is the expectation over all
    minibatches of 3 n rollouts.
    """
    return [
        batch._replace(
            probability=batch.probability * chance,
            tokens=sum(world.lengths[o] for _, o in batch.rollouts) + others,
        )
        for batch in groups(world, law_PO, n)
        for others, chance in _token_counts(world, law_PO, n, batch.rollouts[0][0]).items()
    ]


def _token_counts(world: World, law_PO: torch.Tensor, n: int, without: int) -> dict[int, float]:
    """Law of the number of tokens in groups of n of all prompts but one."""
    counts = {0: 1.0}
    for p, law in enumerate(law_PO.tolist()):
        for _ in range(0 if p == without else n):
            grown: dict[int, float] = defaultdict(float)
            for (total, chance), (o, more) in product(counts.items(), enumerate(law)):
                grown[total + world.lengths[o]] += chance * more
            counts = grown
    return counts


def one_of_each(world: World, law_PO: torch.Tensor) -> list[Batch]:
    """All minibatches of one rollout of each prompt."""
    laws = law_PO.tolist()
    return [
        Batch(
            math.prod(law[o] for law, o in zip(laws, outcomes, strict=True)),
            tuple(enumerate(outcomes)),
            sum(world.lengths[o] for o in outcomes),
            PROMPTS,
        )
        for outcomes in product(range(len(world.replies)), repeat=PROMPTS)
    ]


Credit = Callable[[World, Sequence[Batch]], torch.Tensor]
"""advantages of all tokens of all batches, one after the other `[T]`"""


def flat(batches: Sequence[Batch]) -> list[Rollout]:
    return [rollout for batch in batches for rollout in batch.rollouts]


def lengths_of(world: World, batches: Sequence[Batch]) -> list[int]:
    return [world.lengths[o] for _, o in flat(batches)]


def by_group(rule: Callable[[list[float | None]], list[float]]) -> Credit:
    """Each batch is a group, and `rule` says what each of its rollouts gets."""

    def credit(world: World, batches: Sequence[Batch]) -> torch.Tensor:
        given = [
            advantage
            for batch in batches
            for (_, o), advantage in zip(
                batch.rollouts, rule([world.rewards[p][o] for p, o in batch.rollouts]), strict=True
            )
            for _ in range(world.lengths[o])
        ]
        return torch.tensor(given, dtype=torch.float64)

    return credit


def rewards_at_the_end(world: World, batches: Sequence[Batch]) -> torch.Tensor:
    """Each rollout's reward at its last token, 0 elsewhere `[T]`."""
    given = [
        world.rewards[p][o] if step == world.lengths[o] - 1 else 0.0
        for p, o in flat(batches)
        for step in range(world.lengths[o])
    ]
    return torch.tensor(given, dtype=torch.float64)


def expected_weights(world: World, batches: Sequence[Batch], average: str) -> torch.Tensor:
    """token_weights of each batch, times the batch's probability `[T]`."""
    known: dict[tuple, torch.Tensor] = {}
    parts = []
    for batch in batches:
        lengths = tuple(world.lengths[o] for _, o in batch.rollouts)
        key = (lengths, batch.tokens if average == "token" else 0.0, batch.size)
        if key not in known:
            known[key] = token_weights(
                torch.ones(sum(lengths), dtype=torch.float64),
                lengths,
                average,
                tokens=batch.tokens,
                rollouts=batch.size,
                max_tokens=world.steps,
            )
        parts.append(known[key] * batch.probability)
    return torch.cat(parts)


def on_policy(now_T: torch.Tensor, behaviour_T: torch.Tensor) -> Anchor:
    """Takes every token as drawn by the present policy, whoever drew it."""
    return Anchor(now_T, torch.ones_like(now_T))


def expected_gradient(
    policy: Policy,
    world: World,
    batches: Sequence[Batch],
    credit: Credit,
    *,
    ratio: str = "token",
    average: str = "constant",
    clip: float = NO_CLIP,
    behaviour: Policy | None = None,
    anchor: Callable[[torch.Tensor, torch.Tensor], Anchor] = on_policy,
) -> torch.Tensor:
    """Minus the gradient of the loss, in expectation over `batches`, `[N]`.

    All batches are packed into one tensor and go through the library's loss and one backward pass:
    no formula of a gradient stands here. anchor: of (present, behaviour) log-probs, as constants.
    """
    rollouts, lengths = flat(batches), lengths_of(world, batches)
    now_T = policy.packed(world, rollouts)
    behaviour_T = (behaviour or policy).packed(world, rollouts).detach()
    old_T, factors_T = anchor(now_T.detach(), behaviour_T)
    log_ratio_T = level_ratio(now_T - old_T, torch.ones_like(now_T), lengths, ratio)
    loss_T, _ = clipped_surrogate(log_ratio_T, credit(world, batches), clip, clip)
    weights_T = expected_weights(world, batches, average)
    return -policy.gradient((loss_T * factors_T * weights_T).sum())


def cosine(one_N: torch.Tensor, other_N: torch.Tensor) -> float:
    return (one_N @ other_N / (one_N.norm() * other_N.norm())).item()


def distance(one_N: torch.Tensor, other_N: torch.Tensor) -> float:
    """Relative to the second."""
    return ((one_N - other_N).norm() / other_N.norm()).item()
