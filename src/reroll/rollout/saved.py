"""What is under way, as plain data for a checkpoint, and back.

Token streams are not copied: a completion that is not in the engine does not change any more. What
the engine still has (a kept cache) is saved without its tokens and is drawn anew.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from reroll.errors import UserError
from reroll.rollout.buffer import Buffer, Member, State, Unit
from reroll.rollout.collect import Collector
from reroll.types import Completion, Finish, Prompt

_COUNTS = ("update", "cursor", "admitted", "_units", "_requests")
_ROLLOUT = ("text", "reward", "rewards", "failure", "seconds_grading", "key_visit")


def snapshot(buffer: Buffer) -> dict[str, Any]:
    """JSON of a buffer between two batches."""
    places = {"flying": buffer.flying.values(), "ready": buffer.ready, "deferred": buffer.deferred}
    return {
        "counts": {name.strip("_"): getattr(buffer, name) for name in _COUNTS},
        "lengths": {str(row): length for row, length in buffer.lengths.items()},
        "units": [_unit(unit, place) for place, units in places.items() for unit in units],
    }


def restore(collector: Collector, saved: dict[str, Any], prompts: Sequence[Prompt]) -> None:
    """Put a snapshot into a new collector. Raises UserError for problems that are gone."""
    buffer, rows = collector.buffer, {prompt.row: prompt for prompt in prompts}
    buffer.lengths.update({int(row): length for row, length in saved["lengths"].items()})
    for one in saved["units"]:
        if one["row"] not in rows:
            raise UserError(
                f"task: problem {one['row']} has rollouts in the checkpoint and is not among the "
                "training problems any more; go on with the task as it was"
            )
        unit = Unit(one["index"], rows[one["row"]], one["visit"], one["need"], one["admitted"])
        unit.since, unit.cut = one["since"], one.get("cut", 0)
        most = 1 + max(state["sample"] for state in one["members"])
        starts = collector.decisions.start(unit.prompt, unit.visit, most)
        for state in one["members"]:
            collector.join(unit, state["sample"], starts[state["sample"]])
            _fill(unit.members[-1], state, collector)
        by_sample = {member.rollout.sample: member for member in unit.members}
        unit.done = [by_sample[sample] for sample in one["done"]]
        if one["place"] == "flying":
            buffer.fly(unit)
            collector.queue(unit)
        else:
            {"ready": buffer.ready, "deferred": buffer.deferred}[one["place"]].append(unit)
        if unit.since is not None:
            buffer.starts[unit.since] += 1
    # last: putting rollouts back takes new request ids
    for name in _COUNTS:
        setattr(buffer, name, saved["counts"][name.strip("_")])


def _unit(unit: Unit, place: str) -> dict[str, Any]:
    return {
        "place": place,
        "index": unit.index,
        "row": unit.prompt.row,
        "visit": unit.visit,
        "need": unit.need,
        "admitted": unit.admitted,
        "since": unit.since,
        "cut": unit.cut,
        "members": [_member(member) for member in unit.members],
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
        "rollout": {name: getattr(member.rollout, name) for name in _ROLLOUT},
        "completion": {f.name: getattr(completion, f.name) for f in fields(completion)},
    }


def _fill(member: Member, saved: dict[str, Any], collector: Collector) -> None:
    member.state, member.lost = State(saved["state"]), saved["lost"]
    for name in _ROLLOUT:
        setattr(member.rollout, name, saved["rollout"][name])
    completion = Completion(**saved["completion"])
    completion.finish = Finish(completion.finish)
    member.rollout.completion = completion
    collector.renew(member, saved["request"])
