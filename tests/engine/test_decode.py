"""Ticks of several tokens: how many are offered, what is booked, and what happens at the edges.

The standard is a loop over the known replies that looks up, offers and compares as a tick does.
"""

import itertools
import random
from dataclasses import dataclass, replace

import pytest

from reroll.algo.noise import make_key
from reroll.engine.base import Finished
from reroll.engine.costs import CHUNKS, TYPICAL, Costs, best_chunk
from reroll.engine.local import LocalEngine, Speculation
from reroll.engine.redraft import Texts, count_rates
from reroll.engine.shares import Shares
from reroll.types import Completion, Draft, Finish, Request, Sampling, Watch
from tests.engine.helpers import finish, tokens
from tests.engine.test_trees import CHEAP, check_same, engine_of, tiny_model
from tests.tiny import VOCABULARY

STEEP = Costs((1, 64), ((1.0, 2.0, 4.0, 8.0), (1.0, 2.0, 4.0, 8.0)), 0.1)
"""not even a perfect guess pays"""


def shifted_requests(count: int = 6, limit: int = 30) -> list[Request]:
    return [
        Request(i, ((3, 1, 4), (1, 5))[i % 2], make_key(1, "train", i, 0, 0), Sampling(limit - i))
        for i in range(count)
    ]


def shifted_drafts(
    requests: list[Request], plain: dict[int, Completion], rng: random.Random
) -> list[Request]:
    """Replies with a foreign token in front: no tree helps, all of it can be looked up."""
    out = []
    for request in requests:
        reply = list(plain[request.id].token_ids)
        for _ in range(2):
            reply[rng.randrange(len(reply))] = rng.randrange(VOCABULARY)
        out.append(replace(request, drafts=(Draft([60, *reply]),)))
    return out


@dataclass
class Booked:
    """What the loop over known replies counts."""

    ticks: int = 0
    decoded: int = 0
    redrafted: int = 0
    reused: int = 0
    context_decode: int = 0
    context_verify: int = 0
    seconds: float = 0.0
    """by the table"""


def loop_over(
    requests: list[Request], plain: dict[int, Completion], costs: Costs, most: int
) -> tuple[Booked, Shares]:
    """All run at once from their first token on, which no tree has helped to."""
    texts: dict[tuple[int, ...], Texts] = {}
    for request in requests:
        texts.setdefault(request.prompt_ids, Texts()).add(request.drafts)
    rates, booked = count_rates(), Booked()
    drawn = {request.id: 1 for request in requests}
    while running := [r for r in requests if drawn[r.id] < len(plain[r.id].token_ids)]:
        offers = {}
        for r in running:
            done = plain[r.id].token_ids[: drawn[r.id]]
            room = r.sampling.max_tokens - len(done) - 1
            offers[r.id] = texts[r.prompt_ids].propose(done, min(most - 1, room))
        there = [(len(o), min(0.99, rates.of(which))) for o, which in offers.values() if o]
        chunk = 1
        if there:
            chunks = [c for c in CHUNKS if c <= most]
            chunk = best_chunk(costs, len(running), *zip(*there, strict=True), chunks)
        booked.ticks += 1
        booked.seconds += costs.tick(len(running), chunk)
        seen = []
        for r in running:
            offer, which = offers[r.id]
            shown, offer = offer, offer[: chunk - 1]
            reply, at = plain[r.id].token_ids, drawn[r.id]
            right = next((n for n, token in enumerate(offer) if token != reply[at + n]), len(offer))
            if shown and chunk == 1:  # the next token tells of the first one anyway
                seen.append((which, 1, int(shown[0] == reply[at])))
            elif offer:
                seen.append((which, right + (right < len(offer)), right))
            length = len(r.prompt_ids) + at  # seen by the last token, itself included
            booked.decoded += 1
            booked.context_decode += length
            booked.redrafted += len(offer)
            booked.context_verify += sum(length + n for n in range(1, len(offer) + 1))
            booked.reused += right
            drawn[r.id] += right + 1
        for offer in seen:
            rates.add(*offer)
    return booked, rates


@pytest.mark.parametrize("costs", [CHEAP, TYPICAL], ids=["cheap", "typical"])
@pytest.mark.parametrize("most", [2, 4, 8])
def test_ticks_and_counters_are_those_of_a_loop_over_the_replies(most, costs):
    requests = shifted_requests()
    plain = finish(engine_of(slots=1), requests)
    assert all(c.token_ids[0] != 60 for c in plain.values())
    costs = replace(costs, prefill=1e9)  # no node of a tree is worth it
    for seed in range(3):
        drafted = shifted_drafts(requests, plain, random.Random(seed))
        engine = engine_of(slots=6, costs=costs, redraft=most, gate=True)
        done = finish(engine, drafted)
        check_same(done, plain)
        booked, rates = loop_over(drafted, plain, costs, most)
        stats = engine.stats()
        assert booked.reused > 20
        assert stats.ticks == booked.ticks and stats.tokens_decoded == booked.decoded
        assert stats.tokens_verified == stats.tokens_redrafted == booked.redrafted
        assert stats.tokens_reused == stats.tokens_redraft_reused == booked.reused
        assert stats.tokens_reused == sum(c.accepted for c in done.values())
        assert sum(c.walked for c in done.values()) == 0
        assert stats.context["decode"] == booked.context_decode
        assert stats.context["verify"] == booked.context_verify
        total = sum(len(c.token_ids) for c in plain.values())
        assert stats.tokens_drawn == total == 6 + booked.decoded + booked.reused
        assert engine.rates.trials == pytest.approx(rates.trials)
        assert engine.rates.hits == pytest.approx(rates.hits)
        assert engine.pace.seconds == pytest.approx(booked.seconds)
        assert engine.pace.tokens == booked.decoded + booked.reused


def widths_of(engine: LocalEngine, monkeypatch) -> list[int]:
    """Tokens a slot of each tick to come."""
    widths, decode = [], engine.runner.decode

    def spy(cache, tokens, *args):
        widths.append(tokens.shape[1])
        return decode(cache, tokens, *args)

    monkeypatch.setattr(engine.runner, "decode", spy)
    return widths


@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_a_perfect_guess_takes_full_ticks_up_to_the_limit(most, monkeypatch):
    request = Request(0, (3, 1, 4), 17, Sampling(28))
    plain = finish(engine_of(slots=1), [request])
    reply = plain[0].token_ids
    assert len({*itertools.pairwise(reply)}) == 27  # two tokens tell the place
    engine = engine_of(slots=1, redraft=most)
    widths = widths_of(engine, monkeypatch)
    done = finish(engine, [replace(request, drafts=(Draft([60, *reply]),))])
    check_same(done, plain)
    # two tokens one by one; then most at a time, the last of which is drawn, not offered
    rest, expected = 26, [1]
    while rest:
        expected.append(max(c for c in CHUNKS if c <= min(most, rest)))
        rest -= expected[-1]
    if most == 8:
        expected = [1, 8, 8, 8, 2]
    assert widths == expected
    assert sum(widths) == 27 and done[0].accepted == 27 - len(widths)


def test_nothing_is_offered_where_no_guess_pays(monkeypatch):
    request = Request(0, (3, 1, 4), 17, Sampling(28))
    plain = finish(engine_of(slots=1), [request])
    drafts = (Draft([60, *plain[0].token_ids]),)
    engine = engine_of(slots=1, redraft=8, costs=STEEP)
    monkeypatch.setattr(Texts, "propose", None)  # nobody looks anything up
    check_same(finish(engine, [replace(request, drafts=drafts)]), plain)
    assert engine.stats().tokens_redrafted == 0 and engine.stats().ticks == 27


@pytest.mark.parametrize(("slots", "share"), [(15, 1.0), (16, 0.25)])
def test_where_many_run_in_vain_it_is_looked_up_now_and_then(slots, share, monkeypatch):
    requests = [Request(i, (3, 1, 4), 40 + i, Sampling(41)) for i in range(slots)]
    plain = finish(engine_of(slots=1), requests)
    asked = []
    propose = Texts.propose
    monkeypatch.setattr(Texts, "propose", lambda *a: asked.append(a) or propose(*a))
    engine = engine_of(slots=slots, redraft=8)
    for _ in range(2):  # the second time as the first: nothing is left of it
        asked.clear()
        check_same(finish(engine, requests), plain)
        # forty ticks, the last of which has room for one token alone
        assert len(asked) == slots * (40 * share - (share == 1))
    # a wider tick that pays ends it
    drafted = [replace(r, drafts=(Draft([60, *plain[r.id].token_ids]),)) for r in requests]
    engine = engine_of(slots=slots, redraft=8)
    check_same(finish(engine, drafted), plain)
    assert engine.stats().ticks < 13


def test_bad_guesses_are_given_up():
    """An old text that always misleads behind two tokens: its rate falls until it is left out."""
    request = Request(0, (3, 1, 4), 17, Sampling(60))
    plain = finish(engine_of(slots=1), [request])
    reply = plain[0].token_ids
    lies = [x for a, b, c in zip(reply, reply[1:], reply[2:], strict=False) for x in (a, b, c + 1)]
    drafts = (Draft([60, *(x % VOCABULARY for x in lies)]),)
    # worth it while 1 + rate > 1.45; ten right of 20 are assumed, and 10 / 23 is too few
    costs = Costs((1, 64), ((1.0, 1.45, 9.0, 9.0),) * 2, 0.1)
    engine = engine_of(slots=1, redraft=2, costs=costs)
    check_same(finish(engine, [replace(request, drafts=drafts)]), plain)
    assert engine.stats().tokens_redrafted == 3 and engine.stats().tokens_redraft_reused == 0
    assert engine.rates.of(3) < 10 / 23  # still counted: the next token tells


def test_a_rate_that_has_fallen_rises_again():
    request = Request(0, (3, 1, 4), 17, Sampling(60))
    plain = finish(engine_of(slots=1), [request])
    costs = Costs((1, 64), ((1.0, 1.45, 9.0, 9.0),) * 2, 0.1)
    engine = engine_of(slots=1, redraft=2, costs=costs)
    engine.rates.hits[:] = 1.0  # 1 of 20
    drafts = (Draft([60, *plain[0].token_ids]),)
    check_same(finish(engine, [replace(request, drafts=drafts)]), plain)
    assert engine.rates.of(0) > 0.45 and engine.stats().tokens_redraft_reused > 10


@pytest.mark.filterwarnings("error")
def test_offers_that_never_failed():
    """A share of one has no sum of its powers; it is not believed."""
    request = Request(0, (3, 1, 4), 17, Sampling(28))
    plain = finish(engine_of(slots=1), [request])
    engine = engine_of(slots=1, redraft=8)
    engine.rates.hits[:] = engine.rates.trials
    done = finish(engine, [replace(request, drafts=(Draft([60, *plain[0].token_ids]),))])
    check_same(done, plain)
    assert done[0].accepted > 15


def test_a_stop_id_inside_an_offer_ends_the_sequence_there():
    """What stands behind the ending in an old text is neither taken nor counted as reused."""
    whole = finish(engine_of(slots=1), [Request(0, (3, 1, 4), 17, Sampling(28))])[0]
    places = [n for n in range(3, 22) if whole.token_ids[n] not in whole.token_ids[:n]]
    assert len(places) > 8
    drafts = (Draft([60, *whole.token_ids]),)
    for at, (most, slots) in itertools.product(places[::2], ((8, 1), (4, 3), (2, 2))):
        engine = engine_of(slots=slots, redraft=most)
        law = Sampling(28, stop_ids=(whole.token_ids[at],))
        # the tree is that of the widest, which knows no stop ids: offers go beyond the ending
        requests = [Request(i, (3, 1, 4), 17, law, drafts=drafts) for i in range(2)]
        done = finish(engine, [*requests, Request(2, (3, 1, 4), 18, Sampling(29), drafts=drafts)])
        del done[2]
        for completion in done.values():
            assert completion.token_ids == whole.token_ids[: at + 1]
            assert completion.finish is Finish.STOP
            assert completion.logprobs == pytest.approx(whole.logprobs[: at + 1], abs=1e-9)
            assert completion.accepted < at  # the first two find the place


def test_what_is_offered_behind_an_ending_is_not_counted_as_reused():
    whole = finish(engine_of(slots=1), [Request(0, (3, 1, 4), 17, Sampling(28))])[0]
    at = next(n for n in range(3, 7) if whole.token_ids[n] not in whole.token_ids[:n])
    law = Sampling(28, stop_ids=(whole.token_ids[at],))
    engine = engine_of(slots=1, redraft=8)
    request = Request(0, (3, 1, 4), 17, law, drafts=(Draft([60, *whole.token_ids]),))
    done = finish(engine, [request])[0]
    assert done.token_ids == whole.token_ids[: at + 1]
    stats = engine.stats()
    assert stats.tokens_drawn == at + 1
    assert stats.tokens_redraft_reused == stats.tokens_reused == done.accepted


def test_a_slot_is_clean_for_whoever_comes_next():
    """One slot after another's refused tokens, longer and shorter ones in turn."""
    rng = random.Random(0)
    requests = [
        Request(i, tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))), i,
                Sampling(rng.choice([3, 9, 20])))
        for i in range(16)
    ]  # fmt: skip
    plain = finish(engine_of(slots=1), requests)
    drafted = shifted_drafts(requests, plain, rng)
    for slots in (1, 2, 3):
        check_same(finish(engine_of(slots=slots, redraft=8), drafted), plain)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gpt2"])
def test_a_full_slot_has_room_for_what_others_are_offered(name):
    """Prompt + limit fill a slot, and the model's positions, while the others' ticks are wide."""
    model = tiny_model(name)
    # learned positions end somewhere: here
    capacity = model.config.n_positions if name == "gpt2" else 140
    prompt = tuple(n % VOCABULARY for n in range(capacity - 12))
    requests = [
        Request(0, prompt, 4, Sampling(12)),
        Request(1, (3, 1, 4), 6, Sampling(130)),
        Request(2, (5, 1, 4), 7, Sampling(130)),
    ]

    def engine(slots: int, **speculation) -> LocalEngine:
        return LocalEngine(
            model, slots=slots, capacity=capacity, costs=CHEAP,
            speculation=Speculation(**speculation),
        )  # fmt: skip

    plain = finish(engine(1), requests)
    drafted = [replace(r, drafts=(Draft([60, *plain[r.id].token_ids]),)) for r in requests[1:]]
    done = finish(engine(3, redraft=8), [requests[0], *drafted])
    check_same(done, plain)
    assert done[0].accepted == 0 and min(done[1].accepted, done[2].accepted) > 90


def test_probed_and_unprobed_share_chunks():
    """States are asked of a whole tick; only those who asked get theirs, each position once."""
    requests = shifted_requests()
    plain = finish(engine_of(slots=1), requests)
    drafted = shifted_drafts(requests, plain, random.Random(1))
    every = tuple(range(40))
    drafted = [replace(r, watch=Watch(at=every)) if r.id % 2 else r for r in drafted]
    engine = engine_of(slots=4, redraft=8)
    for request in drafted:
        engine.submit(request)
    seen, done = [], {}
    while len(done) < len(drafted):
        for event in engine.step():
            if isinstance(event, Finished):
                done[event.completion.request_id] = event.completion
            else:
                seen.append((event.request_id, event.position))
                assert event.hidden.shape == (32,)
    check_same(done, plain)
    expected = [(r.id, n) for r in drafted if r.id % 2 for n in range(r.sampling.max_tokens)]
    assert sorted(seen) == expected


def test_chunks_with_greedy_and_truncated_members():
    rng = random.Random(3)
    laws = [
        Sampling(24, temperature=0.0), Sampling(24, top_k=3), Sampling(24, top_p=0.6), Sampling(24),
    ]  # fmt: skip
    requests = [Request(i, (3, 1, 4), 40 + i, law) for i, law in enumerate(laws * 2)]
    plain = finish(engine_of(slots=1), requests)
    engine = engine_of(slots=5, redraft=8)
    done = finish(engine, shifted_drafts(requests, plain, rng))
    check_same(done, plain)
    assert all(c.accepted > 5 for c in done.values())
    assert done[0].behaviour_logprobs == [0.0] * 24
    assert tokens(done)[0] == tokens(done)[4]
