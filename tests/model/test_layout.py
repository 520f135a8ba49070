"""Forwards laid out of rollouts: every token stands once behind its own text, whatever is shared,
and what the model says of it is what a plain forward says."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reroll.model.attention import takes_flex
from reroll.model.cut import (
    LEAST_GAIN,
    cut,
    leaf_context,
    leafy_cost,
    neighbours,
)
from reroll.model.flops import CostModel
from reroll.model.layout import MASK_ELEMENTS, Layout, Pair, in_order, lay_out
from reroll.model.logprobs import token_logprobs
from reroll.model.masks import attention_mask
from reroll.model.tree import merge, tree_mask
from tests.model.plain import plain
from tests.tiny import ATTENTION_FREE, MIXTURES, SERVED, VOCABULARY, flex, tiny, wide

DEAR = CostModel(per_token=1.0, per_context=0.05)
"""attention that makes wide rows dear"""
KINDS = [(None, False), (DEAR, False), (DEAR, True), (ATTENTION_FREE, False)]
"""(cost, whether leaves are free): flat, narrow rows, rows with leaves, wide rows"""


@contextmanager
def leaves(free: bool) -> Iterator[None]:
    """Leaves that cost nothing but themselves, wherever a tree is wider than its trunk."""
    if not free:
        yield
        return
    with patch.multiple("reroll.model.cut", LEAF=0, COPY=0):
        yield


TOKENS = st.sampled_from([0, 1, 2])
PAIRS = st.lists(
    st.tuples(st.lists(TOKENS, min_size=1, max_size=4), st.lists(TOKENS, min_size=1, max_size=6)),
    min_size=1,
    max_size=10,
)


def read(layout: Layout) -> list[tuple[list[int], int]]:
    """(text that the model sees before it, token) of each packed token, by mask and positions."""
    rows, width = layout.tokens.shape
    if layout.columns is None:
        seen = torch.ones(width, width).tril().bool().expand(rows, width, width)
        position = torch.arange(width).expand(rows, width)
    else:
        order, end, position = layout.columns
        seen = tree_mask(order, end, width)
    predictions = []
    for row, column in layout.wanted.nonzero().tolist():
        columns = seen[row, column].nonzero()[:, 0]
        columns = columns[position[row, columns].argsort()]
        assert position[row, columns].tolist() == list(range(len(columns)))  # none is missing
        predictions.append(layout.tokens[row, columns].tolist())
    for part in layout.leaves:
        for row, column in part.wanted.nonzero().tolist():
            path = part.past[row]
            assert (path[1:] >= 0).sum() == (path >= 0).sum() - 1  # it stands at the front
            before = layout.tokens.flatten()[path[path >= 0]].tolist()
            predictions.append(before + part.tokens[row, : column + 1].tolist())
    of_token = layout.of_rollouts(torch.arange(len(predictions))).tolist()
    targets = layout.target if layout.gather is None else layout.target[layout.gather]
    return [(predictions[i], t) for i, t in zip(of_token, targets.tolist(), strict=True)]


def distinct(pairs: list[Pair]) -> int:
    """Distinct prefixes, the empty one left out."""
    texts = [(*a, *b) for a, b in pairs]
    return len({text[:n] for text in texts for n in range(1, len(text) + 1)})


@settings(max_examples=200)
@given(PAIRS, st.sampled_from([None, 1, 8, 20]), st.sampled_from(KINDS))
@example([([0], [0, 0]), ([0], [0, 0])], None, (ATTENTION_FREE, False))  # the same twice
@example([([0, 1], [2]), ([0], [1, 2, 0])], None, (ATTENTION_FREE, False))  # given to one alone
@example([([0, 1], [2, 2, 2]), ([0, 1], [1, 1, 2, 0])], None, (DEAR, True))
def test_every_token_is_drawn_from_its_own_text(pairs, max_tokens, kind):
    cost, free = kind
    with leaves(free):
        layouts = lay_out(pairs, max_tokens, cost)
    assert sorted(k for layout in layouts for k in layout.which) == list(range(len(pairs)))
    for layout in layouts:
        found = iter(read(layout))
        for k in layout.which:
            context, continuation = pairs[k]
            for i, token in enumerate(continuation):
                assert next(found) == ([*context, *continuation[:i]], token)
        assert next(found, None) is None
        whole = [len(pairs[k][0]) + len(pairs[k][1]) for k in layout.which]
        assert layout.flat == sum(whole)
        rows = len(layout.tokens)
        assert max_tokens is None or layout.padded() <= max_tokens or rows == 1
        if layout.columns is None:
            assert rows == len(whole) and layout.nodes == layout.flat
            assert layout.context == sum(n * (n + 1) // 2 for n in whole)
        else:
            chosen = [pairs[k] for k in layout.which]
            assert distinct(chosen) <= layout.nodes < layout.flat
            assert layout.nodes <= layout.padded()
            texts = {(*a, *b)[:n] for a, b in chosen for n in range(1, len(a) + len(b) + 1)}
            if rows == 1:
                assert layout.nodes == distinct(chosen)
                assert layout.context == sum(map(len, texts))
    if cost is None:
        assert sum(layout.nodes for layout in layouts) == sum(len(a) + len(b) for a, b in pairs)


@given(PAIRS)
def test_each_distinct_prefix_is_run_once_where_that_is_all_that_counts(pairs):
    layouts = lay_out(pairs, None, ATTENTION_FREE)
    alone = sum(len(a) + len(b) for a, b in pairs)
    nodes = sum(layout.nodes for layout in layouts)
    # but for texts that share less than a twentieth of a row
    assert distinct(pairs) <= nodes <= min(alone, 1.05 * distinct(pairs))


@given(st.lists(st.lists(TOKENS, min_size=1, max_size=6), max_size=12))
def test_neighbours_share_most(texts):
    arrays = [np.array(text) for text in texts]
    order, shared = neighbours(arrays)
    assert sorted(order) == list(range(len(texts)))
    whole = [texts[k] for k in order]
    for i, text in enumerate(whole):
        # with the one before it a text shares at least what it shares with any earlier one
        common = [
            next(
                (n for n, (a, b) in enumerate(zip(text, o, strict=False)) if a != b),
                min(len(text), len(o)),
            )
            for o in whole[:i]
        ]
        assert shared[i] == max(common, default=0) == (common[-1] if common else 0)


@settings(max_examples=100)
@given(
    st.lists(st.lists(TOKENS, min_size=1, max_size=8), min_size=1, max_size=7),
    st.floats(0.0, 0.3),
    st.sampled_from([6, 12, 1000]),
    st.sampled_from([8, 1000]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 3]),
)
def test_the_cut_is_the_cheapest(texts, each, widest, most, behind, free, block):
    arrays, cost = [np.array(text) for text in texts], CostModel(1.0, each, block)
    order, shared = neighbours(arrays)

    def price(first: int, stop: int, leafy: bool | None = None) -> float:
        if stop - first == 1:
            n = len(texts[order[first]])
            return cost.flops(n, n * (n + 1) / 2)
        # of the tree itself, node by node
        tree = merge([texts[k] for k in order[first:stop]])
        width, paths = len(tree) - 1, [row[row > 0] for row in tree.node]
        if width > most or not all(shared[i] > 0 for i in range(first + 1, stop)):
            return float("inf")
        seen = cost.attended(width)
        whole = LEAST_GAIN * cost.flops(width, seen) if width <= widest else float("inf")
        inside = [int((tree.count[path] >= 2).sum()) for path in paths]
        rests = [len(path) - n for path, n in zip(paths, inside, strict=True)]
        context = sum(leaf_context(cost, n, m) for n, m in zip(rests, inside, strict=True))
        trunk = int((tree.count[1:] >= 2).sum())
        split = leafy_cost(cost, width, trunk, sum(n > 0 for n in rests), context)
        split = split if trunk <= widest else float("inf")
        if leafy is None:
            return min(whole, split) if behind else whole
        return split if leafy else whole

    with leaves(free):
        count, least = len(order), float("inf")
        for ends in itertools.product([False, True], repeat=count - 1):
            bounds = [0, *(i + 1 for i, end in enumerate(ends) if end), count]
            least = min(least, sum(price(a, b) for a, b in itertools.pairwise(bounds)))
        rows = cut(arrays, cost, widest, most, behind)
        assert [k for row in rows for k in row.texts] == order
        assert behind or not any(row.leafy for row in rows)
        bounds = itertools.pairwise([0, *itertools.accumulate(len(row.texts) for row in rows)])
        found = sum(price(*ends, row.leafy) for ends, row in zip(bounds, rows, strict=True))
    assert found == pytest.approx(least, rel=1e-12)


def test_little_in_common_with_a_neighbour_ends_the_search(monkeypatch):
    groups = [[[0, 1, k, *[2] * 38, k, j, *[j] * 20] for j in range(3)] for k in range(3, 6)]
    texts = [np.array(text) for group in groups for text in group]
    # two tokens of 62 in common, which would save 4 of 126
    rows = cut(texts, ATTENTION_FREE, 1000, 1000)
    assert [row.texts for row in rows] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    monkeypatch.setattr("reroll.model.cut.LEAST_GAIN", 1.0)
    assert [row.texts for row in cut(texts, ATTENTION_FREE, 1000, 1000)] == [list(range(9))]


def test_flex_attention_is_for_wide_rows():
    pairs = [([1] * 10, [50 + j] * 10) for j in range(4)] + [([2] * 5, [j] * 9) for j in (3, 4)]
    cost = replace(ATTENTION_FREE, flex_from=50)
    layouts = [layout for one in (pairs[:4], pairs[4:]) for layout in lay_out(one, None, cost)]
    assert [(layout.tokens.shape[1], layout.flex) for layout in layouts] == [
        (50, True),
        (23, False),
    ]
    cost = CostModel(1.0, 1.0, flex_from=1000)
    assert cost.attended(999) == 999**2 and cost.attended(1024) == 1024 * (1024 + 128) / 2


def test_blocks_attend_to_what_stands_before_their_end():
    # three blocks of four queries: 4 * 4 + 4 * 8 + 4 * 12 pairs
    assert CostModel(1.0, 1.0, block=4).attended(12) == 4 * 4 + 4 * 8 + 4 * 12
    assert CostModel(1.0, 1.0, block=12).attended(12) == CostModel(1.0, 1.0).attended(12) == 144
    assert CostModel(1.0, 1.0, block=12).attended(5) == 25


def test_by_hand():
    # 5 6 | 7 8    two replies of one prompt, one of which goes on where the other ends,
    # 5 6 | 7      and a third; 9 shares nothing
    pairs = [([5, 6], [7, 8]), ([9], [9, 9]), ([5, 6], [7]), ([5, 6], [1])]
    alone, shared = lay_out(pairs, None, ATTENTION_FREE)
    assert alone.which == [1] and alone.tokens.tolist() == [[9, 9, 9]] and alone.columns is None
    assert sorted(shared.which) == [0, 2, 3] and shared.nodes == 5 and shared.flat == 4 + 3 + 3
    assert sorted(shared.tokens[0].tolist()) == [1, 5, 6, 7, 8]
    assert shared.context == 1 + 2 + 3 + 3 + 4
    assert int(shared.wanted.sum()) == 2  # behind 6, and behind 7
    assert sorted(shared.target.tolist()) == [1, 7, 8]  # 7 is drawn once, for both


def test_little_sharing_goes_flat():
    # 24 of 25 tokens are each one's own
    pairs = [([0], list(range(1, 25))), ([0], list(range(25, 49)))]
    (layout,) = lay_out(pairs, None, ATTENTION_FREE)
    assert layout.columns is None and layout.nodes == 50
    pairs = [([0, 1, 2], list(range(3, 25))), ([0, 1, 2], list(range(25, 47)))]
    (layout,) = lay_out(pairs, None, ATTENTION_FREE)
    assert layout.columns is not None and layout.nodes == 3 + 44


def test_wide_rows_are_split_and_each_piece_carries_the_trunk():
    trunk = list(range(20))
    pairs = [(trunk, [20 + k] * 30) for k in range(8)]
    (layout,) = lay_out(pairs, None, ATTENTION_FREE)
    assert layout.tokens.shape == (1, 20 + 8 * 30)
    for max_tokens in (150, 90, 60):
        layouts = lay_out(pairs, max_tokens, ATTENTION_FREE)
        per_row = (max_tokens - 20) // 30
        wide = [layout for layout in layouts if layout.columns is not None]
        assert all(layout.tokens.numel() <= max_tokens for layout in layouts)
        if per_row > 1:
            assert sum(layout.nodes for layout in wide) == 8 // per_row * (20 + per_row * 30)
        else:
            assert not wide and len(layouts) == 8


def test_masks_are_bounded(monkeypatch):
    monkeypatch.setattr("reroll.model.layout.MASK_ELEMENTS", 5000)
    pairs = [([k] * 10, [50 + j] * 10) for k in range(6) for j in range(4)]
    for layout in lay_out(pairs, None, ATTENTION_FREE):
        assert layout.columns is not None
        rows, width = layout.tokens.shape
        assert width == 50 and rows <= 2
    monkeypatch.setattr("reroll.model.layout.MASK_ELEMENTS", 2000)
    with leaves(True):  # 10 of the prompt, leaves of 10 behind them
        layouts = lay_out(pairs, None, DEAR)
    assert sum(len(layout.which) for layout in layouts) == 24
    for layout in layouts:
        masks = [layout.tokens.numel() * 10, *(x.tokens.numel() * 20 for x in layout.leaves)]
        assert layout.leaves and max(masks) <= 2000
    assert MASK_ELEMENTS == 1 << 26


@pytest.mark.parametrize(
    "budget, shapes",
    [
        (None, [(7, 100)]),  # without a budget all in one
        # 10 alone is small, under a tenth of the budget, and takes what comes; 10 + 30 take no more
        (400, [(2, 30), (3, 30), (2, 100)]),
        (4000, [(7, 100)]),  # a tenth of it: small, as a whole
        (90, [(1, 10), (3, 30), (1, 30), (1, 100), (1, 100)]),
    ],
)
def test_little_of_a_forward_is_padding(budget, shapes):
    pairs = [([1], [2] * (n - 1)) for n in (30, 100, 30, 10, 30, 100, 30)]
    assert [tuple(x.tokens.shape) for x in lay_out(pairs, budget)] == shapes


def test_forwards_of_leaves_are_bounded(monkeypatch):
    monkeypatch.setattr("reroll.model.layout.MASK_ELEMENTS", 3000)
    trunk = list(range(40))
    pairs = [(trunk, [50 + k] * 20) for k in range(6)]
    with leaves(True):
        (layout,) = lay_out(pairs, 10_000, DEAR)
    masks = [x.tokens.numel() * (x.past.shape[1] + x.tokens.shape[1]) for x in layout.leaves]
    assert sum(len(x.tokens) for x in layout.leaves) == 6 and max(masks) == 2 * 20 * 60


def test_what_is_brought_to_leaves_counts_as_memory():
    # two groups of 40 + 2 * 20 tokens, 80 brought: as much as 10 tokens that are run
    pairs = [([a, *range(40)], [50 + k] * 20) for a in (8, 9) for k in range(2)]
    with leaves(True):
        for room, forwards in (((81 + 10) * 2 / 0.9 + 1, 1), ((81 + 9) * 2 / 0.9, 2)):
            assert len(lay_out(pairs, int(room), DEAR)) == forwards


def test_nothing_to_lay_out():
    assert lay_out([]) == lay_out([], 10, DEAR) == []


def test_in_order_undoes_the_sorting():
    pairs = [([1], [2] * n) for n in (3, 1, 2)]
    layouts = lay_out(pairs, 6)
    streams = [
        torch.tensor([float(10 * k + i) for k in layout.which for i in range(len(pairs[k][1]))])
        for layout in layouts
    ]
    said = [(stream, None, -stream) for stream in streams]
    found, none, negative = in_order(layouts, said, [3, 1, 2])
    assert found is not None and negative is not None and none is None
    assert found.tolist() == (-negative).tolist() == [0, 1, 2, 10, 20, 21]
    assert in_order([], [], []) == []


# --- what the model says ------------------------------------------------------------------------

SINGLE = {*MIXTURES, "gemma2"}
"""computed in float32; of Gemma 2 only the softmax of its attention is"""


def ragged(seed: int = 0) -> list[Pair]:
    """Groups with shared prompts and beginnings, identical rollouts, one-token rollouts, nested
    prefixes, and some that share nothing."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    prompt, other, begun = tokens(9), tokens(3), tokens(8)
    return [
        (prompt, [*begun, *tokens(5)]),
        (prompt, [*begun[:4], *tokens(7)]),
        (prompt, begun),
        (prompt, begun),
        (prompt, tokens(1)),
        (other, tokens(6)),
        (other, [*tokens(2)]),
        (tokens(5), tokens(4)),
        ([*prompt, *begun[:3]], [*begun[3:], *tokens(3)]),  # a prefix that is given
        ([*prompt, *begun[:6]], tokens(2)),
    ]


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("name", SERVED)
def test_trees_say_what_plain_forwards_say(name, free, monkeypatch):
    monkeypatch.setattr("reroll.model.attention.BLOCK", 4)
    with nullcontext() if name in SINGLE else wide(), leaves(free):
        compare_with_plain(name, DEAR if free else ATTENTION_FREE, free)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("name", SERVED)
def test_trees_through_flex_attention_say_the_same(name, free):
    kind = DEAR if free else ATTENTION_FREE
    with nullcontext() if name in SINGLE else wide(), leaves(free), flex():
        compare_with_plain(
            name, replace(kind, flex_from=0 if takes_flex(tiny(name)) else None), free
        )


def compare_with_plain(name, cost, leafy):
    model, pairs = tiny(name), ragged()
    layouts = lay_out(pairs, None, cost)
    assert any(layout.leaves for layout in layouts) == leafy
    assert any(layout.columns is not None for layout in layouts)
    got = token_logprobs(model, pairs, temperature=0.7, entropy=True, hidden=True, cost=cost)
    assert got.entropy is not None and got.hidden is not None
    each = [plain(model, *pair, temperature=0.7) for pair in pairs]
    logprobs, entropy = (torch.cat(parts) for parts in zip(*each, strict=True))
    bound = 2e-5 if name in SINGLE else 1e-12
    assert (got.logprobs - logprobs).abs().max() < bound
    assert (got.entropy - entropy).abs().max() < bound
    states = token_logprobs(model, pairs, temperature=0.7, hidden=True).hidden
    assert states is not None and (got.hidden - states).abs().max() < bound
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    shared = gradient(model, (weights * (got.logprobs + 0.5 * got.entropy)).sum())
    apart = gradient(model, (weights * (logprobs + 0.5 * entropy)).sum())
    assert apart.norm() > 1
    assert (shared - apart).norm() < (1e-5 if name in SINGLE else 1e-10) * apart.norm()


def test_windows_go_by_depth_and_the_comparison_can_fail(monkeypatch):
    model, pairs = tiny("mistral_window"), ragged()
    expected = token_logprobs(model, pairs).logprobs

    def by_column(style, seen, query, key, dtype):
        columns = torch.arange(key.shape[1]).expand(key.shape)
        return attention_mask(style, seen, columns, columns, dtype)

    monkeypatch.setattr("reroll.model.logprobs.attention_mask", by_column)
    got = token_logprobs(model, pairs, cost=ATTENTION_FREE).logprobs
    assert (got - expected).abs().max() > 1e-2


def test_pads_of_leaves_stay_within_the_positions_that_a_model_has():
    """A short leaf behind a long path beside a long leaf behind a short one."""
    model = tiny("gpt2")
    positions = model.transformer.wpe
    positions.weight = torch.nn.Parameter(positions.weight[:32])
    long, short = list(range(24)), list(range(30, 35))
    pairs = [
        (long, [40] * 8),
        (long, [41] * 8),
        (long, [44]),
        (short, [42] * 27),
        (short, [43] * 27),
    ]
    cost = CostModel(1.0, 0.001)
    with leaves(True), wide(), torch.no_grad():
        layouts = lay_out(pairs, None, cost)
        widths = [x.past.shape[1] + x.tokens.shape[1] for y in layouts for x in y.leaves]
        assert max(widths) > 32
        got = token_logprobs(model, pairs, cost=cost).logprobs
        assert (got - token_logprobs(model, pairs).logprobs).abs().max() < 1e-12


@pytest.fixture
def _two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_two_threads")
def test_gradients_add_up_in_one_order_on_several_threads():
    """Eight rollouts behind one hidden state, enough of them to be shared among threads."""
    pairs = [(list(range(9)), [k, *range(9)]) for k in range(8)] * 16
    (layout,) = lay_out(pairs, None, ATTENTION_FREE)
    states = torch.randn(int(layout.wanted.sum()), 64, requires_grad=True)
    weights = torch.randn(len(pairs) * 10, 64)
    assert weights.numel() > 32768
    found = {
        torch.autograd.grad((weights * layout.of_rollouts(states)).sum(), states)[0]
        .numpy()
        .tobytes()
        for _ in range(20)
    }
    assert len(found) == 1


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen2_moe"])
def test_trees_in_float32(name, monkeypatch):
    monkeypatch.setattr("reroll.model.attention.BLOCK", 4)
    model, pairs = tiny(name, dtype=torch.float32), ragged(1)
    with torch.no_grad():
        shared = token_logprobs(model, pairs, cost=ATTENTION_FREE).logprobs
        flat = token_logprobs(model, pairs).logprobs
    assert shared.dtype == torch.float32 and (shared - flat).abs().max() < 2e-5
    weights = torch.linspace(-1, 2, len(flat))
    one, other = (
        gradient(model, (weights * token_logprobs(model, pairs, cost=cost).logprobs).sum())
        for cost in (ATTENTION_FREE, None)
    )
    assert (one - other).norm() < 1e-5 * other.norm()


def test_trees_under_autocast(monkeypatch):
    monkeypatch.setattr("reroll.model.attention.BLOCK", 4)
    model, pairs = tiny("qwen3", dtype=torch.float32), ragged(2)
    flat = token_logprobs(model, pairs).logprobs
    with torch.autocast("cpu", torch.bfloat16):
        rounded = token_logprobs(model, pairs, cost=ATTENTION_FREE).logprobs
        alone = token_logprobs(model, pairs).logprobs
    # as near to the exact ones as plain forwards under autocast are
    assert rounded.dtype == torch.float32
    off, as_far = (rounded - flat).abs().max(), (alone - flat).abs().max()
    assert 0 < off < 3 * as_far


REPLIES = st.lists(
    st.tuples(st.lists(TOKENS, max_size=5), st.lists(TOKENS, min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.lists(TOKENS, min_size=1, max_size=6), REPLIES), min_size=1, max_size=4),
    st.sampled_from(["llama", "qwen3_window"]),
    st.sampled_from([None, 30]),
    st.booleans(),
)
def test_any_groups_in_float64(groups, name, max_tokens, free):
    pairs = [(prompt, [*begun, *rest]) for prompt, replies in groups for begun, rest in replies]
    model = tiny(name)
    cost = DEAR if free else ATTENTION_FREE
    with wide(), leaves(free):
        flat = token_logprobs(model, pairs).logprobs
        got = token_logprobs(model, pairs, max_tokens=max_tokens, cost=cost).logprobs
        assert (got - flat).abs().max() < 1e-11
        weights = torch.linspace(-1, 2, len(flat), dtype=flat.dtype)
        one, other = (gradient(model, (weights * x).sum()) for x in (got, flat))
    assert (one - other).norm() <= 1e-10 * other.norm()
