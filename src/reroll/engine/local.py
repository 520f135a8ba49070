"""The embedded engine: continuous batching over the very module that the trainer updates.

A request goes waiting -> ready -> running -> finished:

    waiting   queued, in order of submission
    ready     prefilled ahead: its row's keys and values are held, its draft tree is walked, its
              next token is drawn. Requests with the same tokens (a group's prompt) share one row.
              What ends here (stop id, limit inside a draft) never takes a slot
    running   in slot 0..active-1, one token a tick, or a few where re-drafting offers some

One `step` prefills if free slots outnumber the ready, fills the free slots (longest expected rest
first), closes holes so that active slots stay packed at the front, and decodes one tick.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from transformers import PreTrainedModel

from reroll.engine.base import Capabilities, Event, Finished, Span, Stats
from reroll.engine.costs import CHUNKS, TYPICAL, Costs, Pace
from reroll.engine.decode import Decoder
from reroll.engine.follow import count_follow
from reroll.engine.measure import measure_costs
from reroll.engine.pages import keep_pages
from reroll.engine.prefill import Plan, next_rows, prefill
from reroll.engine.redraft import Texts, count_rates
from reroll.engine.runner import Runner
from reroll.engine.sequence import Sequence as Running
from reroll.engine.slots import SlotCache, check_fits, layer_shapes
from reroll.engine.speculation import Speculation
from reroll.errors import UserError
from reroll.model.cut import packs
from reroll.model.logprobs import token_logprobs
from reroll.types import Completion, Draft, Request


class LocalEngine:
    """See the module. `capacity` is the tokens a slot holds: prompt + completion.

    `prefill_tokens` and `prefill_rows` bound one prefill forward (a single longer row runs alone).
    `costs` decides which drafts are verified. Raises UserError if slots exceed `cache_gb` GiB.
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
        speculation: Speculation | None = None,
        costs: Costs = TYPICAL,
    ) -> None:
        self.runner = Runner(model, autocast)
        if self.runner.device.type == "cpu":
            keep_pages()
        self.capacity = capacity
        self.speculation = speculation or Speculation()
        self.costs = costs
        self.follow, self.rates, self.pace = count_follow(), count_rates(), Pace()
        self._counts = {"follow": self.follow, "rates": self.rates, "pace": self.pace}
        assert self.speculation.redraft in CHUNKS
        self.policy_version = 0
        self.spans: list[Span] | None = None
        self.prefill_tokens, self.prefill_rows = prefill_tokens, prefill_rows
        with self.runner.inference():
            shapes = layer_shapes(self.runner.prefill([[0]], [1], hidden=False).cache)
            self.memory = check_fits(shapes, slots, capacity, cache_gb)
            # room for refused tokens behind the last one that is kept
            room = capacity + self.speculation.redraft - 1
            self.cache = SlotCache(shapes, slots, room, self.runner.device)
        self._waiting: deque[Running] = deque()
        self._ready: list[Running] = []
        self._running: list[Running] = []
        self._owners: dict[int, tuple[Texts, int]] = {}
        self._texts: WeakValueDictionary[tuple[int, ...], Texts] = WeakValueDictionary()
        self._stats = Stats(capacity=slots)
        self._decoder = Decoder(self.runner, self.cache, self.rates, self.pace, self._stats)

    @property
    def capabilities(self) -> Capabilities:
        """Drafts of both kinds and hidden states."""
        return Capabilities(lossless_drafts=True, lenient_drafts=True, hidden_states=True)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises UserError when it can never fit its slot, or when lenience meets
        a law that it is not defined for."""
        sampling = request.sampling
        if request.lenience and (sampling.temperature == 0 or sampling.top_k or sampling.top_p < 1):
            raise UserError(
                f"request {request.id}: lenient drafts need the whole tempered law: temperature "
                "above 0, no top-k, no top-p"
            )
        longest = len(request.prompt_ids) + len(request.prefix_ids) + request.sampling.max_tokens
        if not request.prompt_ids or longest > self.capacity:
            raise UserError(
                f"request {request.id}: prompt of {len(request.prompt_ids)} tokens + prefix of "
                f"{len(request.prefix_ids)} + limit of {request.sampling.max_tokens} does not "
                f"fit a slot of {self.capacity}: shorten it, or raise the engine's capacity"
            )
        start = (*request.prompt_ids, *request.prefix_ids)
        texts = self._texts.setdefault(start, Texts())
        texts.add(request.drafts)
        if not (self._running or self._ready or self._waiting):
            self._decoder.rest = 0  # or a run would depend on what its engine did before
        self._waiting.append(Running.start(request, texts))
        if self.speculation.siblings:
            self._owners[request.id] = (texts, len(request.prefix_ids))

    def step(self) -> list[Event]:
        """One tick: admit, draw one token a slot, report what finished or was probed."""
        events: list[Event] = []
        with self.runner.inference():
            free = self.cache.slots - len(self._running)
            while self._waiting and self._starved(free - len(self._ready)):
                events += self._prefill(free - len(self._ready))
            self._admit(free)
            if self._running:
                events += self._decode()
        if self.speculation.siblings:
            self._share(events)
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
            for sequence in leaving:
                self._owners.pop(sequence.request.id, None)
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

    def load_weights(self, version: int, keep: bool = False) -> None:
        """The trainer has updated the shared module: what is drawn from now on is `version`."""
        if not keep and (self._running or self._ready or self._waiting):
            raise ValueError(
                "weights may not change while requests are in the engine: abort them first"
            )
        self.policy_version = version
        for one in self._counts.values():
            one.decay()

    def stats(self) -> Stats:
        """Live counters."""
        waiting = len(self._waiting) + len(self._ready)
        self._stats.running, self._stats.waiting = len(self._running), waiting
        return self._stats

    def measure(self) -> Costs:
        """Time ticks and forwards over trees, on this machine, now; the slots must be empty."""
        assert not self._running and not self._ready
        with self.runner.inference():
            return measure_costs(self.runner, self.cache, self.prefill_tokens)

    def state(self) -> dict[str, Any]:
        """What has been counted to choose drafts by, for a checkpoint."""
        return {name: one.state() for name, one in self._counts.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        for name, one in self._counts.items():
            one.load_state(state[name])

    def check(self) -> None:
        """Integrity: slots, lengths and streams agree."""
        assert len(self._running) <= self.cache.slots
        for sequence in [*self._running, *self._ready]:
            sequence.check(self.capacity)

    # --- prefill --------------------------------------------------------------------------------

    def _starved(self, lacking: int) -> bool:
        """Whether to prefill, with so many more free slots than ready sequences."""
        if self.speculation.stagger and self._running and not self._waiting[0].request.drafts:
            # these are prefilled for the free slots alone: wait until a forward serves a few
            return lacking >= min(max(self.cache.slots // 8, 1), len(self._waiting))
        return lacking > 0

    def _prefill(self, lacking: int) -> list[Event]:
        """Run waiting requests, those of a length together; each is then ready, or finished."""
        started, stats, chosen = time.perf_counter(), self._stats, self.speculation
        token = self.pace.token(self.costs, self.cache.slots)
        least = self.costs.prefill / token if chosen.gate else 0.0
        # windows after the first need tree masks
        window = chosen.window if chosen.branching else self.capacity
        plan = Plan(self.follow, least, window, chosen.branching, self.prefill_tokens)
        room = lacking if chosen.stagger else len(self._waiting)
        rows = next_rows(self._waiting, plan, self.prefill_rows, room)
        sequences = [sequence for row in rows for sequence in row.sequences]
        rows.sort(key=len)
        before = [(len(s.completion.token_ids), s.completion.walked) for s in sequences]
        stats.tokens_resumed += sum(s.resumed for s in sequences)
        events: list[Event] = []
        widths = [self.runner.width(len(row)) for row in rows]
        for pack in packs(widths, self.prefill_tokens, None):
            events += prefill(self.runner, rows[pack], self.policy_version, plan, stats)
        for sequence, (tokens, walked) in zip(sequences, before, strict=True):
            stats.tokens_drawn += len(sequence.completion.token_ids) - tokens
            stats.tokens_reused += sequence.completion.walked - walked
            if sequence.finished:
                events.append(Finished(sequence.completion))
            else:
                self._ready.append(sequence)
        self._ready.sort(key=Running.expected_left, reverse=True)
        # a slot whose request is being read is not idle
        self._pass("prefill", started, min(self.cache.slots, len(self._running) + len(sequences)))
        return events

    def _pass(self, what: str, started: float, running: int) -> None:
        """Book the seconds since `started`, with so many slots in use."""
        seconds = time.perf_counter() - started
        self._stats.seconds[what] += seconds
        self._stats.slot_seconds += seconds * running

    def _share(self, events: Sequence[Event]) -> None:
        """Offer what has finished to the rest of its group."""
        for event in events:
            if isinstance(event, Finished):
                texts, prefix = self._owners.pop(event.completion.request_id)
                texts.add([Draft(event.completion.token_ids[prefix:])])

    # --- slots ----------------------------------------------------------------------------------

    def _admit(self, free: int) -> None:
        """Fill free slots from the ready; one copy for those of one forward."""
        chosen, self._ready = self._ready[:free], self._ready[free:]
        batches: dict[int, list[Running]] = {}
        for sequence in chosen:
            batches.setdefault(id(sequence.source[0]), []).append(sequence)
        for batch in batches.values():
            self._load(batch)

    def _load(self, batch: list[Running]) -> None:
        cache = batch[0].source[0]
        rows, columns = [s.source[1] for s in batch], [s.source[2] for s in batch]
        self.cache.load(len(self._running), cache, rows, columns)
        for sequence in batch:
            sequence.source, sequence.began = None, self._stats.clock
        self._running += batch
        self._decoder.changed = True

    def _vacate(self, ids: set[int]) -> None:
        """Take sequences out of their slots and close the holes from the back."""
        running = self._running
        if self.spans is not None:
            now, gone = self._stats.clock, (s for s in running if s.request.id in ids)
            self.spans += [Span(s.request.id, s.began, now) for s in gone]
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
        self._decoder.changed = self._decoder.changed or bool(ids)

    def _decode(self) -> list[Event]:
        """One tick for every running sequence."""
        started, running = time.perf_counter(), len(self._running)
        chunk, version = self.speculation.redraft, self.policy_version
        events: list[Event] = [*self._decoder.tick(self._running, version, chunk, self.costs)]
        self._pass("decode", started, running)
        done = [sequence for sequence in self._running if sequence.finished]
        if done:
            self._vacate({sequence.request.id for sequence in done})
            events += [Finished(sequence.completion) for sequence in done]
        return events
