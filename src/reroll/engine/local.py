"""The embedded engine: continuous batching over the very module that the trainer updates.

A request goes waiting -> ready -> running -> finished:

    waiting   queued, in order of submission
    ready     prefilled ahead: its row's keys and values are held, its draft is verified, its next
              token is drawn. Requests with the same tokens (a group's prompt) share one row. What
              ends here (stop id, limit inside a draft) never takes a slot
    running   in slot 0..active-1, one token a tick

One `step` prefills if free slots outnumber the ready, fills the free slots, closes holes so that
active slots stay packed at the front, and decodes one tick.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from reroll.algo.sample import Law
from reroll.engine.base import Capabilities, Event, Finished, Stats
from reroll.engine.prefill import next_rows, prefill, probes
from reroll.engine.runner import Runner, make_law
from reroll.engine.sequence import Sequence as Running
from reroll.engine.slots import SlotCache, check_fits, layer_shapes
from reroll.errors import UserError
from reroll.model.logprobs import token_logprobs
from reroll.types import Completion, Request


class LocalEngine:
    """See the module. `capacity` is the tokens a slot holds: prompt + completion.

    `prefill_tokens` and `prefill_rows` bound one prefill forward (a single longer row runs alone).
    Raises UserError when the slots would not fit in `cache_gb` GiB.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        capacity: int,
        cache_gb: float = 4.0,
        prefill_tokens: int = 4096,
        prefill_rows: int = 32,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.runner = Runner(model, autocast)
        self.policy_version = 0
        self.prefill_tokens, self.prefill_rows = prefill_tokens, prefill_rows
        with self.runner.inference():
            shapes = layer_shapes(self.runner.prefill([[0]], [1], hidden=False).cache)
            self.memory = check_fits(shapes, slots, capacity, cache_gb)
            self.cache = SlotCache(shapes, slots, capacity, self.runner.device)
        self._waiting: deque[Running] = deque()
        self._ready: deque[Running] = deque()
        self._running: list[Running] = []
        self._changed = True
        self._stats = Stats(capacity=slots)

    @property
    def capabilities(self) -> Capabilities:
        """Lossless drafts and hidden states."""
        return Capabilities(lossless_drafts=True, hidden_states=True)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises UserError when it can never fit its slot."""
        sequence = Running.start(request)
        longest = len(request.prompt_ids) + len(request.prefix_ids) + request.sampling.max_tokens
        if not request.prompt_ids or longest > self.cache.capacity:
            raise UserError(
                f"request {request.id}: prompt of {len(request.prompt_ids)} tokens + prefix of "
                f"{len(request.prefix_ids)} + limit of {request.sampling.max_tokens} does not "
                f"fit a slot of {self.cache.capacity}: shorten it, or raise the engine's capacity"
            )
        self._waiting.append(sequence)

    def step(self) -> list[Event]:
        """One tick: admit, draw one token a slot, report what finished or was probed."""
        events: list[Event] = []
        with self.runner.inference():
            free = self.cache.slots - len(self._running)
            while self._waiting and free > len(self._ready):
                events += self._prefill()
            self._admit()
            if self._running:
                events += self._decode()
        return events

    def abort(self, ids: Iterable[int] | None, reason: str) -> list[Completion]:
        """Take requests out, wherever they are; each completion holds what it had so far."""
        out = None if ids is None else set(ids)
        aborted = []
        for queue in (self._running, self._ready, self._waiting):
            leaving = [s for s in queue if out is None or s.request.id in out]
            if queue is self._running:
                with torch.inference_mode():  # the slots were made in it
                    self._vacate({s.request.id for s in leaving})
            else:
                for sequence in leaving:
                    queue.remove(sequence)
            aborted += [sequence.abort(reason) for sequence in leaving]
        return aborted

    def score(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
    ) -> list[list[float]]:
        """Tempered log-probs of each (context, continuation)'s continuation tokens."""
        with self.runner.inference():
            packed = token_logprobs(
                self.runner.model,
                sequences,
                temperature=temperature,
                max_tokens=self.prefill_tokens,
            ).logprobs
        return [part.tolist() for part in packed.split([len(c) for _, c in sequences])]

    def load_weights(self, version: int) -> None:
        """The trainer has updated the shared module: what is drawn from now on is `version`."""
        if self._running or self._ready or self._waiting:
            raise ValueError(
                "weights may not change while requests are in the engine: abort them first"
            )
        self.policy_version = version

    def stats(self) -> Stats:
        """Live counters."""
        self._stats.running = len(self._running)
        self._stats.waiting = len(self._waiting) + len(self._ready)
        return self._stats

    def check(self) -> None:
        """Integrity: slots, lengths and streams agree. For tests and debugging."""
        assert len(self._running) <= self.cache.slots
        for sequence in [*self._running, *self._ready]:
            sequence.check()
            assert sequence.length < self.cache.capacity

    # --- prefill and verification ---------------------------------------------------------------

    def _prefill(self) -> list[Event]:
        """Run waiting requests in one forward; each is then ready, or finished."""
        started = time.perf_counter()
        rows = next_rows(self._waiting, self.prefill_tokens, self.prefill_rows)
        events: list[Event] = []
        for sequence, probed in prefill(self.runner, rows, self.policy_version):
            events += probed
            self._stats.tokens_drawn += sequence.drawn_at_prefill
            self._stats.tokens_reused += sequence.reused_at_prefill
            if sequence.finished:
                events.append(Finished(sequence.completion))
            else:
                self._ready.append(sequence)
        for leader, *_ in rows:  # a shared row is run once
            given, draft = leader.given, len(leader.draft)
            self._stats.tokens_prefilled += given
            self._stats.tokens_verified += draft
            self._stats.context["prefill"] += given * (given + 1) // 2
            self._stats.context["verify"] += draft * (2 * given + draft + 1) // 2
        self._stats.seconds["prefill"] += time.perf_counter() - started
        return events

    # --- slots ----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Fill free slots from the ready, in order; one copy for neighbours that share a row."""
        batch: list[Running] = []
        source: tuple[DynamicCache, int] | None = None
        while self._ready and len(self._running) + len(batch) < self.cache.slots:
            sequence = self._ready.popleft()
            if batch and (sequence.source != source or sequence.length != batch[0].length):
                self._load(batch)
                batch = []
            batch.append(sequence)
            source = sequence.source
        if batch:
            self._load(batch)

    def _load(self, batch: list[Running]) -> None:
        assert batch[0].source is not None
        start = len(self._running)
        cache, row = batch[0].source
        self.cache.load(list(range(start, start + len(batch))), cache, row, batch[0].length)
        for sequence in batch:
            sequence.source = None
        self._running += batch
        self._changed = True

    def _vacate(self, ids: set[int]) -> None:
        """Take sequences out of their slots and close the holes from the back."""
        running = self._running
        slot = 0
        while slot < len(running):
            if running[slot].request.id not in ids:
                slot += 1
                continue
            last = running.pop()
            if slot < len(running):
                # the last one may be leaving too: then it is moved and looked at again
                if last.request.id not in ids:
                    self.cache.move(len(running), slot, last.length)
                running[slot] = last
        self._changed = self._changed or bool(ids)

    # --- decode ---------------------------------------------------------------------------------

    def _decode(self) -> list[Event]:
        """One token for every running sequence."""
        started = time.perf_counter()
        running = self._running
        if self._changed:
            self._gather_state()
        longest = max(sequence.length for sequence in running) + 1
        hidden = any(s.request.probe_at for s in running)
        logits, states = self.runner.decode(
            self.cache, self._tokens, self._lengths, longest, hidden
        )
        drawn = self.runner.draw(logits, self._positions, self._law)
        self._tokens = drawn.tokens
        self._lengths = self._lengths + 1
        self._positions = self._positions + 1
        tokens, logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist()
        behaviour = (
            drawn.behaviour_logprobs.tolist()
            if self._law.any_truncated or self._law.any_greedy
            else logprobs
        )
        events: list[Event] = []
        for slot, sequence in enumerate(running):
            self._stats.context["decode"] += sequence.length + 1
            if states is not None:
                at = len(sequence.completion.token_ids)
                events += probes(sequence, states[slot : slot + 1], at, 1)
            sequence.take(tokens[slot], logprobs[slot], behaviour[slot], self.policy_version)
        done = [sequence for sequence in running if sequence.finished]
        self._stats.ticks += 1
        self._stats.tokens_decoded += len(running)
        self._stats.tokens_drawn += len(running)
        if done:
            self._vacate({sequence.request.id for sequence in done})
            events += [Finished(sequence.completion) for sequence in done]
        self._stats.seconds["decode"] += time.perf_counter() - started
        return events

    def _gather_state(self) -> None:
        """Rebuild the per-slot tensors after slots have changed hands."""
        device, running = self.runner.device, self._running
        self._law: Law = make_law([s.request for s in running], device)
        last = [s.completion.token_ids[-1] for s in running]
        self._tokens = torch.tensor(last, device=device)
        self._lengths = torch.tensor([s.length for s in running], device=device)
        self._positions = torch.tensor(
            [len(s.completion.token_ids) for s in running], device=device
        )
        self._changed = False
