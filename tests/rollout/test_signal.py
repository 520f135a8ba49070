"""Features of a rollout on its way by hand, and what the small network makes of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from reroll.engine.base import Probed
from reroll.rollout.signal import BATCH, RECENT, Signal, features, progress, statistics


def probed(token_ids: list[int], logprobs: list[float], entropies: list[float]) -> Probed:
    hidden = torch.tensor([0.5, -1.0, 2.0], dtype=torch.bfloat16)
    return Probed(7, len(token_ids), hidden, token_ids, logprobs, entropies)


def test_statistics_by_hand() -> None:
    assert RECENT == 8
    # the last eight of ten: log-probs -1 ... -8, entropies 1 each but a 3
    logprobs = [-10.0, -4.0, *(-float(i) for i in range(1, 9))]
    entropies = [2.0, 2.0, *[1.0] * 7, 3.0]
    mean, recent = -(10 + 4 + 36) / 10, -36 / 8
    deviation = math.sqrt(sum((x - mean) ** 2 for x in logprobs) / 10)
    expected = [mean, recent, deviation, -10.0, 1.4, 1.25, 3.0, mean + 1.4, math.log(11)]
    assert statistics(logprobs, entropies) == pytest.approx(expected)


def test_statistics_without_entropies_or_tokens() -> None:
    assert statistics([], []) == [0.0] * 9
    found = statistics([-1.0, -3.0], [])
    assert found == pytest.approx([-2.0, -2.0, 1.0, -3.0, 0, 0, 0, -2.0, math.log(3)])


def test_progress_by_hand() -> None:
    ends = frozenset({0, 9})
    # two steps are over, of 2 and of 3 tokens; two of the third
    found = progress([5, 0, 5, 5, 9, 5, 5], ends)
    assert found == pytest.approx([math.log1p(x) for x in (7, 2, 2, 7 / 3)])
    assert progress([5, 0], ends) == pytest.approx([math.log1p(x) for x in (2, 1, 0, 1)])
    assert progress([5, 5, 5], ends) == pytest.approx([math.log1p(x) for x in (3, 0, 3, 3)])
    assert progress([], ends) == [0.0] * 4


def test_what_each_signal_reads() -> None:
    one = probed([5, 0, 5], [-1.0, -2.0, -3.0], [0.5, 0.5, 0.5])
    numbers = statistics(one.logprobs, one.entropies)
    state = [0.5, -1.0, 2.0]
    for kind, with_statistics, expected in (
        ("confidence", True, numbers), ("quality", True, [*state, *numbers]),
        ("quality", False, state), ("length", True, progress([5, 0, 5], frozenset({0}))),
    ):  # fmt: skip
        read = features(kind, one, frozenset({0}), with_statistics)
        assert read.dtype == np.float32 and read.tolist() == pytest.approx(expected)
    with pytest.raises(AssertionError, match="quality"):
        features("quality", replace(one, hidden=None), frozenset(), True)


# --- the network ----------------------------------------------------------------------------------


def batch(seed: int, count: int, size: int = 4) -> tuple[np.ndarray, list[float]]:
    """Features of which the first, in odd units, says how likely success is: from .02 to .98."""
    source = np.random.default_rng(seed)
    features = source.normal(size=(count, size)).astype(np.float32)
    chances = 1 / (1 + np.exp(-3 * features[:, 0]))
    features[:, 0] = 100 + 0.01 * features[:, 0]
    return features, (source.random(count) < chances).astype(float).tolist()


def fresh(memory: int = 4096, seed: int = 1) -> Signal:
    return Signal(16, 1e-2, memory, seed)


def test_it_knows_nothing_before_it_has_learnt() -> None:
    signal = fresh()
    assert signal.scores(batch(0, 5)[0]) == [0.0] * 5 and signal.version == 0
    signal.learn(np.zeros((0, 4), np.float32), [], [])
    assert signal.version == 0 and signal.tensors() == {}


def test_it_learns_what_separates_right_from_wrong() -> None:
    signal = fresh()
    for step in range(12):
        features, targets = batch(step, 60)
        signal.learn(features, targets, [1.0] * 60)
    assert signal.version == 12
    features, targets = batch(99, 800)
    scores = np.array(signal.scores(features))
    right, wrong = scores[np.array(targets) == 1], scores[np.array(targets) == 0]
    area = float((right[:, None] > wrong).mean())
    # that of the true chances is .91, with an error of .010 on so many
    assert area > 0.91 - 0.04
    # and as log-odds: the mean chance is the share of successes, within its error of .018
    assert abs((1 / (1 + np.exp(-scores))).mean() - np.mean(targets)) < 4 * 0.018


def test_shares_of_success_are_targets_too() -> None:
    signal = fresh()
    for step in range(20):
        features, _ = batch(step, 60)
        signal.learn(features, [0.75] * 60, [1.0] * 60)
    found = 1 / (1 + np.exp(-np.array(signal.scores(batch(99, 50)[0]))))
    assert found == pytest.approx([0.75] * 50, abs=0.05)


def test_weights_count_as_copies() -> None:
    """Successes of weight 1 and failures of weight 3: one in four, for what looks alike."""
    for heavy, share in ((3.0, 0.25), (1 / 3, 0.75), (1.0, 0.5)):
        signal = fresh()
        for _ in range(25):
            targets = [1.0, 0.0] * 30
            signal.learn(np.ones((60, 2), np.float32), targets, [1.0, heavy] * 30)
        (score,) = signal.scores(np.ones((1, 2), np.float32))
        assert 1 / (1 + math.exp(-score)) == pytest.approx(share, abs=0.04)


def test_it_remembers_the_latest() -> None:
    signal = fresh(memory=50)
    for step in range(4):
        features, targets = batch(step, 30)
        signal.learn(features, targets, [float(step)] * 30)
    assert [len(x) for x in signal.examples] == [50] * 3
    assert signal.examples[2].tolist() == [2.0] * 20 + [3.0] * 30
    assert BATCH > 50


def test_a_batch_of_one_is_no_scale() -> None:
    signal = fresh()
    features, targets = batch(0, 1)
    signal.learn(features, targets, [1.0])
    assert all(map(math.isfinite, signal.scores(batch(1, 9)[0])))
    # a feature that never varies, and one far off
    features = np.array([[1.0, 0.0], [1.0, 1.0]] * 8, np.float32)
    signal = fresh()
    signal.learn(features, [0.0, 1.0] * 8, [1.0] * 16)
    assert all(map(math.isfinite, signal.scores(np.array([[1e9, -1e9]], np.float32))))


def test_it_is_a_function_of_its_seed_and_of_what_it_was_told() -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))  # nobody else's generator matters
        signal = fresh(seed=seed)
        for step in range(3):
            features, targets = batch(step, 300)
            signal.learn(features, targets, [1.0] * 300)
        found.append(signal.scores(batch(9, 20)[0]))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("after", [0, 1, 4])
def test_it_goes_on_from_what_was_saved(after: int) -> None:
    """Bit for bit: network, optimizer, scale, memory and the order of its steps."""
    whole, part = fresh(memory=500), fresh(memory=500)
    for step in range(7):
        features, targets = batch(step, 120)
        if step == after:
            saved = {name: value.clone() for name, value in part.tensors().items()}
            version = part.version
            part = fresh(memory=500)
            part.load(saved, version)
            again = part.tensors()
            assert again.keys() == saved.keys()
            assert all(torch.equal(again[name], saved[name]) for name in saved)
        assert part.scores(features) == whole.scores(features)
        whole.learn(features, targets, [1.0] * 120)
        part.learn(features, targets, [1.0] * 120)
    ours, theirs = part.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys() and len(ours) == 4 + 12 + 2 + 3
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # what was saved is a copy
    before = whole.tensors()
    features, targets = batch(50, 120)
    whole.learn(features, targets, [1.0] * 120)
    changed = {
        name for name, value in whole.tensors().items() if not torch.equal(value, before[name])
    }
    assert {name.split(".")[0] for name in changed} == {"net", "optimizer", "scale", "examples"}
