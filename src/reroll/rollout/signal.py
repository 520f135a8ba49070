"""What predicts success while a rollout runs: features, and a small network trained as grades come.

ARRoL (arXiv 2603.24840) reads the last hidden state; log-probs and entropies so far need no state
and serve any engine. `M` rollouts, `F` features, `H` hidden width, `T` tokens read.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from reroll.engine.base import Probed

RECENT = 8
"""tokens that count as recent"""
BATCH = 256
"""rollouts of one step of the network's optimizer"""
STEPS = 16
"""of those steps after each batch of rollouts"""
FADE = 0.7
"""what earlier batches count in the mean and deviation that features are divided by"""
_LIMIT = 5.0
"""deviations beyond which a feature is cut off"""


def statistics(logprobs: Sequence[float], entropies: Sequence[float]) -> list[float]:
    """Of the tokens read: mean, recent mean, deviation and minimum of their log-probs; mean, recent
    mean and maximum of the entropies; mean log-prob beyond what the entropy says; 9 numbers with
    the logarithm of how many there are. Without entropies those are 0."""
    count = len(logprobs)
    if not count:
        return [0.0] * 9
    # plain Python: these are short, and numpy would take longer to be called
    h = entropies if len(entropies) == count else [0.0] * count
    mean, mean_h = sum(logprobs) / count, sum(h) / count
    deviation = math.sqrt(max(0.0, sum(x * x for x in logprobs) / count - mean * mean))
    recent, recent_h = logprobs[-RECENT:], h[-RECENT:]
    of_lp = [mean, sum(recent) / len(recent), deviation, min(logprobs)]
    of_h = [mean_h, sum(recent_h) / len(recent_h), max(h), mean + mean_h]
    return [*of_lp, *of_h, math.log1p(count)]


def progress(token_ids: Sequence[int], step_ids: frozenset[int]) -> list[float]:
    """How far it has come: tokens, steps, tokens of the present step, tokens a step."""
    ends = [i for i, token in enumerate(token_ids) if token in step_ids]
    since = len(token_ids) - (ends[-1] + 1 if ends else 0)
    each = len(token_ids) / (len(ends) + 1)
    return [float(np.log1p(x)) for x in (len(token_ids), len(ends), since, each)]


def features(
    kind: str, probed: Probed, step_ids: frozenset[int], with_statistics: bool
) -> np.ndarray:
    """What the network of a signal reads of a probe, float32 `[F]`."""
    if kind == "length":
        return np.array(progress(probed.token_ids, step_ids), np.float32)
    numbers = np.array(statistics(probed.logprobs, probed.entropies), np.float32)
    if kind == "confidence":
        return numbers
    assert kind == "quality" and probed.hidden is not None, kind
    state = probed.hidden.float().cpu().numpy()
    return np.concatenate([state, numbers]) if with_statistics else state


class Signal:
    """A network of one hidden layer from features to log-odds, its optimizer, and what it learns
    from: the last `memory` graded rollouts.

    Everything it does is a function of its seed and of what it was told. width: hidden units.
    """

    def __init__(self, width: int, learning_rate: float, memory: int, seed: int) -> None:
        self.width, self.rate, self.memory, self.seed = width, learning_rate, memory, seed
        self.version = 0
        """updates so far"""
        self.examples: list[torch.Tensor] = []
        """features `[M, F]`, targets `[M]` in [0, 1] and weights `[M]`; empty before the first"""
        self._net: nn.Sequential | None = None
        self._scale: list[torch.Tensor] = []

    @torch.no_grad()
    def scores(self, features_MF: np.ndarray) -> list[float]:
        """Log-odds of success; 0 before anything was learnt."""
        if self._net is None:
            return [0.0] * len(features_MF)
        out: torch.Tensor = self._net(self._standard(torch.from_numpy(features_MF)))
        return out[:, 0].tolist()

    def learn(
        self, features_MF: np.ndarray, targets_M: Sequence[float], weights_M: Sequence[float]
    ) -> None:
        """Take examples in, and a few steps on all that are remembered: weighted cross-entropy,
        each target a success or a share of one."""
        if not len(features_MF):
            return
        new = [torch.from_numpy(features_MF).float(), *map(torch.tensor, (targets_M, weights_M))]
        new = [x.float() for x in new]
        old = self.examples or [x[:0] for x in new]
        self.examples = [torch.cat(pair)[-self.memory :] for pair in zip(old, new, strict=True)]
        self._rescale(new[0])
        net, optimizer = self._made(features_MF.shape[1])
        inputs, (targets, weights) = self._standard(self.examples[0]), self.examples[1:]
        source = torch.Generator().manual_seed(self.seed * 1_000_003 + self.version)
        for _ in range(STEPS):
            chosen = torch.randperm(len(inputs), generator=source)[:BATCH]
            loss = nn.functional.binary_cross_entropy_with_logits(
                net(inputs[chosen])[:, 0], targets[chosen], weights[chosen]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.version += 1

    def _made(self, size: int) -> tuple[nn.Sequential, torch.optim.Optimizer]:
        """The network and its optimizer, made at the first call."""
        if self._net is None:
            source = torch.Generator().manual_seed(self.seed)
            self._net = nn.Sequential(
                nn.Linear(size, self.width), nn.Tanh(), nn.Linear(self.width, 1)
            )
            with torch.no_grad():
                for weight in self._net.parameters():
                    bound = weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.0
                    weight.copy_((2 * torch.rand(weight.shape, generator=source) - 1) * bound)
            self._optimizer = torch.optim.AdamW(
                self._net.parameters(), lr=self.rate, weight_decay=1e-2, fused=True
            )
        return self._net, self._optimizer

    def _rescale(self, new_MF: torch.Tensor) -> None:
        """Mean and deviation of the features, earlier batches fading."""
        if len(new_MF) < 2 and not self._scale:
            self._scale = [new_MF.mean(0), torch.ones(new_MF.shape[1])]
            return
        fresh = [new_MF.mean(0), new_MF.std(0, correction=0)]
        old = self._scale or fresh
        self._scale = [FADE * a + (1 - FADE) * b for a, b in zip(old, fresh, strict=True)]

    def _standard(self, features_MF: torch.Tensor) -> torch.Tensor:
        mean, deviation = self._scale
        return ((features_MF.float() - mean) / (deviation + 1e-4)).clamp(-_LIMIT, _LIMIT)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything but the version, for a checkpoint; nothing before anything was learnt."""
        if self._net is None:
            return {}
        found = {f"net.{k}": v.clone() for k, v in self._net.state_dict().items()}
        for index, one in self._optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{k}": v.clone() for k, v in one.items()}
        found |= {f"scale.{i}": x.clone() for i, x in enumerate(self._scale)}
        return found | {f"examples.{i}": x.clone() for i, x in enumerate(self.examples)}

    def load(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        """Go on from `tensors()` of a version."""
        self.version = version
        if not tensors:
            return
        self._scale = [tensors[f"scale.{i}"] for i in range(2)]
        self.examples = [tensors[f"examples.{i}"] for i in range(3)]
        net, optimizer = self._made(len(self._scale[0]))
        net.load_state_dict({k: tensors[f"net.{k}"] for k in net.state_dict()})
        inner, names = optimizer.state_dict(), ("step", "exp_avg", "exp_avg_sq")
        inner["state"] = {
            index: {k: tensors[f"optimizer.{index}.{k}"] for k in names}
            for index in range(len(list(net.parameters())))
        }
        optimizer.load_state_dict(inner)
