"""What `collect` asks its techniques, and what it does with the answers."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from reroll.algo.noise import make_key
from reroll.engine.local import LocalEngine
from reroll.rollout.collect import collect
from reroll.rollout.collected import Collected, CollectSpec
from reroll.rollout.decisions import (
    NOTHING,
    Decisions,
    Graded,
    Start,
    grade_everything,
    start_plainly,
)
from reroll.types import Draft, Finish, Lenience, Prompt, Purpose, Request, Rollout, Sampling
from tests.rollout.stub import StubGraders, spell
from tests.tiny import VOCABULARY, tiny

PROMPTS = [Prompt(row, f"p{row}", (row, 3, 8), f"a{row}") for row in (5, 2, 9)]
SPEC = CollectSpec(
    Purpose.TRAIN, 3, 4, Sampling(max_tokens=8, stop_ids=tuple(range(0, VOCABULARY, 6)))
)


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(tiny("qwen3"), slots=5, capacity=16)


def run(
    engine: LocalEngine,
    decisions: Decisions = NOTHING,
    graders: StubGraders | None = None,
    visit: int = 2,
    spec: CollectSpec = SPEC,
) -> Collected:
    visits = [visit] * len(PROMPTS)
    return collect(
        engine, graders or StubGraders(len), spell, PROMPTS, visits, spec, decisions=decisions
    )


def rollouts(collected: Collected) -> list[Rollout]:
    return [rollout for group in collected.groups for rollout in group.rollouts]


def tokens(collected: Collected) -> list[list[int]]:
    return [rollout.completion.token_ids for rollout in rollouts(collected)]


@pytest.fixture
def requests(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that the engine is given from now on."""
    given: list[Request] = []
    submit: Callable[[Request], None] = engine.submit
    monkeypatch.setattr(engine, "submit", lambda r: (given.append(r), submit(r))[1])
    return given


def test_the_null_decisions(engine: LocalEngine, requests: list[Request]) -> None:
    assert start_plainly(PROMPTS[0], 7, 3) == [Start(7)] * 3 == [Start(7, (), None)] * 3
    assert grade_everything(Rollout(PROMPTS[0], 0, 0)) is None
    assert Decisions(start_plainly, grade_everything) == NOTHING
    graders = StubGraders(len)
    collected = run(engine, graders=graders)
    assert len(graders.jobs) == 12
    assert all((r.key_visit, r.visit) == (2, 2) for r in rollouts(collected))
    assert all((r.drafts, r.lenience) == ((), None) for r in requests)
    assert collected.tokens_known == 0


def test_each_prompt_is_asked_about_once_in_order(engine: LocalEngine) -> None:
    asked = []

    def start(prompt: Prompt, visit: int, samples: int) -> list[Start]:
        asked.append((prompt, visit, samples))
        return start_plainly(prompt, visit, samples)

    plain = run(engine)
    assert tokens(run(engine, Decisions(start))) == tokens(plain)
    assert asked == [(prompt, 2, 4) for prompt in PROMPTS]


def test_a_start_is_what_is_requested(engine: LocalEngine, requests: list[Request]) -> None:
    lenience = Lenience(0.5)
    drafts = {
        (prompt.row, sample): Draft([10 + prompt.row, sample], [-1.0, -2.0], [0, 0])
        for prompt in PROMPTS
        for sample in range(4)
    }

    def start(prompt: Prompt, visit: int, samples: int) -> list[Start]:
        return [
            Start(visit - s, (drafts[prompt.row, s],), lenience if s == 3 else None)
            for s in range(samples)
        ]

    collected = run(engine, Decisions(start))
    places = [(prompt.row, sample) for prompt in PROMPTS for sample in range(4)]
    for request, rollout, (row, sample) in zip(requests, rollouts(collected), places, strict=True):
        assert request.key == make_key(3, Purpose.TRAIN, row, sample, 2 - sample)
        assert request.drafts == (drafts[row, sample],)
        assert request.lenience == (lenience if sample == 3 else None)
        assert (rollout.prompt.row, rollout.sample) == (row, sample)
        assert (rollout.visit, rollout.key_visit) == (2, 2 - sample)


def test_a_key_of_another_visit_draws_what_that_visit_drew(engine: LocalEngine) -> None:
    before = run(engine, visit=1)
    held = run(engine, Decisions(lambda prompt, visit, samples: [Start(1)] * samples), visit=2)
    assert tokens(held) == tokens(before) != tokens(run(engine, visit=2))
    assert {r.visit for r in rollouts(held)} == {2}


def test_staggered_samples_of_a_prompt_do_not_start_together(
    engine: LocalEngine, requests: list[Request]
) -> None:
    """What finishes first can then be a draft for its siblings; groups come back as ever."""
    plain = run(engine)
    requests.clear()
    staggered = run(engine, Decisions(stagger=True))
    assert [r.prompt_ids[0] for r in requests] == [5, 2, 9] * 4
    assert tokens(staggered) == tokens(plain)
    assert [(r.prompt.row, r.sample) for r in rollouts(staggered)] == [
        (row, sample) for row in (5, 2, 9) for sample in range(4)
    ]
    # a prompt with old drafts stays together, and comes first
    drafted = {2: (Draft([1]),)}
    requests.clear()
    again = run(
        engine, Decisions(lambda p, v, n: [Start(v, drafted.get(p.row, ()))] * n, stagger=True)
    )
    assert [r.prompt_ids[0] for r in requests] == [2] * 4 + [5, 9] * 4
    assert len({r.id for r in requests}) == 12
    assert tokens(again) == tokens(plain)


def test_drafts_of_a_decision_change_no_token(engine: LocalEngine) -> None:
    plain = run(engine)
    texts = {r.prompt.row: [] for r in rollouts(plain)}
    for rollout in rollouts(plain):
        texts[rollout.prompt.row].append(Draft(rollout.completion.token_ids))

    def start(prompt: Prompt, visit: int, samples: int) -> list[Start]:
        return [Start(visit, tuple(texts[prompt.row]))] * samples

    before = engine.stats().tokens_decoded
    again = run(engine, Decisions(start))
    assert tokens(again) == tokens(plain)
    assert engine.stats().tokens_decoded == before  # nothing was left to decode
    assert all(r.completion.walked == len(r.completion.token_ids) - 1 for r in rollouts(again))


def some_known(rollout: Rollout) -> Graded | None:
    """The second and the fourth of each group have a grade, of their text."""
    assert rollout.reward is None and rollout.completion.token_ids
    return Graded(100 + len(rollout.text), {"old": 7.0}) if rollout.sample % 2 else None


def test_a_grade_that_is_known_is_not_asked_for(engine: LocalEngine) -> None:
    graders = StubGraders(len, behind=2)
    plain, collected = run(engine), run(engine, Decisions(grade=some_known), graders)
    assert tokens(collected) == tokens(plain)
    known = [r for r in rollouts(collected) if r.sample % 2]
    asked = [r for r in rollouts(collected) if not r.sample % 2]
    assert sorted(job.completion for job in graders.jobs) == sorted(r.text for r in asked)
    for rollout in known:
        assert rollout.text == spell(rollout.completion.token_ids)
        assert rollout.reward == 100 + len(rollout.text)
        assert (rollout.rewards, rollout.failure) == ({"old": 7.0}, "")
        assert rollout.seconds_grading == 0
    for rollout in asked:
        assert (rollout.reward, rollout.rewards) == (
            len(rollout.text), {"stub": len(rollout.text)},
        )  # fmt: skip
    assert collected.tokens_known == sum(len(r.completion.token_ids) for r in known)
    assert collected.seconds_grading == 6 * 0.25
    assert collected.ungraded == 0


def test_nothing_is_left_for_the_graders(engine: LocalEngine) -> None:
    graders = StubGraders(lambda text: "never asked")
    collected = run(engine, Decisions(grade=lambda rollout: Graded(0.25, {})), graders)
    assert graders.jobs == []
    assert {r.reward for r in rollouts(collected)} == {0.25}


def test_a_known_grade_is_settled_like_any_other(engine: LocalEngine) -> None:
    spec = replace(SPEC, truncated="penalty", penalty=1.5)
    collected = run(engine, Decisions(grade=lambda rollout: Graded(5.0, {})), spec=spec)
    ends = {r.completion.finish: r.reward for r in rollouts(collected)}
    assert ends == {Finish.LENGTH: 3.5, Finish.STOP: 5.0}
