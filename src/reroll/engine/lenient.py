"""SPEC-RL's acceptance: each lenient sample keeps the beginning of its own old rollout.

The draft's path in the row's tree has been run; its tokens are kept by `algo.accept.lenient` (or
the ablations), the end of text among them, and the next token is drawn plainly. The sampled law is
then no longer the policy's (docs/techniques/reuse.md); that is the paper's rule, for comparison.
"""

import numpy as np
import torch

from reroll.algo.accept import lenient, random_cut
from reroll.algo.noise import uniform
from reroll.algo.sample import entropy, pick
from reroll.engine.walk import Walk


def accept_lenient(walk: Walk, logits: torch.Tensor) -> None:
    """Let the lenient samples take what they keep of their drafts, and the token after it."""
    live = [i for i, s in enumerate(walk.samples) if s.request.lenience and s.guessed()]
    if not live:
        return
    samples, forest = [walk.samples[i] for i in live], walk.forest
    tokens = [sample.guessed() for sample in samples]
    lengths = np.array([len(t) for t in tokens])
    width = int(lengths.max())
    rows = forest.first_text[walk.row[live]] + np.array([s.text for s in samples])
    nodes = forest.paths[rows][:, : width + 1]
    inside = np.arange(width) < lengths[:, None]
    new, entropies = np.zeros(inside.shape), np.zeros(inside.shape)
    device = walk.runner.device
    which = inside.nonzero()[0]
    flat = torch.tensor([x for t in tokens for x in t], device=device)
    temperature = walk.law.temperature[torch.from_numpy(np.array(live)[which]).to(device)]
    after = logits[torch.from_numpy(forest.logit[nodes[:, :width][inside]]).to(device)]
    after = after if after.dtype == torch.float64 else after.float()
    tempered = after / temperature[:, None]
    new[inside] = pick(tempered, flat).double().cpu().numpy()
    if walk.law.any_entropy:
        entropies[inside] = entropy(tempered).double().cpu().numpy()
    kept = _kept(walk, live, new, lengths)
    for row, (i, sample) in enumerate(zip(live, samples, strict=True)):
        count = kept[row]
        # an ending has no node: nothing is drawn after it
        walk.at[i] = nodes[row, : count + 1].max()
        streams = new[row, :count].tolist(), entropies[row, :count].tolist()
        sample.take_kept(count, *streams, walk.version)
        walk.walking[i] = False
    drawing = np.array([i for i, s in zip(live, samples, strict=True) if not s.finished], int)
    if len(drawing):
        _draw_next(walk, drawing, logits)


def _kept(walk: Walk, live: list[int], new: np.ndarray, lengths: np.ndarray) -> list[int]:
    """How many tokens of its draft each sample keeps; new: `[A, D]` their log-probs of now."""
    requests = [walk.samples[i].request for i in live]
    old = np.zeros(new.shape)
    for row, request in enumerate(requests):
        old[row, : lengths[row]] = request.drafts[0].logprobs[: lengths[row]]
    keys, begin = walk.law.keys[live].cpu(), torch.from_numpy(walk.begin[live])
    position = begin[:, None] + torch.arange(new.shape[1])
    chance = uniform(keys[:, None].expand_as(position), position)
    length = torch.from_numpy(lengths)
    rules = [request.lenience for request in requests if request.lenience]
    factor = torch.tensor([rule.factor for rule in rules])
    kept = lenient(torch.from_numpy(new - old), chance, factor, length)
    cut = random_cut(chance[:, 0], length)
    return torch.where(torch.tensor([rule.random_cut for rule in rules]), cut, kept).tolist()


def _draw_next(walk: Walk, live: np.ndarray, logits: torch.Tensor) -> None:
    index = walk.forest.logit[walk.at[live]][:, None]
    drawn = walk.draw(live, index, np.ones_like(index, bool), logits)
    for i, *streams in zip(live, *(stream.tolist() for stream in drawn), strict=True):
        walk.samples[i].take_walked(*streams, walk.version, 0)
