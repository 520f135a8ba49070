"""What is under way, as plain data for a checkpoint, and back.

Token streams are not copied: a completion that is not in the engine does not change any more. What
the engine still has (a kept cache) is saved without its tokens and is drawn anew.
"""

import base64
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from reroll.errors import UserError
from reroll.rollout.buffer import Buffer
from reroll.rollout.collect import Collector
from reroll.rollout.unit import Member, State, Unit
from reroll.types import Completion, Finish, Look, Prompt, Watch

_COUNTS = ("update", "cursor", "admitted", "_units", "_requests")
_ROLLOUT = ("text", "reward", "rewards", "failure", "seconds_grading", "key_visit")


def snapshot(buffer: Buffer) -> dict[str, Any]:
    """JSON of a buffer between two batches."""
    places = {"flying": buffer.flying.values(), "ready": buffer.ready, "deferred": buffer.deferred}
    return {
        "counts": {name.strip("_"): getattr(buffer, name) for name in _COUNTS},
        "lengths": {_named(*one): length for one, length in buffer.lengths.items()},
        "units": [_unit(unit, place) for place, units in places.items() for unit in units],
    }


def restore(
    collector: Collector, saved: dict[str, Any], find: Callable[[int, int, int], Prompt | None]
) -> None:
    """Put a snapshot into a new collector. find: the prompt of an identity, None if there is none.

    Raises UserError for problems that are gone.
    """
    buffer = collector.buffer
    buffer.lengths.update({_identity(name): n for name, n in saved["lengths"].items()})
    for one in saved["units"]:
        prompt = find(one["row"], one.get("trace", 0), one.get("cut_at", 0))
        if prompt is None:
            raise UserError(
                f"task: problem {one['row']} has rollouts in the checkpoint and is not among the "
                "training problems any more; go on with the task (and the traces) as it was"
            )
        unit = Unit(one["index"], prompt, one["visit"], one["need"], one["admitted"])
        unit.since, unit.cut = one["since"], one.get("cut", 0)
        unit.wanted, unit.stage = one.get("wanted", unit.need), one.get("stage", 0)
        unit.watch = _watch(one.get("watch"))
        states = [*one.get("pruned", []), *one["members"]]
        most = 1 + max(state["sample"] for state in states)
        starts = collector.launch.start(unit.prompt, unit.visit, most)
        for state in states:
            sample, extra = state["sample"], state.get("extra", False)
            collector.launch.join(unit, sample, starts[sample], extra)
            _fill(unit.members[-1], state, collector)
        gone = len(one.get("pruned", []))
        unit.pruned, unit.members = unit.members[:gone], unit.members[gone:]
        by_sample = {member.rollout.sample: member for member in unit.members}
        unit.done = [by_sample[sample] for sample in one["done"]]
        if one["place"] == "flying":
            buffer.fly(unit)
            collector.launch.queue(unit)
        else:
            {"ready": buffer.ready, "deferred": buffer.deferred}[one["place"]].append(unit)
        if unit.since is not None:
            buffer.starts[unit.since] += 1
    # last: putting rollouts back takes new request ids
    for name in _COUNTS:
        setattr(buffer, name, saved["counts"][name.strip("_")])


def _named(row: int, trace: int, cut: int) -> str:
    """An identity as a key of JSON."""
    return f"{row}/{trace}/{cut}" if trace else str(row)


def _identity(name: str) -> tuple[int, int, int]:
    """Back again."""
    row, trace, cut = map(int, f"{name}/0/0".split("/")[:3])
    return row, trace, cut


def _unit(unit: Unit, place: str) -> dict[str, Any]:
    return {
        "place": place,
        "index": unit.index,
        "row": unit.prompt.row,
        "trace": unit.prompt.trace,
        "cut_at": unit.prompt.cut,
        "visit": unit.visit,
        "need": unit.need,
        "admitted": unit.admitted,
        "since": unit.since,
        "cut": unit.cut,
        "wanted": unit.wanted,
        "stage": unit.stage,
        "watch": unit.watch and asdict(unit.watch) | {"step_ids": sorted(unit.watch.step_ids)},
        "members": [_member(member) for member in unit.members],
        "pruned": [_member(member) for member in unit.pruned],
        "done": [member.rollout.sample for member in unit.done],
    }


def _member(member: Member) -> dict[str, Any]:
    gone = member.state is State.RUNNING
    completion = Completion(member.request.id) if gone else member.rollout.completion
    return {
        "sample": member.rollout.sample,
        "state": State.QUEUED if gone else member.state,
        "request": member.request.id,
        "lost": member.lost,
        "extra": member.extra,
        # what is drawn anew is of no prefix that was looked at
        "looks": [] if gone else [asdict(look) for look in member.rollout.looks],
        "seen": {} if gone else {place: _packed(*seen) for place, seen in member.seen.items()},
        "rollout": {name: getattr(member.rollout, name) for name in _ROLLOUT},
        "completion": {f.name: getattr(completion, f.name) for f in fields(completion)},
    }


def _fill(member: Member, saved: dict[str, Any], collector: Collector) -> None:
    member.state, member.lost = State(saved["state"]), saved["lost"]
    for name in _ROLLOUT:
        setattr(member.rollout, name, saved["rollout"][name])
    member.rollout.looks = [Look(**look) for look in saved.get("looks", [])]
    member.seen = {int(place): _unpacked(seen) for place, seen in saved.get("seen", {}).items()}
    completion = Completion(**saved["completion"])
    completion.finish = Finish(completion.finish)
    member.rollout.completion = completion
    collector.launch.renew(member, saved["request"])


def _watch(saved: dict[str, Any] | None) -> Watch | None:
    if saved is None:
        return None
    at, steps = tuple(saved["at"]), tuple(saved["steps"])
    return Watch(**saved | {"at": at, "steps": steps, "step_ids": frozenset(saved["step_ids"])})


def _packed(position: int, features: np.ndarray) -> dict[str, Any]:
    """A hidden state has thousands of numbers: as base64 of float32 they keep every bit."""
    return {"position": position, "read": base64.b64encode(features.tobytes()).decode()}


def _unpacked(saved: dict[str, Any]) -> tuple[int, np.ndarray]:
    return saved["position"], np.frombuffer(base64.b64decode(saved["read"]), np.float32)
