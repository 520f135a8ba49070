"""Start and grade decisions on a real store, rule by rule."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reroll.config import ReuseSection
from reroll.rollout.decisions import Graded, Start
from reroll.rollout.reuse import Reuse
from reroll.rollout.store import Past, Store, prompt_hash
from reroll.types import Completion, Draft, Finish, Group, Lenience, Prompt, Rollout

PROMPT = Prompt(7, "p", (1, 2, 3))
OTHER = Prompt(8, "o", (3, 2, 1))
RULES = ("fresh", "held", "lenient")
Make = Callable[..., Reuse]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes a Reuse over the one store of the test, which is closed behind the test."""
    stores: list[Store] = []

    def reuse(seed: int = 3, graders: str = "digest", **settings: Any) -> Reuse:
        for store in stores:
            store.close()
        stores[:] = [Store(tmp_path / "rollouts.sqlite", keep_visits=99, memory_gb=0.01)]
        return Reuse(ReuseSection(on=True, **settings), stores[0], seed, graders)

    yield reuse
    for store in stores:
        store.close()


def rollout(sample: int = 0, visit: int = 0, **changes: Any) -> Rollout:
    """A rollout whose five tokens are a function of its place."""
    prompt = changes.pop("prompt", PROMPT)
    seed = (prompt.row * 31 + sample) * 31 + visit
    ids = changes.pop("ids", random.Random(seed).choices(range(10, 99), k=5))
    size = len(ids)
    completion = Completion(
        request_id=0,
        token_ids=list(ids),
        logprobs=[-1000.0 - i for i in range(size)],
        behaviour_logprobs=[-(seed % 7) - 0.25 * i for i in range(size)],
        versions=changes.pop("versions", [10 + visit] * size),
        loss_mask=[True] * size,
        finish=changes.pop("finish", Finish.STOP),
        accepted=changes.pop("accepted", 0),
        walked=changes.pop("walked", 0),
    )
    made = Rollout(prompt, sample, visit, completion, "text", reward=0.5, rewards={"stub": 0.25})
    return replace(made, **{"key_visit": visit} | changes)


def group(visit: int = 0, samples: int = 3, prompt: Prompt = PROMPT, **changes: Any) -> Group:
    return Group(prompt, [rollout(i, visit, prompt=prompt, **changes) for i in range(samples)])


def remember(reuse: Reuse, groups: Sequence[Group], trained: Sequence[Rollout] = ()) -> None:
    """Write groups as the step after their visit, of policy version 10 + visit."""
    for one in groups:
        visit = one.rollouts[0].visit
        reuse.remember([one], visit + 1, 10 + visit, {id(r) for r in trained})


def visits(reuse: Reuse, count: int, samples: int = 3) -> None:
    remember(reuse, [group(visit, samples) for visit in range(count)])


def stored(reuse: Reuse, prompt: Prompt = PROMPT) -> dict[tuple[int, int], Past]:
    """All of a prompt's rows by (visit, sample)."""
    rows = reuse.store.get(prompt_hash(prompt.token_ids), prompt.row, before_visit=99, visits=99)
    return {(past.visit, past.sample): past for past in rows}


def places(drafts: Sequence[Draft], prompt: Prompt = PROMPT) -> list[tuple[int, int]]:
    """(visit, sample) of drafts, by their tokens."""
    known = {
        tuple(rollout(s, v, prompt=prompt).completion.token_ids): (v, s)
        for v in range(9)
        for s in range(4)
    }
    assert len(known) == 36
    return [known[tuple(draft.token_ids)] for draft in drafts]


def is_draft_of(draft: Draft, past: Rollout, whole: bool = False) -> bool:
    """Tokens; of a whole one also behaviour log-probs (exact in float32 here) and versions."""
    completion = past.completion
    if not whole:
        return list(draft.token_ids) == completion.token_ids
    return (list(draft.token_ids), list(draft.logprobs), list(draft.versions)) == (
        completion.token_ids, completion.behaviour_logprobs, completion.versions,
    )  # fmt: skip


def own_first(expected: list[tuple[int, int]], sample: int) -> list[tuple[int, int]]:
    """(visit, sample) of drafts, newest first, with a sample's own before the others'."""
    return sorted(expected, key=lambda place: place[1] != sample)


# --- fresh --------------------------------------------------------------------------------------

WINDOWS: list[tuple[dict[str, int], list[tuple[int, int]]]] = [
    ({}, [(4, 0), (4, 1), (4, 2), (3, 0), (3, 1), (3, 2)]),
    ({"epochs": 1}, [(4, 0), (4, 1), (4, 2)]),
    ({"epochs": 3, "rollouts": 7}, [(v, s) for v in (4, 3, 2) for s in range(3)][:7]),
    ({"epochs": 99, "rollouts": 99}, [(v, s) for v in (4, 3, 2, 1, 0) for s in range(3)]),
    ({"rollouts": 1}, [(4, 0)]),
    ({"rollouts": 4}, [(4, 0), (4, 1), (4, 2), (3, 0)]),
]


@pytest.mark.parametrize(("settings", "expected"), WINDOWS)
def test_fresh_gives_every_sample_all_drafts_of_the_window_newest_first(
    settings: dict[str, int], expected: list[tuple[int, int]], make: Make
) -> None:
    reuse = make(rule="fresh", **settings)
    visits(reuse, 5)
    starts = reuse.start(PROMPT, 5, 4)
    assert len(starts) == 4
    for own, start in enumerate(starts):
        assert (start.key_visit, start.lenience) == (5, None)
        mine = own_first(expected, own)
        assert places(start.drafts) == mine
        for draft, (visit, sample) in zip(start.drafts, mine, strict=True):
            assert is_draft_of(draft, rollout(sample, visit))
        # the engine merges what is one object once, however many samples bring it
        assert set(map(id, start.drafts)) == set(map(id, starts[0].drafts))


@pytest.mark.parametrize("rule", RULES)
def test_a_first_visit_starts_plainly(rule: str, make: Make) -> None:
    reuse = make(rule=rule)
    assert reuse.start(PROMPT, 0, 3) == [Start(0)] * 3
    visits(reuse, 1)
    assert reuse.start(OTHER, 4, 2) == [Start(4)] * 2
    # the same tokens in another row, and another prompt in the same row
    assert reuse.start(replace(PROMPT, row=9), 4, 2) == [Start(4)] * 2
    assert reuse.start(replace(PROMPT, row=10, token_ids=(1, 2)), 4, 2) == [Start(4)] * 2
    assert reuse.start(PROMPT, 1, 2) != [Start(1)] * 2


@pytest.mark.parametrize("rule", RULES)
def test_visits_that_were_skipped_are_looked_past_only_inside_the_window(
    rule: str, make: Make
) -> None:
    reuse = make(rule=rule, epochs=2)
    visits(reuse, 2)
    assert all(start.drafts for start in reuse.start(PROMPT, 3, 3))
    reuse = make(rule=rule, epochs=2)
    assert not any(start.drafts for start in reuse.start(PROMPT, 4, 3))


def test_a_store_is_found_by_prompt_in_any_order_and_batch_size(make: Make) -> None:
    prompts = [Prompt(row, f"p{row}", (row, 5)) for row in range(20, 26)]
    reuse = make()
    for step, batch in enumerate((prompts[:3], prompts[3:]), start=1):
        reuse.remember([group(0, prompt=p) for p in batch], step, step, set())
    reuse = make()  # a second start opens the file again
    shuffled = random.Random(1).sample(prompts, 6)
    assert shuffled != prompts
    for step, batch in enumerate((shuffled[:1], shuffled[1:5], shuffled[5:]), start=3):
        groups = []
        for prompt in batch:
            (start, *_) = reuse.start(prompt, 1, 2)
            assert places(start.drafts, prompt) == [(0, 0), (0, 1), (0, 2)]
            groups.append(group(1, prompt=prompt))
        reuse.remember(groups, step, step, set())
    for prompt in prompts:
        (start, *_) = reuse.start(prompt, 2, 2)
        both = [(v, s) for v in (1, 0) for s in range(3)]
        assert places(start.drafts, prompt) == own_first(both, 0)


# --- held ---------------------------------------------------------------------------------------

ROWS = [Prompt(row, "", (row,)) for row in range(1000)]


def redrawn(reuse: Reuse, visit: int, samples: int = 2) -> list[bool]:
    """Whether each sample of many rows gets a key of this visit; held ones keep that of visit 0."""
    keys = [start.key_visit for prompt in ROWS for start in reuse.start(prompt, visit, samples)]
    assert set(keys) <= {0, visit}
    return [key == visit for key in keys]


def test_the_share_of_keys_redrawn(make: Make) -> None:
    for visit in range(2):  # both under keys of visit 0
        old = [
            Group(p, [rollout(s, visit, prompt=p, ids=[1], key_visit=0) for s in range(2)])
            for p in ROWS
        ]
        make().remember(old, visit + 1, 1, set())
    drawn = {refresh: redrawn(make(rule="held", refresh=refresh), 1) for refresh in (0.0, 1.0)}
    assert not any(drawn[0.0])
    assert all(drawn[1.0])

    def agrees(outcomes: list[bool], share: float) -> bool:
        error = math.sqrt(share * (1 - share) / len(outcomes))
        return abs(sum(outcomes) / len(outcomes) - share) < 4 * error

    quarter = redrawn(make(rule="held", refresh=0.25), 1)
    assert len(quarter) == 2000 and agrees(quarter, 0.25)
    assert redrawn(make(rule="held", refresh=0.25), 1) == quarter  # of the seed, nothing else
    # samples, visits and seeds draw independently: a quarter of the quarter coincides
    both = [a and b for a, b in zip(quarter[::2], quarter[1::2], strict=True)]
    assert agrees(both, 1 / 16)
    for other in (
        redrawn(make(rule="held", refresh=0.25), 2),
        redrawn(make(seed=4, rule="held", refresh=0.25), 1),
    ):
        assert agrees(other, 0.25)
        assert agrees([a and b for a, b in zip(quarter, other, strict=True)], 1 / 16)
    assert agrees(redrawn(make(rule="held", refresh=0.5), 1), 0.5)


def test_a_held_key_is_that_of_the_newest_visit(make: Make) -> None:
    reuse = make(rule="held", refresh=0.0)
    remember(reuse, [group(0), group(1, key_visit=0), group(2, key_visit=2), group(3, key_visit=2)])
    assert [s.key_visit for s in reuse.start(PROMPT, 4, 3)] == [2, 2, 2]
    # a sample without a past begins with a key of its own visit
    reuse = make(rule="held", refresh=0.0)
    assert [s.key_visit for s in reuse.start(PROMPT, 4, 5)] == [2, 2, 2, 4, 4]


def test_a_problem_that_comes_twice_in_a_step_gets_two_keys(make: Make) -> None:
    """When the second visit starts, the first one is under way on the held key, not yet stored."""
    reuse = make(rule="held", refresh=0.0)
    visits(reuse, 2)
    assert [s.key_visit for s in reuse.start(PROMPT, 2, 3)] == [1, 1, 1]
    assert [s.key_visit for s in reuse.start(PROMPT, 3, 3)] == [3, 3, 3]


def test_held_keys_have_their_own_texts_however_many(make: Make) -> None:
    """`rollouts` bounds the others: a key whose text is missing would be worth nothing."""
    reuse = make(rule="held", refresh=0.0, rollouts=2)
    visits(reuse, 3, samples=4)
    for sample, start in enumerate(reuse.start(PROMPT, 3, 4)):
        assert places(start.drafts)[0] == (2, sample)
        assert len(start.drafts) == 4


def test_what_is_kept_by_chance_does_not_matter(make: Make) -> None:
    """Visits that the store may let go at the next checkpoint are not looked at."""
    reuse = make(rule="held", refresh=0.0)
    visits(reuse, 7)
    reuse.store.keep_visits = 2

    def found() -> list[Any]:
        starts = [(start.key_visit, places(start.drafts)) for start in reuse.start(PROMPT, 7, 3)]
        return [starts, reuse.metrics([group(4)], 99), reuse.known_grade(rollout(0, 4))]

    before = found()
    reuse = make(rule="held", refresh=0.0)
    reuse.store.keep_visits = 2
    assert reuse.store.evict() == 15
    assert found() == before


def test_samples_keep_their_own_keys(make: Make) -> None:
    reuse = make(rule="held", refresh=0.0)
    rollouts = [rollout(sample, 5, key_visit=key) for sample, key in enumerate((3, 5, 1, 4))]
    remember(reuse, [Group(PROMPT, rollouts)])
    assert [s.key_visit for s in reuse.start(PROMPT, 6, 4)] == [3, 5, 1, 4]


@pytest.mark.parametrize("max_age", [1, 3])
def test_a_key_grows_only_so_old(max_age: int, make: Make) -> None:
    reuse = make(rule="held", refresh=0.0, max_age=max_age)
    keys = []
    for visit in range(9):
        (start,) = reuse.start(PROMPT, visit, 1)
        keys.append(start.key_visit)
        remember(reuse, [group(visit, 1, key_visit=start.key_visit)])
    assert keys == [visit - visit % (max_age + 1) for visit in range(9)]


@pytest.mark.parametrize("max_age", [1, 8])
def test_keys_of_rollouts_trained_on_are_redrawn(max_age: int, make: Make) -> None:
    reuse = make(rule="held", refresh="trained", max_age=max_age)
    one = group(1, 4, key_visit=0)
    remember(reuse, [one], one.rollouts[1:3])
    assert [past.trained for past in stored(reuse).values()] == [False, True, True, False]
    assert [s.key_visit for s in reuse.start(PROMPT, 2, 4)] == (
        [0, 2, 2, 0] if max_age == 8 else [2] * 4
    )


def test_held_and_fresh_have_the_same_drafts(make: Make) -> None:
    found = {}
    for rule in ("fresh", "held"):
        reuse = make(rule=rule, rollouts=4)
        if not found:
            visits(reuse, 3)
        starts = reuse.start(PROMPT, 3, 4)
        assert {start.lenience for start in starts} == {None}
        found[rule] = [places(start.drafts) for start in starts]
    window = [(2, 0), (2, 1), (2, 2), (1, 0)]
    assert found["held"] == found["fresh"] == [own_first(window, sample) for sample in range(4)]


# --- lenient ------------------------------------------------------------------------------------


def own_drafts(reuse: Reuse, visit: int, samples: int = 4) -> list[list[tuple[int, int]]]:
    starts = reuse.start(PROMPT, visit, samples)
    for start in starts:
        assert start.key_visit == visit
        assert bool(start.lenience) == bool(start.drafts)
    return [places(start.drafts) for start in starts]


def test_lenient_offers_each_sample_its_own_newest_rollout(make: Make) -> None:
    reuse = make(rule="lenient")
    visits(reuse, 3)
    assert own_drafts(reuse, 3) == [[(2, 0)], [(2, 1)], [(2, 2)], []]
    assert reuse.start(PROMPT, 3, 4)[3] == Start(3)
    # one was left out of the newest visit
    remember(reuse, [Group(PROMPT, [rollout(sample, 3) for sample in (0, 2)])])
    assert own_drafts(reuse, 4) == [[(3, 0)], [(2, 1)], [(3, 2)], []]


@pytest.mark.parametrize(
    ("delay", "epochs", "expected"),
    [(0, 1, 4), (0, 2, 4), (1, 1, 3), (1, 2, 3), (2, 1, 2), (4, 1, 0), (5, 1, None), (9, 9, None)],
)
def test_lenient_drafts_may_be_older(
    delay: int, epochs: int, expected: int | None, make: Make
) -> None:
    reuse = make(rule="lenient", delay=delay, epochs=epochs)
    visits(reuse, 5)
    wanted = [] if expected is None else [(expected, 1)]
    assert own_drafts(reuse, 5)[1] == wanted


def test_a_gap_wider_than_the_window_ends_a_chain(make: Make) -> None:
    for epochs, expected in ((1, [[]]), (2, [[(0, 0)]])):
        reuse = make(rule="lenient", epochs=epochs)
        remember(reuse, [group(0, 1)])
        assert own_drafts(reuse, 2, 1) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Lenience(1.6487)),
        ({"lenience": 0.5}, Lenience(0.5)),
        ({"cut": "random"}, Lenience(1.6487, random_cut=True)),
        ({"cut": "none"}, Lenience(math.inf)),
        ({"anchor": "generator"}, Lenience(1.6487, keep_writer=True)),
        ({"anchor": "generator", "cut": "none"}, Lenience(math.inf, keep_writer=True)),
    ],
)
def test_what_lenience_stands_for(settings: dict[str, Any], expected: Lenience, make: Make) -> None:
    reuse = make(rule="lenient", **settings)
    visits(reuse, 1)
    assert [start.lenience for start in reuse.start(PROMPT, 1, 4)] == [expected] * 3 + [None]


@pytest.mark.parametrize("anchor", ["previous", "generator"])
def test_lenient_drafts_bring_log_probs_and_versions_as_stored(anchor: str, make: Make) -> None:
    reuse = make(rule="lenient", anchor=anchor)
    past = rollout(0, 4, versions=[2, 2, 3, 7, 7])
    remember(reuse, [Group(PROMPT, [past])])
    (start,) = reuse.start(PROMPT, 5, 1)
    assert is_draft_of(start.drafts[0], past, whole=True)
    assert start.lenience is not None
    assert start.lenience.keep_writer == (anchor == "generator")


# --- audits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_an_audit_starts_losslessly_on_new_noise_whatever_the_rule(rule: str, make: Make) -> None:
    reuse = make(rule=rule, epochs=1, rollouts=5)
    visits(reuse, 4)
    starts = reuse.start_fresh(PROMPT, 4, 3)
    assert len(starts) == 3
    for own, start in enumerate(starts):
        assert (start.key_visit, start.lenience) == (4, None)
        window = [(3, 0), (3, 1), (3, 2), (2, 0), (2, 1)]
        assert places(start.drafts) == own_first(window, own)
    assert reuse.start_fresh(OTHER, 4, 3) == [Start(4)] * 3


# --- grades -------------------------------------------------------------------------------------

GRADES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "same text": ({}, {}, True),
    "another sample's": ({"sample": 2}, {}, True),
    "now cut by the limit": ({}, {"finish": Finish.LENGTH}, False),
    "cut by the limit then": ({"finish": Finish.LENGTH}, {}, False),
    "never graded": ({"reward": None, "rewards": {}}, {}, False),
    "another last token": ({"ids": [5, 6, 8]}, {}, False),
    "a longer one": ({"ids": [5, 6, 7, 7]}, {}, False),
    "a shorter one": ({"ids": [5, 6]}, {}, False),
    "a reward of nothing": ({"reward": 0.0, "rewards": {}}, {}, True),
    "another prompt's": ({"prompt": OTHER}, {}, False),
}
"""the old rollout; the new one; whether its grade is known"""


@pytest.mark.parametrize("kind", GRADES)
def test_grades_that_are_known(kind: str, make: Make) -> None:
    old, new, known = GRADES[kind]
    reuse = make()
    past = rollout(**{"visit": 3, "ids": [5, 6, 7]} | old)
    remember(reuse, [Group(past.prompt, [past])])
    reuse.start(PROMPT, 4, 2)
    now = rollout(**{"visit": 4, "ids": [5, 6, 7], "reward": None, "rewards": {}} | new)
    expected = Graded(past.reward, past.rewards) if known else None
    assert reuse.known_grade(now) == expected


def test_grades_are_known_to_the_same_graders_alone(make: Make) -> None:
    for graders, known in (("digest", True), ("other", False), ("", False), ("digest", True)):
        reuse = make(graders=graders)
        if not stored(reuse):
            remember(reuse, [group(0)])
        reuse.start(PROMPT, 1, 3)
        assert (reuse.known_grade(rollout(0, 0)) is not None) == known


def test_a_grade_of_a_text_that_was_cut_is_not_that_of_a_whole_one(make: Make) -> None:
    """Though this store should hold no such grade."""
    reuse = make()
    visits(reuse, 1)
    cut = replace(stored(reuse)[0, 0], finish="length")
    assert cut.reward is not None
    reuse.store.put(1, [(prompt_hash(PROMPT.token_ids), cut)])
    reuse.start(PROMPT, 1, 3)
    assert reuse.known_grade(rollout(0, 0)) is None
    assert reuse.known_grade(rollout(1, 0)) is not None


def test_unnamed_graders_know_nothing_of_each_other(make: Make) -> None:
    reuse = make(graders="")
    visits(reuse, 1)
    reuse.start(PROMPT, 1, 3)
    assert stored(reuse)[0, 0].graders == ""
    assert reuse.known_grade(rollout(0, 0)) is None


def test_a_text_ungraded_once_and_graded_later_is_known(make: Make) -> None:
    reuse = make()
    remember(
        reuse,
        [
            Group(PROMPT, [rollout(0, 0, ids=[4, 5], reward=0.75)]),
            Group(PROMPT, [rollout(0, 1, ids=[4, 5], reward=None, rewards={})]),
        ],
    )
    reuse.start(PROMPT, 2, 1)
    assert reuse.known_grade(rollout(0, 2, ids=[4, 5])) == Graded(0.75, {"stub": 0.25})


def test_a_known_grade_is_a_copy(make: Make) -> None:
    reuse = make()
    visits(reuse, 1)
    reuse.start(PROMPT, 1, 1)
    first = reuse.known_grade(rollout(0, 0))
    assert first is not None
    first.rewards["more"] = 1.0
    assert reuse.known_grade(rollout(0, 0)) == Graded(0.5, {"stub": 0.25})


# --- what is written ----------------------------------------------------------------------------


def test_what_is_remembered(make: Make) -> None:
    reuse = make()
    stop = rollout(0, 3, key_visit=1, versions=[4, 4, 9, 9, 9])
    cut = rollout(1, 3, finish=Finish.LENGTH, reward=-0.5)  # after a penalty, say
    failed = rollout(2, 3, reward=None, rewards={})
    other = rollout(0, 2, prompt=OTHER)
    groups = [Group(PROMPT, [stop, cut, failed]), Group(OTHER, [other])]
    reuse.remember(groups, step=6, version=9, trained={id(stop), id(other)})
    common = {"visit": 3, "step": 6, "version": 9, "graders": "digest", "row": 7}

    def expected(past: Rollout, **changes: Any) -> Past:
        completion = past.completion
        made: dict[str, Any] = common | {
            "sample": past.sample, "noise_visit": past.key_visit, "finish": completion.finish,
            "token_ids": completion.token_ids, "logprobs": completion.behaviour_logprobs,
            "versions": completion.versions, "reward": past.reward, "rewards": past.rewards,
            "trained": False,
        } | changes  # fmt: skip
        return Past(**made)

    assert list(stored(reuse).values()) == [
        expected(stop, trained=True),
        expected(cut, reward=None, rewards={}),
        expected(failed),
    ]
    assert [past.noise_visit for past in stored(reuse).values()] == [1, 3, 3]
    (its,) = stored(reuse, OTHER).values()
    assert its == expected(other, row=8, visit=2, trained=True)


def test_a_step_is_one_transaction(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, put = [], Store.put

    def watched(store: Store, step: int, rows: Sequence[Any]) -> None:
        calls.append((step, len(rows)))
        put(store, step, rows)

    monkeypatch.setattr(Store, "put", watched)
    make().remember([group(0), group(0, prompt=OTHER)], 1, 0, set())
    assert calls == [(1, 6)]


@pytest.mark.parametrize("rule", RULES)
def test_what_was_looked_up_for_one_step_is_looked_up_again_in_the_next(
    rule: str, make: Make
) -> None:
    reuse = make(rule=rule)
    assert reuse.start(PROMPT, 0, 1) == [Start(0)]
    remember(reuse, [group(0, 1)])
    (start,) = reuse.start(PROMPT, 1, 1)
    assert places(start.drafts) == [(0, 0)]


# --- figures ------------------------------------------------------------------------------------


def test_metrics_by_hand(make: Make) -> None:
    reuse = make()
    remember(
        reuse,
        [
            Group(PROMPT, [rollout(0, 0, ids=[1, 2, 3, 4]), rollout(1, 0, ids=[1, 5, 9])]),
            Group(PROMPT, [rollout(0, 1, ids=[1, 2, 7, 8])]),
        ],
    )
    reuse.start(PROMPT, 2, 4)
    reuse.start(OTHER, 0, 2)
    drafted = [
        # the whole old text again: its last token is drawn, not read off the tree
        rollout(0, 2, ids=[1, 2, 3, 4], walked=3, accepted=3),
        # left the tree after two tokens, and re-drafting brought two more
        rollout(1, 2, ids=[1, 2, 0, 0, 3, 4, 5, 6], walked=2, accepted=4),
        # ended on the tree, earlier than the old one did
        rollout(2, 2, ids=[1, 5, 0], walked=2, accepted=2),
        # nothing in common
        rollout(3, 2, ids=[6, 6, 6, 6, 6], walked=0, accepted=0),
    ]
    new = [rollout(s, 0, prompt=OTHER, ids=[1, 2], accepted=s) for s in range(2)]
    figures = reuse.metrics([Group(PROMPT, drafted), Group(OTHER, new)], version=20)
    assert figures == pytest.approx(
        {
            "drafted": 4 / 6,
            "reused_tokens": (3 + 4 + 2 + 0 + 1) / (4 + 8 + 3 + 5 + 2 + 2),
            "accept_prefix": (1 + 2 / 8 + 1 + 0) / 4,
            "full_reuse": 2 / 6,
            "duplicates": 1 / 6,
            # 1 2 stands in both visits (written at versions 10 and 11), 1 5 in the first
            "reuse_age": (10 + 10 + 10) / 3,
        }
    )


def test_ages_are_those_of_the_oldest_text_that_begins_so(make: Make) -> None:
    reuse = make()
    remember(
        reuse,
        [
            Group(PROMPT, [rollout(0, 0, ids=[1, 2, 9])]),
            Group(PROMPT, [rollout(0, 1, ids=[1, 2, 3, 9])]),
            Group(PROMPT, [rollout(0, 2, ids=[1, 2, 3, 4, 9])]),
        ],
    )
    for walked, age in ((2, 10), (3, 9), (4, 8), (0, 0)):
        reuse.start(PROMPT, 3, 1)
        now = rollout(0, 3, ids=[1, 2, 3, 4, 5, 6, 7], walked=walked)
        assert reuse.metrics([Group(PROMPT, [now])], 20)["reuse_age"] == age


@pytest.mark.parametrize(
    ("size", "walked", "whole"),
    [(5, 3, False), (5, 4, True), (5, 5, True), (2, 1, True), (2, 0, False), (1, 0, False)],
)
def test_a_rollout_is_reused_whole_if_it_ended_on_the_tree(
    size: int, walked: int, whole: bool, make: Make
) -> None:
    reuse = make()
    visits(reuse, 1)
    reuse.start(PROMPT, 1, 1)
    now = rollout(0, 1, ids=range(size), walked=walked, accepted=walked)
    figures = reuse.metrics([Group(PROMPT, [now])], 1)
    assert figures["full_reuse"] == whole
    assert figures["accept_prefix"] == (1 if whole else walked / size)


def test_metrics_without_any_past(make: Make) -> None:
    reuse = make()
    reuse.start(PROMPT, 0, 3)
    assert set(reuse.metrics([group(0)], 5).values()) == {0.0}


# --- prefixes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_drafts_are_kept_by_cut_and_begin_after_what_is_given(rule: str, make: Make) -> None:
    reuse, cuts = make(rule=rule), (2, 3)
    prompts = {cut: replace(PROMPT, prefix_ids=(5,) * cut, trace=9, cut=cut) for cut in cuts}
    texts = {cut: [[5] * cut + [10 * cut + i, 40 + i, 50 + i] for i in range(2)] for cut in cuts}
    for cut, prompt in prompts.items():
        done = [rollout(i, 0, prompt=prompt, ids=text) for i, text in enumerate(texts[cut])]
        remember(reuse, [Group(prompt, done)])
    remember(reuse, [group(0, 2)])  # the problem itself
    for cut, prompt in prompts.items():
        starts = reuse.start(prompt, 1, 2)
        offered = [list(draft.token_ids) for draft in starts[0].drafts]
        own = texts[cut][:1] if rule == "lenient" else texts[cut]
        assert offered == [text[cut:] for text in own]
        for draft in starts[0].drafts:
            assert len(draft.logprobs) == (len(draft.token_ids) if rule == "lenient" else 0)
    plain = [list(draft.token_ids) for draft in reuse.start(PROMPT, 1, 2)[0].drafts]
    assert all(len(ids) == 5 and 5 not in ids for ids in plain)


def test_what_is_reused_is_counted_in_tokens_drawn(make: Make) -> None:
    reuse, prompt = make(), replace(PROMPT, prefix_ids=(5, 5, 5), trace=9, cut=3)
    old = rollout(0, 0, prompt=prompt, ids=[5, 5, 5, 11, 12, 13, 14])
    remember(reuse, [Group(prompt, [old])])
    reuse.start(prompt, 1, 2)
    whole = rollout(0, 1, prompt=prompt, ids=[5, 5, 5, 11, 12, 13, 14], walked=3, accepted=3)
    half = rollout(1, 1, prompt=prompt, ids=[5, 5, 5, 11, 12, 99, 98], walked=2, accepted=2)
    found = reuse.metrics([Group(prompt, [whole, half])], 20)
    assert found["reused_tokens"] == 5 / 8
    assert found["accept_prefix"] == (1 + 2 / 4) / 2
    assert found["full_reuse"] == found["duplicates"] == 1 / 2
