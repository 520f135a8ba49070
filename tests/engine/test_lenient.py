"""SPEC-RL's acceptance in the engine, token for token against the rule written out.

`expect` scores a draft with a plain forward, takes the rule's own uniforms, cuts, and lets the
plain engine go on behind the cut under the same key. What the rule does to the law is tested in
`test_laws.py`.
"""

import itertools
import math
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from scipy.stats import chisquare

from reroll.algo.noise import make_key, uniform
from reroll.engine.local import LocalEngine
from reroll.errors import UserError
from reroll.types import Completion, Draft, Finish, Lenience, Request, Sampling, Watch
from tests.algo.laws import ALPHA
from tests.engine.helpers import finish, finish_with_probes
from tests.engine.test_trees import check_same, engine_of, tiny_model

P = (3, 1, 4)
LENGTH = 10
NOW = 3
"""version of the policy that is sampled; drafts are of version 1"""


@cache
def written(request: Request, shift: float, version: int = 1) -> Draft:
    """A reply under another key, as an old policy wrote it that was `shift` surer of each token."""
    law = replace(request.sampling, max_tokens=LENGTH, stop_ids=())
    plain = replace(request, sampling=law, key=request.key + 1, drafts=(), lenience=None)
    reply = finish(engine_of(slots=1), [plain])[request.id]
    logprobs = [x + shift * math.cos(3 * n) for n, x in enumerate(reply.logprobs)]
    own = slice(len(request.prefix_ids), None)
    versions = [version] * len(reply.token_ids)
    return Draft(reply.token_ids[own], logprobs[own], versions[own])


def lenient_requests(count: int = 12, factor: float = 0.8, **rule) -> list[Request]:
    """Limits before and behind the draft's end, stop ids inside and outside, prefixes, tempers."""
    out = []
    for i in range(count):
        law = Sampling((14, 12, 10, 6)[i % 4], temperature=(1.0, 0.5)[i // 2 % 2])
        prefix = ((), (8,), (5, 9))[i % 3]
        request = Request(i, P, make_key(4, "train", 0, i, 0), law, prefix)
        draft = written(request, 0.7)
        if i % 5 in (1, 3):
            law = replace(law, stop_ids=(draft.token_ids[i % 4 + 1],))
        rule_of = Lenience(factor, **rule)
        out.append(replace(request, sampling=law, drafts=(draft,), lenience=rule_of))
    return out


@cache
def expect(request: Request) -> Completion:
    """The rule written out; `accepted` is what is kept."""
    engine = engine_of(slots=1)
    engine.policy_version = NOW
    draft, rule, law = request.drafts[0], request.lenience, request.sampling
    guess = list(draft.token_ids[: law.max_tokens])
    stop = min((guess.index(s) for s in law.stop_ids if s in guess), default=len(guess))
    guess = guess[: stop + 1]
    begin = len(request.prefix_ids)
    context = (*request.prompt_ids, *request.prefix_ids)
    now = engine.score([(context, guess)], law.temperature)[0] if guess else []
    where = torch.arange(begin, begin + len(guess) + 1)
    chance = uniform(torch.full_like(where, request.key), where).tolist()
    if rule.random_cut:
        kept = int(chance[0] * (len(guess) + 1))
    else:
        chances = [
            min(1.0, rule.factor * math.exp(new - old))
            for new, old in zip(now, draft.logprobs, strict=False)
        ]
        kept = next((n for n, c in enumerate(chances) if chance[n] > c), len(guess))
    guess = guess[:kept]
    tested = draft.logprobs if rule.keep_writer else now
    versions = draft.versions if rule.keep_writer else [NOW] * kept
    if (guess and guess[-1] in law.stop_ids) or kept == law.max_tokens:
        rest = Completion(request.id, [*request.prefix_ids, *guess])
        rest.finish = Finish.STOP if guess[-1] in law.stop_ids else Finish.LENGTH
    else:
        plain = Request(
            request.id, request.prompt_ids, request.key,
            replace(law, max_tokens=law.max_tokens - kept), (*request.prefix_ids, *guess),
        )  # fmt: skip
        rest = finish(engine, [plain])[request.id]
    behind = begin + kept
    for stream in (rest.logprobs, rest.behaviour_logprobs):
        stream[:behind] = [0.0] * begin + list(tested[:kept])
    rest.versions[:behind] = [-1] * begin + list(versions[:kept])
    rest.loss_mask[:behind] = [False] * begin + [True] * kept
    rest.accepted = kept
    return rest


def served(requests: list[Request], slots: int = 4, **settings) -> dict[int, Completion]:
    engine = engine_of(slots=slots, **settings)
    engine.load_weights(NOW)
    return finish(engine, requests)


RULES = [
    dict(factor=1.0), dict(factor=0.5), dict(factor=math.exp(0.5)), dict(factor=math.inf),
    dict(factor=0.7, keep_writer=True), dict(factor=1.0, random_cut=True),
    dict(factor=1.0, random_cut=True, keep_writer=True),
    dict(factor=math.inf, keep_writer=True), dict(factor=0.0001),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_tokens_are_those_of_the_rule_written_out(rule):
    requests = lenient_requests(**rule)
    expected = {r.id: expect(r) for r in requests}
    done = {}
    for request in requests:  # alone in their rows: no two of them share a draft or stop ids
        done |= served([request])
    check_same(done, expected)
    for i, completion in done.items():
        assert completion.accepted == completion.walked == expected[i].accepted
    kept = [c.accepted for c in done.values()]
    whole = [c.accepted + len(requests[i].prefix_ids) == len(c.token_ids) for i, c in done.items()]
    if rule["factor"] == math.inf:
        ends = {c.finish for c, w in zip(done.values(), whole, strict=True) if w}
        assert min(kept) > 0 and ends == {Finish.STOP, Finish.LENGTH}
    elif rule["factor"] == 0.0001:
        assert max(kept) <= 1
    else:
        assert len(set(kept)) > 2 and any(whole)


def by_limit(requests: list[Request], law: Sampling) -> list[Request]:
    return [replace(r, sampling=replace(law, temperature=r.sampling.temperature)) for r in requests]


@pytest.mark.parametrize("settings", [
    dict(), dict(window=2), dict(gate=True, redraft=4), dict(branching=False),
    dict(window=1, siblings=True, redraft=8), dict(prefill_rows=1, prefill_tokens=1),
], ids=str)  # fmt: skip
def test_lenient_and_lossless_requests_share_rows(settings):
    """Many of a group in one row, each by its own draft and rule; others beside them by none."""
    every = [
        replace(r, id=10 * at + r.id, prefix_ids=(), lenience=Lenience(**rule))
        for at, rule in enumerate(RULES[:6])
        for r in by_limit(lenient_requests(4), Sampling(12, stop_ids=(7, 11, 30)))
    ]
    expected = {r.id: expect(r) for r in every}
    lossless = [replace(r, id=500 + r.id, lenience=None) for r in every[::3]]
    bare = [replace(r, id=700 + r.id, lenience=None, drafts=()) for r in every[1::4]]
    empty = [replace(r, id=900 + r.id, drafts=()) for r in every[::5]]
    plain = finish(engine_of(slots=1), [replace(r, drafts=()) for r in lossless])
    plain |= finish(engine_of(slots=1), bare)
    plain |= finish(engine_of(slots=1), [replace(r, lenience=None) for r in empty])
    for completion in plain.values():
        completion.versions = [NOW] * len(completion.token_ids)
    requests = [*every, *lossless, *bare, *empty]
    random.Random(1).shuffle(requests)
    done = served(requests, 7, **settings)
    check_same(done, expected | plain)
    for request in every:
        assert done[request.id].walked == expected[request.id].accepted


def test_members_of_one_row_keep_their_own_limits():
    requests = [replace(r, prefix_ids=()) for r in lenient_requests(12, factor=math.inf)]
    requests = [replace(r, sampling=replace(r.sampling, stop_ids=())) for r in requests]
    assert len({r.sampling.max_tokens for r in requests}) == 4
    for order in (requests, requests[::-1]):
        check_same(served(order), {r.id: expect(r) for r in requests})


def test_members_of_one_row_keep_their_own_stop_ids():
    """One text, which ends early for one of them and goes on for the others."""
    request = lenient_requests(1, factor=math.inf)[0]
    text = request.drafts[0].token_ids
    foreign = next(t for t in range(60) if t not in text)
    ends = [(), (text[3],), (text[6], text[8]), (foreign,)]
    requests = [
        replace(request, id=i, key=i, sampling=Sampling(12, stop_ids=stops))
        for i, stops in enumerate(ends)
    ]
    expected = {r.id: expect(r) for r in requests}
    assert [expected[i].accepted for i in range(4)] == [10, 4, 7, 10]
    for order in itertools.permutations(requests):
        check_same(served(list(order)), expected)


def test_a_row_of_different_prompts_that_meet_in_the_same_tokens():
    """(3, 1, 4) as a prompt, and as a prompt and a prefix, and with different limits."""
    first = lenient_requests(1, factor=math.inf)[0]
    other = replace(first, id=1, key=8, prompt_ids=P[:2], prefix_ids=P[2:])
    expected = {r.id: expect(r) for r in (first, other)}
    check_same(served([first, other]), expected)
    # a partial brings the same tokens, but its draft begins before them
    longer = Draft([P[2], *first.drafts[0].token_ids], [-1.0, *first.drafts[0].logprobs], [1] * 11)
    half = Completion(2, [P[2]], [-1.0], [-1.0], [1], [True])
    resumed = Request(
        2, P[:2], 9, Sampling(15), drafts=(longer,), lenience=first.lenience, partial=half
    )
    done = served([first, resumed])
    assert done[0].token_ids == expected[0].token_ids
    assert done[0].logprobs == pytest.approx(expected[0].logprobs, abs=1e-9)


def test_an_empty_draft_is_none():
    plain = finish(engine_of(slots=1), [Request(0, P, 5, Sampling(9))])
    plain[0].versions = [NOW] * 9
    for drafts in ((), (Draft([]),)):
        for rule in (Lenience(1.0), Lenience(math.inf), Lenience(1.0, random_cut=True)):
            request = Request(0, P, 5, Sampling(9), drafts=drafts, lenience=rule)
            done = served([request])
            check_same(done, plain)
            assert done[0].accepted == 0


def test_only_the_first_draft_is_tried():
    request = lenient_requests(1, factor=math.inf)[0]
    other = Draft([9] * 10, [0.0] * 10, [1] * 10)
    both = served([replace(request, drafts=(request.drafts[0], other))])
    check_same(both, {0: expect(request)})


def test_the_whole_draft_up_to_the_limit_takes_no_slot(monkeypatch):
    requests = [
        replace(r, prefix_ids=(), sampling=Sampling(limit))
        for r, limit in zip(lenient_requests(4, factor=math.inf), (1, 4, 9, 10), strict=True)
    ]
    engine = engine_of(slots=1)
    monkeypatch.setattr(engine.cache, "load", None)
    done = finish(engine, requests)
    for request in requests:
        limit = request.sampling.max_tokens
        assert done[request.id].token_ids == request.drafts[0].token_ids[:limit]
        assert done[request.id].finish is Finish.LENGTH and done[request.id].accepted == limit
    assert engine.stats().ticks == 0


def test_the_end_of_text_is_tested_too():
    """A draft of its ending alone, which has become half as likely: half of the keys keep it."""
    engine = engine_of(slots=64, prefill_rows=64)
    end = 7
    now = engine.score([(P, [end])])[0][0]
    draft = Draft([end], [now + math.log(2)], [0])
    count = 2000
    done = finish(engine, [
        Request(i, P, make_key(0, "train", 1, i, 0), Sampling(3, stop_ids=(end,)),
                drafts=(draft,), lenience=Lenience(1.0))
        for i in range(count)
    ])  # fmt: skip
    kept = [c for c in done.values() if c.accepted]
    assert all(c.token_ids == [end] and c.finish is Finish.STOP for c in kept)
    # 5 standard deviations of a binomial: 5 * sqrt(.25 / n) = .056
    assert abs(len(kept) / count - 0.5) < 5 * math.sqrt(0.25 / count)


@pytest.mark.parametrize("factor", [0.6, 1.0, math.exp(0.5)])
def test_chance_to_keep_is_that_of_the_formula(factor):
    """min(1, l * q / p) at one place, for drafts whose p is 0.2 to 5 times their q."""
    engine = engine_of(slots=64, prefill_rows=64)
    ratios = (0.2, 0.5, 0.8, 1.0, 1.25, 5.0)
    texts = [11, 22, 33, 44, 55, 60]
    now = engine.score([(P, [token]) for token in texts])
    drafts = [
        Draft([token], [new[0] - math.log(ratio)], [0])
        for token, new, ratio in zip(texts, now, ratios, strict=True)
    ]
    count = 600
    requests = [
        Request(6 * i + which, P, make_key(8, "train", which, i, 0), Sampling(1),
                drafts=(draft,), lenience=Lenience(factor))
        for which, draft in enumerate(drafts) for i in range(count)
    ]  # fmt: skip
    done = finish(engine, requests)
    for which, ratio in enumerate(ratios):
        chance = min(1.0, factor * ratio)
        kept = sum(done[6 * i + which].accepted for i in range(count))
        # 5 standard deviations of a binomial, none where the chance is 1
        assert abs(kept / count - chance) <= 5 * math.sqrt(chance * (1 - chance) / count)


def test_random_cut_is_uniform():
    request = replace(lenient_requests(1)[0], prefix_ids=())
    count, length = 3300, LENGTH
    requests = [
        replace(request, id=i, key=make_key(5, "train", 0, i, 0), sampling=Sampling(12),
                lenience=Lenience(0.001, random_cut=True))
        for i in range(count)
    ]  # fmt: skip
    engine = engine_of(slots=64, prefill_rows=64)
    kept = []
    for part in range(0, count, 300):
        for one in requests[part : part + 300]:
            engine.submit(one)
        engine.step()  # all of the draft is decided at once: nothing more is to be seen
        kept += [c.accepted for c in engine.abort(None, "")]
    observed = [kept.count(n) for n in range(length + 1)]
    assert sum(observed) == count and chisquare(observed).pvalue > ALPHA


@pytest.mark.parametrize("law", [
    Sampling(5, temperature=0.0), Sampling(5, top_k=3), Sampling(5, top_p=0.9),
], ids=str)  # fmt: skip
def test_lenience_needs_the_whole_tempered_law(law):
    engine = engine_of()
    draft = Draft([1], [-1.0], [0])
    with pytest.raises(UserError, match="request 6: lenient drafts need the whole tempered law"):
        engine.submit(Request(6, P, 0, law, drafts=(draft,), lenience=Lenience(1.0)))
    assert engine.stats().waiting == 0
    engine.submit(Request(6, P, 0, law, drafts=(draft,)))


@pytest.mark.parametrize("limits", [(6, 9, 12, 6, 6, 12, 6, 9), (6,) * 8], ids=str)
def test_probes_of_lenient_requests(limits):
    """Each of a row, those that end inside their drafts as well, gets its own states."""
    requests = [
        replace(r, watch=Watch(at=(0, 1, 3, 5)), prefix_ids=(), sampling=Sampling(limit))
        for r, limit in zip(lenient_requests(8, factor=0.9), limits, strict=True)
    ]
    requests = [replace(r, lenience=Lenience(math.inf)) if r.id % 2 else r for r in requests]
    expected = {r.id: expect(r) for r in requests}
    engine = engine_of(slots=3)
    engine.load_weights(NOW)
    done, probes = finish_with_probes(engine, requests)
    check_same(done, expected)
    asked = {(r.id, n) for r in requests for n in (0, 1, 3, 5)}
    assert {(e.request_id, e.position) for e in probes} == {
        (i, n) for i, n in asked if n < len(done[i].token_ids)
    }
    model = tiny_model("qwen3")
    for event in probes:
        text = [*P, *done[event.request_id].token_ids[: event.position]]
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([text])).last_hidden_state[0, -1]
        assert torch.allclose(event.hidden, hidden, atol=1e-9)


@pytest.mark.parametrize("ticks", [1, 3])
def test_interrupted_and_resumed_equals_never_interrupted(ticks):
    """What was refused stays refused, even where the plain draw gave the draft's token."""
    model = tiny_model("llama")
    with torch.no_grad():
        sure = LocalEngine(model, slots=4, capacity=64)
        text = finish(sure, [Request(0, P, 0, Sampling(12, temperature=0.0))])[0].token_ids
    law = Sampling(12, temperature=0.2)  # nearly always the same token
    now = sure.score([(P, text)], law.temperature)[0]
    # an old policy that was thrice as sure of some of them
    old = [x + (math.log(3) if n % 3 == 1 else 0) for n, x in enumerate(now)]
    draft = Draft(text, old, [0] * 12)
    requests = [
        Request(i, P, make_key(0, "train", 0, i, 0), law, drafts=(draft,), lenience=Lenience(1.0))
        for i in range(40)
    ]
    whole = finish(sure, requests)
    again = 0
    for request in requests:
        engine = LocalEngine(model, slots=4, capacity=64)
        engine.submit(request)
        for _ in range(ticks):
            engine.step()
        partial = engine.abort(None, "harvest")
        if partial:
            kept = partial[0].accepted
            again += partial[0].token_ids == text[: len(partial[0].token_ids)]
            done = finish(engine, [replace(request, partial=partial[0])])[request.id]
            assert done.token_ids == whole[request.id].token_ids
            assert whole[request.id].accepted == kept  # what is resumed may use more, losslessly
    assert again > 5  # the case has been met
