"""Samples on their trees: every step against one that looks up prefixes, and what is counted.

The walk is tried without a model: logits come from a table of prefixes. The counters are compared
with those of a loop over the true replies.
"""

import itertools
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from reroll.algo.noise import make_key
from reroll.algo.sample import draw
from reroll.engine.costs import Costs
from reroll.engine.follow import count_follow
from reroll.engine.redraft import Texts
from reroll.engine.runner import make_law
from reroll.engine.sequence import Sequence
from reroll.engine.walk import STRETCH, Forest, Walk
from reroll.model.tree import merge
from reroll.types import Draft, Finish, Request, Sampling
from tests.engine.helpers import finish
from tests.engine.test_trees import (
    CHEAP,
    check_same,
    engine_of,
    mixed_requests,
    one_group,
    plain_group,
    plain_of,
    some_drafts,
)

CPU = torch.device("cpu")
SIZE = 5
"""tokens of the table's vocabulary"""


class TableRunner:
    """What a walk needs of a runner."""

    device = CPU
    draw = staticmethod(draw)


@cache
def logits_after(seed: int, row: int, text: tuple[int, ...]) -> np.ndarray:
    """A law for each prefix; peaked, so that samples share long beginnings."""
    return np.random.default_rng([seed, row, *text]).normal(size=SIZE) * 4


def texts_of(trees) -> list[list[tuple[int, ...]]]:
    """The text to each node of each tree."""
    out = []
    for tree in trees:
        texts = [()]
        for node in range(1, len(tree)):
            texts.append((*texts[tree.parent[node]], int(tree.tokens[node])))
        out.append(texts)
    return out


@cache
def one_by_one(seed: int, row: int, request: Request, begin: int) -> list[tuple[int, float]]:
    """Tokens and log-probs drawn without any tree."""
    law, text, out = make_law([request], CPU), (), []
    while len(text) < request.sampling.max_tokens:
        logits = torch.from_numpy(logits_after(seed, row, text))[None]
        drawn = draw(logits, torch.tensor([begin + len(text)]), law)
        out.append((int(drawn.tokens), float(drawn.logprobs)))
        text = (*text, out[-1][0])
        if text[-1] in request.sampling.stop_ids:
            break
    return out


def make_samples(seed: int, rng: random.Random) -> tuple[list[tuple[int, Sequence]], list[list]]:
    """Samples of three rows, and texts for their trees: true replies, cut, bent, and nonsense."""
    samples, texts = [], []
    for row in range(3):
        pool, begin = [], rng.randint(0, 3)
        for sample in range(5):
            stops = (4,) if rng.random() < 0.3 else ()
            limit = rng.choice([1, 2, 5, 12, 25, 25])
            law = Sampling(limit, temperature=rng.choice([0, 0.7, 1]), stop_ids=stops)
            prefix = tuple(range(begin))
            request = Request(9, (1,), make_key(seed, "train", row, sample, 0), law, prefix)
            samples.append((row, Sequence.start(request, Texts())))
            reply = [token for token, _ in one_by_one(seed, row, request, begin)]
            at = rng.randrange(len(reply))
            bent = [*reply[:at], (reply[at] + 1) % SIZE, *(rng.randrange(SIZE) for _ in range(9))]
            pool += [reply, reply[: rng.randint(0, len(reply))], bent]
        texts.append(rng.sample(pool, rng.randint(0, len(pool))))
    return samples, texts


@pytest.mark.parametrize("window", [1, 3, STRETCH - 1, STRETCH, STRETCH + 1, 99])
def test_walking_equals_drawing_one_by_one(window):
    deepest = left = 0
    for seed in range(6):
        samples, texts = make_samples(seed, random.Random(seed))
        trees = [merge(part) for part in texts]
        forest, spelled = Forest(trees), texts_of(trees)
        walk = Walk(TableRunner(), forest, samples, 5, count_follow())
        names = [sorted(map(tuple, part)) for part in spelled]
        rows = np.concatenate([np.full(len(tree), r) for r, tree in enumerate(trees)])
        every = [text for part in spelled for text in part]
        start, expected = 0, {}
        for index, (row, sample) in enumerate(samples):
            expected[index] = one_by_one(seed, row, sample.request, int(walk.begin[index]))
        while start <= forest.depth.max():
            # windows overlap nowhere; the first one holds the root as well
            inside = (forest.depth >= start) & (forest.depth < max(start, 1) + window)
            forest.logit[:] = -1
            forest.logit[inside] = np.arange(inside.sum())
            forest.column[inside] = 0
            table = np.stack(
                [logits_after(seed, rows[i], every[i]) for i in np.flatnonzero(inside)]
            )
            walk.go(torch.from_numpy(table))
            run = max(start, 1) + window - 1  # depths up to here have been run
            for index, (row, sample) in enumerate(samples):
                drawn = expected[index]
                reply = tuple(token for token, _ in drawn)
                on = next(
                    (n for n in range(len(reply)) if reply[: n + 1] not in names[row]), len(reply)
                )  # tokens that stand in the tree
                size = min(len(drawn), on + 1, run + 1)
                begin, got = int(walk.begin[index]), sample.completion
                assert got.token_ids[begin:] == list(reply[:size])
                assert got.logprobs[begin:] == pytest.approx([x for _, x in drawn[:size]])
                assert got.versions[begin:] == [5] * size
                assert got.accepted == got.walked == min(on, size)
                assert sample.finished == (size == len(drawn))
                sample.check()
                waits = not sample.finished and size <= on
                assert walk.walking[index] == waits == (index in walk.waiting())
                if not sample.finished:  # it stands there, or left from there
                    at = walk.at[index] - forest.at[row]
                    assert spelled[row][at] == reply[: size if waits else size - 1]
                deepest, left = max(deepest, size), left + (on < size)
            start = run + 1
        assert not walk.walking.any()
    assert deepest == 25 and left > 15


def test_follow_counts_every_draw_that_could_go_on():
    """Who stood at a node with children, and whether the next token was one; endings left out."""
    total = 0
    for seed in range(6):
        samples, texts = make_samples(seed, random.Random(seed))
        law = Sampling(40, stop_ids=(4,))  # the limit is not reached
        samples = [
            (row, Sequence.start(replace(s.request, sampling=law), Texts())) for row, s in samples
        ]
        # as the engine has them: up to the ending, which is drawn
        texts = [[text[: [*text, 4].index(4)] for text in part] for part in texts]
        trees = [merge(part) for part in texts]
        forest, follow = Forest(trees), count_follow()
        visits, stays = follow.trials.copy(), follow.hits.copy()
        for row, sample in samples:
            node, tree = 0, trees[row]
            drawn = one_by_one(seed, row, sample.request, len(sample.completion.token_ids))
            for token, _ in drawn:
                if token == 4 or tree.end[node] == node + 1:
                    break  # an ending, a leaf
                child = np.flatnonzero((tree.parent == node) & (tree.tokens == token))
                place = next(b for b in range(7) if tree.count[node] <= 2**b)
                visits[place] += 1
                stays[place] += len(child)
                if not len(child):
                    break
                node = child[0]
        walk = Walk(TableRunner(), forest, samples, 0, follow)
        forest.logit[:] = np.arange(len(forest.logit))
        every = [(r, text) for r, part in enumerate(texts_of(trees)) for text in part]
        walk.go(torch.from_numpy(np.stack([logits_after(seed, *place) for place in every])))
        assert follow.trials.tolist() == visits.tolist()
        assert follow.hits == pytest.approx(stays)
        total += visits.sum() - 350
    assert total > 150


def test_forest_against_its_trees():
    rng = np.random.default_rng(0)
    trees = [merge([])] + [
        merge([rng.integers(0, 3, rng.integers(0, 5)).tolist() for _ in range(n)])
        for n in (1, 4, 7)
    ]
    forest = Forest([*trees, merge([[2**31 - 2], [0]])])
    for index, tree in enumerate(trees):
        root = int(forest.at[index])
        for node, token in itertools.product(range(len(tree)), range(4)):
            children = np.flatnonzero((tree.parent == node) & (tree.tokens == token))
            expected = root + children[0] if len(children) else -1
            assert forest.child(np.array([root + node]), np.array([token])) == [expected]
            assert forest.leaf[root + node] == (node not in tree.parent)
        for node in range(len(tree)):
            way = [node]
            while way[0]:
                way.insert(0, int(tree.parent[way[0]]))
            got = forest.path(root + node, 0, len(way)) - root
            assert got.tolist() == way and forest.depth[root + node] == len(way) - 1
    last = int(forest.at[-1])
    found = forest.child(np.full(3, last), np.array([0, 2**31 - 2, 1]))
    assert (found >= 0).tolist() == [True, True, False]


# --- counters -----------------------------------------------------------------------------------


def offered_prefixes(requests: list[Request], limit: int, stops: tuple[int, ...]) -> set:
    """Prefixes that a group's drafts are worth verifying at: up to the limit and the ending."""
    found = set()
    for draft in {id(d): d for r in requests for d in r.drafts}.values():
        text = list(draft.token_ids[: limit - 1])
        text = text[: min((text.index(s) for s in stops if s in text), default=len(text))]
        found |= {tuple(text[:n]) for n in range(1, len(text) + 1)}
    return found


def reached(nodes: set, replies: list[list[int]], window: int) -> set:
    """Those that are run in windows: below a node where somebody waits when the last one ends."""
    run, start = set(), 1
    while True:
        waiting = {
            tuple(reply[:start])
            for reply in replies
            # the last token is drawn, and that was the end of it
            if len(reply) > start and tuple(reply[:start]) in nodes
        }
        if start == 1:
            waiting = {node for node in nodes if len(node) == 1}
        here = {
            node
            for node in nodes
            if start <= len(node) < start + window and node[:start] in waiting
        }
        if not here:
            return run
        run |= here
        start += window


def uniform_groups(stop_ids=()) -> list[Request]:
    """Three groups of four, one limit, the same stop ids."""
    return [
        Request(4 * g + s, prompt, make_key(6, "train", g, s, 0), Sampling(15, stop_ids=stop_ids))
        for g, prompt in enumerate([(3, 1, 4), (1, 5, 9, 2, 6), (8,)])
        for s in range(4)
    ]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("rows", [1, 32])
def test_every_reached_node_is_verified_once(window, rows):
    stops = (7, 8)
    requests = uniform_groups(stops)
    plain = finish(engine_of(slots=1), requests)
    deep = 0
    for seed in range(4):
        drafted = some_drafts(requests, plain, random.Random(seed))
        engine = engine_of(slots=12, window=window, prefill_rows=rows)
        done = finish(engine, drafted)
        check_same(done, plain)
        verified = context = prefill = offered = trees = 0
        for _, members in itertools.groupby(drafted, key=lambda r: r.prompt_ids):
            group = list(members)
            given = len(group[0].prompt_ids)
            nodes = offered_prefixes(group, 15, stops)
            run = reached(nodes, [plain[r.id].token_ids for r in group], window)
            if window == 64:
                assert run == nodes
            verified += len(run)
            context += sum(given + len(node) for node in run)
            prefill += given * (given + 1) // 2
            offered, trees = offered + len(nodes), trees + bool(nodes)
            deep += len(nodes - run)
            for request in group:  # on the tree up to the first surprise
                reply = plain[request.id].token_ids
                on = next(
                    n for n in range(16) if n == len(reply) or tuple(reply[: n + 1]) not in nodes
                )
                assert done[request.id].accepted == done[request.id].walked == on
        stats = engine.stats()
        assert stats.tokens_verified == verified
        assert stats.context["verify"] == context and stats.context["prefill"] == prefill
        assert (stats.nodes_offered, stats.trees_offered) == (offered, trees)
        assert stats.trees_skipped == stats.tokens_redrafted == 0
        assert stats.tokens_prefilled == 3 + 5 + 1
        assert stats.tokens_drawn == sum(len(c.token_ids) for c in plain.values())
        assert stats.tokens_reused == sum(c.accepted for c in done.values())
        # one at a time from the token after the tree on
        rest = {i: len(c.token_ids) - min(c.walked + 1, len(c.token_ids)) for i, c in done.items()}
        assert stats.tokens_decoded == sum(rest.values())
        lengths = {r.id: len(r.prompt_ids) + len(plain[r.id].token_ids) for r in requests}
        assert stats.context["decode"] == sum(
            lengths[i] - n for i, count in rest.items() for n in range(1, count + 1)
        )
    assert deep == 0 if window == 64 else deep > 10  # there was something to leave out


def test_the_deep_part_that_nobody_reaches_costs_nothing():
    plain = plain_group()
    reply = plain[0].token_ids
    wrong = (reply[2] + 1) % 61
    stem, tail = [*reply[:2], wrong], list(range(30, 38))
    requests = [replace(one_group()[0], drafts=(Draft([*stem, *tail]), Draft(reply[:3])))]
    for window, verified in ((1, 3), (2, 3), (3, 4), (4, 5), (64, 12)):
        # nodes: 2 in common, then the right one, the wrong one, and 8 behind the wrong one; a
        # window that begins at the right one holds nothing else
        engine = engine_of(window=window)
        done = finish(engine, requests)
        check_same(done, plain)
        assert done[0].accepted == 3
        assert engine.stats().tokens_verified == verified
        assert engine.stats().nodes_offered == 12


def test_what_is_not_worth_it_is_not_verified():
    plain = plain_group(8, 12)
    requests = [replace(r, drafts=(Draft(plain[0].token_ids),)) for r in one_group(8)]
    for prefill, verified in ((0.0, 11), (1e9, 0)):
        engine = engine_of(slots=8, gate=True, costs=replace(CHEAP, prefill=prefill))
        done = finish(engine, requests)
        check_same(done, plain)
        stats = engine.stats()
        assert stats.tokens_verified == verified and stats.nodes_offered == 11
        assert stats.trees_skipped == (verified == 0)
        assert done[0].accepted == verified
    # in between: 8 samples at eight a tick, all on one text that 97 in 100 go on with: node d has
    # 8 * 0.97^d visits and saves 0.97^d
    engine = engine_of(slots=8, gate=True, costs=replace(CHEAP, prefill=0.97**5.5))
    check_same(finish(engine, requests), plain)
    assert engine.stats().tokens_verified == 5


def test_what_decoding_has_cost_decides_what_is_worth_it():
    """Thin ticks make tokens dear: then nodes are worth it that full slots would decode cheaper."""
    plain = plain_group(8, 12)
    costs = Costs((1, 8), ((1.0,) * 4, (1.0,) * 4), 0.3)
    # two samples at each node at most: worth it where a token costs more than 0.15
    requests = [replace(r, drafts=(Draft(plain[0].token_ids),)) for r in one_group(2)]
    verified = []
    for before in (0, 1, 8):
        engine = engine_of(slots=8, gate=True, costs=costs)
        finish(engine, one_group(before, 9))
        assert engine.pace.tokens == 8 * before
        check_same(finish(engine, requests), plain)
        verified.append(engine.stats().tokens_verified)
    # eight at a time: unmeasured and measured; alone: a tick for a token
    assert verified == [0, 11, 0]


def test_a_narrow_window_learns_from_the_first():
    """Of two equal texts behind each of two first tokens, only that where samples wait is run."""
    plain = plain_group(8, 12)
    first = plain[0].token_ids[0]
    drafts = (Draft([(first + 1) % 61, *range(10)]), Draft([first, *plain[0].token_ids[1:]]))
    requests = [replace(one_group()[0], id=0, drafts=drafts)]
    engine = engine_of(window=1)
    done = finish(engine, requests)
    assert done[0].token_ids == plain[0].token_ids and done[0].finish is Finish.LENGTH
    assert engine.stats().tokens_verified == 1 + 11 and engine.stats().nodes_offered == 22


@pytest.mark.parametrize("redraft", [1, 4])
def test_counters_of_resumed_and_prefixed_requests(redraft):
    """What came in is prefilled, not drawn; what was accepted earlier is not accepted again."""
    plain, rng = plain_of(), random.Random(5)
    requests = {r.id: r for r in some_drafts(mixed_requests(), plain, rng)}
    engine = engine_of(slots=5, window=3, redraft=redraft)
    for request in requests.values():
        engine.submit(request)
    done = {}
    for event in engine.step():
        done[event.completion.request_id] = event.completion
    partial = {p.request_id: p for p in engine.abort(None, "")}
    first = replace(engine.stats(), context={}, seconds={})
    had = sum(len(p.token_ids) for p in partial.values())
    accepted = sum(p.accepted for p in partial.values())
    drawn = sum(len(c.token_ids) for c in done.values()) + had
    assert first.tokens_drawn == drawn
    assert first.tokens_reused == accepted + sum(c.accepted for c in done.values())
    again = [
        replace(requests[i], partial=p, drafts=(Draft(plain[i].token_ids),))
        for i, p in partial.items()
    ]
    again = finish(engine, again)
    check_same(again, plain)
    second = engine.stats()
    total = sum(len(c.token_ids) for c in again.values())
    assert second.tokens_drawn - first.tokens_drawn == total - had
    now = sum(c.accepted for c in again.values())
    assert second.tokens_reused - first.tokens_reused == now - accepted > 0
