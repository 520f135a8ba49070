"""Draft trees change the time and never the tokens: token identity in float64, all settings.

What is drafted here is of every kind at once: true replies, corrupted, cut off, too long, twice the
same, another prompt's, nothing, nonsense. The standard is one slot, one row, no drafts.
"""

import itertools
import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from reroll.algo.noise import make_key
from reroll.engine.costs import Costs
from reroll.engine.local import LocalEngine, Speculation
from reroll.types import Completion, Draft, Finish, Lenience, Request, Sampling, Watch
from tests.engine.helpers import finish, finish_with_probes, tokens
from tests.tiny import VOCABULARY, tiny

CAPACITY = 64
CHEAP = Costs((1, 64), ((1.0, 1.01, 1.02, 1.03), (1.0, 1.01, 1.02, 1.03)), 0.1)
"""ticks of many tokens are nearly free; a node is worth it from 0.4 visits of four sequences on"""

tiny_model = cache(tiny)


def engine_of(
    name: str = "qwen3", slots: int = 4, costs: Costs = CHEAP, capacity: int = CAPACITY, **settings
) -> LocalEngine:
    """An engine of a shared tiny model; settings of its own and of `Speculation` alike."""
    own = {n: settings.pop(n) for n in ("prefill_rows", "prefill_tokens") if n in settings}
    return LocalEngine(
        tiny_model(name),
        slots=slots,
        capacity=capacity,
        costs=costs,
        speculation=Speculation(**settings),
        **own,
    )


LAWS = [
    dict(stop_ids=(7,)),
    dict(stop_ids=(7, 8, 9, 10)),
    dict(temperature=0.7),
    dict(temperature=0.0, stop_ids=(7,)),
    dict(top_k=4, stop_ids=(11, 7)),
    dict(top_p=0.8),
]


def mixed_requests(groups: int = 3, each: int = 4, limit: int = 13) -> list[Request]:
    """Groups of one prompt each; members differ in limit, stop ids and law."""
    rng = random.Random(4)
    prompts = [tuple(rng.randrange(VOCABULARY) for _ in range(n)) for n in (3, 1, 8, 5, 6)]
    return [
        Request(
            g * each + s, prompts[g], make_key(3, "train", g, s, 0),
            Sampling(limit - (3 * g + 2 * s) % 5, **LAWS[(g + s) % len(LAWS)]),
        )
        for g in range(groups) for s in range(each)
    ]  # fmt: skip


@cache
def plain_of(name: str = "qwen3", groups: int = 3, each: int = 4, limit: int = 13):
    """What one slot gives for `mixed_requests` without drafts."""
    return finish(engine_of(name, slots=1, prefill_rows=1), mixed_requests(groups, each, limit))


def some_drafts(
    requests: list[Request], plain: dict[int, Completion], rng: random.Random
) -> list[Request]:
    """The requests with drafts of every kind; members of a group share some of theirs."""
    prompts: dict[tuple[int, ...], list[Request]] = {}
    for request in requests:
        prompts.setdefault(request.prompt_ids, []).append(request)
    out = []
    for members in prompts.values():
        pool = []
        for member in members:
            reply = plain[member.id].token_ids
            at = rng.randrange(len(reply))
            wrong = (reply[at] + rng.randint(1, VOCABULARY - 1)) % VOCABULARY
            pool += [
                reply,
                [*reply[:at], wrong, *reply[at + 1 :]],
                [*reply[:at], wrong, *reply[at:]],  # shifted: only re-drafting can use the rest
                [60, *reply],
                [*reply[:at], 0, 0],
                reply[: rng.randint(0, len(reply))],
                [*reply, *(rng.randrange(VOCABULARY) for _ in range(20))],
            ]
        foreign = plain[rng.choice(requests).id].token_ids
        pool += [foreign, list(pool[rng.randrange(len(pool))]), [], [0] * 9, [7], [5, 7, 7, 7]]
        drafts = [Draft(text) for text in rng.sample(pool, rng.randint(2, 7))]
        for member in members:
            own = rng.sample(drafts, rng.randint(0, len(drafts)))
            if own and rng.random() < 0.3:
                own.append(own[0])  # the same object twice
            out.append(replace(member, drafts=tuple(own)))
    return out


def check_same(
    done: dict[int, Completion], plain: dict[int, Completion], atol: float = 1e-9
) -> None:
    assert tokens(done) == {i: plain[i].token_ids for i in done}
    for i, completion in done.items():
        expected = plain[i]
        assert completion.finish is expected.finish
        assert completion.versions == expected.versions
        assert completion.loss_mask == expected.loss_mask
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=atol)
        assert completion.behaviour_logprobs == pytest.approx(expected.behaviour_logprobs, abs=atol)
        assert 0 <= completion.walked <= completion.accepted <= len(completion.token_ids)


def test_the_standard_is_not_vacuous():
    plain = plain_of()
    finishes = [completion.finish for completion in plain.values()]
    assert {Finish.STOP, Finish.LENGTH} == set(finishes)
    # members of a group go different ways, else a tree would be a chain
    assert len({tuple(c.token_ids[:3]) for c in plain.values()}) > 9
    assert max(len(c.token_ids) for c in plain.values()) == 13


SETTINGS = list(itertools.product([1, 2, 3, 5, 64], [False, True], [True, False]))


@pytest.mark.parametrize(("window", "gate", "branching"), SETTINGS)
def test_trees_change_no_token(window, gate, branching):
    rng = random.Random(window * 4 + gate * 2 + branching)
    reused = redrafted = skipped = 0
    for redraft, siblings in itertools.product([1, 2, 4, 8], [False, True]):
        requests = some_drafts(mixed_requests(2), plain_of(), rng)
        rng.shuffle(requests)
        engine = engine_of(
            slots=rng.choice([1, 2, 3, 5, 8, 20]),
            prefill_rows=rng.choice([1, 2, 32]),
            prefill_tokens=rng.choice([1, 20, 4096]),
            window=window, gate=gate, branching=branching, redraft=redraft, siblings=siblings,
        )  # fmt: skip
        check_same(finish(engine, requests), plain_of())
        stats = engine.stats()
        nodes = stats.tokens_verified - stats.tokens_redrafted
        reused += stats.tokens_reused
        redrafted += stats.tokens_redraft_reused
        skipped += stats.nodes_offered - nodes
        assert redraft > 1 or stats.tokens_redrafted == 0
    assert reused > 100 and redrafted > 15  # it has been at work
    if gate or (branching and window < 5):
        assert skipped > 30
    elif window == 64:
        assert skipped == 0


def test_more_requests_than_slots_with_siblings():
    """Forty of three prompts, some with drafts: some wait longer, none is lost."""
    requests = mixed_requests(3, 14)
    plain, rng = finish(engine_of(slots=8), requests), random.Random(0)
    drafted = [*some_drafts(requests[:14], plain, rng), *requests[14:]]
    accepted = 0
    for slots, redraft, stagger in ((1, 8, True), (3, 4, True), (16, 1, True), (17, 4, False)):
        for order in (drafted, drafted[::-1]):
            engine = engine_of(slots=slots, siblings=True, redraft=redraft, stagger=stagger)
            done = finish(engine, order)
            check_same(done, plain)
            accepted += sum(c.accepted for c in done.values())
    assert accepted > 50


@pytest.mark.parametrize(
    ("name", "atol"),
    [
        ("gemma3", 1e-9),  # a window in every other layer
        ("gemma2", 1e-5),  # its softmax is in float32
        ("mistral_window", 1e-9),  # a window of 6, shorter than the texts
        ("cohere2_window", 1e-9),
        ("gpt2", 1e-9),  # learned positions
        ("mixtral", 1e-4),  # a mixture in float32
    ],
)
def test_trees_on_other_architectures(name, atol):
    rng = random.Random(1)
    plain = plain_of(name)
    walked = 0
    for window, redraft, slots in ((64, 1, 5), (3, 4, 12), (1, 8, 3), (5, 2, 2)):
        requests = some_drafts(mixed_requests(), plain, rng)
        engine = engine_of(name, slots, window=window, redraft=redraft, siblings=True)
        done = finish(engine, requests)
        check_same(done, plain, atol)
        walked += sum(completion.walked for completion in done.values())
    assert walked > 100


def test_deep_trees_in_narrow_windows_on_a_sliding_window():
    """Texts of 40 tokens: several stretches, several windows, far beyond the model's window."""
    plain = plain_of("gemma3", 2, 3, 40)
    rng = random.Random(2)
    walked = 0
    for window in (1, 7, 8, 9, 17):
        requests = some_drafts(mixed_requests(2, 3, 40), plain, rng)
        done = finish(engine_of("gemma3", 3, window=window, redraft=4), requests)
        check_same(done, plain)
        walked += max(completion.walked for completion in done.values())
    assert walked > 100


# --- interruptions ------------------------------------------------------------------------------


@pytest.mark.parametrize("ticks", [1, 2, 4])
@pytest.mark.parametrize(
    "speculation",
    [
        dict(window=2, redraft=4, siblings=True),
        dict(window=64, siblings=True, gate=True),
        dict(window=3, redraft=8, branching=False),
    ],
    ids=str,
)
def test_aborted_with_trees_and_resumed_with_others(ticks, speculation):
    plain, rng = plain_of(), random.Random(ticks)
    requests = {r.id: r for r in some_drafts(mixed_requests(), plain, rng)}
    engine, done = engine_of(slots=3, **speculation), {}
    for request in requests.values():
        engine.submit(request)
    for _ in range(ticks):
        for event in engine.step():
            done[event.completion.request_id] = event.completion
        engine.check()
    partial = engine.abort(None, "harvest")
    assert len(partial) > 2 and {p.request_id for p in partial} | set(done) == set(plain)
    begun = {p.request_id: len(p.token_ids) for p in partial}
    before = {p.request_id: p.accepted for p in partial}
    again = some_drafts([requests[p.request_id] for p in partial], plain, rng)
    halves = {p.request_id: p for p in partial}
    again = [replace(r, partial=halves[r.id]) for r in again]
    resumed = finish(engine, again)
    check_same(resumed | done, plain)
    for i, completion in resumed.items():
        assert completion.accepted >= before[i] and completion.abort_reason == ""
        assert len(halves[i].token_ids) == begun[i]  # what was handed in is not written to


def test_resumed_partials_walk_the_rest_of_their_drafts():
    plain = plain_of()
    requests = [r for r in mixed_requests() if len(plain[r.id].token_ids) >= 6]
    again, expected = [], {}
    for request in requests:
        whole = plain[request.id]
        cut = 3
        half = Completion(
            request.id, whole.token_ids[:cut], whole.logprobs[:cut],
            whole.behaviour_logprobs[:cut], [0] * cut, [True] * cut, accepted=1, walked=1,
        )  # fmt: skip
        # a draft that begins otherwise is of no use, one that goes on for a while is
        other = [(whole.token_ids[0] + 1) % VOCABULARY, *whole.token_ids[1:]]
        drafts = (Draft(other), Draft(whole.token_ids[:5]))
        again.append(replace(request, partial=half, drafts=drafts))
        expected[request.id] = 1 + 2
    engine = engine_of(slots=8)
    done = finish(engine, again)
    check_same(done, plain)
    assert {i: c.walked for i, c in done.items()} == expected
    assert engine.stats().tokens_reused == 2 * len(again)
    # the given ones are not drawn again
    assert engine.stats().tokens_drawn == sum(len(c.token_ids) - 3 for c in done.values())


def test_abort_of_some_with_siblings_leaves_the_others_alone():
    plain, rng = plain_of(), random.Random(8)
    engine, done = engine_of(slots=3, window=2, redraft=4, siblings=True), {}
    requests = some_drafts(mixed_requests(), plain, rng)
    for request in requests:
        engine.submit(request)
    for _ in range(2):
        for event in engine.step():
            done[event.completion.request_id] = event.completion
    gone = {c.request_id for c in engine.abort([0, 3, 4, 5, 10], "prune")} - set(done)
    assert gone and engine.stats().running
    while engine.stats().running or engine.stats().waiting:
        for event in engine.step():
            done[event.completion.request_id] = event.completion
        engine.check()
    assert set(done) == set(plain) - gone
    check_same(done, plain)
    # and the engine serves the same ids again, new weights in between
    engine.load_weights(0)
    check_same(finish(engine, requests), plain)


def test_a_prefix_with_drafts_behind_it():
    plain = plain_of()
    requests, cut = [], 2
    for request in mixed_requests():
        whole = plain[request.id].token_ids
        if len(whole) <= cut:
            continue
        sampling = replace(request.sampling, max_tokens=request.sampling.max_tokens - cut)
        drafts = (Draft(whole[cut:]), Draft(whole), Draft([0, *whole[cut:]]))
        requests.append(
            replace(request, prefix_ids=tuple(whole[:cut]), sampling=sampling, drafts=drafts)
        )
    engine = engine_of(slots=5, window=3, redraft=4, siblings=True)
    done = finish(engine, requests)
    assert len(done) > 8 and tokens(done) == {i: plain[i].token_ids for i in done}
    for i, completion in done.items():
        rest = len(completion.token_ids) - cut
        assert completion.loss_mask == [False] * cut + [True] * rest
        assert completion.versions == [-1] * cut + [0] * rest
        assert completion.logprobs[:cut] == [0.0] * cut
        assert completion.logprobs[cut:] == pytest.approx(plain[i].logprobs[cut:], abs=1e-9)
        assert completion.finish is plain[i].finish
    assert engine.stats().tokens_reused > 50


def test_a_draft_is_what_comes_behind_the_prefix():
    whole = plain_group()[0].token_ids
    request = replace(one_group(1)[0], prefix_ids=tuple(whole[:4]), sampling=Sampling(8))
    for draft, walked in ((whole[4:], 7), (whole[4:7], 3), (whole[3:], 0)):
        done = finish(engine_of(), [replace(request, drafts=(Draft(draft),))])[0]
        assert done.token_ids == whole and done.walked == walked
    # and so it is when some of it has been drawn already
    half = Completion(0, whole[:6], [-1.0] * 6, [-1.0] * 6, [0] * 6, [False] * 4 + [True] * 2)
    again = replace(request, partial=half, drafts=(Draft(whole[4:]),))
    done = finish(engine_of(), [again])[0]
    assert done.token_ids == whole and done.walked == 5


def test_prompts_and_prefixes_that_meet_in_the_same_tokens():
    """(1, 2, 3) is a prompt, a prompt with a prefix, and a prompt with a partial: one row."""
    text, keys = (1, 2, 3), (50, 51, 52)
    plain = {
        i: finish(engine_of(slots=1), [Request(i, text, key, Sampling(8))])[i]
        for i, key in enumerate(keys)
    }
    # positions count the prefix, so the noise of the others is that of other places
    prefixed = Request(1, (1, 2), keys[1], Sampling(7), prefix_ids=(3,))
    half = Completion(2, [3], [-1.0], [-1.0], [0], [True])
    resumed = Request(2, (1, 2), keys[2], Sampling(8), partial=half)
    plain[1] = finish(engine_of(slots=1), [prefixed])[1]
    plain[2] = finish(engine_of(slots=1), [resumed])[2]
    drafts = {i: Draft(c.token_ids) for i, c in plain.items()}
    requests = [
        Request(0, text, keys[0], Sampling(8), drafts=(drafts[0], drafts[2])),
        replace(prefixed, drafts=(Draft(plain[1].token_ids[1:]), drafts[0])),
        replace(resumed, drafts=(drafts[2], drafts[1])),
    ]
    for order in itertools.permutations(requests):
        for siblings in (False, True):
            engine = engine_of(slots=3, redraft=4, siblings=siblings)
            check_same(finish(engine, list(order)), plain)
            assert engine.stats().tokens_prefilled == 3  # one row


# --- probes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculation", [
    dict(), dict(window=2), dict(redraft=8), dict(window=3, redraft=4, siblings=True, gate=True),
    dict(branching=False, redraft=2),
], ids=str)  # fmt: skip
def test_probes_report_the_states_of_plain_forwards(speculation):
    plain, rng = plain_of(), random.Random(3)
    requests = some_drafts(mixed_requests(), plain, rng)
    # one group is not probed: it shares forwards with those that are
    requests = [replace(r, watch=Watch(at=(0, 1, 4, 5, 9))) if r.id > 3 else r for r in requests]
    engine = engine_of(slots=4, **speculation)
    done, probes = finish_with_probes(engine, requests)
    check_same(done, plain)
    asked = {(r.id, p) for r in requests for p in (r.watch.at if r.watch else ())}
    expected = {(i, p) for i, p in asked if p < len(plain[i].token_ids)}
    assert len(probes) == len(expected)
    assert {(e.request_id, e.position) for e in probes} == expected
    if speculation.get("redraft", 1) > 1:
        assert engine.stats().tokens_redraft_reused > 0
    model, prompts = tiny_model("qwen3"), {r.id: r.prompt_ids for r in requests}
    for event in probes:
        text = [*prompts[event.request_id], *plain[event.request_id].token_ids[: event.position]]
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([text])).last_hidden_state[0, -1]
        assert torch.allclose(event.hidden, hidden, atol=1e-9)


# --- special drafts -----------------------------------------------------------------------------


def one_group(count: int = 4, limit: int = 12, **sampling) -> list[Request]:
    return [
        Request(i, (3, 1, 4), make_key(9, "train", 0, i, 0), Sampling(limit, **sampling))
        for i in range(count)
    ]


@cache
def plain_group(count: int = 4, limit: int = 12) -> dict[int, Completion]:
    return finish(engine_of(slots=1, prefill_rows=1), one_group(count, limit))


@pytest.mark.parametrize("window", [1, 4, 64])
def test_everything_reused_takes_no_slot(window, monkeypatch):
    """Same weights, same keys, whole texts as drafts: nothing is decoded."""
    plain = plain_group(8, 30)
    # the group of `plain_group`, some of it cut by a stop id
    stop = plain[2].token_ids[20]
    sampling = Sampling(30, stop_ids=(stop,))
    whole = {
        i: c.token_ids[: c.token_ids.index(stop) + 1 if stop in c.token_ids else 30]
        for i, c in plain.items()
    }
    requests = [
        replace(r, sampling=sampling, drafts=tuple(Draft(text) for text in whole.values()))
        for r in one_group(8, 30)
    ]
    engine = engine_of(slots=2, window=window, redraft=4, siblings=True)
    monkeypatch.setattr(engine.cache, "load", None)  # no slot is written
    done = finish(engine, requests)
    assert tokens(done) == whole
    assert {c.finish for c in done.values()} == {Finish.STOP, Finish.LENGTH}
    stats = engine.stats()
    assert stats.ticks == stats.tokens_decoded == stats.context["decode"] == 0
    assert stats.tokens_drawn == sum(map(len, whole.values()))
    # all but one of each: the end of text, or the last token of the limit, is drawn
    assert stats.tokens_reused == stats.tokens_drawn - 8


@pytest.mark.parametrize("window", [1, 64])
def test_nothing_reused(window):
    plain = plain_group()
    firsts = {c.token_ids[0] for c in plain.values()}
    wrong = [t for t in range(VOCABULARY) if t not in firsts][:3]
    drafts = tuple(Draft([t, *plain[0].token_ids[1:]]) for t in wrong)
    engine = engine_of(window=window)
    done = finish(engine, [replace(r, drafts=drafts) for r in one_group()])
    check_same(done, plain)
    assert all(c.accepted == c.walked == 0 for c in done.values())
    stats = engine.stats()
    assert stats.tokens_reused == 0 and stats.tokens_verified == 3 * min(window, 11)


def test_a_draft_cut_by_the_limit():
    plain = plain_group()
    for limit in (1, 2, 7):
        requests = [
            replace(r, sampling=Sampling(limit), drafts=(Draft(plain[r.id].token_ids),))
            for r in one_group()
        ]
        engine = engine_of()
        done = finish(engine, requests)
        for i, completion in done.items():
            assert completion.token_ids == plain[i].token_ids[:limit]
            assert completion.finish is Finish.LENGTH
            assert completion.accepted == limit - 1  # the last one is drawn either way
        assert engine.stats().ticks == 0


def test_members_of_one_row_end_at_their_own_limits_and_stop_ids():
    plain = plain_group()
    text = plain[0].token_ids
    at = next(n for n in range(4, 12) if text[n] not in text[:n])
    first = one_group()[0]
    samplings = [
        Sampling(12), Sampling(3), Sampling(1), Sampling(12, stop_ids=(text[at],)),
        Sampling(at + 1, stop_ids=(text[at],)), Sampling(at, stop_ids=(text[at],)),
    ]  # fmt: skip
    ends = [12, 3, 1, at + 1, at + 1, at]
    stops = [False, False, False, True, True, False]
    for order in (range(6), reversed(range(6))):
        requests = [
            replace(first, id=i, sampling=samplings[i], drafts=(Draft(text),)) for i in order
        ]
        engine = engine_of(slots=6)
        done = finish(engine, requests)
        for i, (end, stop) in enumerate(zip(ends, stops, strict=True)):
            assert done[i].token_ids == text[:end]
            assert done[i].finish is (Finish.STOP if stop else Finish.LENGTH)
            assert done[i].logprobs == pytest.approx(plain[0].logprobs[:end], abs=1e-9)
        assert engine.stats().tokens_prefilled == 3


def test_a_draft_that_ends_in_a_stop_id():
    """The ending is drawn, not verified: no node is run for it, and the sequence stops there."""
    text = plain_group()[0].token_ids
    at = next(n for n in range(4, 12) if text[n] not in text[:n])
    request = one_group(1, stop_ids=(text[at],))[0]
    for behind in ([], [5, 6], text[at:]):
        engine = engine_of()
        done = finish(engine, [replace(request, drafts=(Draft([*text[: at + 1], *behind]),))])[0]
        assert done.token_ids == text[: at + 1] and done.finish is Finish.STOP
        assert done.accepted == at and engine.stats().tokens_verified == at
        assert engine.stats().ticks == 0
    # an ending that the sampler does not draw is no reason to stop
    early = finish(engine_of(), [replace(request, drafts=(Draft([*text[:2], text[at]]),))])[0]
    assert early.token_ids == text[: at + 1] and early.accepted == 2


def test_duplicate_drafts_cost_nothing():
    plain = plain_group()
    draft, equal = Draft(plain[0].token_ids), Draft(list(plain[0].token_ids))
    verified = set()
    for drafts in ((draft,), (draft, draft), (draft, equal), (equal, draft, equal, draft)):
        engine = engine_of()
        done = finish(engine, [replace(r, drafts=drafts) for r in one_group()])
        check_same(done, plain)
        assert done[0].accepted == 11
        verified.add(engine.stats().tokens_verified)
    assert verified == {11}


def test_the_pad_id_is_a_token_like_any_other():
    """Token 0 pads rows and chunks; here it is also what is drawn and drafted."""
    model = tiny("qwen3")
    with torch.no_grad():  # make 0 likely: its output row answers to what all states share
        states = model.model(input_ids=torch.arange(61)[None]).last_hidden_state[0]
        model.lm_head.weight[0] = 2.5 * states.mean(0) / states.mean(0).norm()
    engines = [
        LocalEngine(model, slots=slots, capacity=40, costs=CHEAP, speculation=speculation)
        for slots, speculation in (
            (1, Speculation()),
            (5, Speculation(redraft=4, window=3)),
            (5, Speculation(redraft=8, siblings=True)),
        )
    ]
    requests = [
        Request(i, (0,) * (i % 4 + 1), make_key(2, "train", 0, i, 0), Sampling(14))
        for i in range(12)
    ]
    plain = finish(engines[0], requests)
    zeros = [c.token_ids.count(0) for c in plain.values()]
    assert sum(zeros) > 12 and any(
        pair == (0, 0) for c in plain.values() for pair in itertools.pairwise(c.token_ids)
    )
    drafts = {i: (Draft([0] * 14), Draft([*c.token_ids[:5], 0])) for i, c in plain.items()}
    for engine in engines[1:]:
        done = finish(engine, [replace(r, drafts=drafts[r.id]) for r in requests])
        check_same(done, plain)
        assert all(c.accepted >= 5 for c in done.values())


def test_each_request_verifies_its_own_draft_without_branching():
    plain = plain_group()
    requests = [replace(r, drafts=(Draft(plain[r.id].token_ids),)) for r in one_group()]
    done = finish(engine_of(branching=False), requests)
    check_same(done, plain)
    assert [c.accepted for _, c in sorted(done.items())] == [11] * 4


def test_a_group_walks_all_drafts_of_its_members():
    plain = plain_group()
    # each member brings another's reply
    requests = [replace(r, drafts=(Draft(plain[(r.id + 1) % 4].token_ids),)) for r in one_group()]
    engine = engine_of()
    done = finish(engine, requests)
    check_same(done, plain)
    assert [c.accepted for c in done.values()] == [11] * 4
    assert engine.stats().tokens_prefilled == 3 and engine.stats().trees_offered == 1


@pytest.mark.parametrize("law", [
    Sampling(12, temperature=0.0), Sampling(12, top_k=3), Sampling(12, top_p=0.7),
    Sampling(12, temperature=1.4, top_k=9, top_p=0.9), Sampling(12, temperature=0.3),
], ids=str)  # fmt: skip
def test_other_laws_with_drafts(law):
    requests = [replace(r, sampling=law) for r in one_group()]
    plain = finish(engine_of(slots=1, prefill_rows=1), requests)
    rng = random.Random(6)
    for window, redraft in ((64, 1), (2, 4)):
        done = finish(engine_of(window=window, redraft=redraft), some_drafts(requests, plain, rng))
        check_same(done, plain)
        assert sum(c.accepted for c in done.values()) > 10


def test_without_branching_no_forward_needs_a_mask(monkeypatch):
    """However long the draft, and whatever the window: the model may be deaf to tree masks."""
    request = Request(0, (3, 1, 4), 17, Sampling(50))
    plain = finish(engine_of(slots=1), [request])
    engine = engine_of(branching=False, window=4)
    run, forwards = engine.runner.prefill, []
    monkeypatch.setattr(
        engine.runner, "prefill", lambda *a, **k: forwards.append(a[3]) or run(*a, **k)
    )
    done = finish(engine, [replace(request, drafts=(Draft(plain[0].token_ids),))])
    check_same(done, plain)
    assert forwards == [None]
    assert done[0].walked == 49 and engine.stats().ticks == 0


@pytest.mark.parametrize("bound", [64, 128, 4096])
def test_windows_keep_to_the_bound_of_a_forward(bound, monkeypatch):
    """Eight prompts whose drafts branch below the first window: the second one is run in parts."""
    requests = [Request(i, (3, 1, 4 + i // 4), 50 + i, Sampling(16)) for i in range(32)]
    plain = finish(engine_of(slots=1), requests)
    drafted = []
    for start in range(0, 32, 4):
        drafts = tuple(Draft(plain[start + k].token_ids) for k in range(4))
        wrong = tuple(Draft([*d.token_ids[:9], *range(20, 30)]) for d in drafts)
        group = requests[start : start + 4]
        drafted += [replace(r, drafts=drafts + wrong) for r in group]
    engine = engine_of(window=8, prefill_tokens=bound)
    run, sizes = engine.runner.prefill, []

    def watched(rows, *others, **more):
        past = others[3].get_seq_length() if len(others) > 3 and others[3] else 0
        ran = run(rows, *others, **more)
        sizes.append((len(rows), ran.cache.get_seq_length() - past))
        return ran

    monkeypatch.setattr(engine.runner, "prefill", watched)
    done = finish(engine, drafted)
    check_same(done, plain)
    assert all(rows == 1 or rows * width <= bound for rows, width in sizes)
    # prompts and first windows at once, then second ones; smaller bounds take more forwards
    assert len(sizes) == 2 if bound == 4096 else len(sizes) > 4
    assert all(c.walked >= 14 for c in done.values())


def test_staggered_samples_start_as_slots_become_free():
    """Without drafts of their own, no more of a prompt than there are slots: the next ones have
    somebody to follow."""
    twins = [Request(i, (3, 1, 4), 17, Sampling(12)) for i in range(6)]
    plain = finish(engine_of(slots=1), twins)
    engine = engine_of(slots=2, siblings=True, stagger=True)
    done = finish(engine, twins)
    check_same(done, plain)
    assert sorted(c.walked for c in done.values()) == [0, 0, 11, 11, 11, 11]


def test_lenient_drafts_without_the_writers_log_probs_are_refused_at_once():
    for draft, keep in ((Draft([1, 2]), False), (Draft([1, 2], [0.0, 0.0]), True)):
        rule = Lenience(1.0, keep_writer=keep)
        with pytest.raises(ValueError, match="request 4: a lenient draft"):
            Request(4, (3,), 1, Sampling(5), drafts=(draft,), lenience=rule)
