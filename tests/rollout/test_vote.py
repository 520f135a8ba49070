"""Votes: every rollout is weighed when it ends, and none is stopped."""

import pytest

from reroll.algo.noise import make_key
from reroll.config import PruneSection
from reroll.engine.local import LocalEngine
from reroll.rollout.collect import collect
from reroll.rollout.collected import CollectSpec
from reroll.rollout.decisions import Decisions
from reroll.rollout.predict import Predictor
from reroll.rollout.signal import features
from reroll.rollout.vote import Voter
from reroll.types import Group, Prompt, Purpose, Request, Rollout, Sampling, Watch
from tests.rollout.stub import StubGraders, spell
from tests.tiny import tiny

PROMPTS = [Prompt(row, f"p{row}", (row + 1, row + 2)) for row in range(3)]
SPEC = CollectSpec(Purpose.EVAL, 5, 4, Sampling(max_tokens=12, stop_ids=(0, 7, 14)))


def engine() -> LocalEngine:
    return LocalEngine(tiny("qwen3"), slots=3, capacity=32)


def sampled(voter: Voter | None) -> list[Group]:
    graders, looks = StubGraders(lambda text: 0.0), Decisions(prune=voter)
    return collect(engine(), graders, spell, PROMPTS, [0] * 3, SPEC, None, looks).groups


@pytest.mark.parametrize("signal", ["confidence", "quality"])
def test_weights_are_those_of_the_whole_rollouts(signal: str) -> None:
    config = PruneSection(on=True, signal=signal)
    predictor = Predictor(config, 1, seed=3)
    voter = Voter(config, predictor, frozenset())
    groups = sampled(voter)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert len(rollouts) == 12 and not any(group.pruned for group in groups)
    plain = [r.completion.token_ids for g in sampled(None) for r in g.rollouts]
    assert [r.completion.token_ids for r in rollouts] == plain
    # before anything was learnt all weigh the same
    assert len(set(voter.weights(rollouts))) == 1
    read = [features_of(rollout, config) for rollout in rollouts]
    targets = [float(len(r.completion.token_ids) > 6) for r in rollouts]
    assert 0 < sum(targets) < 12
    for _ in range(20):
        predictor.end.learn(stack(read), targets, [1.0] * 12)
    for x, y in zip(predictor.end.scores(stack(read)), targets, strict=True):
        predictor.end_bins.add(x, y)
    weights = voter.weights(rollouts)
    expected = predictor.end_bins.probabilities(predictor.end.scores(stack(read)))
    assert weights == pytest.approx(expected, abs=1e-5)
    good = [w for w, y in zip(weights, targets, strict=True) if y]
    bad = [w for w, y in zip(weights, targets, strict=True) if not y]
    assert min(good) > max(bad)


def stack(read):
    import numpy as np

    return np.stack(read)


def features_of(rollout: Rollout, config: PruneSection):
    """From the engine anew, one rollout by itself."""
    alone, key = engine(), make_key(5, "eval", rollout.prompt.row, rollout.sample, 0)
    watch = Watch(hidden=True, entropy=True, last=True)
    alone.submit(Request(0, rollout.prompt.token_ids, key, SPEC.sampling, watch=watch))
    while True:
        for event in alone.step():
            if getattr(event, "last", False):
                assert event.token_ids == rollout.completion.token_ids
                return features(config.signal, event, frozenset(), config.statistics)
