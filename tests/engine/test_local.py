"""The embedded engine: drafts, interruptions, slots, limits and laws.

Token-for-token tests run in float64, where differently shaped forwards differ by 1e-15 and no
argmax can flip; the law tests run in float32 as training does.
"""

import random
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from scipy.stats import chisquare

from reroll.algo.noise import make_key
from reroll.engine.local import LocalEngine
from reroll.errors import UserError
from reroll.types import Draft, Finish, Request, Sampling, Watch
from tests.engine.helpers import finish, finish_with_probes, tokens
from tests.tiny import SERVED, VOCABULARY, tiny

CAPACITY = 64


def engine_of(name: str = "qwen3", slots: int = 4, **settings: int) -> LocalEngine:
    return LocalEngine(tiny(name), slots=slots, capacity=CAPACITY, **settings)


def some_requests(count: int = 12, limit: int = 24, **sampling: float) -> list[Request]:
    """Groups of three with one prompt each, ragged limits, a stop id."""
    rng = random.Random(1)
    prompts = [
        tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))) for _ in range(99)
    ]
    return [
        Request(
            i, prompts[i // 3], make_key(0, "train", i // 3, i % 3, 0),
            Sampling(limit - i % 5, stop_ids=(7,), **sampling),  # type: ignore[arg-type]
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> dict[int, list[int]]:
    """Tokens of `some_requests`, one slot, one at a time, no drafts."""
    return tokens(finish(engine_of(slots=1, prefill_rows=1), some_requests()))


@pytest.mark.parametrize("slots", [1, 2, 5, 12, 20])
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_slots_and_prefill_batches_change_nothing(plain, slots: int, rows: int) -> None:
    assert tokens(finish(engine_of(slots=slots, prefill_rows=rows), some_requests())) == plain


def test_long_rows_and_short_ones_are_prefilled_apart(monkeypatch) -> None:
    prompts = [(*range(1, 61 if i % 5 == 0 else 6), i) for i in range(10)]
    requests = [Request(i, prompt, i, Sampling(3)) for i, prompt in enumerate(prompts)]
    engine = engine_of(slots=10, prefill_tokens=400)
    run, sizes = engine.runner.prefill, []
    monkeypatch.setattr(
        engine.runner, "prefill", lambda rows, *a, **k: sizes.append([*map(len, rows)])
        or run(rows, *a, **k),
    )  # fmt: skip
    finish(engine, requests)
    assert sizes == [[6] * 8, [61] * 2]


def test_rows_are_padded_no_further_than_the_models_last_position() -> None:
    """A model with learnt positions has no vector for the next one. Only oneDNN gains by it."""
    kind, settings = SERVED["gpt2"]
    with patch.dict(SERVED, {"gpt2": (kind, settings | {"n_positions": 21})}):
        engine = LocalEngine(tiny("gpt2", torch.float32), slots=2, capacity=21)
    assert [engine.runner.width(n) for n in (1, 16, 17, 21)] == [16, 16, 21, 21]
    assert engine_of().runner.width(17) == 17  # float64
    requests = [Request(i, tuple(range(1, 18 + i)), i, Sampling(3)) for i in range(2)]
    alone = LocalEngine(engine.runner.model, slots=1, capacity=21, prefill_rows=1)
    assert tokens(finish(engine, requests)) == tokens(finish(alone, requests))


def test_order_and_batch_composition_change_nothing(plain) -> None:
    requests = some_requests()
    random.Random(3).shuffle(requests)
    assert tokens(finish(engine_of(), requests)) == plain
    half = finish(engine_of(), requests[:6])
    assert tokens(half) == {r.id: plain[r.id] for r in requests[:6]}


def test_submitting_while_running_changes_nothing(plain) -> None:
    engine = engine_of(slots=3)
    requests, done = some_requests(), {}
    while len(done) < len(plain):
        for _ in range(2):
            if requests:
                engine.submit(requests.pop())
        for event in engine.step():
            done[event.completion.request_id] = event.completion
        engine.check()
    assert tokens(done) == plain


def corrupt(reply: list[int], rng: random.Random) -> tuple[int, ...]:
    """One or more tokens changed at random positions."""
    out = list(reply)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out))
        out[at] = (out[at] + rng.randint(1, VOCABULARY - 1)) % VOCABULARY
    return tuple(out)


def drafts_of(kind: str, plain: dict[int, list[int]]) -> dict[int, tuple[int, ...]]:
    rng = random.Random(5)
    make = {
        "perfect": lambda i: tuple(plain[i]),
        "corrupted": lambda i: corrupt(plain[i], rng),
        "empty": lambda i: (),
        "other prompt": lambda i: tuple(plain[(i + 5) % len(plain)]),
        "beyond the limit": lambda i: (*plain[i], *range(40)),
        "first half": lambda i: tuple(plain[i][: len(plain[i]) // 2]),
        "one for all": lambda i: tuple(plain[0]),
    }[kind]
    return {i: make(i) for i in plain}


@pytest.mark.parametrize(
    "kind",
    [
        "perfect",
        "corrupted",
        "empty",
        "other prompt",
        "beyond the limit",
        "first half",
        "one for all",
    ],
)
@pytest.mark.parametrize("slots", [2, 12])
def test_drafts_change_the_time_and_never_the_tokens(plain, kind: str, slots: int) -> None:
    drafts = drafts_of(kind, plain)
    requests = [replace(r, drafts=(Draft(drafts[r.id]),)) for r in some_requests()]
    engine = engine_of(slots=slots)
    done = finish(engine, requests)
    assert tokens(done) == plain
    without = finish(engine_of(), some_requests())
    for i, completion in done.items():
        expected = without[i]
        assert completion.finish is expected.finish
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-9)
        assert completion.versions == expected.versions
        # a group's drafts are one tree; an ending is drawn, and so is the last token of the limit
        group = [drafts[j] for j in drafts if j // 3 == i // 3]
        agreed = max(
            next((n for n, (a, b) in enumerate(zip(d, plain[i], strict=False)) if a != b or a == 7),
                 min(len(d), len(plain[i])))
            for d in group
        )  # fmt: skip
        limits = [r.sampling.max_tokens for r in requests if r.id // 3 == i // 3]
        limit = requests[i].sampling.max_tokens
        assert completion.accepted == min(agreed, limit, max(limits) - 1)


def test_perfect_drafts_leave_nothing_to_decode(plain) -> None:
    drafts = drafts_of("perfect", plain)
    engine = engine_of()
    finish(engine, [replace(r, drafts=(Draft(drafts[r.id]),)) for r in some_requests()])
    assert engine.stats().ticks == 0 and engine.stats().tokens_decoded == 0


@pytest.mark.parametrize("name", ["gpt2", "mistral_window", "gemma3", "cohere2_window"])
def test_drafts_on_other_architectures(name: str) -> None:
    expected = tokens(finish(engine_of(name), some_requests()))
    drafts = drafts_of("corrupted", expected)
    requests = [replace(r, drafts=(Draft(drafts[r.id]),)) for r in some_requests()]
    assert tokens(finish(engine_of(name), requests)) == expected


@pytest.mark.parametrize("ticks", [0, 1, 4, 9, 15])
def test_abort_and_resume_equals_never_interrupted(plain, ticks: int) -> None:
    engine, requests, done = engine_of(slots=5), some_requests(), {}
    for request in requests:
        engine.submit(request)
    for _ in range(ticks):
        for event in engine.step():
            done[event.completion.request_id] = event.completion
    partial = engine.abort(None, "harvest")
    assert engine.stats().running == engine.stats().waiting == 0
    assert all(p.finish is Finish.ABORT and p.abort_reason == "harvest" for p in partial)
    assert {p.request_id for p in partial} | set(done) == set(plain)
    engine.load_weights(1)  # nothing is in the engine: the version may change
    again = [replace(requests[p.request_id], partial=p) for p in partial]
    kept = {p.request_id: len(p.token_ids) for p in partial}
    for completion in finish(engine, again).values():
        done[completion.request_id] = completion
        begun = kept[completion.request_id]
        assert completion.versions[:begun] == [0] * begun
        assert set(completion.versions[begun:]) == {1}
    assert tokens(done) == plain


def test_resumed_with_a_draft_of_the_whole(plain) -> None:
    engine, requests = engine_of(slots=12), some_requests()
    for request in requests:
        engine.submit(request)
    for _ in range(5):
        engine.step()
    partial = engine.abort(range(12), "harvest")
    again = [
        replace(requests[p.request_id], partial=p, drafts=(Draft(tuple(plain[p.request_id])),))
        for p in partial
    ]
    assert len(again) > 3
    done = finish(engine, again)
    assert tokens(done) == {r.id: plain[r.id] for r in again}


def test_abort_of_some_leaves_the_others_alone(plain) -> None:
    engine, done = engine_of(slots=4), {}
    for request in some_requests():
        engine.submit(request)
    for _ in range(3):
        for event in engine.step():
            done[event.completion.request_id] = event.completion
    gone = {c.request_id for c in engine.abort([0, 2, 3, 9, 11], "prune")}
    engine.check()
    while engine.stats().running or engine.stats().waiting:
        for event in engine.step():
            done[event.completion.request_id] = event.completion
    assert set(done) == set(plain) - gone
    assert tokens(done) == {i: plain[i] for i in done}


def test_prefix_is_given_counted_in_positions_and_not_trained(plain) -> None:
    request = replace(some_requests()[0], sampling=Sampling(20))
    whole = finish(engine_of(), [request])[0]
    prefix = tuple(whole.token_ids[:6])
    prefixed = replace(request, prefix_ids=prefix, sampling=Sampling(14))
    done = finish(engine_of(), [prefixed])[0]
    assert done.token_ids == whole.token_ids  # noise goes by position, so the rest is the same
    assert done.loss_mask == [False] * 6 + [True] * 14
    assert done.logprobs[:6] == [0.0] * 6 and done.versions[:6] == [-1] * 6
    # logprobs of what follows are those of the same text unprefixed
    assert done.logprobs[6:] == pytest.approx(whole.logprobs[6:], abs=1e-9)
    cut = finish(engine_of(), [replace(prefixed, drafts=(Draft(tuple(whole.token_ids[6:12])),))])[0]
    assert cut.token_ids == whole.token_ids and cut.accepted == 6


def test_stop_id_ends_and_limit_truncates() -> None:
    requests = [replace(r, sampling=Sampling(50, stop_ids=(7, 8))) for r in some_requests()]
    done = finish(LocalEngine(tiny("llama"), slots=4, capacity=CAPACITY), requests)
    kinds = {completion.finish for completion in done.values()}
    assert kinds == {Finish.STOP, Finish.LENGTH}
    for completion in done.values():
        stops = [token in (7, 8) for token in completion.token_ids]
        if completion.finish is Finish.STOP:
            assert stops[-1] and not any(stops[:-1])
        else:
            assert len(completion.token_ids) == 50 and not any(stops)


def test_one_prefill_serves_a_group() -> None:
    engine = engine_of(slots=2)
    prompt = tuple(range(1, 11))
    sampling = Sampling(5)
    finish(engine, [Request(i, prompt, key=i, sampling=sampling) for i in range(8)])
    assert engine.stats().tokens_prefilled == len(prompt)


def test_a_finished_slot_is_refilled_at_once() -> None:
    """With known limits the ticks are those of longest first: no slot idles while work waits."""
    lengths = [9, 3, 14, 5, 8, 2, 11, 6, 4, 7]
    engine = engine_of(slots=4)
    finish(engine, [Request(i, (1, 2), i, Sampling(n)) for i, n in enumerate(lengths)])
    ends = [0] * 4
    for n in sorted(lengths, reverse=True):  # the first token of each comes with its prefill
        first = ends.index(min(ends))
        ends[first] += n - 1
    assert engine.stats().ticks == max(ends)


def test_greedy_and_sampled_requests_share_a_batch(plain) -> None:
    sampled = some_requests(6)
    greedy = [replace(r, id=r.id + 100, sampling=Sampling(10, temperature=0.0)) for r in sampled]
    truncated = [
        replace(r, id=r.id + 200, sampling=Sampling(10, top_k=4, top_p=0.8)) for r in sampled
    ]
    mixed = finish(engine_of(slots=7), [*sampled, *greedy, *truncated])
    for part in (sampled, greedy, truncated):
        alone = finish(engine_of(), part)
        assert {i: mixed[i].token_ids for i in alone} == tokens(alone)
        for i, completion in alone.items():
            assert mixed[i].behaviour_logprobs == pytest.approx(
                completion.behaviour_logprobs, abs=1e-9
            )
    # truncation renormalises upwards: the behaviour log-prob is never below the untruncated one
    for request in truncated:
        c = mixed[request.id]
        assert all(b >= x - 1e-12 for b, x in zip(c.behaviour_logprobs, c.logprobs, strict=True))


@pytest.mark.parametrize("settings", [
    Sampling(1), Sampling(1, temperature=0.5), Sampling(1, top_k=5), Sampling(1, top_p=0.6),
    Sampling(1, temperature=1.5, top_k=12, top_p=0.9),
], ids=str)  # fmt: skip
def test_first_token_follows_the_softmax_over_many_keys(settings: Sampling) -> None:
    """Chi-square at the 1e-4 level, fixed keys: position 0 over 4,000 keys through the engine."""
    model = tiny("qwen3", dtype=torch.float32)
    engine = LocalEngine(model, slots=8, capacity=CAPACITY, prefill_rows=8)
    count, prompt = 4000, (3, 1, 4)
    keys = [make_key(11, "train", 0, sample, 0) for sample in range(count)]
    done = finish(engine, [Request(i, prompt, k, settings) for i, k in enumerate(keys)])
    check_law(model, prompt, settings, [done[i].token_ids[0] for i in range(count)])


def test_later_token_follows_the_softmax_at_fresh_positions() -> None:
    """The token after a fixed prefix, at position 0, 1, 2, ... for few keys: fresh positions."""
    model = tiny("llama", dtype=torch.float32)
    engine = LocalEngine(model, slots=8, capacity=CAPACITY, prefill_rows=64)
    drawn = []
    for position in range(40):
        # the model sees the same text; only the position of the draw moves from prompt to prefix
        text = tuple(range(3, 43))
        requests = [
            Request(i, text[: 40 - position], make_key(2, "train", i, 0, 0), Sampling(1),
                    prefix_ids=text[40 - position :])
            for i in range(100)
        ]  # fmt: skip
        drawn += [c.token_ids[-1] for c in finish(engine, requests).values()]
    check_law(model, text, Sampling(1), drawn)


def check_law(model, prompt: tuple[int, ...], settings: Sampling, drawn: list[int]) -> None:
    with torch.no_grad():
        logits = (
            model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / settings.temperature
        )
    probs = logits.softmax(-1)
    if settings.top_k:
        probs[probs < probs.sort(descending=True).values[settings.top_k - 1]] = 0
        probs /= probs.sum()
    order = probs.sort(descending=True)
    before = order.values.cumsum(0) - order.values
    probs[order.indices[before >= settings.top_p]] = 0
    probs = (probs / probs.sum()).numpy()
    counts = torch.tensor(drawn).bincount(minlength=len(probs)).numpy()
    assert counts[probs == 0].sum() == 0
    common = probs * len(drawn) >= 5  # chi-square needs five expected in a cell; pool the rest
    observed, expected = list(counts[common]), list(probs[common] * len(drawn))
    if not common.all() and probs[~common].sum() > 0:
        observed.append(counts[~common].sum())
        expected.append(probs[~common].sum() * len(drawn))
    assert chisquare(observed, expected).pvalue > 1e-4


def test_score_equals_the_logprobs_that_step_returned() -> None:
    engine = LocalEngine(tiny("qwen3", dtype=torch.float32), slots=4, capacity=CAPACITY)
    requests = some_requests(temperature=0.8)
    done = finish(engine, requests)
    pairs = [(r.prompt_ids, done[r.id].token_ids) for r in requests]
    for request, scored in zip(requests, engine.score(pairs, temperature=0.8), strict=True):
        assert scored == pytest.approx(done[request.id].logprobs, abs=1e-4)


@pytest.mark.parametrize("with_draft", [False, True])
def test_probes_report_the_last_hidden_state(plain, with_draft: bool) -> None:
    engine = engine_of()
    requests = [
        replace(r, watch=Watch((1, 4, 8)), drafts=(Draft(plain[r.id][:6]),) if with_draft else ())
        for r in some_requests()
    ]
    done, probes = finish_with_probes(engine, requests)
    assert tokens(done) == plain
    expected = {(i, p) for i in plain for p in (1, 4, 8) if p < len(plain[i])}
    assert {(e.request_id, e.position) for e in probes} == expected
    model = engine.runner.model
    for event in probes:
        text = [*requests[event.request_id].prompt_ids, *plain[event.request_id][: event.position]]
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([text])).last_hidden_state[0, -1]
        assert torch.allclose(event.hidden, hidden, atol=1e-9)


def test_too_long_a_request_is_refused() -> None:
    engine = engine_of()
    with pytest.raises(UserError, match=r"prompt of 60 tokens .* does not fit a slot of 64"):
        engine.submit(Request(0, tuple(range(60)), 0, Sampling(10)))
    with pytest.raises(UserError, match="prompt of 0 tokens"):
        engine.submit(Request(0, (), 0, Sampling(10)))


def test_weights_may_not_change_under_running_requests() -> None:
    engine = engine_of()
    engine.submit(some_requests()[0])
    with pytest.raises(ValueError, match="abort them first"):
        engine.load_weights(1)


def test_training_mode_is_restored_and_no_gradient_is_kept() -> None:
    engine = engine_of()
    engine.runner.model.train()
    finish(engine, some_requests(3))
    assert engine.runner.model.training
    assert all(p.grad is None for p in engine.runner.model.parameters())


def test_counters_add_up(plain) -> None:
    engine = engine_of()
    drafts = drafts_of("corrupted", plain)
    done = finish(engine, [replace(r, drafts=(Draft(drafts[r.id]),)) for r in some_requests()])
    stats = engine.stats()
    assert stats.tokens_drawn == sum(map(len, plain.values()))
    assert stats.tokens_reused == sum(c.accepted for c in done.values())
    # what was drawn: accepted, the one after the draft, or decoded
    ended_inside = sum(c.accepted == len(c.token_ids) for c in done.values())
    after = len(done) - ended_inside
    assert stats.tokens_drawn == stats.tokens_reused + after + stats.tokens_decoded
