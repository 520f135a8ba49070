"""Prefill: what is given runs through the model, and the draft tree behind it with it.

One forward serves many requests. Those that begin with the same tokens (a group's prompt) share a
row, and their drafts one tree. Every sample then walks down its row's tree (`engine/walk.py`); a
deep tree is run in windows of depth, each next one only below the nodes where samples wait.

    row:  given tokens | nodes of the tree, each seeing its ancestors alone | padding
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import DynamicCache

from reroll.engine.base import Probed, Stats
from reroll.engine.follow import expected_visits
from reroll.engine.lenient import accept_lenient
from reroll.engine.runner import Columns, Prefilled, Runner
from reroll.engine.sequence import Sequence as Running
from reroll.engine.shares import Shares
from reroll.engine.walk import Forest, Walk
from reroll.engine.watch import probes, wants_hidden
from reroll.model.tree import EVERYTHING, Tree, merge, pad_columns


@dataclass(slots=True, eq=False)
class Row:
    """Requests that begin with the same tokens, and their tree."""

    sequences: list[Running]
    given: tuple[int, ...]
    tree: Tree
    nodes: np.ndarray
    """of the next forward, in preorder, the root not among them"""
    columns: np.ndarray = field(default_factory=lambda: np.zeros((3, 0), np.int64))
    """`[3, C]` of its keys and values so far: preorder number, end, position; see `tree_mask`"""

    def __len__(self) -> int:
        return len(self.given) + len(self.nodes)


@dataclass(frozen=True, slots=True)
class Plan:
    """What decides which nodes are verified."""

    follow: Shares
    least: float
    """visits that a node must be expected to get: a token's prefill over its decoding; 0: any"""
    window: int
    """depth of a tree that one forward runs at most"""
    branching: bool
    """False for models that take no tree masks: a row has one draft, in one window"""
    max_tokens: int
    """of a padded forward; a longer row runs alone"""

    def nodes(self, tree: Tree, standing: np.ndarray, depth: int) -> np.ndarray:
        """Nodes from `depth` to the end of the window that are worth a forward.

        A node saves a decoded token for each sample expected at it, and costs one of prefill.
        standing: `[N]` samples at the nodes of that depth.
        """
        start = max(depth, 1)
        inside = (tree.depth >= start) & (tree.depth < start + self.window)
        if self.least > 0 and len(tree) > 1:
            inside &= expected_visits(tree, self.follow, standing, depth) > self.least
        return np.flatnonzero(inside)


def next_rows(waiting: deque[Running], plan: Plan, max_rows: int, room: int) -> list[Row]:
    """Take requests for about one forward off the queue, in order, grouped into rows.

    room: requests without drafts of their own are taken for so many slots only, since later ones
    may have finished siblings to follow.
    """
    rows: dict[object, Row] = {}
    tokens = 0
    while waiting and (room > 0 or waiting[0].request.drafts):
        taken = _alike(waiting, plan, room)
        key = _key(taken[0], plan)
        before = rows.get(key)
        row = _row([*(before.sequences if before else ()), *taken], plan)
        more = len(row) - (len(before) if before else 0)
        full = before is None and len(rows) == max_rows
        if rows and (full or (more > 0 and tokens + more > plan.max_tokens)):
            waiting.extendleft(reversed(taken))
            break
        rows[key], tokens = row, tokens + more
        room -= len(taken)
    return list(rows.values())


def _key(sequence: Running, plan: Plan) -> object:
    """What a row's sequences have in common."""
    given = sequence.given_tokens()
    return given if plan.branching else (given, *map(id, sequence.first_draft()))


def _alike(waiting: deque[Running], plan: Plan, room: int) -> list[Running]:
    """The requests at the head of the queue that can share a row."""
    taken = [waiting.popleft()]
    key = _key(taken[0], plan)
    while waiting and _key(waiting[0], plan) == key:
        if len(taken) >= room and not waiting[0].request.drafts:
            break
        taken.append(waiting.popleft())
    return taken


def _row(sequences: list[Running], plan: Plan) -> Row:
    """A row with the tree of its sequences' drafts."""
    # drafts are mostly the group's: the same objects, taken once
    every = {id(draft): draft for s in sequences for draft in s.drafts()}
    drafts = list(every.values()) if plan.branching else list(sequences[0].first_draft())
    widest = max(sequences, key=lambda s: s.request.sampling.max_tokens)
    texts, given = [widest.rest_of(draft) for draft in drafts], widest.given_tokens()
    # each lenient one needs all of its own text, up to its own limit and stop ids
    lenient = [s for s in sequences if s.request.lenience]
    for sequence in lenient:
        sequence.text = len(texts)
        texts += [sequence.rest_of(draft) for draft in sequence.drafts()]
    tree = merge(texts)
    if lenient:
        return Row(sequences, given, tree, np.arange(1, len(tree)))
    standing = np.zeros(len(tree))
    standing[0] = len(sequences)
    return Row(sequences, given, tree, plan.nodes(tree, standing, 0))


def prefill(
    runner: Runner, rows: list[Row], version: int, plan: Plan, stats: Stats
) -> list[Probed]:
    """Run the rows; each sequence takes what was drawn for it and remembers where its keys and
    values are. Returns the probe events of the positions they passed.
    """
    forest = Forest([row.tree for row in rows])
    samples = [(index, s) for index, row in enumerate(rows) for s in row.sequences]
    walk = Walk(runner, forest, samples, version, plan.follow)
    hidden = wants_hidden(walk.samples)
    which = list(range(len(rows)))
    ran = _forward(walk, rows, which, None, hidden)
    accept_lenient(walk, ran.logits)
    walk.go(ran.logits)
    _settle(walk, rows, which, ran.cache)
    _go_deeper(walk, rows, which, ran.cache, plan, 1 + plan.window, hidden)
    events = _probes(walk) if any(s.request.watch for s in walk.samples) else []
    for index in walk.waiting():  # the token in hand stands on the tree, but was not verified
        walk.samples[index].completion.accepted -= 1
        walk.samples[index].completion.walked -= 1
    for index, row in enumerate(rows):
        _count(stats, row, forest.column[forest.at[index] :][: len(row.tree)] >= 0)
    return events


def _go_deeper(
    walk: Walk,
    rows: Sequence[Row],
    which: Sequence[int],
    cache: DynamicCache,
    plan: Plan,
    depth: int,
    hidden: bool,
) -> None:
    """Run the window of these rows that begins at `depth`, behind what their cache holds, as many
    of them at once as the bound allows, and each of these forwards' own next window."""
    further = _further(walk, rows, which, plan, depth)
    while further:
        widest = [
            walk.runner.width(max(len(rows[row].nodes) for row in further[: n + 1]))
            for n in range(len(further))
        ]
        count = sum((n + 1) * width <= plan.max_tokens for n, width in enumerate(widest))
        some, further = further[: max(count, 1)], further[max(count, 1) :]
        past = _select(cache, [which.index(row) for row in some])
        ran = _forward(walk, rows, some, past, hidden)
        walk.go(ran.logits)
        _settle(walk, rows, some, ran.cache)
        _go_deeper(walk, rows, some, ran.cache, plan, depth + plan.window, hidden)


def _forward(
    walk: Walk, rows: Sequence[Row], which: Sequence[int], past: DynamicCache | None, hidden: bool
) -> Prefilled:
    """Run the chosen nodes of some rows (and what is given, if nothing is past)."""
    runner, forest = walk.runner, walk.forest
    forest.logit[:] = -1
    texts, columns, starts, total = [], [], [], 0
    width = 0 if past is None else past.get_seq_length()
    for index in which:
        row, root = rows[index], forest.at[index]
        given = row.given if past is None else ()
        before, nodes, tree = len(row.given), row.nodes, row.tree
        texts.append([*given, *tree.tokens[nodes].tolist()])
        starts.append(max(len(given) - 1, 0))
        own = np.stack([nodes - 1, tree.end[nodes] - 1, tree.depth[nodes] - 1]) + before
        if given:
            step = np.arange(before)
            own = np.concatenate([[step, np.full(before, EVERYTHING), step], own], axis=1)
            forest.column[root] = before - 1
        columns.append(own)
        ran = np.concatenate([[0], nodes]) if given else nodes
        forest.logit[root + ran] = total + np.arange(len(ran))
        forest.column[root + nodes] = width + len(given) + np.arange(len(nodes))
        total += len(ran)
    widest = runner.width(max(map(len, texts)))
    for index, own in zip(which, columns, strict=True):
        own = pad_columns(own, widest)
        rows[index].columns = np.concatenate([rows[index].columns, own], axis=1)
    stacked = None
    if past is not None or not all(_is_chain(rows[index]) for index in which):  # else causal
        stacked = Columns(*np.stack([rows[index].columns for index in which], axis=1))
    prefilled = runner.prefill(texts, starts, hidden, stacked, past, widest)
    if prefilled.hidden is not None:
        walk.remember(prefilled.hidden)
    return prefilled


def _is_chain(row: Row) -> bool:
    """Whether the nodes to run are one text from the root on."""
    depths = row.tree.depth[row.nodes]
    return bool((depths == np.arange(1, len(depths) + 1)).all())


def _select(cache: DynamicCache, rows: list[int]) -> DynamicCache:
    """A copy of some rows of keys and values, to go on from."""
    chosen = DynamicCache()
    for index, layer in enumerate(list[Any](cache.layers)):
        chosen.update(layer.keys[rows], layer.values[rows], index)
    return chosen


def _further(
    walk: Walk, rows: Sequence[Row], which: Sequence[int], plan: Plan, depth: int
) -> list[int]:
    """Choose the nodes of these rows' window that begins at `depth`; the rows that have any.

    Only below nodes of that depth where samples wait: those that wait higher up do so at nodes
    that were not worth it.
    """
    further = []
    waiting = walk.waiting()
    waiting = waiting[walk.forest.depth[walk.at[waiting]] == depth]
    waiting = waiting[np.isin(walk.row[waiting], which)]
    for index in np.unique(walk.row[waiting]).tolist():
        row = rows[index]
        at = walk.at[waiting[walk.row[waiting] == index]] - walk.forest.at[index]
        standing = np.bincount(at, minlength=len(row.tree)).astype(float)
        chosen = plan.nodes(row.tree, standing, depth)
        row.nodes = chosen[_below(row.tree, at)[chosen]]
        if len(row.nodes):
            further.append(index)
    return further


def _below(tree: Tree, at: np.ndarray) -> np.ndarray:
    """Which nodes are these or their descendants, bool `[N]`."""
    change = np.bincount(at, minlength=len(tree) + 1) - np.bincount(
        tree.end[at], minlength=len(tree) + 1
    )
    return np.cumsum(change)[: len(tree)] > 0


def _settle(walk: Walk, rows: Sequence[Row], which: Sequence[int], cache: DynamicCache) -> None:
    """Each sample of these rows: where the keys and values of its tokens are."""
    place = {row: index for index, row in enumerate(which)}
    for index, sequence in enumerate(walk.samples):
        row = int(walk.row[index])
        if row not in place or sequence.finished:
            continue
        given = sequence.given
        path = walk.forest.path(walk.at[index], 1, sequence.length - given + 1)
        columns = np.concatenate([np.arange(given), walk.forest.column[path]])
        sequence.source = (cache, place[row], columns)


def _count(stats: Stats, row: Row, ran: np.ndarray) -> None:
    """Book a row: given tokens, and the nodes that were run."""
    given, verified = len(row.given), int(ran[1:].sum())
    stats.tokens_prefilled += given
    stats.tokens_verified += verified
    stats.context["prefill"] += given * (given + 1) // 2
    stats.context["verify"] += int(row.tree.depth[1:][ran[1:]].sum()) + given * verified
    if len(row.tree) > 1:
        stats.trees_offered += 1
        stats.nodes_offered += len(row.tree) - 1
        stats.trees_skipped += verified == 0


def _probes(walk: Walk) -> list[Probed]:
    """Probe events of the tokens drawn so far."""
    events: list[Probed] = []
    for index, sequence in enumerate(walk.samples):
        drawn = len(sequence.completion.token_ids) - int(walk.begin[index])
        passed = walk.forest.path(walk.at[index], 0, drawn)
        events += probes(sequence, walk.states(passed), int(walk.begin[index]), drawn)
    return events
