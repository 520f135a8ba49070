"""The mix: which problems come next, with a prefix or without, in every batch in the same parts.

    prefixed   hard problems, each from a prefix of its trace; a group of its own for every cut
    original   the same problems without, and with `prefix.untraced` those that have no trace
    easy       problems that were solved often enough without any of this; none by default

PrefixRL (arXiv 2601.18795) mixes 3 : 1 : 0. A batch of the mix is a run of places in the stream, so
the parts hold in every update. What comes next depends on the place and on what earlier batches
earned, never on the clock.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from reroll.config import PrefixSection
from reroll.rollout import prefix
from reroll.rollout.traces import Trace
from reroll.types import Group, Prompt

PARTS = ("prefixed", "original", "easy")
DEAD = 5
"""batches in a row without a live group in a part, after which the user is told"""
FADE = 0.8
"""what a group without prefix counts at the problem's next one"""
FEW = 8
"""rollouts of a problem without prefix that are seen before it may be retired"""


@dataclass(slots=True)
class Known:
    """What earlier batches say of a hard problem."""

    share: float
    """of its trace, that it is given next where cuts are steered"""
    successes: float = 0.0
    """of its rollouts without prefix, earlier ones fading"""
    rollouts: float = 0.0
    failed: bool = False
    """its last group without prefix had no success (`on_failure`)"""


@dataclass(slots=True)
class _Part:
    """Where the stream of a part stands: epochs of a shuffle over its items."""

    epoch: int = -1
    left: list[int] = field(default_factory=list)
    """items still to come in this epoch, the next one last"""


class Mix:
    """Owns the state of every hard problem; a source of prompts for `Collector`.

    hard: problems, of which those in `traces`, by row, can be given one. easy: others. batch:
    prompts of an update. steps: updates of the run. ends: places where steps of a trace end.
    success: what a reward counts as. place: a problem, a trace and a cut to a prompt. All else as
    in `PrefixSection`.
    """

    def __init__(
        self,
        config: PrefixSection,
        hard: Sequence[Prompt],
        traces: dict[int, Trace],
        easy: Sequence[Prompt],
        *,
        batch: int,
        steps: int,
        seed: int,
        success: Callable[[float], bool],
        ends: Callable[[Trace], Sequence[int]] = lambda trace: (),
        place: Callable[[Prompt, Trace, int], Prompt] = prefix.with_prefix,
    ) -> None:
        self.config, self.seed, self.batch, self.steps = config, seed, batch, steps
        self.success, self.ends, self.place = success, ends, place
        self.hard = {prompt.row: prompt for prompt in hard}
        self.easy = {prompt.row: prompt for prompt in easy}
        self.traces = dict(traces)
        """the trace of each hard problem now"""
        self._all = {trace.id: trace for trace in traces.values()}
        """also those that were replaced while rollouts from them are under way"""
        self.known = {row: Known(prefix.first_share(config)) for row in self.hard}
        self.visits: Counter[tuple[int, int, int]] = Counter()
        """starts of each prompt with its prefix"""
        self.given: Counter[int] = Counter()
        """starts of each hard problem with a prefix"""
        self.parts = {name: _Part() for name in PARTS}
        self.dead: Counter[str] = Counter()
        """batches in a row without a live group, by part"""
        self.said: list[str] = []
        """lines for the user since they were last taken"""
        self._cuts: dict[int, list[int]] = {}

    # --- what comes next --------------------------------------------------------------------------

    def __call__(self, start: int, count: int) -> tuple[list[Prompt], list[int]]:
        """(prompts, visits) of `count` places of the stream from place `start`."""
        prompts, visits = [], []
        for place in range(start, start + count):
            prompt = self._next(place)
            prompts.append(prompt)
            visits.append(self.visits[prompt.identity])
            self.visits[prompt.identity] += 1
        return prompts, visits

    def quota(self) -> dict[str, int]:
        """Places of a batch that each part has."""
        weights = {name: getattr(self.config, name) for name in PARTS}
        return {name: self.batch * w // sum(weights.values()) for name, w in weights.items()}

    def active(self) -> list[int]:
        """Hard problems that are not retired, all of them if there is no other."""
        rows = [row for row in self.hard if not self.retired(row)]
        return rows or list(self.hard)

    def retired(self, row: int) -> bool:
        """Whether a problem is solved without prefix as often as `prefix.retire` says."""
        known = self.known[row]
        if self.config.retire >= 1 or known.rollouts < FEW:
            return False
        return known.successes / known.rollouts >= self.config.retire

    def find(self, row: int, trace: int, cut: int) -> Prompt | None:
        """The prompt of an identity."""
        prompt = self.hard.get(row) or self.easy.get(row)
        if prompt is None or not trace:
            return prompt
        found = self._all.get(trace)
        return found and self.place(prompt, found, cut)

    def _next(self, place: int) -> Prompt:
        at, part = place % self.batch, PARTS[-1]
        for name, places in self.quota().items():
            if at < places:
                part = name
                break
            at -= places
        if part == "easy":
            return self.easy[self._draw(part, lambda: list(self.easy))]
        if part == "original":
            return self.hard[self._draw(part, self.active)]
        row = self._draw(part, self._wanting)
        if row is None:  # nothing has failed: the place goes to an original one
            return self.hard[self._draw("original", self.active)]
        return self._prefixed(row, place)

    def _wanting(self) -> list[int]:
        """Problems that are to be given a prefix."""
        active = [row for row in self.active() if row in self.traces]
        if self.config.mode == "always":
            return active
        return [row for row in active if self.known[row].failed]

    def _draw(self, part: str, items: Callable[[], list[int]]) -> Any:
        """The row that comes next in a part's epoch; None: there is none. Those that have left the
        part since the epoch began are passed over."""
        state, there = self.parts[part], items()
        if not there:
            return None
        present = set(there)
        while True:
            while state.left:
                if (item := state.left.pop()) in present:
                    return item
            state.epoch += 1
            source = random.Random(f"{self.seed} {part} {state.epoch}")
            state.left = source.sample(there, len(there))

    def _prefixed(self, row: int, place: int) -> Prompt:
        """A hard problem with as much of its trace as its rule says now."""
        prompt, trace, config = self.hard[row], self.traces[row], self.config
        before = self.given[row]
        self.given[row] += 1
        if config.cut in ("uniform", "step"):
            cuts = self.cuts(trace)  # each in turn; not every problem begins with its shortest
            return self.place(prompt, trace, cuts[(row + before) % len(cuts)])
        if config.cut == "schedule":
            share = prefix.scheduled_share(config, place / self.batch / self.steps)
        elif config.cut == "resample":
            share = prefix.drawn_share(config, self.seed, row, before)
        else:
            share = self.known[row].share
        return self.place(prompt, trace, prefix.cut_at(trace, config, share))

    def cuts(self, trace: Trace) -> list[int]:
        """Where a trace is cut, under the rules that draw this once."""
        if trace.id not in self._cuts:
            found = prefix.frozen_cuts(trace, self.config, self.seed, self.ends(trace))
            self._cuts[trace.id] = found
        return self._cuts[trace.id]

    # --- what came of it --------------------------------------------------------------------------

    def learn(self, groups: Sequence[Group], rates: Sequence[float], live: Sequence[bool]) -> None:
        """What a batch's groups earned. rates: mean success of all that were started, of each.
        live: whether they carry a gradient."""
        for group, rate, alive in zip(groups, rates, live, strict=True):
            row = group.prompt.row
            if row not in self.known:
                continue
            known = self.known[row]
            if group.prompt.trace:
                if self.config.steers:
                    known.share = prefix.next_share(self.config, known.share, rate, not alive)
                known.failed = False
                continue
            trace = self.traces.get(row) if self.config.steers else None
            if trace is not None and prefix.cut_at(trace, self.config, known.share) < 1:
                # nothing is given any more; should it fail again, something is
                known.share = prefix.next_share(self.config, known.share, rate, not alive)
            count = len(group.rollouts) + len(group.pruned)
            known.successes = FADE * known.successes + rate * count
            known.rollouts = FADE * known.rollouts + count
            known.failed = rate == 0.0
        self._watch(groups, live)

    def refresh(self, traces: Sequence[Trace]) -> None:
        """These successes take the place of the traces that their problems have."""
        for trace in traces:
            if trace.row in self.hard and prefix.limit(trace, self.config) >= 1:
                self.traces[trace.row] = self._all[trace.id] = trace

    def told(self) -> list[str]:
        """Lines for the user since the last call."""
        lines, self.said = self.said, []
        return lines

    def _watch(self, groups: Sequence[Group], live: Sequence[bool]) -> None:
        """Tell the user of a part whose groups stay dead."""
        for part in PARTS:
            mine = [alive for g, alive in zip(groups, live, strict=True) if self.part(g) == part]
            if not mine:
                continue
            self.dead[part] = 0 if any(mine) else self.dead[part] + 1
            if self.dead[part] == DEAD:
                self.said.append(
                    f"prefix: no {part} group had unequal rewards in {DEAD} batches: nothing is "
                    "learnt from them; see docs/techniques/prefix.md"
                )

    def part(self, group: Group) -> str:
        """Which part of the mix a group belongs to."""
        if group.prompt.trace:
            return "prefixed"
        return "original" if group.prompt.row in self.hard else "easy"

    def metrics(
        self, groups: Sequence[Group], rates: Sequence[float], live: Sequence[bool]
    ) -> dict[str, float]:
        """Success and live groups of each part, and how much is given; see docs/glossary.md."""
        found: dict[str, float] = {}
        for part in PARTS:
            mine = [i for i, group in enumerate(groups) if self.part(group) == part]
            found[f"groups_{part}"] = float(len(mine))
            if mine:
                found[f"success_{part}"] = fmean(rates[i] for i in mine)
                found[f"live_{part}"] = fmean(float(live[i]) for i in mine)
        given = [g.prompt for g in groups if g.prompt.trace]
        if given:
            found["prefix_tokens"] = fmean(prompt.cut for prompt in given)
            shares = [p.cut / len(self._all[p.trace].token_ids) for p in given]
            found["prefix_share"] = fmean(shares)
        found["retired"] = float(sum(map(self.retired, self.hard)))
        return found

    # --- for a checkpoint -------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON of all that earlier batches have changed."""
        return {
            "known": {str(row): asdict(known) for row, known in self.known.items()},
            "given": {str(row): count for row, count in self.given.items()},
            "visits": [[*identity, count] for identity, count in self.visits.items()],
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "dead": dict(self.dead),
            "traces": {str(row): trace.id for row, trace in self.traces.items()},
            "own": [asdict(t) for t in self._all.values() if t.source == "training"],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.known = {int(row): Known(**known) for row, known in state["known"].items()}
        self.visits = Counter({(r, t, c): count for r, t, c, count in state["visits"]})
        self.given = Counter({int(row): count for row, count in state["given"].items()})
        self.parts = {name: _Part(**part) for name, part in state["parts"].items()}
        self.dead = Counter(state["dead"])
        for own in state["own"]:
            trace = Trace(**own | {"token_ids": tuple(own["token_ids"])})
            self._all[trace.id] = trace
        self.traces = {int(row): self._all[one] for row, one in state["traces"].items()}
