from collections.abc import Sequence
from typing import Any

import pytest

import reroll.evaluate
from reroll.algo.passk import bootstrap_interval
from reroll.config import EvalSection
from reroll.engine.local import LocalEngine
from reroll.evaluate import evaluate
from reroll.rollout.collected import Collected, CollectSpec
from reroll.types import Completion, Finish, Group, Prompt, Purpose, Rollout, Sampling
from tests.rollout.stub import StubGraders, spell
from tests.tiny import tiny

SAMPLING = Sampling(max_tokens=6, stop_ids=(0, 7, 14))
PROMPTS = [Prompt(row, f"p{row}", (row + 1, row + 2)) for row in range(5)]

Answer = tuple[str, float | None]


def scripted(
    monkeypatch: pytest.MonkeyPatch, sampled: list[list[Answer]], greedy: list[Answer]
) -> list[CollectSpec]:
    """Put a collect with these (text, reward) in place; returns the specs it is called with."""
    specs: list[CollectSpec] = []

    def collect(
        engine: Any, graders: Any, decode: Any, prompts: Sequence[Prompt], visits: list[int],
        spec: CollectSpec, progress: Any = None, decisions: Any = None,
    ) -> Collected:  # fmt: skip
        specs.append(spec)
        assert visits == [0] * len(prompts)
        rows = [[one] for one in greedy] if spec.sampling.temperature == 0 else sampled
        groups = []
        for prompt, row in zip(prompts, rows, strict=True):
            assert len(row) == spec.samples
            group = Group(prompt)
            for sample, (text, reward) in enumerate(row):
                ids = [1] * len(text)
                finish = Finish.LENGTH if text.endswith("~") else Finish.STOP
                completion = Completion(0, ids, finish=finish)
                group.rollouts.append(Rollout(prompt, sample, 0, completion, text, reward))
            groups.append(group)
        return Collected(groups)

    monkeypatch.setattr(reroll.evaluate, "collect", collect)
    return specs


def evaluated(prompts: int, **settings: Any) -> dict[str, float]:
    return evaluate(
        None, None, spell, lambda text: text.strip("~ ") or None, PROMPTS[:prompts],
        EvalSection(**settings), seed=5, step=30, sampling=SAMPLING,
    )  # fmt: skip


def test_figures_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[list[Answer]] = [
        [("7", 1.0), ("7", 1.0), ("8", 0.0), ("9", 0.25)],  # two right, and the majority
        [("1", 0.0), ("1", 0.0), ("2", 1.0), ("3~", None)],  # one right, the majority wrong
        [("", 0.0), ("5", 0.0), ("6", 0.5), ("6 ", 0.5)],  # none right
    ]
    greedy: list[Answer] = [("7", 1.0), ("1", 0.0), ("6", None)]
    specs = scripted(monkeypatch, sampled, greedy)
    metrics = evaluated(3, samples=4, temperature=0.7)
    assert metrics["reward"] == pytest.approx((2.25 / 4 + 1 / 4 + 1 / 4) / 3)
    # 1 - C(n - c, k) / C(n, k) with n = 4 and c = 2, 1, 0
    assert metrics["pass@1"] == pytest.approx((2 / 4 + 1 / 4) / 3)
    assert metrics["pass@2"] == pytest.approx((5 / 6 + 1 / 2) / 3)
    assert metrics["pass@4"] == pytest.approx(2 / 3)
    assert metrics["maj@4"] == pytest.approx(1 / 3)
    assert metrics["greedy_reward"] == pytest.approx(1 / 3)
    assert metrics["length"] == pytest.approx((1 + 1 + 1 + 1 + 1 + 1 + 1 + 2 + 0 + 1 + 1 + 2) / 12)
    assert metrics["truncated"] == pytest.approx(1 / 12)
    assert (metrics["ungraded"], metrics["problems"], metrics["samples"]) == (1, 3, 4)
    low, high = bootstrap_interval([2.25 / 4, 1 / 4, 1 / 4])
    assert (metrics["reward_low"], metrics["reward_high"]) == (low, high)
    for key in ("reward", "pass@1", "pass@2", "pass@4", "maj@4", "greedy_reward"):
        assert 0 <= metrics[f"{key}_low"] <= metrics[key] <= metrics[f"{key}_high"] <= 1

    first, second = specs
    assert (first.purpose, first.seed, first.samples) == (Purpose.EVAL, 5, 4)
    assert (first.sampling.temperature, second.sampling.temperature) == (0.7, 0.0)
    assert (second.purpose, second.seed, second.samples) == (Purpose.EVAL, 5, 1)
    assert first.sampling.stop_ids == second.sampling.stop_ids == SAMPLING.stop_ids
    assert first.truncated == "keep"
    assert first.label != second.label
    assert "30" in first.label


class Weighing:
    """A voter that weighs by what is written."""

    def weights(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [0.9 if rollout.text == "7" else 0.2 for rollout in rollouts]


def test_votes_beside_the_majority(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[list[Answer]] = [
        [("7", 1.0), ("8", 0.0), ("8", 0.0)],  # the majority is wrong, the vote right
        [("1", 1.0), ("1", 1.0), ("2", 0.0)],  # both right
    ]
    scripted(monkeypatch, sampled, [("7", 1.0), ("1", 1.0)])
    metrics = evaluate(
        None, None, spell, lambda text: text, PROMPTS[:2], EvalSection(samples=3), seed=5, step=30,
        sampling=SAMPLING, voter=Weighing(),
    )  # fmt: skip
    assert (metrics["maj@3"], metrics["vote@3"], metrics["vote@3 - maj@3"]) == (0.5, 1.0, 0.5)
    assert metrics["vote@3 - maj@3_low"] <= 0.5 <= metrics["vote@3 - maj@3_high"]
    assert not any("vote" in key for key in evaluated(2, samples=3))


def test_from_which_reward_a_rollout_is_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[list[Answer]] = [[("a", 0.5), ("b", 0.49)]]
    scripted(monkeypatch, sampled, [("a", 0.5)])
    assert evaluated(1, samples=2)["pass@2"] == 0.0
    assert evaluated(1, samples=2, correct_at=0.5)["pass@1"] == 0.5
    assert evaluated(1, samples=2, correct_at=0.25)["pass@1"] == 1.0
    assert evaluated(1, samples=2, correct_at=0.5)["maj@2"] == 0.5  # a tie is shared out


def test_pass_at_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [[("a", 1.0)] * 6], [("a", 1.0)])
    metrics = evaluated(1, samples=6)
    assert [k for k in metrics if k.startswith("pass@") and "_" not in k] == [
        "pass@1", "pass@2", "pass@4",
    ]  # fmt: skip
    assert "maj@6" in metrics


def test_without_the_greedy_part(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = scripted(monkeypatch, [[("a", 1.0)]], [])
    metrics = evaluated(1, samples=1, greedy=False)
    assert len(specs) == 1
    assert not [key for key in metrics if "greedy" in key]


def really(slots: int, seed: int = 5, model_seed: int = 0) -> dict[str, float]:
    engine = LocalEngine(tiny("qwen3", seed=model_seed), slots=slots, capacity=16)
    graders = StubGraders(lambda text: (sum(map(ord, text)) % 7) / 6)
    seen: list[int] = []
    metrics = evaluate(
        engine, graders, spell, lambda text: text[-1:], PROMPTS,
        EvalSection(samples=3), seed=seed, step=0, sampling=SAMPLING,
        progress=lambda done, total: seen.append(total),
    )  # fmt: skip
    assert set(seen) == {15, 5}
    return metrics


def test_it_differs_by_the_weights_and_not_by_luck() -> None:
    expected = really(slots=2)
    assert really(slots=2) == expected
    assert really(slots=64) == expected
    assert really(slots=2, model_seed=1) != expected
    other_seed = really(slots=2, seed=6)
    assert other_seed["reward"] != expected["reward"]
    assert other_seed["greedy_reward"] == expected["greedy_reward"]  # greedy has no luck
