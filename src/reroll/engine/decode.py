"""A tick: one token for every running sequence, or a few where offered ones prove right.

`B` running sequences, `C` tokens a slot (the last drawn one and what is offered behind it).
"""

from collections.abc import Sequence

import numpy as np
import torch

from reroll.algo.accept import lossless
from reroll.algo.sample import Drawn
from reroll.engine.base import Probed, Stats
from reroll.engine.costs import CHUNKS, Costs, Pace, best_chunk
from reroll.engine.runner import Runner, make_law, take
from reroll.engine.sequence import Sequence as Running
from reroll.engine.shares import Shares
from reroll.engine.slots import SlotCache
from reroll.engine.watch import probes, wants_hidden

Offer = tuple[list[int], int]
"""(tokens that may come next, which match size found them; -1: none)"""
_NOTHING: Offer = ([], -1)
_SURE = 0.99
"""no rate is believed to be higher"""
_REST, _MANY = 3, 16
"""ticks without a look-up after one that found nothing worth a wider tick, where so many sequences
run that looking up takes a noticeable part of a tick (5 % on a CPU)"""


class Decoder:
    """The per-slot tensors of the running sequences, and the ticks over them."""

    def __init__(
        self, runner: Runner, cache: SlotCache, rates: Shares, pace: Pace, stats: Stats
    ) -> None:
        self.runner, self.cache, self.stats = runner, cache, stats
        self.rates, self.pace = rates, pace
        self.changed = True
        """slots have changed hands since the last tick"""
        self.rest = 0
        """ticks to go without a look-up; 0 whenever new work comes to an empty engine"""

    def tick(
        self, running: Sequence[Running], version: int, most: int, costs: Costs
    ) -> list[Probed]:
        """Run all slots once; each sequence takes what was drawn. Returns the probe events.

        most: tokens a slot at most; costs: what decides how many are worth it.
        """
        if self.changed:
            self._gather(running)
        chunk, offers = 1, [_NOTHING] * len(running)
        if most > 1:
            chunk, offers = self._offers(running, most, costs)
        longest = max(sequence.length for sequence in running) + chunk
        tokens = self._tokens[:, None]
        if chunk > 1:
            padded = [[*o[: chunk - 1], *[0] * (chunk - 1 - len(o))] for o, _ in offers]
            offered = torch.tensor(padded, device=self.runner.device)
            tokens = torch.cat([tokens, offered], dim=1)
        hidden = self._hidden
        logits, states = self.runner.decode(self.cache, tokens, self._lengths, longest, hidden)
        self._book(running, chunk, offers)
        if chunk == 1:
            drawn = self.runner.draw(logits[:, 0], self._positions, self._law)
            counts = [1] * len(running)
            self._advance(drawn.tokens, 1)
            if any(offer for offer, _ in offers):
                # not run, but known: or a rate that has fallen would never rise again
                pairs = zip(offers, drawn.tokens.tolist(), strict=True)
                firsts = [(which, offer[0] == token) for (offer, which), token in pairs if offer]
                kinds, right = zip(*firsts, strict=True)
                self.rates.add(np.array(kinds), 1, np.array(right))
        else:
            drawn, counts = self._verify(logits, tokens, offers, chunk)
        self.pace.observe(costs.tick(len(running), chunk), sum(counts))
        return self._take(running, drawn, counts, states, version)

    def _offers(
        self, running: Sequence[Running], most: int, costs: Costs
    ) -> tuple[int, list[Offer]]:
        """Look up what may come next in each slot, and choose how many tokens are worth a tick."""
        chunks = [c for c in CHUNKS if c <= most]
        base = costs.tick(len(running))
        if self.rest or all(costs.tick(len(running), c) >= c * base for c in chunks[1:]):
            self.rest = max(0, self.rest - 1)
            return 1, [_NOTHING] * len(running)  # or not even a perfect guess would pay
        offers = []
        for sequence in running:
            done = sequence.completion.token_ids
            room = sequence.request.sampling.max_tokens - sequence.done - 1
            offer = sequence.texts.propose(done, min(most - 1, room)) if room > 0 else _NOTHING
            offers.append(offer)
        there = [(len(offer), which) for offer, which in offers if offer]
        chunk = 1
        if there:
            lengths, kinds = zip(*there, strict=True)
            rates = np.minimum(_SURE, self.rates.of(np.array(kinds))).tolist()
            chunk = best_chunk(costs, len(running), lengths, rates, chunks)
        self.rest = _REST if chunk == 1 and len(running) >= _MANY else 0
        return chunk, offers

    def _verify(
        self, logits: torch.Tensor, tokens: torch.Tensor, offers: Sequence[Offer], chunk: int
    ) -> tuple[Drawn, list[int]]:
        """The samplers' own choices after each token, and how many of them hold in each slot."""
        device = self.runner.device
        sizes = [min(len(offer), chunk - 1) for offer, _ in offers]
        size = torch.tensor(sizes, device=device)
        step = torch.arange(chunk, device=device)
        inside = step <= size[:, None]
        which = torch.arange(len(offers), device=device).repeat_interleave(size + 1)
        position = (self._positions[:, None] + step)[inside]
        drawn = self.runner.draw(logits[inside], position, take(self._law, which))
        choices = torch.zeros_like(tokens)
        choices[inside] = drawn.tokens
        accepted = lossless(tokens[:, 1:], choices[:, :-1], size)
        kept = (step <= accepted[:, None])[inside]
        self._advance(choices.gather(1, accepted[:, None])[:, 0], accepted + 1)
        counts = accepted.tolist()
        tried = np.array(sizes) > 0
        hits = np.array(counts)[tried]
        # the first refusal ends an offer: what comes after was not tried
        trials = hits + (hits < np.array(sizes)[tried])
        self.rates.add(np.array([which for _, which in offers])[tried], trials, hits)
        entropies = None if drawn.entropies is None else drawn.entropies[kept]
        taken = (drawn.tokens[kept], drawn.logprobs[kept], drawn.behaviour_logprobs[kept])
        return Drawn(*taken, entropies), [count + 1 for count in counts]

    def _advance(self, last: torch.Tensor, count: torch.Tensor | int) -> None:
        self._tokens = last
        self._lengths = self._lengths + count
        self._positions = self._positions + count

    def _take(
        self,
        running: Sequence[Running],
        drawn: Drawn,
        counts: Sequence[int],
        states: torch.Tensor | None,
        version: int,
    ) -> list[Probed]:
        """Hand each sequence its tokens: as many as its count, or up to its end."""
        law = self._law
        tokens, logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist()
        other = law.any_truncated or law.any_greedy
        behaviour = drawn.behaviour_logprobs.tolist() if other else logprobs
        entropies = logprobs if drawn.entropies is None else drawn.entropies.tolist()
        events: list[Probed] = []
        at = 0
        for slot, (sequence, count) in enumerate(zip(running, counts, strict=True)):
            before = len(sequence.completion.token_ids)
            for i in range(at, at + count):
                sequence.take(tokens[i], logprobs[i], behaviour[i], entropies[i], version)
                if sequence.finished:
                    break
            at += count
            taken = len(sequence.completion.token_ids) - before
            self.stats.tokens_drawn += taken
            kept = min(taken, count - 1)
            sequence.completion.accepted += kept
            self.stats.tokens_redraft_reused += kept
            self.stats.tokens_reused += kept
            if self._watched:
                events += probes(sequence, None if states is None else states[slot], before, taken)
        return events

    def _book(self, running: Sequence[Running], chunk: int, offers: Sequence[Offer]) -> None:
        stats = self.stats
        stats.ticks += 1
        stats.tokens_decoded += len(running)
        stats.context["decode"] += sum(s.length + 1 for s in running)
        if chunk == 1:
            return
        for sequence, (offer, _) in zip(running, offers, strict=True):
            size = min(len(offer), chunk - 1)
            stats.tokens_redrafted += size
            stats.tokens_verified += size
            stats.context["verify"] += size * (sequence.length + 1) + size * (size + 1) // 2

    def _gather(self, running: Sequence[Running]) -> None:
        """Rebuild the per-slot tensors after slots have changed hands."""
        device = self.runner.device
        self._law = make_law([s.request for s in running], device)
        self._watched = any(s.request.watch is not None for s in running)
        self._hidden = wants_hidden(running)
        last = [s.completion.token_ids[-1] for s in running]
        self._tokens = torch.tensor(last, device=device)
        self._lengths = torch.tensor([s.length for s in running], device=device)
        self._positions = torch.tensor(
            [len(s.completion.token_ids) for s in running], device=device
        )
        self.changed = False
