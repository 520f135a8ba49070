import random
from dataclasses import replace
from typing import Any

import pytest

from reroll.algo.noise import make_key
from reroll.engine.local import LocalEngine
from reroll.errors import UserError
from reroll.rollout.collect import collect
from reroll.rollout.collected import Collected, CollectSpec, check_failures, settle
from reroll.types import Completion, Finish, Prompt, Purpose, Request, Rollout, Sampling
from tests.rollout.stub import StubGraders, spell
from tests.tiny import VOCABULARY, tiny

STOPS = tuple(range(0, VOCABULARY, 6))
PROMPTS = [
    Prompt(row, f"p{row}", tuple((7 * row + i) % VOCABULARY for i in range(2 + row % 4)), f"a{row}")
    for row in (11, 4, 9, 2, 30, 5)
]
SPEC = CollectSpec(Purpose.TRAIN, 3, 4, Sampling(max_tokens=8, stop_ids=STOPS))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("qwen3")


def make(model: Any, slots: int = 5) -> LocalEngine:
    return LocalEngine(model, slots=slots, capacity=16)


def run(
    engine: LocalEngine,
    prompts: list[Prompt] | None = None,
    spec: CollectSpec = SPEC,
    graders: StubGraders | None = None,
    visit: int = 0,
) -> Collected:
    prompts = PROMPTS if prompts is None else prompts
    graders = graders or StubGraders(len)
    return collect(engine, graders, spell, prompts, [visit] * len(prompts), spec)


def tokens(collected: Collected) -> dict[tuple[int, int], list[int]]:
    """Completion tokens by (row, sample)."""
    return {
        (group.prompt.row, rollout.sample): rollout.completion.token_ids
        for group in collected.groups
        for rollout in group.rollouts
    }


def recorded(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that the engine is given from now on."""
    requests: list[Request] = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda r: (requests.append(r), submit(r))[1])
    return requests


def test_groups_come_in_the_order_of_the_prompts(model: Any) -> None:
    collected = collect(
        make(model, slots=3), StubGraders(len), spell, PROMPTS, [0, 1, 2, 3, 4, 5], SPEC
    )  # fmt: skip
    assert [group.prompt for group in collected.groups] == PROMPTS
    for visit, group in enumerate(collected.groups):
        assert [rollout.sample for rollout in group.rollouts] == [0, 1, 2, 3]
        assert {rollout.visit for rollout in group.rollouts} == {visit}
        assert all(rollout.prompt is group.prompt for rollout in group.rollouts)
        for rollout in group.rollouts:
            assert rollout.completion.token_ids
            assert rollout.text == spell(rollout.completion.token_ids)
            assert rollout.reward == len(rollout.text)
            assert rollout.rewards == {"stub": len(rollout.text)}
    assert collected.ungraded == 0
    assert collected.seconds_grading == 24 * 0.25
    ends = [r.completion.finish for g in collected.groups for r in g.rollouts]
    assert set(ends) == {Finish.STOP, Finish.LENGTH}  # the tests below need both
    assert collected.truncated == ends.count(Finish.LENGTH)


def test_keys_are_those_of_seed_purpose_row_sample_and_visit(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(model)
    requests = recorded(engine, monkeypatch)
    visits = [5, 0, 1, 7, 2, 3]
    collect(engine, StubGraders(len), spell, PROMPTS, visits, SPEC)
    assert [r.key for r in requests] == [
        make_key(3, Purpose.TRAIN, prompt.row, sample, visit)
        for prompt, visit in zip(PROMPTS, visits, strict=True)
        for sample in range(4)
    ]
    assert len({r.key for r in requests}) == 24
    assert [r.prompt_ids for r in requests[::4]] == [prompt.token_ids for prompt in PROMPTS]
    assert all(r.sampling == SPEC.sampling for r in requests)


def test_other_seeds_purposes_and_visits_draw_other_tokens(model: Any) -> None:
    engine = make(model)
    outcomes = [
        tokens(run(engine)),
        tokens(run(engine, visit=1)),
        tokens(run(engine, spec=replace(SPEC, seed=4))),
        tokens(run(engine, spec=replace(SPEC, purpose=Purpose.EVAL))),
    ]
    assert all(len({str(row) for row in outcome.values()}) > 12 for outcome in outcomes)
    for index, one in enumerate(outcomes):
        for other in outcomes[:index]:
            assert sum(one[key] == other[key] for key in one) < 6  # a short one may coincide


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_tokens_do_not_depend_on_slots_or_the_order_of_prompts(model: Any, slots: int) -> None:
    expected = tokens(run(make(model)))
    engine = make(model, slots)
    assert tokens(run(engine)) == expected
    shuffled = random.Random(slots).sample(PROMPTS, len(PROMPTS))
    assert shuffled != PROMPTS
    assert tokens(run(engine, shuffled)) == expected


def test_tokens_do_not_depend_on_what_else_is_in_the_batch(model: Any) -> None:
    engine = make(model, slots=64)
    expected = tokens(run(engine))
    alone: dict[tuple[int, int], list[int]] = {}
    for prompt in PROMPTS:
        alone |= tokens(run(engine, [prompt]))
    assert alone == expected
    more = tokens(run(engine, spec=replace(SPEC, samples=6)))
    assert {key: value for key, value in more.items() if key in expected} == expected


def test_log_probs_do_not_depend_on_slots_either(model: Any) -> None:
    def logprobs(collected: Collected) -> list[float]:
        return [x for g in collected.groups for r in g.rollouts for x in r.completion.logprobs]

    assert logprobs(run(make(model, 1))) == pytest.approx(logprobs(run(make(model, 64))), abs=1e-9)


def of_each_end(collected: Collected) -> tuple[list[Rollout], list[Rollout]]:
    rollouts = [r for g in collected.groups for r in g.rollouts]
    return (
        [r for r in rollouts if r.completion.finish is Finish.LENGTH],
        [r for r in rollouts if r.completion.finish is Finish.STOP],
    )


@pytest.mark.parametrize(
    ("policy", "reward", "trained"),
    [("keep", 5.0, True), ("mask", 5.0, False), ("zero", 0.0, True), ("penalty", 3.5, True)],
)
def test_policies_for_truncated_rollouts(
    model: Any, policy: str, reward: float, trained: bool
) -> None:
    spec = replace(SPEC, truncated=policy, penalty=1.5)
    cut, whole = of_each_end(run(make(model), spec=spec, graders=StubGraders(lambda _: 5.0)))
    assert cut
    assert whole
    for rollout in cut:
        assert rollout.reward == reward
        assert rollout.rewards == {"stub": 5.0}  # each grader's own number stays
        assert rollout.completion.loss_mask == [trained] * 8
    for rollout in whole:
        assert rollout.reward == 5.0
        assert set(rollout.completion.loss_mask) == {True}


def test_an_ungraded_truncated_rollout_stays_ungraded() -> None:
    for policy in ("keep", "mask", "zero", "penalty"):
        completion = Completion(0, [1, 2], [0.0] * 2, [0.0] * 2, [0] * 2, [True] * 2, Finish.LENGTH)
        rollout = Rollout(PROMPTS[0], 0, 0, completion)
        settle(rollout, replace(SPEC, truncated=policy, penalty=1.0))
        assert rollout.reward is None


def test_graders_work_while_the_engine_steps(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, graders = make(model, slots=2), StubGraders(len, behind=3)
    still_in: list[int] = []
    submit = graders.submit
    stats = engine.stats

    def watch(job: Any) -> None:
        still_in.append(stats().running + stats().waiting)
        submit(job)

    monkeypatch.setattr(graders, "submit", watch)
    collected = run(engine, graders=graders)
    assert still_in[0] >= 20  # the first is handed over long before the last has begun
    assert sorted(still_in, reverse=True) == still_in
    early = sum(given for wait, given in graders.polls if not wait)
    late = [given for wait, given in graders.polls if wait]
    assert early == 24 - 3  # what was done came back without waiting for it
    assert late == [1, 1, 1]  # the rest was waited for when the engine was empty
    assert graders.polls.index((True, 1)) == len(graders.polls) - 3
    assert all(r.reward == len(r.text) for g in collected.groups for r in g.rollouts)


def test_jobs_tell_the_grader_everything(model: Any) -> None:
    prompt = replace(PROMPTS[0], columns={"level": 3})
    graders = StubGraders(len)
    collected = run(make(model), [prompt], graders=graders, visit=2)
    texts = {r.sample: r.text for r in collected.groups[0].rollouts}
    assert len(graders.jobs) == 4
    for job in graders.jobs:
        purpose, row, sample, visit, mark = job.name.split("/")
        assert (purpose, row, visit) == ("train", "11", "2")
        assert job.completion == texts[int(sample)]
        assert (job.prompt, job.answer, job.columns) == ("p11", "a11", {"level": 3})
        assert len(mark) == 8
    assert len({job.name for job in graders.jobs}) == 4
    again = StubGraders(len)
    run(make(model, 1), [prompt], graders=again, visit=2)
    assert {job.name for job in again.jobs} == {job.name for job in graders.jobs}
    labelled = StubGraders(len)
    run(make(model), [prompt], spec=replace(SPEC, label="eval-3"), graders=labelled)
    assert {job.name.split("/")[0] for job in labelled.jobs} == {"eval-3"}


def test_one_text_under_other_weights_has_another_name() -> None:
    """Recorded time-outs go by name, and an evaluation comes again with the same keys."""
    names = []
    for seed in (0, 1):
        graders = StubGraders(len)
        run(make(tiny("qwen3", seed=seed)), PROMPTS[:1], graders=graders)
        names.append({job.name for job in graders.jobs})
    assert not names[0] & names[1]


def test_progress_rises_to_the_end(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    collect(
        make(model, 3), StubGraders(len), spell, PROMPTS, [0] * 6, SPEC,
        lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert {total for _, total in seen} == {24}
    done = [count for count, _ in seen]
    assert done == sorted(set(done))
    assert done[0] < 6
    assert done[-1] == 24


@pytest.mark.parametrize("after", [1, 9, 24])
def test_an_interrupted_collect_leaves_the_engine_empty(model: Any, after: int) -> None:
    engine = make(model, slots=3)
    expected = tokens(run(make(model)))

    def interrupt(done: int, total: int) -> None:
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(engine, StubGraders(len), spell, PROMPTS, [0] * 6, SPEC, interrupt)
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    engine.check()
    engine.load_weights(1)
    again = run(engine)
    assert tokens(again) == expected
    assert {v for g in again.groups for r in g.rollouts for v in r.completion.versions} == {1}


def test_a_request_that_does_not_fit_leaves_the_engine_empty(model: Any) -> None:
    engine = make(model)
    long = Prompt(99, "long", tuple(range(15)))
    with pytest.raises(UserError, match="does not fit a slot"):
        run(engine, [*PROMPTS, long])
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


def test_graders_busy_with_another_collect_are_refused(model: Any) -> None:
    graders = StubGraders(len)
    engine = make(model, slots=3)

    def interrupt(done: int, total: int) -> None:
        graders.behind = 100
        if graders.pending:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(engine, graders, spell, PROMPTS, [0] * 6, SPEC, interrupt)
    with pytest.raises(AssertionError, match="another collect"):
        run(engine, graders=graders)


def refuse_some(text: str) -> float | str:
    return f"Traceback of\n{text}" if ord(text[0]) % 3 == 0 else 1.0


def test_ungraded_rollouts_are_counted_and_keep_their_reason(model: Any) -> None:
    collected = run(make(model), graders=StubGraders(refuse_some))
    rollouts = [r for g in collected.groups for r in g.rollouts]
    failed = [r for r in rollouts if ord(r.text[0]) % 3 == 0]
    assert 0 < len(failed) < 24
    assert collected.ungraded == len(failed)
    for rollout in rollouts:
        assert rollout.reward == (None if rollout in failed else 1.0)
        assert rollout.failure == (f"Traceback of\n{rollout.text}" if rollout in failed else "")
        assert rollout.rewards == ({} if rollout in failed else {"stub": 1.0})
    # the first by row and sample, however the graders were scheduled
    first = min(failed, key=lambda r: (r.prompt.row, r.sample))
    assert collected.first_failure == first.failure


def test_too_many_ungraded_rollouts_stop_the_run(model: Any) -> None:
    engine = make(model)
    collected = run(engine, graders=StubGraders(refuse_some))
    failed = collected.ungraded
    check_failures(collected, failed / 24)
    with pytest.raises(UserError) as raised:
        check_failures(collected, (failed - 0.5) / 24)
    message = str(raised.value)
    assert f"{failed} of 24 rollouts came back ungraded; the first failure was:\n" in message
    assert "Traceback of" in message
    check_failures(run(engine), 0.0)
