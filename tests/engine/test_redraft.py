"""Looking up what may come next, and how often that proves right."""

import json
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reroll.algo.noise import make_key
from reroll.engine.redraft import SIZES, Texts
from reroll.types import Draft, Request, Sampling
from tests.engine.helpers import finish, tokens
from tests.engine.test_trees import check_same, engine_of


def texts_of(*texts) -> Texts:
    found = Texts()
    found.add([Draft(text) for text in texts])
    return found


def brute_propose(texts, tail, count):
    """Longest match first, then the latest text, then its latest place; something must follow."""
    for which, size in enumerate(SIZES):
        if len(tail) < size:
            continue
        for text in reversed(texts):
            for place in range(len(text) - 1, size - 1, -1):
                if list(text[place - size : place]) == list(tail[-size:]):
                    return list(text[place : place + count]), which
    return [], -1


WRITTEN = st.lists(st.sampled_from([0, 1, 256]), max_size=24)


@settings(max_examples=250)
@given(st.lists(WRITTEN, max_size=4), WRITTEN, st.integers(1, 7), st.integers(0, 24))
@example([[1, 2]], [1, 2], 3, 2)  # nothing stands behind it
@example([[1, 2, 0], [1, 2]], [1, 2], 3, 2)
@example([[1, 2, 0, 1, 2, 1]], [0, 1, 2], 7, 0)
@example([[0, 0, 0, 0, 0]], [0, 0], 2, 2)
@example([], [1, 2, 0], 3, 2)
@example([[1, 2, 0]], [], 3, 2)
def test_propose_against_a_search(written, tail, count, cut):
    tail = [*(written[0][:cut] if written else []), *tail][-24:]
    assert texts_of(*written).propose(tail, count) == brute_propose(written, tail, count)


def test_propose_by_hand():
    long = list(range(100, 120))
    texts = texts_of([1, 2, 3, 4, 5], [9, 3, 4, 6], [*long, 7, 8])
    assert texts.propose([1, 2, 3, 4], 3) == ([5], 2)  # four tokens go before two, though older
    assert texts.propose([0, 2, 3, 4], 3) == ([6], 3)  # two: the latest text
    assert texts.propose(long, 9) == ([7, 8], 0) and texts.propose(long, 1) == ([7], 0)
    assert texts.propose(long[-15:], 9) == ([7, 8], 1)  # 15 tokens: eight of them match
    assert texts.propose([4], 3) == texts.propose([4, 4], 3) == ([], -1)
    assert texts.propose([7, 8], 3) == ([], -1)  # that text ends there
    tail = [3, 4]
    texts.propose(tail, 3)
    assert tail == [3, 4]


def test_texts_added_later_are_found_and_win():
    texts = texts_of([1, 2, 3])
    assert texts.propose([1, 2], 2) == ([3], 3)
    texts.add([Draft([1, 2, 4]), Draft([5, 6, 7])])
    assert texts.propose([1, 2], 2) == ([4], 3) and texts.propose([5, 6], 2) == ([7], 3)
    texts.add([Draft([])])
    assert texts.propose([1, 2], 2) == ([4], 3)


def test_the_same_draft_is_taken_in_once():
    texts, draft, equal = Texts(), Draft([1, 2, 3]), Draft([1, 2, 3])
    assert texts.mean_length() is None
    texts.add([draft])
    texts.add([Draft([1, 2, 4, 4, 4]), draft, equal])
    assert len(texts.drafts) == 3 and texts.drafts[0] is draft and texts.drafts[2] is equal
    assert texts.mean_length() == pytest.approx(11 / 3)


def test_prompts_do_not_share_their_texts():
    """What was written for one prompt is not offered to another that runs beside it."""
    plain = finish(engine_of(slots=1), [Request(0, (3, 1, 4), 5, Sampling(20))])[0]
    draft = Draft([60, *plain.token_ids])
    two = [
        Request(0, (3, 1, 4), 5, Sampling(20), drafts=(draft,)),
        Request(1, (3, 1, 5), 5, Sampling(20)),
    ]
    engine = engine_of(slots=2, redraft=8)
    first = finish(engine, two)
    assert first[0].accepted > 10 and first[1].accepted == 0
    # nor is it kept when the prompt has left the engine
    assert finish(engine, [Request(0, (3, 1, 4), 5, Sampling(20))])[0].accepted == 0


@pytest.mark.parametrize("siblings", [False, True])
def test_finished_siblings_are_offered_to_those_who_run_or_wait(siblings):
    """Twins under one key, one slot: the second finds what the first has written."""
    requests = [
        Request(i, (3, 1, 4), 17, Sampling(limit)) for i, limit in enumerate([12, 12, 9, 12])
    ]
    other = Request(9, (2, 7), 18, Sampling(12))
    plain = finish(engine_of(slots=1), [*requests, other])
    engine = engine_of(slots=1, siblings=siblings, prefill_rows=1, redraft=8)
    done = finish(engine, [requests[0], other])
    check_same(done, plain)
    assert done[9].accepted == 0
    # all are prefilled together with the first, then run one after another
    engine = engine_of(slots=1, siblings=siblings, redraft=8)
    done = finish(engine, requests)
    check_same(done, plain)
    accepted = sorted(c.accepted for c in done.values())
    if siblings:  # behind the two tokens that find the place; the last one is drawn either way
        assert accepted[0] == 0 and accepted[1] >= 5 and accepted[-1] >= 8
    else:
        assert accepted == [0] * 4
    assert all(c.walked == 0 for c in done.values())
    # those who come later find it in their tree, as long as one of the group is in the engine
    engine = engine_of(slots=2, siblings=siblings)
    engine.submit(requests[2])
    engine.submit(Request(5, (3, 1, 4), 19, Sampling(30)))
    found = {}
    while len(found) < 3:
        for event in engine.step():
            found[event.completion.request_id] = event.completion
            if event.completion.request_id == 2:
                engine.submit(requests[1])
        engine.check()
    assert found[1].token_ids == plain[1].token_ids
    assert found[1].walked == found[1].accepted == (9 if siblings else 0)


def test_redrafts_of_members_with_a_prefix_are_counted_from_its_end():
    """Texts of a group begin behind the prefix, and are found by the tail of what follows."""
    whole = finish(engine_of(slots=1), [Request(0, (3, 1, 4), 5, Sampling(22))])[0].token_ids
    draft = Draft([60, *whole[2:]])
    request = Request(0, (3, 1, 4), 5, Sampling(20), prefix_ids=tuple(whole[:2]), drafts=(draft,))
    twin = Request(1, (3, 1, 4), 5, Sampling(20), prefix_ids=tuple(whole[:2]))
    engine = engine_of(slots=1, redraft=8, siblings=True)
    done = finish(engine, [request, twin])
    assert tokens(done) == {0: whole, 1: whole}
    assert done[0].accepted > 12 and done[1].accepted > 12
    # and a tree made of a finished one begins behind the prefix as well
    engine = engine_of(slots=2, siblings=True)
    longer = replace(twin, id=2, key=6, sampling=Sampling(30))
    engine.submit(twin)
    engine.submit(longer)
    found = {}
    while len(found) < 3:
        for event in engine.step():
            found[event.completion.request_id] = event.completion
            if event.completion.request_id == 1:
                engine.submit(replace(twin, id=3))
    assert found[3].token_ids == whole and found[3].walked == 19


def test_an_engine_goes_on_from_its_state():
    """What has been counted comes back, and new weights let it fade."""
    plain = finish(engine_of(slots=1), [Request(0, (3, 1, 4), 5, Sampling(20))])[0]
    request = Request(
        0, (3, 1, 4), make_key(0, "train", 0, 0, 0), Sampling(20),
        drafts=(Draft(plain.token_ids), Draft([60, *plain.token_ids])),
    )  # fmt: skip
    engine = engine_of(slots=1, redraft=8)
    finish(engine, [request, Request(1, (3, 1, 4), 5, Sampling(20))])
    state = json.loads(json.dumps(engine.state()))
    assert state != engine_of().state()
    other = engine_of(slots=1, redraft=8)
    other.load_state(state)
    assert other.state() == state
    other.load_weights(1)
    assert other.follow.trials.sum() < sum(state["follow"]["trials"])
    assert other.rates.trials.sum() <= sum(state["rates"]["trials"])
    assert 0 < other.pace.tokens < state["pace"]["tokens"]
