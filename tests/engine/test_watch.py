"""Watched requests: where they are probed, with which streams, whoever draws the tokens."""

import random
from dataclasses import replace

import pytest
import torch

from reroll.types import Draft, Lenience, Watch
from tests.engine.helpers import finish, finish_with_probes
from tests.engine.test_trees import engine_of, mixed_requests, plain_of, some_drafts, tiny_model

FULL = Watch(at=(1, 4, 9), hidden=False, entropy=True, last=True)
WAYS = [
    dict(), dict(window=2), dict(redraft=8), dict(window=3, redraft=4, siblings=True, gate=True),
    dict(branching=False, redraft=2),
]  # fmt: skip


def laws_of(request, tokens: list[int]) -> torch.Tensor:
    """log pi `[L, V]` of a plain forward."""
    text = torch.tensor([[*request.prompt_ids, *request.prefix_ids, *tokens]])
    with torch.no_grad():
        logits = tiny_model("qwen3")(input_ids=text).logits[0]
    start = len(request.prompt_ids) + len(request.prefix_ids)
    return (logits[start - 1 : -1] / (request.sampling.temperature or 1)).log_softmax(-1)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("drafted", [False, True])
def test_streams_of_probes_and_entropies(way: dict, drafted: bool) -> None:
    plain, requests = plain_of(), mixed_requests()
    if drafted:
        requests = some_drafts(requests, plain, random.Random(5))
    watched = [replace(r, watch=FULL) for r in requests]
    done, probes = finish_with_probes(engine_of(slots=4, **way), watched)
    assert {i: c.token_ids for i, c in done.items()} == {i: c.token_ids for i, c in plain.items()}
    for request in requests:
        tokens = done[request.id].token_ids
        laws = laws_of(request, tokens)
        entropies = -(laws.exp() * laws).sum(-1)
        assert torch.allclose(
            torch.tensor(done[request.id].entropies, dtype=torch.float64), entropies, atol=1e-9
        )
        mine = [event for event in probes if event.request_id == request.id]
        places = [e.position for e in mine if not e.last]
        assert sorted(places) == [p for p in FULL.at if p < len(tokens)]
        for event in mine:
            read = len(tokens) if event.last else event.position
            assert event.hidden is None
            assert event.token_ids == tokens[:read]
            assert event.logprobs == done[request.id].logprobs[:read]
            assert event.entropies == done[request.id].entropies[:read]
        (last,) = (event for event in mine if event.last)
        assert last.position == len(tokens) - 1


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_n_th_step(way: dict) -> None:
    """Reported when the token that ends the n-th step has been read, with the state behind it."""
    plain = plain_of()
    requests = some_drafts(mixed_requests(), plain, random.Random(6))
    ends = frozenset(range(0, 64, 3))
    watch = Watch(at=(2,), steps=(1, 3), step_ids=ends, last=True)
    done, probes = finish_with_probes(
        engine_of(slots=3, **way), [replace(r, watch=watch) for r in requests]
    )
    expected = set()
    for request in requests:
        tokens = done[request.id].token_ids
        places = [i + 1 for i, token in enumerate(tokens[:-1]) if token in ends]
        expected |= {(request.id, 1 + k, places[n - 1]) for k, n in enumerate((1, 3))
                     if len(places) >= n}  # fmt: skip
        expected |= {(request.id, 0, 2)} if len(tokens) > 2 else set()
    found = {(e.request_id, e.place, e.position) for e in probes if not e.last}
    assert found == expected and len(expected) > len(requests)
    prompts = {r.id: r.prompt_ids for r in requests}
    for event in probes:
        text = [*prompts[event.request_id], *done[event.request_id].token_ids[: event.position]]
        with torch.no_grad():
            states = tiny_model("qwen3").model(input_ids=torch.tensor([text])).last_hidden_state
        assert event.hidden is not None
        assert torch.allclose(event.hidden, states[0, -1], atol=1e-9)


def test_entropies_go_on_across_an_interruption() -> None:
    requests = [replace(r, watch=FULL) for r in mixed_requests()]
    whole = finish(engine_of(slots=4), requests)
    engine, done = engine_of(slots=4), {}
    for request in requests:
        engine.submit(request)
    for _ in range(3):
        done |= {e.completion.request_id: e.completion for e in engine.step()
                 if hasattr(e, "completion")}  # fmt: skip
    halves = {c.request_id: c for c in engine.abort(None, "a batch was due")}
    assert any(c.token_ids for c in halves.values())
    again = [replace(r, partial=halves[r.id]) for r in requests if r.id in halves]
    resumed, probes = finish_with_probes(engine, again)
    done |= resumed
    for request in requests:
        assert done[request.id].token_ids == whole[request.id].token_ids
        assert done[request.id].entropies == pytest.approx(whole[request.id].entropies, abs=1e-9)
    # what was passed before the interruption is not reported again
    early = {r.id for r in again if len(halves[r.id].token_ids) > 1}
    assert early and not any(e.request_id in early and e.position == 1 for e in probes)


def test_entropies_of_what_lenience_keeps() -> None:
    plain, requests = plain_of(), [r for r in mixed_requests() if r.sampling.temperature > 0]
    requests = [r for r in requests if r.sampling.top_k == 0 and r.sampling.top_p == 1]
    kept = [
        replace(
            r,
            watch=FULL,
            prefix_ids=(),
            drafts=(Draft(plain[r.id].token_ids, [-1.0] * len(plain[r.id].token_ids)),),
            lenience=Lenience(float("inf")),
        )
        for r in requests
    ]
    done = finish(engine_of(slots=4), kept)
    assert sum(c.walked for c in done.values()) > 10
    for request in kept:
        laws = laws_of(request, done[request.id].token_ids)
        entropies = -(laws.exp() * laws).sum(-1)
        assert torch.allclose(
            torch.tensor(done[request.id].entropies, dtype=torch.float64), entropies, atol=1e-9
        )


def test_only_who_asks_pays() -> None:
    requests = mixed_requests()
    done = finish(engine_of(slots=4), [replace(requests[0], watch=FULL), *requests[1:]])
    assert done[requests[0].id].entropies
    assert not any(done[r.id].entropies for r in requests[1:])
