"""Pictures of slots over time: who held which, and how many were in use.

A timeline is a list of batches, one a line in `timeline.jsonl`:

    {"update": 3, "capacity": 8, "spans": [[12.5, 17.25, "finished"], ...]}

`spans` are stays in a slot, in seconds from the beginning, each with what became of it: "finished"
(ended by itself, to be trained on), "kept" (interrupted, resumed later), "pruned" (left out by a
rule, on its way or after its end) or "dropped" (lost).
Simulated and real runs write the same.
"""

import json
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from reroll.engine.base import Span
from reroll.errors import UserError
from reroll.rollout.buffer import Buffer
from reroll.rollout.collected import Collected
from reroll.rollout.unit import State

OUTCOMES = {
    "finished": ("finished, trained on", "#4477aa"),
    "kept": ("interrupted, resumed later", "#ddaa33"),
    "pruned": ("pruned", "#aa3377"),
    "dropped": ("dropped", "#cc6677"),
}
"""label and colour of what became of a stay"""
_IDLE, _TRAINING = "#ececec", "#ffffff"
_DPI = 110


def batch_of(
    update: int,
    spans: Iterable[Span],
    buffer: Buffer,
    collected: Collected,
    begin: float = 0.0,
) -> dict[str, Any]:
    """A batch of a timeline, from the stays since the last one; to be asked before the next one.

    begin: the second of engine time that counts as 0.
    """
    groups, kept = collected.groups, set[int]()
    finished = {r.completion.request_id for group in groups for r in group.rollouts}
    pruned = {r.completion.request_id for group in groups for r in group.pruned}
    for unit in (*buffer.ready, *buffer.flying.values()):
        pruned |= {member.request.id for member in unit.pruned}
        for member in unit.members:
            if member.state is State.DONE:
                finished.add(member.request.id)
            elif member.state is not State.DROPPED:
                kept.add(member.request.id)

    def outcome(request_id: int) -> str:
        if request_id in finished:
            return "finished"
        if request_id in kept:
            return "kept"
        return "pruned" if request_id in pruned else "dropped"

    stays = [[span.begin - begin, span.end - begin, outcome(span.request_id)] for span in spans]
    return {"update": update, "capacity": buffer.slots, "spans": stays}


def read_timeline(path: Path) -> list[dict[str, Any]]:
    """The batches of a `timeline.jsonl`. Raises UserError for a file that is not one."""
    batches = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            batch = json.loads(line)
            stays = [[float(begin), float(end), what] for begin, end, what in batch["spans"]]
            if unknown := {what for *_, what in stays} - set(OUTCOMES):
                raise ValueError(f"no such outcome: {unknown.pop()!r}")
            sizes = {"update": int(batch["update"]), "capacity": int(batch["capacity"])}
            batches.append(sizes | {"spans": stays})
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: line {len(batches) + 1} is no batch of a timeline ({error})"
        ) from None
    return batches


def one_after_another(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same batches, each of whose times began at 0, on one clock."""
    shifted, now = [], 0.0
    for batch in batches:
        stays = [[begin + now, end + now, what] for begin, end, what in batch["spans"]]
        shifted.append(batch | {"spans": stays})
        now = max([end for _, end, _ in stays], default=now)
    return shifted


def lanes_of(stays: Sequence[Sequence[Any]], capacity: int) -> list[tuple[int, float, float, str]]:
    """(lane, begin, end, outcome) of each stay by its begin: the lowest lane that is free.

    Lanes never overlap and are at most `capacity`: where rounding makes one stay too many, it
    begins when the first lane becomes free.
    """
    free, busy = list(range(capacity)), list[tuple[float, int]]()
    placed = []
    for begin, end, outcome in sorted(stays, key=lambda stay: (stay[0], stay[1])):
        while busy and (busy[0][0] <= begin or not free):
            until, lane = heappop(busy)
            begin = max(begin, until)
            heappush(free, lane)
        lane = heappop(free)
        end = max(begin, end)
        placed.append((lane, begin, end, outcome))
        heappush(busy, (end, lane))
    return placed


def draw_timeline(spans_by_batch: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Slots over time, coloured by what became of each stay. Raises UserError without any stay.

    spans_by_batch: see the module.
    """
    stays = [stay for batch in spans_by_batch for stay in batch["spans"]]
    if not stays:
        raise UserError(f"{path}: no request held a slot, so there is nothing to draw")
    capacity = max(batch["capacity"] for batch in spans_by_batch)
    figure, (axis,) = _figure(1, min(8.0, max(2.6, 1.6 + 0.11 * capacity)))
    placed = lanes_of(stays, capacity)
    used = {outcome for *_, outcome in placed}
    for outcome, (label, colour) in OUTCOMES.items():
        boxes = [one[:3] for one in placed if one[3] == outcome]
        _boxes(axis, boxes, colour, label, fine=capacity <= 64) if outcome in used else None
    _batches(axis, spans_by_batch, capacity)
    axis.set(
        xlabel="seconds", ylabel="slot", ylim=(0, capacity), xlim=(0, max(one[2] for one in placed))
    )
    _legend(axis, len(used) + 2)
    _save(figure, path)


def _boxes(
    axis: Any, boxes: Sequence[tuple[int, float, float]], colour: str, label: str, fine: bool
) -> None:
    """A rectangle for each (lane, begin, end); fine: few enough to be told apart."""
    from matplotlib.collections import PolyCollection

    height = 0.86 if fine else 1.0
    corners = [
        ((begin, lane), (end, lane), (end, lane + height), (begin, lane + height))
        for lane, begin, end in boxes
    ]
    axis.add_collection(
        PolyCollection(
            corners,
            facecolors=colour,
            edgecolors="white" if fine else "none",
            linewidths=0.4 if fine else 0,
            antialiaseds=[fine],
            label=label,
        )
    )


def _batches(axis: Any, batches: Sequence[dict[str, Any]], capacity: int) -> None:
    """Mark where batches end, what lies between them, and, if there is room, their numbers."""
    bounds = [
        (min(s[0] for s in batch["spans"]), max(s[1] for s in batch["spans"]), batch["update"])
        for batch in batches
        if batch["spans"]
    ]
    axis.set_facecolor(_IDLE)
    for (_, end, _), (begin, _, _) in pairwise(bounds):
        axis.axvspan(end, max(begin, end), facecolor=_TRAINING, zorder=0.5)
        axis.axvline(end, color="#555555", linewidth=0.7)
    if len(bounds) <= 24:
        for begin, end, update in bounds:
            axis.annotate(
                str(update), ((begin + end) / 2, capacity), (0, 3), textcoords="offset points",
                ha="center", va="bottom", fontsize=8, color="#555555",
            )  # fmt: skip


def _legend(axis: Any, columns: int) -> None:
    from matplotlib.patches import Patch

    handles, labels = axis.get_legend_handles_labels()
    handles += [Patch(facecolor=c, edgecolor="#999999") for c in (_IDLE, _TRAINING)]
    labels += ["idle slot", "between batches: training, reading again"]
    axis.figure.legend(
        handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9
    )


class Occupancy:
    """The share of slots in use over time, from the engine's cumulated slot time.

    However many are added, about `points` of them are kept: shares between those stay exact.
    """

    def __init__(self, capacity: int, begin: float, points: int) -> None:
        self.capacity, self._begin, self._limit = capacity, begin, points
        self._points = points
        self.clocks: list[float] = []
        """seconds since `begin`"""
        self.busy: list[float] = []
        """slot-seconds until then"""
        self.pauses: list[tuple[float, float]] = []
        """(begin, end) of updates, seconds"""
        self._stay: list[bool] = []
        """whether each of them must be kept"""
        self._gap = 0.0

    def add(self, clock: float, busy: float, stay: bool = False) -> None:
        """The engine's clock and its `slot_seconds`; stay: a corner that must be kept."""
        at = clock - self._begin
        if self.clocks and not stay and at - self.clocks[-1] < self._gap:
            return
        self.clocks.append(at)
        self.busy.append(busy)
        self._stay.append(stay)
        if len(self.clocks) > self._limit:
            self._gap = 2 * at / self._points
            left = [i for i, must in enumerate(self._stay) if must or i % 2 == 0]
            self.clocks = [self.clocks[i] for i in left]
            self.busy = [self.busy[i] for i in left]
            self._stay = [self._stay[i] for i in left]
            self._limit = max(self._points, 2 * len(left))

    def pause(self, clock: float, seconds: float) -> None:
        """An update from `clock` on."""
        self.pauses.append((clock - self._begin, clock - self._begin + seconds))

    def shares(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """(edges `[bins + 1]` in seconds, mean share of slots in use in each of the bins)."""
        edges = np.linspace(0.0, self.clocks[-1], bins + 1)
        busy = np.interp(edges, self.clocks, self.busy)
        return edges, np.diff(busy) / np.maximum(self.capacity * np.diff(edges), 1e-300)


def draw_occupancy(rows: Sequence[tuple[str, Occupancy]], path: str | Path) -> None:
    """Share of slots in use over time, one panel for each (title, occupancy), on one time axis."""
    figure, axes = _figure(len(rows), 0.6 + 0.95 * len(rows))
    longest = max(occupancy.clocks[-1] for _, occupancy in rows)
    for axis, (title, occupancy) in zip(axes, rows, strict=True):
        edges, shares = occupancy.shares(max(1, round(600 * occupancy.clocks[-1] / longest)))
        axis.stairs(shares, edges, fill=True, color="#4477aa", alpha=0.85, label="collecting")
        boxes = [(begin, end - begin) for begin, end in occupancy.pauses]
        axis.broken_barh(boxes, (0, 1.05), facecolors="#ddaa33", alpha=0.35, label="updating")
        axis.axvline(occupancy.clocks[-1], color="#555555", linewidth=0.8)
        axis.set(xlim=(0, longest * 1.005), ylim=(0, 1.05), yticks=(0, 0.5, 1))
        axis.set_title(title, loc="left", fontsize=9, pad=3)
        axis.tick_params(labelsize=8)
        axis.label_outer()
    axes[-1].set_xlabel("seconds")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper right", ncols=2, frameon=False, fontsize=9,
    )  # fmt: skip
    figure.supylabel("share of slots in use", fontsize=9)
    _save(figure, path)


def _figure(panels: int, height: float) -> tuple[Any, list[Any]]:
    # the object interface: no global state, no display needed
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False, sharex=True)
    return figure, [row[0] for row in axes]


def _save(figure: Any, path: str | Path) -> None:
    try:
        figure.savefig(path, dpi=_DPI)
    except (OSError, ValueError) as error:  # ValueError: an ending that is no picture's
        raise UserError(f"{path}: cannot write the picture: {error}") from None
