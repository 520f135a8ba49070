"""The mix: its parts hold in every batch, and what comes next follows from what was earned."""

import json
from collections import Counter
from collections.abc import Sequence

import pytest

from reroll.config import PrefixSection
from reroll.rollout.mix import DEAD, Mix
from reroll.rollout.prefix import first_share
from reroll.types import Completion, Finish, Group, Prompt, Rollout
from tests.rollout.test_prefix import section, trace

HARD, EASY, BATCH = 10, 6, 8


def mix(batch: int = BATCH, hard: int = HARD, **changes: object) -> Mix:
    config: PrefixSection = section(**changes)
    return Mix(
        config,
        [Prompt(row, f"hard {row}", (row,)) for row in range(hard)],
        {row: trace(50, row=row) for row in range(hard)},
        [Prompt(100 + row, f"easy {row}", (100 + row,)) for row in range(EASY)],
        batch=batch,
        steps=100,
        seed=0,
        success=lambda reward: reward >= 1,
    )


def group(prompt: Prompt, rewards: Sequence[float]) -> Group:
    def done(reward: float) -> Rollout:
        ids = [*prompt.prefix_ids, 1]
        return Rollout(prompt, 0, 0, Completion(0, ids, finish=Finish.STOP), reward=reward)

    return Group(prompt, [done(reward) for reward in rewards])


def tell(one: Mix, prompts: Sequence[Prompt], rewards: Sequence[Sequence[float]]) -> None:
    groups = [group(p, r) for p, r in zip(prompts, rewards, strict=True)]
    rates = [sum(r) / len(r) for r in rewards]
    one.learn(groups, rates, [len(set(r)) > 1 for r in rewards])


def parts_of(prompts: Sequence[Prompt]) -> Counter[str]:
    names = ["prefixed" if p.trace else "easy" if p.row >= 100 else "original" for p in prompts]
    return Counter(names)


@pytest.mark.parametrize("weights", [(3, 1, 0), (1, 1, 0), (1, 0, 0), (2, 1, 1), (4, 2, 2)])
@pytest.mark.parametrize("cut", ["uniform", "resample", "step", "schedule"])
def test_the_parts_hold_in_every_batch(weights: tuple[int, int, int], cut: str) -> None:
    names = ("prefixed", "original", "easy")
    one = mix(cut=cut, **dict(zip(names, weights, strict=True)))
    for update in range(20):
        prompts, _ = one(update * BATCH, BATCH)
        expected = {n: BATCH * w // sum(weights) for n, w in zip(names, weights, strict=True) if w}
        assert parts_of(prompts) == expected
        tell(one, prompts, [[0.0, 1.0]] * BATCH)


def test_the_stream_does_not_depend_on_how_it_is_asked_for() -> None:
    one, other = mix(), mix()
    piecemeal = [one(place, 1)[0][0] for place in range(5 * BATCH)]
    assert piecemeal == [p for update in range(5) for p in other(update * BATCH, BATCH)[0]]


def test_every_problem_comes_once_an_epoch_and_every_cut_in_turn() -> None:
    one, seen, given = mix(), Counter[int](), {}
    for update in range(30):  # 6 prefixed places a batch: 18 epochs of 10
        for prompt in one(update * BATCH, BATCH)[0]:
            if prompt.trace:
                seen[prompt.row] += 1
                given.setdefault(prompt.row, []).append(prompt.cut)
        assert max(seen.values()) - min(seen[row] for row in range(HARD)) <= 1
    for row, cuts in given.items():
        frozen = one.cuts(one.traces[row])
        assert set(cuts) == set(frozen)
        assert cuts[: len(frozen)] == cuts[len(frozen) : 2 * len(frozen)]


def test_visits_grow_with_every_start_of_the_same_prefix() -> None:
    one, last = mix(), {}
    for update in range(30):
        for prompt, visit in zip(*one(update * BATCH, BATCH), strict=True):
            assert visit == last.get(prompt.identity, -1) + 1
            last[prompt.identity] = visit
    assert max(last.values()) > 3


def test_steered_cuts_follow_what_was_earned() -> None:
    one = mix(cut="target", original=0, prefixed=1)
    assert all(known.share == first_share(one.config) for known in one.known.values())
    for update in range(60):
        prompts, _ = one(update * BATCH, BATCH)
        # even rows always succeed, odd ones never do
        tell(one, prompts, [[float(p.row % 2 == 0)] * 4 for p in prompts])
    assert {row: known.share for row, known in one.known.items()} == {
        row: 0.0 if row % 2 == 0 else one.config.high for row in range(HARD)
    }
    prompts, _ = one(60 * BATCH, BATCH)
    assert all((p.trace == 0) == (p.row % 2 == 0) for p in prompts)
    # one that fails again without is given something again
    tell(one, prompts, [[0.0] * 4] * BATCH)
    assert all(one.known[p.row].share > 0 for p in prompts)


def test_solved_problems_retire_and_the_last_one_does_not() -> None:
    one = mix(retire=0.75)
    for update in range(40):
        prompts, _ = one(update * BATCH, BATCH)
        tell(one, prompts, [[float(p.row < 4 or p.row > 90)] * 4 for p in prompts])
    assert [row for row in range(HARD) if one.retired(row)] == [0, 1, 2, 3]
    assert one.active() == list(range(4, HARD))
    for update in range(40, 50):
        prompts, _ = one(update * BATCH, BATCH)
        assert all(4 <= p.row < HARD for p in prompts)
        tell(one, prompts, [[1.0] * 4] * BATCH)
    for update in range(50, 90):
        prompts, _ = one(update * BATCH, BATCH)
        tell(one, prompts, [[1.0] * 4] * BATCH)
    assert all(map(one.retired, range(HARD)))
    assert len(one(90 * BATCH, BATCH)[0]) == BATCH
    assert not any(mix(retire=1.0).retired(row) for row in range(HARD))


def test_on_failure_only_what_has_failed_gets_a_prefix() -> None:
    one = mix(mode="on_failure")
    prompts, _ = one(0, BATCH)
    assert parts_of(prompts) == {"original": BATCH}  # nothing has failed yet
    tell(one, prompts, [[float(p.row == 7), 0.0] for p in prompts])
    failed = {p.row for p in prompts} - {7}
    prompts, _ = one(BATCH, BATCH)
    assert {p.row for p in prompts if p.trace} <= failed
    assert parts_of(prompts)["prefixed"] == min(6, len(failed))
    tell(one, prompts, [[0.0, 1.0]] * BATCH)
    assert not any(one.known[p.row].failed for p in prompts)


@pytest.mark.parametrize("cut", ["uniform", "target", "minimal"])
def test_hard_problems_without_a_trace_come_without_prefix(cut: str) -> None:
    """Until they are solved: then that is their trace."""
    one, seen = mix(cut=cut, prefixed=1), Counter[tuple[int, bool]]()
    for row in range(4, HARD):
        del one.traces[row]
    for update in range(30):
        prompts, _ = one(update * BATCH, BATCH)
        assert parts_of(prompts) == {"prefixed": BATCH // 2, "original": BATCH // 2}
        seen.update((p.row, bool(p.trace)) for p in prompts)
        tell(one, prompts, [[0.0, 1.0]] * BATCH)
    assert {row for row, given in seen if given} == {0, 1, 2, 3}
    assert {row for row, given in seen if not given} == set(range(HARD))
    one.refresh([trace(50, row=6), trace(50, row=100)])  # the latter: an easy one
    given = {p.row for update in range(30, 50) for p in one(update * BATCH, BATCH)[0] if p.trace}
    assert given == {0, 1, 2, 3, 6}


def test_a_dead_part_is_told_of_once_and_again_after_it_lived() -> None:
    one = mix()

    def batch(update: int, prefixed: list[float]) -> list[str]:
        prompts, _ = one(update * BATCH, BATCH)
        tell(one, prompts, [prefixed if p.trace else [0.0, 1.0] for p in prompts])
        return one.told()

    said = [batch(update, [0.0, 0.0]) for update in range(DEAD + 3)]
    assert [bool(lines) for lines in said] == [update == DEAD - 1 for update in range(DEAD + 3)]
    assert "no prefixed group had unequal rewards in 5 batches" in said[DEAD - 1][0]
    assert batch(20, [0.0, 1.0]) == []
    assert any(batch(21 + update, [1.0, 1.0]) for update in range(DEAD))


def test_metrics_by_part() -> None:
    one = mix(easy=1, prefixed=2, original=1)
    prompts, _ = one(0, BATCH)
    names = [one.part(group(p, [])) for p in prompts]
    rates = [{"prefixed": 0.5, "original": 0.0, "easy": 1.0}[name] for name in names]
    groups = [group(p, [0.0]) for p in prompts]
    found = one.metrics(groups, rates, [name == "prefixed" for name in names])
    given = [p.cut for p in prompts if p.trace]
    assert found == {
        "groups_prefixed": 4.0, "success_prefixed": 0.5, "live_prefixed": 1.0,
        "groups_original": 2.0, "success_original": 0.0, "live_original": 0.0,
        "groups_easy": 2.0, "success_easy": 1.0, "live_easy": 0.0,
        "prefix_tokens": sum(given) / 4, "prefix_share": pytest.approx(sum(given) / 200),
        "retired": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"cut": "target"}, {"mode": "on_failure"}, {"easy": 4}])
def test_goes_on_from_a_checkpoint_as_if_nothing_had_happened(changes: dict[str, object]) -> None:
    one = mix(retire=0.6, **changes)
    for update in range(12):
        prompts, _ = one(update * BATCH, BATCH)
        tell(one, prompts, [[float((p.row * update) % 3 == 0), 0.0] for p in prompts])
        if update == 5:
            one.refresh([trace(40, row=2)])
    saved = json.loads(json.dumps(one.state()))
    other = mix(retire=0.6, **changes)
    other._all |= {t.id: t for t in [trace(40, row=2)]}  # of another source than this run's own
    other.load_state(saved)
    for update in range(12, 20):
        prompts, visits = one(update * BATCH, BATCH)
        assert other(update * BATCH, BATCH) == (prompts, visits)
        for each in (one, other):
            tell(each, prompts, [[float(p.row % 2), 1.0] for p in prompts])
    assert one.state() == other.state()


def test_finds_prompts_by_what_they_are() -> None:
    one = mix()
    for prompt in one(0, 40)[0]:
        assert one.find(*prompt.identity) == prompt
    assert one.find(999, 0, 0) is None
    assert one.find(1, 12345, 7) is None


def test_own_successes_take_the_place_of_traces() -> None:
    one = mix()
    before = one.traces[4]
    one.refresh([trace(20, row=4), trace(20, row=77), trace(20, answer_at=0, row=5)])
    assert len(one.traces[4].token_ids) == 20
    assert 77 not in one.traces
    assert len(one.traces[5].token_ids) == 50  # nothing of the new one may be given
    assert one.find(4, before.id, 3) is not None  # rollouts from the old one may be under way
