"""Minibatches hold whole groups, budgets are kept, and every stream stands at its token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reroll.train.batch import Microbatch, minibatches
from reroll.train.credit import Credit
from reroll.types import Group, Prompt
from tests.train.batches import credit, group, rollout


@pytest.fixture(autouse=True)
def _padding_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reroll.model.cut.FULL", 0.0)


def rows_of(microbatch: Microbatch) -> list[int]:
    """Dataset row of each rollout: the prompts of these tests hold nothing else."""
    assert microbatch.layout.columns is None
    return microbatch.layout.tokens[:, 0].tolist()


def numbered(row: int, rewards: list[float | None], lengths: list[int]) -> Group:
    """A group whose prompt is its row, twice."""
    prompt = Prompt(row, "", (row, row))
    made = [rollout(prompt, [9] * n, r) for r, n in zip(rewards, lengths, strict=True)]
    return Group(prompt, made)


def by_hand() -> list[Credit]:
    """Two rollouts of a group, of 3 and 2 tokens; the loss is on fewer than could be trained on."""
    prompt = Prompt(0, "", (5, 6))
    one = rollout(prompt, [1, 2, 3], 2.0, logprobs=[-0.5, -0.25], version=7, prefix=1, weight=3.0)
    other = rollout(prompt, [4, 9], 1.0, logprobs=[-1.0, -2.0], version=3, weight=0.5)
    one.completion.behaviour_logprobs = [0.0, -0.4, -0.2]
    streams = [torch.arange(5, dtype=torch.float64) + 10 * k for k in range(1, 6)]
    return [
        Credit(one, [False, True, True], [0, 0, 0], *(x[:3] for x in streams)),
        Credit(other, [False, True], [4, 4], *(x[3:] for x in streams)),
    ]


def test_by_hand():
    (part,) = minibatches([by_hand()], 1, 1000, True)
    # 2 tokens of weight 3 and 1 of weight 1/2
    assert (part.tokens, part.rollouts, part.groups, part.live_groups) == (6.5, 3.5, 1, 1)
    (batch,) = part.microbatches
    # the shorter rollout comes first
    assert batch.layout.tokens.tolist() == [[5, 6, 4, 9, 0], [5, 6, 1, 2, 3]]
    assert batch.lengths == [2, 3]
    assert batch.weights.tolist() == [0.5, 3.0]
    assert batch.mask.tolist() == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert batch.lags.tolist() == [4, 4, 0, 0, 0]
    assert batch.logprobs.tolist() == [-1.0, -2.0, 0.0, -0.5, -0.25]
    assert batch.behaviour.tolist() == [-1.0, -2.0, 0.0, -0.4, -0.2]
    streams = (batch.advantages, batch.reference, batch.proximal, batch.values, batch.returns)
    for k, stream in enumerate(streams, start=1):
        assert stream is not None
        assert stream.tolist() == [10 * k + i for i in (3, 4, 0, 1, 2)]
        assert stream.dtype == torch.float64  # what the formulas made is not rounded on the way
    assert batch.logprobs.dtype == torch.float64 and batch.lags.dtype == torch.int64


def test_what_is_not_there_stays_away():
    bare = [Credit(c.rollout, c.mask, c.lags, c.advantages) for c in by_hand()]
    (part,) = minibatches([bare], 1, 1000, True)
    (batch,) = part.microbatches
    assert batch.reference is batch.proximal is batch.values is batch.returns is None


def test_streams_are_moved_in_the_dtype_of_the_loss():
    (part,) = minibatches([by_hand()], 1, 1000, True)
    (batch,) = part.microbatches
    moved = batch.to(torch.device("cpu"), torch.float32)
    assert torch.equal(moved.layout.tokens, batch.layout.tokens) and moved.lengths == batch.lengths
    assert moved.lags.dtype == torch.int64
    for name in ("weights", "mask", "logprobs", "behaviour", "advantages", "reference", "proximal"):
        assert getattr(moved, name).dtype == torch.float32
        assert torch.equal(getattr(moved, name), getattr(batch, name).float())


@pytest.mark.parametrize(
    "groups, count, sizes",
    [
        (6, 1, [6]),
        (6, 2, [3, 3]),
        (7, 3, [2, 3, 2]),
        (5, 4, [1, 1, 2, 1]),  # bounds at 1.25, 2.5 (to even) and 3.75
        (4, 4, [1, 1, 1, 1]),
        (2, 4, [1, 1]),  # fewer groups than minibatches: fewer optimizer steps
        (0, 3, []),
    ],
)
def test_minibatches_are_even_and_in_order(groups, count, sizes):
    credited = credit([numbered(row, [0.0, 1.0], [1, 1]) for row in range(groups)])
    parts = minibatches(credited, count, 1000, True)
    assert [part.groups for part in parts] == sizes
    seen = [row for part in parts for m in part.microbatches for row in rows_of(m)]
    assert seen == [row for row in range(groups) for _ in range(2)]


GROUPS = st.lists(
    st.lists(
        st.tuples(st.sampled_from([None, 0.0, 1.0]), st.integers(1, 6)), min_size=2, max_size=4
    ),
    min_size=1,
    max_size=8,
)


@given(GROUPS, st.integers(1, 3), st.integers(1, 60), st.booleans())
def test_all_that_is_trained_on_is_run_once_within_the_budget(shapes, count, budget, skip_dead):
    groups = [
        numbered(row, [r for r, _ in shape], [n for _, n in shape])
        for row, shape in enumerate(shapes)
    ]
    credited = credit(groups)
    trained = [
        [] if skip_dead and not any(one.advantages.any() for one in part) else part
        for part in credited
    ]
    parts = minibatches(credited, count, budget, skip_dead)
    seen: list[int] = []
    for part in parts:
        for index, microbatch in enumerate(part.microbatches):
            rows = rows_of(microbatch)
            assert len(rows) == len(microbatch.lengths) > 0
            seen += rows
            size = len(rows) * (2 + max(microbatch.lengths))
            assert size <= budget or len(rows) == 1
            # no microbatch could have taken the next one's first rollout too
            if index + 1 < len(part.microbatches):
                more = microbatch.lengths + part.microbatches[index + 1].lengths[:1]
                assert len(more) * (2 + max(more)) > budget
    assert sorted(seen) == [row for row in range(len(groups)) for _ in trained[row]]


@given(GROUPS, st.integers(1, 3), st.booleans())
def test_averages_are_over_all_graded_rollouts(shapes, count, skip_dead):
    groups = [
        numbered(row, [r for r, _ in shape], [n for _, n in shape])
        for row, shape in enumerate(shapes)
    ]
    for made in groups:  # weights of a half for rollouts of an odd number of tokens
        for r in made.rollouts:
            r.weight = 0.5 if len(r.completion.token_ids) % 2 else 1.0
    parts = minibatches(credit(groups), count, 20, skip_dead)
    graded = [(0.5 if n % 2 else 1.0, n) for shape in shapes for r, n in shape if r is not None]
    assert sum(part.rollouts for part in parts) == sum(w for w, _ in graded)
    assert sum(part.tokens for part in parts) == sum(w * n for w, n in graded)
    assert sum(part.groups for part in parts) == len(groups)
    live = [shape for shape in shapes if len({r for r, _ in shape} - {None}) > 1]
    assert sum(part.live_groups for part in parts) == len(live)


def test_given_tokens_do_not_count():
    # 4 + 6 tokens, of which 3 of each are given; one more rollout is masked altogether
    made = group(0, [0.0, 1.0], [4, 6], prefix=3)
    masked = group(1, [1.0, 0.0], [5, 5])
    masked.rollouts[0].completion.loss_mask = [False] * 5
    (part,) = minibatches(credit([made, masked]), 1, 1000, True)
    assert (part.tokens, part.rollouts) == (1 + 3 + 5, 4)


def test_a_rollout_beyond_the_budget_runs_alone():
    small, large = [1, 1], [50, 50]
    lengths = [small, large, small, small, large]
    credited = credit([numbered(row, [0.0, 1.0], size) for row, size in enumerate(lengths)])
    (part,) = minibatches(credited, 1, 18, True)
    assert [rows_of(m) for m in part.microbatches] == [[0, 0, 2, 2, 3, 3], [1], [1], [4], [4]]


def test_batches_of_nothing_but_dead_or_ungraded_groups():
    credited = credit([numbered(0, [1.0, 1.0], [2, 2]), numbered(1, [None, None], [3, 3])])
    (part,) = minibatches(credited, 1, 100, True)
    assert part.microbatches == []
    assert (part.tokens, part.rollouts, part.groups, part.live_groups) == (4, 2, 2, 0)
    (part,) = minibatches(credited, 1, 100, False)
    assert [rows_of(m) for m in part.microbatches] == [[0, 0]]
