"""Pruning while rollouts run: who is judged when and by what, who stays, and what becomes of all.

Rollouts are written by the tests (`scripted.py`); the last part draws with a model.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reroll.algo.noise import share
from reroll.algo.survive import balanced, tilt, widest
from reroll.engine.local import LocalEngine
from reroll.errors import UserError
from reroll.order import Stream
from reroll.rollout.buffer import Buffer
from reroll.rollout.collect import Collector
from reroll.rollout.collected import CollectSpec
from reroll.rollout.decisions import NOTHING, Decisions, Graded, Start
from reroll.rollout.policies import (
    Schedule,
    april,
    asynchronous,
    longest_first,
    sorted_by_length,
    sync,
    tail_batch,
)
from reroll.rollout.prune import Pruner
from reroll.rollout.saved import restore, snapshot
from reroll.rollout.unit import Member, State, Unit
from reroll.types import Draft, Finish, Group, Prompt, Purpose, Rollout, Sampling
from tests.rollout.scripted import END, Line, Pruned, line, samples_of
from tests.rollout.stub import StubGraders, spell
from tests.rollout.test_schedules import check
from tests.tiny import VOCABULARY, tiny

PATIENCE = 3
SCHEDULES: dict[str, Schedule] = {
    "sync": sync(),
    "longest_first": longest_first(),
    "sorted": sorted_by_length(3, keep=True, refill=False),
    "sorted, refill": sorted_by_length(3, keep=True, refill=True, patience=PATIENCE),
    "sorted, on-policy": sorted_by_length(3, keep=False, refill=False),
    "sorted, on-policy, refill": sorted_by_length(2, keep=False, refill=True, patience=PATIENCE),
    "april": april(2.0, PATIENCE),
    "tail_batch": tail_batch(1.5),
    "async": asynchronous(PATIENCE, keep_cache=False),
    "async, cache kept": asynchronous(PATIENCE, keep_cache=True),
}
PLAIN = Prompt(0, "", (1,))
"""without a prefix"""


def but(way: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The same settings otherwise."""
    return way | changes


RANDOM: dict[str, Any] = dict(signal="random", when="tokens", at=[4], keep=[0.5], least=2)
"""half of a group by lot at 4 tokens"""
CONFIDENT: dict[str, Any] = but(RANDOM, signal="confidence", warmup=1, audit=0.0, adaptive=False)
"""by what the log-probs tell, from the second batch on"""


WAYS: dict[str, dict[str, Any]] = {
    "random": RANDOM,
    "confidence": CONFIDENT,
    "two probes": but(CONFIDENT, at=[3, 6], keep=[0.75, 0.5]),
    "more samples": but(RANDOM, refill="samples"),
    "two probes, more samples": but(CONFIDENT, at=[3, 6], keep=[0.75, 0.5], refill="samples"),
    "pods": dict(rule="pods", mode="paper", keep=[0.5], least=2),
}


def lot(r: Rollout, seed: int = 0) -> random.Random:
    """A source of its own for each rollout."""
    return random.Random(f"{seed}/{r.prompt.row}/{r.sample}/{r.visit}/{r.key_visit}")


def tailed(
    seed: int = 0, right: float = 0.5, tells: float = 1.0, spread: float = 0.8
) -> Callable[[Rollout], Line]:
    """Lengths with a long tail. tells: how far right ones' log-probs lie above others', +- 1."""

    def script(r: Rollout) -> Line:
        source = lot(r, seed)
        length = 2 + min(int(source.lognormvariate(2, spread)), 37)
        reward = float(source.random() < right)
        return line(length, reward, -2.0 + tells * reward + source.uniform(-1, 1))

    return script


def table(*lines: Line) -> Callable[[Rollout], Line]:
    """What each sample of every prompt draws."""
    return lambda r: lines[r.sample]


def looks_of(run: Pruned, batch: int = -1) -> list[dict[int, list[Any]]]:
    """Of each group of a batch: its looks by sample."""
    return [
        {r.sample: r.looks for r in (*group.rollouts, *group.pruned)}
        for group in run.batches[batch].groups
    ]


# --- when a group is judged -----------------------------------------------------------------------


def test_a_group_is_judged_when_its_last_one_comes_to_the_probe_and_the_others_go_on() -> None:
    # three slots: sample 3 starts when sample 0 has ended, and comes to the probe last
    script = table(line(2, 1), line(20, 0), line(20, 1), line(20, 0))
    run = Pruned(script, batch=1, samples=4, slots=3, **RANDOM).run(1)
    (judged,) = run.judged
    # started at tick 3, so its fifth token, drawn after reading the fourth, comes at tick 7
    assert judged.tick == 7
    assert judged.tokens == {0: 2, 1: 7, 2: 7, 3: 5}
    assert judged.states[0] is State.DONE and len(judged.out) == 2
    positions = {sample: looks[0].position for sample, looks in looks_of(run)[0].items()}
    assert positions == {0: 2, 1: 4, 2: 4, 3: 4}
    ended = {sample: looks[0].ended for sample, looks in looks_of(run)[0].items()}
    assert ended == {0: True, 1: False, 2: False, 3: False}


@pytest.mark.parametrize("last", [2, 4, 5])
def test_or_when_the_last_one_ends_before_it(last: int) -> None:
    """A rollout of as many tokens as the probe is at has ended before it is read that far."""
    script = table(line(3, 0), line(20, 1), line(30, 1), line(last, 0))
    run = Pruned(script, batch=1, samples=4, slots=3, **RANDOM).run(1)
    (judged,) = run.judged
    assert judged.tick == 3 + last
    # with one token more it comes to the probe as it draws its last
    looks = looks_of(run)[0]
    assert looks[3][0].ended is (last < 5)
    assert looks[3][0].position == min(last, 4)


def test_all_that_ended_before_the_probe_are_judged_by_their_rewards() -> None:
    script = table(*(line(2 + i % 3, i % 2) for i in range(8)))
    run = Pruned(script, batch=1, **RANDOM).run(1)
    (judged,) = run.judged
    assert judged.tick == 4 and set(judged.states.values()) == {State.DONE}
    looks = looks_of(run)[0]
    for sample in range(8):
        (look,) = looks[sample]
        assert (look.ended, look.score, look.survival) == (True, None, 0.5)
        assert look.probability == sample % 2 and look.position == 2 + sample % 3
    (group,) = run.groups()
    assert all(r.reward is not None and r.completion.finish is Finish.STOP for r in group.pruned)
    assert [len(group.rollouts), len(group.pruned)] == [4, 4]


def test_a_reward_earned_after_the_own_probe_does_not_enter_survival() -> None:
    """Sample 0 ends after its probe and before the decision; what it earns changes no look."""

    def script(reward: float) -> Callable[[Rollout], Line]:
        def of(r: Rollout) -> Line:
            if r.prompt.row == 2 and r.sample == 0:
                return line(6, reward, -1.3)
            if r.prompt.row == 2:
                return line(16, r.sample % 2, lot(r).uniform(-2, -1))
            return tailed(1)(r)

        return of

    found = []
    for reward in (0.0, 1.0):
        run = Pruned(script(reward), batch=1, samples=6, slots=5, **CONFIDENT).run(3)
        looks = looks_of(run)[0]
        judged = run.judged[-1]
        assert judged.row == 2 and judged.states[0] is State.DONE and judged.tick > 0
        assert not looks[0][0].ended and looks[0][0].score is not None
        assert len(run.groups()[-1].pruned) == 3
        found.append((judged.out, looks))
    assert found[0] == found[1]
    # one that had ended before it enters with its reward, and changes them
    early = []
    for reward in (0.0, 1.0):
        short = script(reward)

        def of(r: Rollout, short: Any = short, reward: float = reward) -> Line:
            one = (r.prompt.row, r.sample) == (2, 0)
            return line(3, reward, -1.3) if one else short(r)

        run = Pruned(of, batch=1, samples=6, slots=5, **CONFIDENT).run(3)
        looks = looks_of(run)[0]
        assert looks[0][0].ended and looks[0][0].probability == reward
        early.append({sample: its[0].survival for sample, its in looks.items()})
    assert early[0] != early[1]


def test_one_that_ended_since_its_probe_may_be_left_out_all_the_same() -> None:
    # sample 3 starts when sample 0 has ended, sample 4 when sample 1 has
    script = table(line(6, 1), line(7, 1), line(30, 0), line(2, 1), line(30, 1))
    lost = []
    for seed in range(12):
        run = Pruned(script, batch=1, samples=5, slots=3, seed=seed, **RANDOM).run(1)
        for group in run.groups():
            for r in group.pruned:
                if r.completion.finish is Finish.STOP:
                    lost.append(r)
                    assert r.reward is not None and r.saved == 0.0
    assert any(not r.looks[0].ended for r in lost) and any(r.looks[0].ended for r in lost)


# --- who stays ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "keep", "least", "kept"),
    [(8, 0.5, 2, 4), (8, 0.25, 4, 4), (8, 0.25, 2, 2), (7, 0.5, 2, 4), (5, 0.5, 2, 2),
     (6, 0.7, 3, 4), (3, 0.1, 2, 2)],
)  # fmt: skip
def test_the_kept_are_as_many_as_stated(samples: int, keep: float, least: int, kept: int) -> None:
    assert kept == max(least, round(keep * samples))
    for way in (RANDOM, CONFIDENT):
        way = but(way, keep=[keep], least=least)
        run = Pruned(tailed(2), batch=4, samples=samples, slots=9, **way).run(4)
        groups = [g for one in run.batches[1:] for g in one.groups]
        assert len(groups) == 12
        assert {(len(g.rollouts), len(g.pruned)) for g in groups} == {(kept, samples - kept)}
        for group in groups:
            every = [*group.rollouts, *group.pruned]
            assert sorted(samples_of(every)) == list(range(samples))
            assert samples_of(group.rollouts) == sorted(samples_of(group.rollouts))
            assert sum(r.looks[0].survival for r in every) == pytest.approx(kept)
            assert all(r.looks[0].kept for r in group.rollouts)
            assert not any(r.looks[0].kept for r in group.pruned)


def kept_sets(run: Pruned) -> dict[tuple[int, int], list[int]]:
    """(row, visit) -> samples that stayed."""
    return {(g.prompt.row, g.rollouts[0].visit): samples_of(g.rollouts) for g in run.groups()}


def test_the_lot_is_that_of_seed_row_and_visit() -> None:
    alike = table(*[line(9, 1)] * 8)
    runs = [
        Pruned(alike, batch=3, seed=seed, slots=slots, prompts=6, **RANDOM).run(4)
        for seed, slots in ((3, 64), (3, 5), (4, 64))
    ]
    first, again, other = map(kept_sets, runs)
    assert len(first) == 12
    assert first == again != other
    # two of 70 sets are alike once in 70: that three of 18 pairs are is one in 60,000
    same = [first[row, 0] == first[row, 1] for row in range(6)]
    same += [first[key] == other[key] for key in first]
    assert sum(same) < 3
    assert len({tuple(kept) for kept in first.values()}) > 6
    # where all are alike to a signal, every other sample stays: which ones, the lot says
    run = Pruned(alike, batch=20, slots=160, prompts=20, **CONFIDENT).run(3)
    later = kept_sets(run)
    for visit in (1, 2):
        assert {tuple(later[row, visit]) for row in range(20)} == {(0, 2, 4, 6), (1, 3, 5, 7)}
    assert 0 < sum(later[row, 1] == later[row, 2] for row in range(20)) < 20


def test_each_is_kept_as_often_as_its_survival_says() -> None:
    """One sample of each of many groups, by their own lots: independent of one another."""
    for way, least in ((RANDOM, 0.5), (CONFIDENT, 0.0)):
        run = Pruned(tailed(5, 0.25), batch=20, slots=640, **way).run(16)
        groups = [g for one in run.batches[1:] for g in one.groups]
        for sample in (0, 3, 7):
            some = [r for g in groups for r in (*g.rollouts, *g.pruned) if r.sample == sample]
            assert len(some) == 300
            survival = [r.looks[0].survival for r in some]
            off = sum(r.looks[0].kept - s for r, s in zip(some, survival, strict=True))
            error = math.sqrt(sum(s * (1 - s) for s in survival))
            assert error > 3 and abs(off) < 3.5 * error
        spread = {round(r.looks[0].survival, 3) for g in groups for r in (*g.rollouts, *g.pruned)}
        assert (len(spread) == 1) is (least == 0.5)


def test_survival_is_that_of_the_tilt() -> None:
    run = Pruned(tailed(5, 0.3), batch=4, **but(CONFIDENT, ratio=0.6, floor=0.15)).run(4)
    seen = 0
    for group in (g for one in run.batches[1:] for g in one.groups):
        every = sorted((*group.rollouts, *group.pruned), key=lambda r: r.sample)
        looks = [r.looks[0] for r in every]
        expected = tilt([look.probability for look in looks], 4, 0.6, 0.15)
        assert [look.survival for look in looks] == pytest.approx(expected, abs=1e-12)
        assert min(look.survival for look in looks) >= 0.15 - 1e-12
        seen += len({round(look.survival, 6) for look in looks}) > 2
    assert seen > 6


# --- what becomes of those left out ---------------------------------------------------------------


def test_pruned_rollouts_leave_the_engine_at_once_and_others_take_their_slots() -> None:
    alike = table(*[line(20, 1)] * 8)
    run = Pruned(alike, batch=3, slots=16, **RANDOM).run(1)
    # two groups at tick 5; the third starts at the next one, in the places of eight that were left
    # out, and is judged five ticks later
    assert [(one.row, one.tick) for one in run.judged] == [(0, 5), (1, 5), (2, 10)]
    starts = Counter(tick for tick, what, _ in run.engine.log if what == "start")
    gone = Counter(tick for tick, what, _ in run.engine.log if what == "pruned")
    assert starts == {1: 16, 6: 8} and gone == {5: 8, 10: 4}
    whole = Pruned(alike, batch=3, slots=16, plain=True, **RANDOM).run(1)
    assert (run.engine.tick, whole.engine.tick) == (25, 40)
    # the others draw to their end, those left out five tokens
    drawn = run.engine.stats().tokens_drawn
    assert drawn == 12 * 20 + 12 * 5 and whole.engine.stats().tokens_drawn == 480
    assert run.batches[0].tokens_dropped == drawn - 240
    assert sorted(run.batches[0].cut) == sorted(
        len(r.completion.token_ids) for g in run.groups() for r in g.pruned
    )
    assert run.batches[0].lost == []


def test_pruned_rollouts_say_why_and_are_never_graded() -> None:
    run = Pruned(tailed(7), batch=3, slots=7, **CONFIDENT).run(5)
    stopped = [r for g in run.groups() for r in g.pruned if r.completion.finish is Finish.ABORT]
    ended = [r for g in run.groups() for r in g.pruned if r.completion.finish is not Finish.ABORT]
    assert len(stopped) > 12 and len(ended) > 5
    for r in stopped:
        assert r.completion.abort_reason == "pruned"
        assert (r.reward, r.rewards, r.text) == (None, {}, "")
        assert len(r.completion.token_ids) == len(r.completion.logprobs) >= 5
    jobs = {job.id for job in run.graders.jobs}
    assert len(jobs) == len(run.graders.jobs)
    trained = [r for g in run.groups() for r in g.rollouts]
    assert jobs == {r.completion.request_id for r in (*trained, *ended)}
    assert all(r.reward is not None and r.saved == 0 for r in (*trained, *ended))


def test_tokens_saved_are_those_expected_of_what_was_longer() -> None:
    # 4 of 8 samples of each prompt are 10 tokens long and 4 are 30: nothing ends between 5 and 10
    script = table(*[line(10, 1)] * 4, *[line(30, 0)] * 4)
    run = Pruned(script, batch=60, slots=1000, **RANDOM).run(3)
    saved = [r.saved for g in run.batches[-1].groups for r in g.pruned]
    assert len(saved) == 240
    # the mean of 20 is 15 after 5 of them; of 720 kept the long ones' share is a half +- .019
    assert set(saved) == {saved[0]} and abs(saved[0] - 15) < 4 * 20 * 0.019
    # all that were started would have drawn 20 on average
    tokens = run.engine.stats().tokens_drawn
    total = sum(r.saved for g in run.groups() for r in g.pruned)
    assert abs(tokens + total - 20 * 1440) < 4 * 20 * 0.019 * 720


# --- groups left whole ----------------------------------------------------------------------------


def test_an_audit_share_of_groups_is_left_whole_and_scored_all_the_same() -> None:
    way = but(CONFIDENT, audit=0.3)
    run = Pruned(tailed(11), batch=10, slots=200, **way).run(9)
    later = [g for one in run.batches[1:] for g in one.groups]
    whole = [g for g in later if not g.pruned]
    for group in later:
        by_lot = share(3, "prune audit", group.prompt.row, 0, 0) < 0.3
        assert (group in whole) is by_lot
        assert len(group.rollouts) == (8 if by_lot else 4)
    assert abs(len(whole) - 24) < 3.5 * math.sqrt(80 * 0.3 * 0.7)
    scores = []
    for group in whole:
        for r in group.rollouts:
            (look,) = r.looks
            assert (look.survival, look.kept) == (1.0, True)
            assert look.ended or (look.score is not None and look.head > 0)
            scores += [] if look.ended else [(look.score, r.reward)]
    # the shadow scores mean something
    right, wrong = ([s for s, reward in scores if reward == x] for x in (1.0, 0.0))
    assert fmean(right) > fmean(wrong) + 0.5


def test_the_first_batches_are_left_whole_to_learn_from() -> None:
    run = Pruned(tailed(1), batch=2, **but(CONFIDENT, warmup=3)).run(5)
    sizes = [{len(g.rollouts) for g in one.groups} for one in run.batches]
    assert sizes == [{8}, {8}, {8}, {4}, {4}]
    heads = [{r.looks[0].head for g in one.groups for r in g.rollouts} for one in run.batches]
    assert heads == [{0}, {1}, {2}, {3}, {4}]
    first = [r.looks[0] for g in run.batches[0].groups for r in g.rollouts]
    assert all(look.kept and look.survival == 1 for look in first)


def test_it_stands_down_while_the_signal_tells_nothing_and_comes_back() -> None:
    def script(r: Rollout) -> Line:
        batch, source = r.prompt.row // 8, lot(r)
        reward = float(source.random() < 0.5)
        tells = reward if batch < 4 or batch >= 24 else float(source.random() < 0.5)
        return line(12, reward, -2.0 + tells + source.uniform(-0.3, 0.3))

    way = but(CONFIDENT, audit=0.25, adaptive=True, warmup=2)
    run = Pruned(script, batch=8, slots=200, **way).run(40)
    lines = [(update, text) for update, some in enumerate(run.said) for text in some]
    assert len(lines) >= 2
    down, up = lines[0], lines[-1]
    number = r"-?\d\.\d{3}"
    assert re.fullmatch(
        rf"prune: stands down, area inside whole groups {number} \+- {number}: under "
        r"prune\.least_auc = 0\.55, or not surely above \.5",
        down[1],
    )
    assert re.fullmatch(rf"prune: area inside whole groups {number} \+- {number}: prunes", up[1])
    assert 4 <= down[0] < 24 <= up[0]
    # it alternates, and what it says is what it does from the next batch on
    worth, told = True, dict(lines)
    for update, one in enumerate(run.batches):
        thinned = [g for g in one.groups if g.pruned]
        if update < 2 or not worth:
            assert thinned == []
        else:
            by_lot = [share(3, "prune audit", g.prompt.row, 0, 0) >= 0.25 for g in one.groups]
            assert len(thinned) == sum(by_lot)
        if update in told:
            assert ("stands down" in told[update]) is worth
            worth = not worth
    assert worth


def test_it_stands_down_where_no_group_could_tell() -> None:
    alike = table(*[line(9, 1)] * 8)
    run = Pruned(alike, batch=2, **but(CONFIDENT, adaptive=True, warmup=2, audit=0.1)).run(4)
    assert run.said == [
        [], ["prune: keeps everything: nothing is known of its signal yet"], [], [],
    ]  # fmt: skip
    assert not any(g.pruned for g in run.groups())
    bold = Pruned(alike, batch=2, **but(CONFIDENT, warmup=2)).run(4)
    assert bold.said == [[]] * 4 and all(g.pruned for g in bold.groups()[4:])


# --- drafts ---------------------------------------------------------------------------------------


def test_wholly_reused_rollouts_are_not_probed_and_drafts_that_run_through_it_are() -> None:
    script = table(
        line(12, 1, walked=11),  # wholly reused: judged by its reward
        line(12, 0, walked=8),  # comes to the probe on its draft, and goes on
        line(12, 1, walked=2),
        line(12, 0),
    )
    run = Pruned(script, batch=1, samples=4, **but(CONFIDENT, warmup=9)).run(1)
    looks = looks_of(run)[0]
    assert [looks[i][0].ended for i in range(4)] == [True, False, False, False]
    assert looks[0][0].probability == 1.0 and looks[0][0].position == 12
    assert [looks[i][0].position for i in range(1, 4)] == [4, 4, 4]
    # it is known at the first tick; the last of the others draws its fifth token at the fifth
    assert run.judged[0].tick == 5
    assert run.judged[0].tokens == {0: 12, 1: 12, 2: 7, 3: 5}


def test_a_group_of_old_rollouts_alone_is_judged_by_rewards() -> None:
    script = table(*(line(12, i % 2, walked=11) for i in range(8)))
    run = Pruned(script, batch=1, **but(CONFIDENT, warmup=1)).run(2)
    for batch in (0, 1):
        for looks in looks_of(run, batch):
            assert all(its[0].ended and its[0].score is None for its in looks.values())
    (group,) = run.batches[1].groups
    assert len(group.pruned) == 4 and all(r.reward is not None for r in group.pruned)
    # nothing was seen of them on their way, so nothing is learnt but from their ends
    assert run.pruner.predictor.signal.version == 0 < run.pruner.predictor.end.version


# --- probes ---------------------------------------------------------------------------------------


def test_several_probes_thin_a_group_step_by_step() -> None:
    alike = table(*[line(20, 1)] * 8)
    way = but(RANDOM, at=[3, 6], keep=[0.75, 0.5])
    run = Pruned(alike, batch=1, **way).run(1)
    assert [(one.tick, one.stage, len(one.out)) for one in run.judged] == [(4, 0, 2), (7, 1, 2)]
    (group,) = run.groups()
    assert (len(group.rollouts), len(group.pruned)) == (4, 4)
    by_stage = Counter((len(r.looks), round(r.looks[-1].survival, 9)) for r in group.pruned)
    assert by_stage == {(1, 0.75): 2, (2, round(4 / 6, 9)): 2}
    for r in group.rollouts:
        assert [(x.position, x.kept) for x in r.looks] == [(3, True), (6, True)]
        assert math.prod(x.survival for x in r.looks) == pytest.approx(0.5)
    for r in group.pruned:
        assert [x.kept for x in r.looks] == [True] * (len(r.looks) - 1) + [False]
        assert len(r.completion.token_ids) == (4 if len(r.looks) == 1 else 7)


def test_both_probes_are_judged_at_once_if_all_are_beyond_the_second() -> None:
    # the sixth of five slots starts when sample 0 has ended: by then the others are beyond both
    script = table(line(10, 1), *[line(30, 1)] * 4, line(5, 0))
    way = but(RANDOM, at=[3, 6], keep=[0.75, 0.5])
    run = Pruned(script, batch=1, samples=6, slots=5, **way).run(1)
    assert [(one.tick, one.stage) for one in run.judged][:1] == [(14, 0)]
    later = run.judged[1]
    # sample 5 was left out at the first, or ends a tick later
    assert later.tick == (14 if 5 in run.judged[0].out else 15)
    (group,) = run.groups()
    assert len(group.rollouts) == 3


def test_probes_by_share_of_the_running_mean_length() -> None:
    run = Pruned(tailed(3), batch=4, **but(RANDOM, when="share", at=[0.25, 0.5], keep=[0.9, 0.5]))
    watch = run.pruner.watch(PLAIN)
    assert watch is not None and watch.at == ()  # nowhere, as long as no length is known
    run.run(3)
    mean = run.pruner.lengths.mean
    assert 5 < mean < 20
    watch = run.pruner.watch(PLAIN)
    assert watch is not None and watch.at == (max(1, round(mean / 4)), max(1, round(mean / 2)))
    assert watch.steps == () and watch.step_ids == frozenset()
    # the group keeps the places it was opened with
    for group in run.batches[-1].groups:
        looks = [x for r in (*group.rollouts, *group.pruned) for x in r.looks]
        assert len({x.position for x in looks if not x.ended}) <= 2


def test_probes_at_the_n_th_step() -> None:
    script = table(
        line(12, 1, steps=(2, 5)),
        line(12, 0, steps=(3, 4)),
        line(12, 1, steps=(1,)),  # never comes to a second step
        line(20, 0, steps=(7, 9)),
    )
    run = Pruned(script, batch=1, samples=4, **but(RANDOM, when="steps", at=[2])).run(1)
    watch = run.pruner.watch(PLAIN)
    assert watch is not None and (watch.at, watch.steps, watch.step_ids) == ((), (2,), {END})
    positions = {sample: its[0].position for sample, its in looks_of(run)[0].items()}
    assert positions == {0: 5, 1: 4, 2: 12, 3: 9}
    assert run.judged[0].tick == 12
    assert {s: its[0].ended for s, its in looks_of(run)[0].items()}[2]


@pytest.mark.parametrize(
    ("way", "hidden", "entropy", "last"),
    [
        (dict(signal="confidence"), False, True, True),
        (dict(signal="quality"), True, True, True),
        (dict(signal="quality", statistics=False), True, False, True),
        (dict(signal="random"), False, False, False),
    ],
)
def test_the_engine_is_asked_for_no_more_than_is_read(
    way: dict[str, Any], hidden: bool, entropy: bool, last: bool
) -> None:
    watch = Pruned(tailed(), **RANDOM | way).pruner.watch(PLAIN)
    assert watch is not None
    assert (watch.hidden, watch.entropy, watch.last) == (hidden, entropy, last)


# --- signals --------------------------------------------------------------------------------------


def styled(r: Rollout) -> Line:
    """Right ones are surer, have fewer steps by then, and are one in five."""
    source = lot(r)
    reward = float(source.random() < 0.2)
    steps = (4,) if reward else (1, 3, 4)
    return line(16, reward, -1.6 + reward + source.uniform(-0.3, 0.3), steps)


@pytest.mark.parametrize(
    ("signal", "better"),
    [("confidence", True), ("quality", True), ("length", True), ("random", False)],
)
def test_signals_find_the_right_ones_on_a_hard_prompt(signal: str, better: bool) -> None:
    run = Pruned(styled, batch=15, slots=300, **but(CONFIDENT, signal=signal)).run(6)
    later = [g for one in run.batches[2:] for g in one.groups]
    kept = [lot(r).random() < 0.2 for g in later for r in g.rollouts]
    every = kept + [lot(r).random() < 0.2 for g in later for r in g.pruned]
    # of 480, half of them drawn from the others: the two means differ by .018 by chance
    error = math.sqrt(0.2 * 0.8 / len(kept) / 2)
    gap = fmean(kept) - fmean(every)
    assert (gap > 5 * error) if better else (abs(gap) < 3.5 * error)
    assert (run.pruner.predictor.signal.version == 6) is (signal != "random")
    scores = [r.looks[0].score for g in later for r in (*g.rollouts, *g.pruned)]
    assert (len(set(scores)) > 1) is better


def test_survivors_are_nearer_to_the_ratio_from_both_sides() -> None:
    for right, ratio in ((0.2, 0.5), (0.8, 0.5), (0.5, 0.8)):
        script = tailed(4, right, tells=3.0)
        run = Pruned(script, batch=15, slots=300, **but(CONFIDENT, ratio=ratio)).run(5)
        later = [g for one in run.batches[2:] for g in one.groups]
        kept = fmean(r.reward for g in later for r in g.rollouts if r.reward is not None)
        assert abs(kept - ratio) < abs(right - ratio) - 0.05


# --- rules ----------------------------------------------------------------------------------------


def test_the_fixed_rule_keeps_the_set_nearest_to_the_ratio() -> None:
    way = but(CONFIDENT, rule="fixed", mode="paper")
    run = Pruned(tailed(8, 0.3), batch=4, **way).run(4)
    for group in (g for one in run.batches[1:] for g in one.groups):
        every = sorted((*group.rollouts, *group.pruned), key=lambda r: r.sample)
        looks = [r.looks[0] for r in every]
        expected = balanced([look.probability for look in looks], 4, 0.5)
        assert [look.kept for look in looks] == expected
        assert {look.survival for look in looks} == {0.5}


def test_pods_keeps_those_whose_rewards_vary_most_once_all_have_ended() -> None:
    run = Pruned(tailed(8, 0.3), batch=4, slots=9, **WAYS["pods"]).run(3)
    assert run.pruner.watch(PLAIN) is None
    for group in run.groups():
        every = sorted((*group.rollouts, *group.pruned), key=lambda r: r.sample)
        rewards = [r.reward for r in every]
        assert [r.looks[0].kept for r in every] == widest(rewards, 4)  # type: ignore[arg-type]
        assert all(r.looks[0].ended and r.looks[0].probability == r.reward for r in every)
        assert all(r.completion.finish is Finish.STOP for r in every)
    assert len(run.graders.jobs) == 96
    assert not any(what == "pruned" for _, what, _ in run.engine.log)
    # all were drawn to their end, nothing was cut
    assert [one.cut for one in run.batches] == [[]] * 3
    assert [len(one.lost) for one in run.batches] == [16] * 3


# --- more samples in place of what was stopped ----------------------------------------------------


def test_more_samples_of_groups_that_are_expected_to_have_signal() -> None:
    def script(r: Rollout) -> Line:
        return line(2, 1) if r.prompt.row % 2 and r.sample < 8 else line(10, r.sample % 2)

    run = Pruned(script, batch=2, slots=16, **but(RANDOM, refill="samples")).run(3)
    for group in run.groups():
        sure = group.prompt.row % 2 == 1  # all had ended, and were right
        assert len(group.pruned) == 4
        extra = [r for r in group.rollouts if r.sample >= 8]
        assert samples_of(extra) == ([] if sure else [8, 9, 10, 11])
        assert len(group.rollouts) == 4 + len(extra)
        for r in extra:  # never judged, and trained on like any other
            assert r.looks == [] and r.reward is not None
            assert len(r.completion.token_ids) == 10
        assert all(len(r.looks) == 1 for r in group.rollouts if r.sample < 8)
    assert run.extra == [(row, 0 if row % 2 else 4) for row in (1, 0, 3, 2, 5, 4)]
    # the first group's four places are taken at the tick after it was judged
    starts = Counter(tick for tick, what, _ in run.engine.log if what == "start")
    assert starts[6] == 4


def test_as_many_as_were_stopped_and_not_those_that_had_ended() -> None:
    script = table(*(line(2, i % 2) for i in range(5)), *[line(20, 1)] * 3, *[line(9, 0)] * 8)
    found = set()
    for seed in range(8):
        way = but(RANDOM, refill="samples")
        run = Pruned(script, batch=1, seed=seed, **way).run(1)
        (group,) = run.groups()
        stopped = sum(r.completion.finish is Finish.ABORT for r in group.pruned)
        assert len(group.rollouts) == 4 + stopped
        found.add(stopped)
    assert len(found) > 1


# --- rewards --------------------------------------------------------------------------------------


def test_ungraded_rollouts_are_not_judged_if_they_had_ended_before_the_probe() -> None:
    script = table(
        line(2, None), line(3, None), *[line(20, i % 2) for i in range(6)],
    )  # fmt: skip
    run = Pruned(script, batch=1, **RANDOM).run(1)
    (group,) = run.groups()
    # 4 of 8 stay: these two, which cost nothing more, and two of the other six
    assert samples_of(group.rollouts)[:2] == [0, 1] and len(group.rollouts) == 4
    assert [r.looks for r in group.rollouts[:2]] == [[], []]
    assert all(r.reward is None and "no grade" in r.failure for r in group.rollouts[:2])
    judged = [*group.rollouts[2:], *group.pruned]
    assert {round(r.looks[0].survival, 9) for r in judged} == {round(2 / 6, 9)}
    assert run.batches[0].ungraded == 2


def test_one_is_kept_at_least_however_many_are_ungraded() -> None:
    script = table(*[line(2, None)] * 6, line(20, 1), line(20, 0))
    run = Pruned(script, batch=1, **RANDOM).run(1)
    (group,) = run.groups()
    assert len(group.rollouts) == 7 and len(group.pruned) == 1


def test_what_is_ungraded_after_its_probe_was_judged_like_any_other() -> None:
    script = table(*[line(9, None)] * 4, *[line(20, i % 2) for i in range(4)])
    run = Pruned(script, batch=1, **RANDOM).run(1)
    (group,) = run.groups()
    assert len(group.rollouts) == len(group.pruned) == 4
    assert all(len(r.looks) == 1 for r in (*group.rollouts, *group.pruned))


@pytest.mark.parametrize("length", [2, 9])
def test_rewards_outside_the_stated_range_stop_the_run(length: int) -> None:
    """Before the probe, as the group is judged; after it, as the batch is learnt from."""

    def script(r: Rollout) -> Line:
        return line(length, 1.5 if (r.prompt.row, r.sample) == (3, 1) else 1)

    for way in (but(RANDOM, keep=[1.0]), but(CONFIDENT, warmup=9), RANDOM)[: 3 - (length > 4)]:
        run = Pruned(script, batch=2, **way)
        with pytest.raises(UserError) as raised:
            run.run(3)
        assert str(raised.value) == (
            "prune.low = 0, prune.high = 1: problem 3 earned 1.5; set them to the least and the "
            "greatest reward there is"
        )
        assert (run.engine.stats().running, run.engine.stats().waiting) == (0, 0)
    run = Pruned(script, batch=2, **but(RANDOM, high=1.5)).run(3)
    assert len(run.groups()) == 6


def test_other_rewards_than_0_and_1_are_shares_of_the_range() -> None:
    """Twice the rewards, less one: the same survivals, and probabilities in their own units."""

    def script(low: float, high: float) -> Callable[[Rollout], Line]:
        def of(r: Rollout) -> Line:
            source = lot(r)
            share_ = source.choice([0.0, 0.5, 0.5, 1.0])
            length = source.choice([3, 15])
            return line(length, low + share_ * (high - low), share_ - 2 + source.uniform(-1, 1) / 2)

        return of

    plain = Pruned(script(0, 1), batch=6, **CONFIDENT).run(4)
    other = Pruned(script(-1, 1), batch=6, **but(CONFIDENT, low=-1.0)).run(4)
    seen: set[float] = set()
    for one, two in zip(plain.groups(), other.groups(), strict=True):
        assert samples_of(one.rollouts) == samples_of(two.rollouts)
        pairs = zip((*one.rollouts, *one.pruned), (*two.rollouts, *two.pruned), strict=True)
        for mine, its in pairs:
            (a,), (b,) = mine.looks, its.looks
            assert a.survival == pytest.approx(b.survival, abs=1e-9)
            assert b.probability == pytest.approx(2 * a.probability - 1, abs=1e-6)
            assert 0 <= a.probability <= 1 and -1 <= b.probability <= 1
            seen |= {a.probability} if a.ended else set()
    assert seen == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("way", [dict(when="steps", at=[2]), WAYS["pods"]], ids=["steps", "pods"])
def test_one_is_judged_by_the_reward_that_it_is_trained_on(way: dict[str, Any]) -> None:
    """One that the limit cut earns nothing under `truncated = "zero"`, judged or trained on."""
    way = way if "rule" in way else RANDOM | way
    script = table(*[line(12, 1)] * 4, *[line(6, i % 2) for i in range(4)])
    run = Pruned(script, batch=6, limit=8, truncated="zero", **way).run(1)
    cut = 0
    for r in (r for g in run.groups() for r in (*g.rollouts, *g.pruned)):
        (look,) = r.looks
        cut += r.completion.finish is Finish.LENGTH
        assert look.ended
        assert look.probability == (0.0 if r.completion.finish is Finish.LENGTH else r.reward)
    assert cut == 24


# --- with every schedule --------------------------------------------------------------------------


def all_members(run: Pruned) -> list[Member]:
    """From now on, every member that is started."""
    members: list[Member] = []
    join = run.collector.launch.join

    def joined(unit: Unit, sample: int, start: Start, extra: bool = False) -> None:
        join(unit, sample, start, extra)
        members.append(unit.members[-1])

    run.collector.launch.join = joined  # type: ignore[method-assign]
    return members


def check_units(run: Pruned) -> None:
    """What the buffer has hangs together."""
    check_counts(run.buffer)
    inside = {r.id for r, _ in (*run.engine._running, *run.engine._waiting)}
    assert inside == run.buffer.running.keys()
    for unit in run.buffer.units():
        assert all(member in unit.members for member in unit.done)
        assert all(m.state is State.PRUNED for m in unit.pruned)
        assert all(m.state is not State.PRUNED for m in unit.members)
        every = [m.rollout.sample for m in (*unit.members, *unit.pruned)]
        assert len(set(every)) == len(every)
        assert len(unit.done) <= len(unit.members) and 1 <= unit.need <= len(unit.members)


def check_counts(buffer: Buffer) -> None:
    flying = list(buffer.flying.values())
    unfinished = [m for u in flying for m in u.members if m.state is not State.DONE]
    assert buffer.active == len(unfinished)
    assert all(len(u.done) < u.need for u in flying)
    assert all(len(u.done) >= u.need for u in buffer.ready)
    starts = Counter(u.since for u in [*flying, *buffer.ready] if u.since is not None)
    assert buffer.starts == starts
    running = {m.request.id for m in unfinished if m.state is State.RUNNING}
    assert running <= buffer.running.keys()


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=12, deadline=None)
@given(
    way=st.sampled_from(list(WAYS)),
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    samples=st.integers(3, 7),
    slots=st.sampled_from([2, 5, 9, 30]),
    bad=st.sampled_from([0.0, 0.15]),
)
def test_nothing_is_lost(
    name: str, way: str, seed: int, batch: int, samples: int, slots: int, bad: float
) -> None:
    """Every member is trained on, pruned, under way, or dropped by a schedule that drops some."""
    source = random.Random(seed)
    refused = {(row, sample) for row in range(60) for sample in range(9) if source.random() < bad}

    def script(r: Rollout) -> Line:
        one = tailed(seed)(r)
        return line(len(one.tokens), None) if (r.prompt.row, r.sample) in refused else one

    run = Pruned(script, SCHEDULES[name], batch=batch, samples=samples, slots=slots, **WAYS[way])
    members = all_members(run)
    trained: dict[int, Rollout] = {}
    pruned: dict[int, Rollout] = {}
    tokens = 0
    for _ in range(6):
        (collected,) = run.run(1).batches[-1:]
        check_units(run)
        assert len(collected.groups) == batch
        for group in collected.groups:
            every = samples_of([*group.rollouts, *group.pruned])
            assert len(set(every)) == len(every)
            for found, its in ((trained, group.rollouts), (pruned, group.pruned)):
                assert not any(id(r) in found for r in its)
                found.update({id(r): r for r in its})
        tokens += collected.tokens_dropped
        assert sum(collected.cut) + sum(collected.lost) == collected.tokens_dropped
    run.collector.park()
    check_units(run)
    here = {id(m.rollout) for u in run.buffer.units() for m in (*u.members, *u.pruned)}
    started = {id(m.rollout) for m in members}
    assert len(started) == len(members)
    assert not trained.keys() & pruned.keys() and not (trained.keys() | pruned.keys()) & here
    gone = started - trained.keys() - pruned.keys() - here
    assert started >= trained.keys() | pruned.keys() | here
    dropping = name == "tail_batch" or ("samples" in way and "on-policy" in name)
    assert dropping or not gone
    # every token drawn is trained on, dropped or kept
    run.collector.park()
    last = run.collector._collected.tokens_dropped - run.batches[-1].tokens_dropped
    assert last == 0 or name == "tail_batch"
    kept = sum(m.tokens for u in run.buffer.units() for m in u.members if u.since is not None
               and m.state is not State.DROPPED)  # fmt: skip
    kept -= sum(m.tokens for u in run.buffer.ready for m in u.members if m not in u.done)
    used = sum(len(r.completion.token_ids) for r in trained.values())
    assert run.engine.stats().tokens_drawn == used + tokens + last + kept


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "tail_batch"])
@pytest.mark.parametrize("way", ["random", "confidence", "two probes"])
def test_the_kept_are_as_many_with_every_schedule(name: str, way: str) -> None:
    run = Pruned(tailed(6), SCHEDULES[name], batch=2, samples=6, slots=7, **WAYS[way]).run(8)
    groups = run.groups()
    assert len(groups) == 16
    whole = [g for g in groups if not g.pruned]
    # opened or judged before there was a head
    assert len(whole) <= (0 if way == "random" else 8)
    assert {(len(g.rollouts), len(g.pruned)) for g in groups if g.pruned} == {(3, 3)}
    versions = {v for g in groups for r in g.rollouts for v in r.completion.versions}
    assert versions == set(range(8))


def test_a_race_of_samples_does_not_lose_those_that_were_kept() -> None:
    """Seven start, four are needed: these end while one is still before the probe, and of all only
    two are to stay. Whoever is kept is waited for or was dropped by the race, and some remain."""
    ends = (6, 6, 6, 6, 30, 30, 9)
    script = table(*(line(length, i % 2) for i, length in enumerate(ends)))
    way = but(RANDOM, keep=[0.3])
    run = Pruned(script, tail_batch(1.75), batch=1, samples=4, slots=6, **way)
    for _ in range(25):
        run.run(1)
        check_units(run)
    assert {len(g.rollouts) for g in run.groups()} == {2}


def test_interrupted_members_are_judged_with_what_was_seen_of_them() -> None:
    """Under a schedule that interrupts, a probe passed before it counts after it."""
    run = Pruned(tailed(9), april(3.0, 4), batch=1, samples=6, slots=4, **CONFIDENT)
    partial = 0
    for _ in range(12):
        run.run(1)
        partial += sum(
            m.state is State.PARTIAL and 0 in m.seen and unit.stage == 0
            for unit in run.buffer.flying.values() for m in unit.members
        )  # fmt: skip
    assert partial > 3
    for group in run.groups()[3:]:
        for r in (*group.rollouts, *group.pruned):
            assert len(r.looks) == 1
            assert r.looks[0].position == 4 or r.looks[0].ended


def test_members_in_place_of_pruned_ones_go_when_their_unit_starts_anew() -> None:
    """One that still waits in the queue is not started any more."""
    run = Pruned(tailed(), samples=2, **RANDOM)
    members = all_members(run)
    launch, buffer = run.collector.launch, run.buffer
    launch.admit(1)
    (unit,) = buffer.flying.values()
    assert buffer.pop() is members[0]
    launch.more(unit, 1)
    buffer.running.clear()
    buffer.reset(unit)
    launch.queue(unit)
    started = [buffer.pop() for _ in range(3)]
    assert members[2].extra and started == [members[0], members[1], None]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "async, cache kept"])
@pytest.mark.parametrize(
    "way", ["random", "two probes", "two probes, more samples", "share", "pods"]
)
def test_saved_and_gone_on_with_it_is_the_same_run(name: str, way: str) -> None:
    share_ = but(CONFIDENT, when="share", at=[0.3])
    how: Any = dict(batch=2, samples=5, slots=6, **(share_ if way == "share" else WAYS[way]))
    whole = Pruned(tailed(12), SCHEDULES[name], **how).run(5)
    part = Pruned(tailed(12), SCHEDULES[name], **how)
    prompts = [Prompt(row, "", (row,)) for row in range(200)]
    for update in range(5):
        part.run(1)
        assert told(part.batches[-1].groups) == told(whole.batches[update].groups)
        assert part.said[-1] == whole.said[update]
        saved = json.dumps(snapshot(part.buffer))
        state = part.pruner.state()
        tensors = {name: value.clone() for name, value in state.pop("tensors").items()}
        head = json.dumps(state)
        other = Pruned(tailed(12), SCHEDULES[name], **how)
        other.engine.load_weights(part.engine.policy_version)
        other.pruner.load_state(json.loads(head) | {"tensors": tensors})
        restore(other.collector, json.loads(saved), Stream(prompts, 0).find)
        assert json.dumps(snapshot(other.buffer)) == saved
        check_units(other)
        part = other


def told(groups: list[Group]) -> list[Any]:
    return [
        (r.prompt.row, r.sample, r.visit, r.key_visit, r.reward, r.completion.token_ids,
         r.completion.versions, r.looks, r.saved, r.completion.finish)
        for group in groups for r in (*group.rollouts, *group.pruned)
    ]  # fmt: skip


def test_groups_whose_survivors_earned_alike_are_set_aside() -> None:
    """Dynamic sampling counts survivors: unequal rewards of those left out are no signal."""
    run = Pruned(tailed(13, 0.2), april(2.0, 4), batch=2, samples=6, slots=9, bound=6.0, **RANDOM)
    run.run(6)
    hidden = 0
    for one in run.batches:
        assert len(one.trained()) == 2
        assert all(len({r.reward for r in g.rollouts}) > 1 for g in one.trained())
        for group in one.groups:
            if group not in one.trained():
                assert len({r.reward for r in group.rollouts}) == 1
                would = {tailed(13, 0.2)(r).tokens[-1] for r in (*group.rollouts, *group.pruned)}
                hidden += len(would) > 1
    assert hidden > 0
    # those set aside are learnt from all the same
    every = sum(len(one.groups) for one in run.batches)
    assert every > 12
    lengths = [n for b in run.pruner.lengths.state()["batches"] for n in b]
    assert len(lengths) >= every * 3


# --- with a model ---------------------------------------------------------------------------------

STOPS = tuple(range(0, VOCABULARY, 9))
PROMPTS = [
    Prompt(row, f"p{row}", tuple((7 * row + i) % VOCABULARY for i in range(2 + row % 4)), f"a{row}")
    for row in range(8)
]


def ordinary(text: str) -> float:
    return float(sum(map(ord, text)) % 3 == 0)


class Drawn:
    """A collector on the embedded engine."""

    def __init__(
        self, model: Any, schedule: Schedule, section: dict[str, Any] | None,
        decisions: Decisions = NOTHING, samples: int = 6,
    ) -> None:  # fmt: skip
        self.engine = LocalEngine(model, slots=5, capacity=40)
        self.graders = StubGraders(ordinary, behind=1)
        self.buffer = Buffer(2, samples, 5, None, schedule.patience)
        sampling = Sampling(max_tokens=30, stop_ids=STOPS)
        spec = CollectSpec(Purpose.TRAIN, 3, samples, sampling)
        self.pruner = None
        if section is not None:
            run = Pruned(tailed(), **section)
            self.pruner = Pruner(run.section, max_tokens=30, seed=3)
        self.collector = Collector(
            self.engine, self.graders, spell, self.source, spec, schedule, self.buffer,
            replace(decisions, prune=self.pruner),
        )  # fmt: skip
        self.groups: list[list[Group]] = []

    @staticmethod
    def source(start: int, count: int) -> tuple[list[Prompt], list[int]]:
        places = range(start, start + count)
        return [PROMPTS[i % 8] for i in places], [i // 8 for i in places]

    def run(self, updates: int) -> "Drawn":
        for _ in range(updates):
            self.groups.append(self.collector.next().groups)
            self.engine.check()
            self.engine.load_weights(self.engine.policy_version + 1)
        return self


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("qwen3")


def everything(groups: list[list[Group]]) -> list[Any]:
    return [
        [
            (r.prompt.row, r.sample, r.visit, r.completion.token_ids, r.completion.logprobs,
             r.completion.behaviour_logprobs, r.completion.versions, r.completion.finish, r.reward)
            for group in batch for r in group.rollouts
        ]
        for batch in groups
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["sync", "april"])
def test_a_pruner_that_leaves_all_groups_whole_is_the_plain_loop_bit_for_bit(
    name: str, model: Any
) -> None:
    plain = Drawn(model, SCHEDULES[name], None).run(4)
    for way in (
        but(CONFIDENT, audit=1.0), but(CONFIDENT, signal="quality", warmup=99),
        but(RANDOM, keep=[1.0]),
    ):  # fmt: skip
        null = Drawn(model, SCHEDULES[name], way).run(4)
        assert everything(null.groups) == everything(plain.groups)
        assert null.engine.stats().ticks == plain.engine.stats().ticks
        assert all(r.looks for batch in null.groups for g in batch for r in g.rollouts)


@pytest.mark.parametrize("signal", ["confidence", "quality"])
def test_survivors_draw_the_tokens_that_they_would_have_drawn_anyway(
    signal: str, model: Any
) -> None:
    plain = Drawn(model, sync(), None).run(4)
    thinned = Drawn(model, sync(), but(CONFIDENT, signal=signal, keep=[0.4])).run(4)
    whole = {
        (r.prompt.row, r.sample, r.visit): r.completion
        for batch in plain.groups for g in batch for r in g.rollouts
    }  # fmt: skip
    stopped = 0
    for group in (g for batch in thinned.groups for g in batch):
        for r in (*group.rollouts, *group.pruned):
            mine, its = r.completion, whole[r.prompt.row, r.sample, r.visit]
            size = len(mine.token_ids)
            assert mine.token_ids == its.token_ids[:size]
            assert mine.logprobs == pytest.approx(its.logprobs[:size], abs=1e-4)
            if mine.finish is Finish.ABORT:
                stopped += 1
                assert mine.abort_reason == "pruned" and len(its.token_ids) > size
            else:
                assert size == len(its.token_ids)
    assert stopped > 3
    assert thinned.engine.stats().tokens_drawn < plain.engine.stats().tokens_drawn
    assert thinned.engine.stats().ticks < plain.engine.stats().ticks


def test_drafts_change_no_decision_but_about_what_they_hold_whole(model: Any) -> None:
    """Old rollouts cut in half, from before the probe or behind it: the same looks as without."""
    plain = Drawn(model, sync(), CONFIDENT).run(4)
    texts: dict[tuple[int, int], list[int]] = {
        (r.prompt.row, r.sample): r.completion.token_ids
        for batch in plain.groups for g in batch for r in (*g.rollouts, *g.pruned)
    }  # fmt: skip

    def start(prompt: Prompt, visit: int, samples: int) -> list[Start]:
        drafts = [texts[prompt.row, sample] for sample in range(samples)]
        return [Start(visit, (Draft(ids[: len(ids) // 2]),)) for ids in drafts]

    def whole(prompt: Prompt, visit: int, samples: int) -> list[Start]:
        return [Start(visit, (Draft(texts[prompt.row, sample]),)) for sample in range(samples)]

    drafted = Drawn(model, sync(), CONFIDENT, Decisions(start)).run(4)
    repeated = Drawn(model, sync(), CONFIDENT, Decisions(whole)).run(4)
    assert everything(drafted.groups)[0] and drafted.engine.stats().tokens_reused > 100
    pairs = list(zip(plain.groups, drafted.groups, strict=True))
    through = 0
    for one, two in ((a, b) for x, y in pairs for a, b in zip(x, y, strict=True)):
        assert samples_of(one.rollouts) == samples_of(two.rollouts)
        both = zip((*one.rollouts, *one.pruned), (*two.rollouts, *two.pruned), strict=True)
        for mine, its in both:
            if its.completion.walked >= len(its.completion.token_ids) - 1:
                continue
            a, b = mine.looks[0], its.looks[0]
            assert (a.position, a.ended, a.kept) == (b.position, b.ended, b.kept)
            assert a.survival == pytest.approx(b.survival, abs=1e-4)
            through += not b.ended and its.completion.walked >= 4
    assert through > 3
    ended = 0
    for group in (g for batch in repeated.groups for g in batch):
        for r in (*group.rollouts, *group.pruned):
            if r.completion.finish is not Finish.ABORT and (
                r.completion.walked >= len(r.completion.token_ids) - 1
            ):
                ended += 1
                assert r.looks[0].ended and r.looks[0].probability == r.reward
    assert ended > 20


def test_grades_that_are_known_are_not_asked_for(model: Any) -> None:
    decisions = Decisions(grade=lambda rollout: Graded(ordinary(rollout.text), {}))
    run = Drawn(model, sync(), RANDOM, decisions).run(2)
    assert run.graders.jobs == []
    assert all(len(g.rollouts) == 3 for batch in run.groups for g in batch)


def test_what_the_plain_check_of_schedules_says(model: Any) -> None:
    """The invariants that hold without pruning hold with it, but for a race."""
    for name in SCHEDULES:
        if name == "tail_batch":
            continue
        run = Pruned(tailed(3), SCHEDULES[name], batch=2, samples=4, slots=5, **RANDOM)
        for _ in range(4):
            run.run(1)
            check(run.buffer)


# --- prefixes -------------------------------------------------------------------------------------


def test_places_are_counted_in_tokens_drawn() -> None:
    """What is given says nothing of what comes of it, and moves no probe nearer."""
    given = Prompt(0, "", (1,), prefix_ids=(7, END, 8, END, 9), trace=5, cut=5)
    tokens = Pruned(tailed(), **RANDOM).pruner.watch(given)
    plain = Pruned(tailed(), **RANDOM).pruner.watch(PLAIN)
    assert tokens is not None and plain is not None
    assert tokens.at == tuple(5 + at for at in plain.at) != ()
    steps = Pruned(tailed(), **but(RANDOM, when="steps", at=[2])).pruner.watch(given)
    assert steps is not None and steps.steps == (4,)
