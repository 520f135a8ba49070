"""Audits: fresh samples of the same policy beside the rollouts trained on."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import reroll.loop
from reroll.algo.noise import make_key
from reroll.algo.passk import bootstrap_interval
from reroll.audit import DEVIATIONS, POOLED, Audit, pooled_gap
from reroll.cli import main
from reroll.config import Config, load_config
from reroll.engine.costs import TYPICAL
from reroll.engine.local import LocalEngine
from reroll.loop import train
from reroll.rollout.collect import CollectSpec, collect
from reroll.rollout.reuse import Reuse
from reroll.rollout.store import Store
from reroll.rundir import RunDir
from reroll.train.trainer import Trainer
from reroll.types import Group, Prompt, Purpose, Request, Sampling
from tests.project import Project, lines_of
from tests.rollout.stub import StubGraders, spell
from tests.test_loop_reuse import FRESH, SHORT
from tests.tiny import VOCABULARY, tiny

PROMPTS = [Prompt(row, f"p{row}", (row % VOCABULARY, row // VOCABULARY, 5)) for row in range(80)]
LAW = Sampling(max_tokens=6, stop_ids=(0, 1, 2, 3))
SPEC = CollectSpec(Purpose.TRAIN, 3, 4, LAW)
KEYS = {
    "reward_trained_on", "reward_fresh", "reward_gap", "reward_gap_low", "reward_gap_high",
    "tokens_audit", "seconds_audit",
}  # fmt: skip
VISIT = 2


def some_digits(text: str) -> float:
    """Many texts earn something, few earn all."""
    return sum(ord(character) % 3 == 0 for character in text) / len(text)


@dataclass
class Setting:
    """What an audit works with, on a tiny engine."""

    engine: LocalEngine
    graders: Any
    reuse: Reuse
    run: RunDir
    config: Config
    decode: Callable[[list[int]], str] = spell

    def groups(
        self, samples: int = 4, prompts: Sequence[Prompt] = PROMPTS, visit: int = VISIT
    ) -> list[Group]:
        """What a step would train on."""
        spec = CollectSpec(Purpose.TRAIN, 3, samples, LAW)
        visits = [visit] * len(prompts)
        return collect(self.engine, self.graders, spell, prompts, visits, spec).groups

    def audit(self) -> Audit:
        return Audit(self.config, self.run, SPEC, self.reuse)

    def take(self, groups: list[Group], step: int = 5) -> dict[str, float]:
        return self.audit().take(self, groups, step)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(tiny("qwen3"), slots=64, capacity=12)


Make = Callable[..., Setting]


@pytest.fixture
def make(engine: LocalEngine, tmp_path: Path) -> Iterator[Make]:
    """Makes a setting with these of [reuse]."""
    stores: list[Store] = []

    def setting(judge: Callable[[str], float | str] = some_digits, **changes: Any) -> Setting:
        flags = {"on": True, "rule": "held", "audit_prompts": 80} | changes
        config = load_config(None, {f"reuse.{k}": str(v) for k, v in flags.items()})
        stores.append(Store(tmp_path / f"{len(stores)}.sqlite"))
        reuse = Reuse(config.reuse, stores[-1], 3, "graders")
        return Setting(engine, StubGraders(judge), reuse, RunDir(tmp_path), config)

    yield setting
    for store in stores:
        store.close()


# --- when ---------------------------------------------------------------------------------------

DUE: dict[str, tuple[dict[str, Any], list[int]]] = {
    "held": ({"rule": "held"}, [5, 10]),
    "lenient": ({"rule": "lenient"}, [5, 10]),
    "fresh": ({"rule": "fresh"}, []),
    "fresh, asked for": ({"rule": "fresh", "audit": "on"}, [5, 10]),
    "held, switched off": ({"rule": "held", "audit": "off"}, []),
    "lenient, switched off": ({"rule": "lenient", "audit": "off"}, []),
    "every third": ({"rule": "held", "audit_every": 3}, [3, 6, 9]),
    "every": ({"rule": "lenient", "audit_every": 1}, list(range(1, 11))),
}


@pytest.mark.parametrize("kind", DUE)
def test_when_an_audit_is_due(kind: str, make: Make) -> None:
    changes, expected = DUE[kind]
    audit = make(**changes).audit()
    assert [step for step in range(1, 11) if audit.due(step)] == expected


# --- what it finds ------------------------------------------------------------------------------


def test_no_gap_where_rollouts_are_the_policys_own(make: Make) -> None:
    setting = make()
    groups = setting.groups()
    figures = setting.take(groups)
    assert set(figures) == KEYS
    before = [statistics.fmean(r.reward for r in g.rollouts) for g in groups]
    spread = statistics.stdev(before) * math.sqrt(2 / len(before))
    assert abs(figures["reward_gap"]) < 4 * spread < 0.2
    assert figures["reward_gap_low"] < 0 < figures["reward_gap_high"]
    assert figures["reward_trained_on"] == pytest.approx(statistics.fmean(before))
    assert figures["reward_gap"] == pytest.approx(
        figures["reward_trained_on"] - figures["reward_fresh"]
    )
    assert figures["reward_gap"] != 0  # other noise
    assert figures["seconds_audit"] > 0


def best_of(groups: list[Group], count: int) -> list[Group]:
    """The better rollouts of each group, as if noise or drafts had been picked by reward."""
    return [
        Group(g.prompt, sorted(g.rollouts, key=lambda r: r.reward or 0.0)[-count:]) for g in groups
    ]


def test_a_gap_where_the_better_rollouts_come_again(make: Make) -> None:
    setting = make()
    groups = best_of(setting.groups(samples=8), 4)
    figures = setting.take(groups)
    assert figures["reward_gap"] > figures["reward_gap_low"] > 0.05
    worse = [Group(g.prompt, g.rollouts[:1]) for g in best_of(setting.groups(samples=8), 8)]
    assert setting.take(worse)["reward_gap_high"] < -0.05


def test_by_hand(make: Make) -> None:
    setting = make(judge=lambda text: 0.25, audit_prompts=3)
    groups = setting.groups(prompts=PROMPTS[:5])
    for group, reward in zip(groups, (1.0, 0.5, 0.0, 9.0, 9.0), strict=True):
        for rollout in group.rollouts:
            rollout.reward = reward
    groups[0].rollouts[1].reward = None  # left out of the mean
    groups[1].rollouts[0].reward = 0.1
    first = (0.5 * 3 + 0.1) / 4
    drawn = setting.engine.stats().tokens_drawn
    figures = setting.take(groups)
    gaps = [1 - 0.25, first - 0.25, 0 - 0.25]
    assert figures["reward_trained_on"] == pytest.approx((1 + first + 0) / 3)
    assert figures["reward_fresh"] == 0.25
    assert figures["reward_gap"] == pytest.approx(sum(gaps) / 3)
    low, high = bootstrap_interval(gaps)
    assert (figures["reward_gap_low"], figures["reward_gap_high"]) == pytest.approx((low, high))
    assert figures["tokens_audit"] == setting.engine.stats().tokens_drawn - drawn > 0


def test_problems_without_a_grade_are_left_out(make: Make) -> None:
    setting = make(judge=lambda text: 0.5, audit_prompts=4)
    groups = setting.groups(prompts=PROMPTS[:4])
    for rollout in groups[1].rollouts:
        rollout.reward = None
    for rollout in groups[2].rollouts:
        rollout.reward = 1.0
    figures = setting.take(groups)
    assert figures["reward_trained_on"] == pytest.approx(2 / 3)
    assert figures["reward_gap"] == pytest.approx(0.5 / 3)
    hopeless = make(judge=lambda text: "never").take(groups)
    for figures in (hopeless, setting.take([])):
        assert set(figures) == KEYS
        assert all(v == 0 for k, v in figures.items() if k.startswith("reward"))


@pytest.mark.parametrize("rule", ["fresh", "held", "lenient"])
def test_it_samples_losslessly_on_keys_of_its_own(
    rule: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"rule": rule, "audit": "on", "audit_prompts": 2}
    setting, drafted = make(**changes), make(**changes)
    old = setting.groups(prompts=PROMPTS[:3], visit=1)
    drafted.reuse.remember(old, 1, 0, set())
    groups = setting.groups(prompts=PROMPTS[:3])
    requests: list[Request] = []
    submit = setting.engine.submit
    monkeypatch.setattr(setting.engine, "submit", lambda r: (requests.append(r), submit(r))[1])
    plain, figures = setting.take(groups), drafted.take(groups)
    assert {k: v for k, v in plain.items() if k != "seconds_audit"} == {
        k: v for k, v in figures.items() if k != "seconds_audit"
    }
    assert len(requests) == 2 * 2 * 4
    for index, request in enumerate(requests):
        key = make_key(3, Purpose.AUDIT, index // 4 % 2, index % 4, VISIT)
        assert (request.key, request.lenience, request.sampling) == (key, None, LAW)
        texts = [list(draft.token_ids) for draft in request.drafts]
        rollouts = old[index // 4 % 2].rollouts
        own_first = sorted(rollouts, key=lambda r: r.sample != index % 4)
        expected = [r.completion.token_ids for r in own_first]
        assert texts == (expected if index >= 8 else [])
    # nothing of it is written down, nor taken from what was
    assert len(drafted.reuse.store) == 12
    assert len(drafted.graders.jobs) == 2 * 4
    assert all(job.name.startswith("audit/") for job in drafted.graders.jobs)


# --- what it says -------------------------------------------------------------------------------


def record(gap: float, error: float, step: int = 5) -> dict[str, Any]:
    """A line of an audit whose 95 % interval has this standard error."""
    half = 1.96 * error
    return {
        "kind": "train", "step": step, "reward_gap": gap, "reward_gap_low": gap - half,
        "reward_gap_high": gap + half,
    }  # fmt: skip


def test_pooled_by_hand() -> None:
    assert pooled_gap([]) == (0.0, math.inf)
    assert pooled_gap([record(0.25, 0.125)]) == pytest.approx((0.25, 0.125))
    assert pooled_gap([record(0.25, 0.3), record(-0.05, 0.4)]) == pytest.approx((0.1, 0.5 / 2))
    assert pooled_gap([record(0.1, 0.2)] * 4) == pytest.approx((0.1, 0.1))


REMEDIES = {
    "held": "raise reuse.refresh, or set reuse.rule = 'fresh'",
    "lenient": "lower reuse.lenience, or set reuse.rule = 'fresh'",
    "fresh": "please report it",
}


@pytest.mark.parametrize("rule", REMEDIES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_warning_names_gap_and_remedy(rule: str, sign: int, make: Make) -> None:
    setting = make(rule=rule, audit="on")
    setting.run.log(record(sign * 0.3, 0.1))
    text = setting.audit().warning(5)
    assert text is not None and "\n" not in text
    assert text.startswith("step 5: WARNING: rollouts trained on score ")
    assert f" {sign * 0.3:+.3f} against fresh samples" in text
    assert "(standard error 0.100, 1 audits)" in text
    assert text.endswith(REMEDIES[rule])
    for other in set(REMEDIES) - {rule}:
        assert REMEDIES[other] not in text


@pytest.mark.parametrize(
    ("times", "warned"), [(0.5, False), (0.99, False), (1.01, True), (3, True)]
)
@pytest.mark.parametrize("count", [1, 3])
def test_it_warns_beyond_the_interval_alone(
    times: float, warned: bool, count: int, make: Make
) -> None:
    setting = make()
    for step in range(count):
        setting.run.log(record(times * DEVIATIONS * 0.1 / math.sqrt(count), 0.1, step + 1))
    assert (setting.audit().warning(5) is not None) == warned


def test_it_rests_on_the_last_audits(make: Make) -> None:
    setting = make(audit_every=1)
    audit = setting.audit()
    assert audit.warning(1) is None  # no audit yet
    gaps = [0.9] * POOLED + [0.0] * POOLED
    heard = []
    for step, gap in enumerate(gaps, start=1):
        setting.run.log({"kind": "eval", "step": step, "reward": 0.1})
        setting.run.log(record(gap, 0.4, step))
        heard.append(audit.warning(step))
    # one is not enough, two to four are; then they fade out one by one
    assert [text is not None for text in heard] == [
        False,
        True,
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert heard[3] is not None and f"{POOLED} audits" in heard[3]
    assert heard[4] is not None and f"{0.9 * 3 / 4:+.3f}" in heard[4]


def test_it_says_nothing_in_steps_that_are_not_audited(make: Make) -> None:
    setting = make()
    setting.run.log(record(0.9, 0.01))
    audit = setting.audit()
    assert [step for step in range(1, 11) if audit.warning(step)] == [5, 10]
    assert not any(make(audit="off").audit().warning(step) for step in range(1, 11))


# --- in a run -----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reroll.loop, "plot_run", lambda run: None)
    monkeypatch.setattr(LocalEngine, "measure", lambda engine: TYPICAL)


@pytest.mark.usefixtures("quick")
def test_audits_of_a_run_train_on_nothing_else(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = SHORT | FRESH | {"train__steps": 4, "reuse__audit_prompts": 2}
    seen: dict[str, list[Any]] = {}
    lines = {}
    for name in ("on", "off"):
        flags = {"reuse__audit": name, "reuse__audit_every": 2}
        trained = seen.setdefault(name, [])
        with monkeypatch.context() as patch:
            credit = Trainer.credit

            def watched(
                trainer: Trainer, groups: list[Group], credit: Any = credit, trained: Any = trained
            ) -> Any:
                trained.append(
                    [(r.completion.token_ids, r.reward) for g in groups for r in g.rollouts]
                )
                return credit(trainer, groups)

            patch.setattr(Trainer, "credit", watched)
            lines[name] = lines_of(train(project.config(name, **changes | flags)).path)
    assert seen["on"] == seen["off"]
    assert [KEYS - {"seconds_audit"} <= set(line) for line in lines["on"]] == [False, True] * 2
    for on, off in zip(lines["on"], lines["off"], strict=True):
        assert "reward_gap" not in off
        audited = on.get("tokens_audit", 0)
        assert (audited > 0) == (on["step"] % 2 == 0)
        # its forwards are booked with the others, its tokens are in no figure of the rollouts
        assert (on["tokens_prefill"] > off["tokens_prefill"]) == (audited > 0)
        for key in ("reward", "length", "entropy", "loss", "drafted"):
            assert on[key] == off[key]


@pytest.mark.usefixtures("quick")
def test_a_run_is_warned(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([record(0.0, 0.1), record(0.9, 0.1), record(0.9, 0.1)])

    def take(self: Audit, parts: Any, groups: list[Group], step: int) -> dict[str, float]:
        return dict.fromkeys(KEYS, 0.0) | {k: v for k, v in next(found).items() if k in KEYS}

    monkeypatch.setattr(Audit, "take", take)
    flags = SHORT | {
        "reuse__on": "true", "reuse__rule": "held", "reuse__audit_every": 1, "train__steps": 3,
        "log__display": "plain",
    }  # fmt: skip
    assert main(project.train(**flags)) == 0
    out = capsys.readouterr().out
    assert "step 1: WARNING" not in out
    assert "step 2: WARNING: rollouts trained on score +0.450 against" in out
    assert "step 3: WARNING: rollouts trained on score +0.600 against" in out
    assert out.count("raise reuse.refresh") == 2
