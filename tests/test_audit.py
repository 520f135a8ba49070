"""Audits: fresh samples of the same policy beside the rollouts trained on."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

import reroll.loop
from reroll.algo.noise import make_key
from reroll.audit import (
    FALSE_ALARMS,
    POOLED,
    Audit,
    PooledGap,
    compare,
    gap_warning,
    pooled_gap,
)
from reroll.cli import main
from reroll.config import Config, ReuseSection, load_config
from reroll.engine.costs import TYPICAL
from reroll.engine.local import LocalEngine
from reroll.loop import train
from reroll.rollout.collect import collect
from reroll.rollout.collected import CollectSpec
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
    "reward_gap_error", "audited", "tokens_audit", "seconds_audit",
}  # fmt: skip
SPENT = {"tokens_audit", "seconds_audit"}
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
        return Audit(self.config, SPEC, self.reuse)

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
        flags = {"on": True, "rule": "held"} | changes
        if (flags["rule"] != "fresh" or "audit" in flags) and flags.get("audit") != "off":
            flags = {"audit_prompts": 80} | flags
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
    low, high = ttest_1samp(gaps, 0.0).confidence_interval(0.95)
    assert (figures["reward_gap_low"], figures["reward_gap_high"]) == pytest.approx((low, high))
    assert figures["reward_gap_error"] == pytest.approx(statistics.stdev(gaps) / math.sqrt(3))
    assert figures["audited"] == 3
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
    assert figures["audited"] == 3
    hopeless = make(judge=lambda text: "never").take(groups)
    for figures in (hopeless, setting.take([]), setting.take(groups[2:3])):
        assert set(figures) == SPENT  # no gap, rather than one of zero or of nothing


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


def record(gap: float, error: float, step: int = 5, problems: int = 8) -> dict[str, Any]:
    """A line of an audit."""
    return {
        "kind": "train", "step": step, "reward_gap": gap, "reward_gap_error": error,
        "audited": float(problems),
    }  # fmt: skip


def reuse_section(**changes: Any) -> ReuseSection:
    flags = {"on": True} | changes
    return load_config(None, {f"reuse.{k}": str(v) for k, v in flags.items()}).reuse


def test_pooled_by_hand() -> None:
    assert pooled_gap([]) is None and pooled_gap([{"kind": "train", "step": 3}]) is None
    assert pooled_gap([record(0.25, 0.125)]) == pytest.approx((0.25, 0.125, 7))
    two = pooled_gap([record(0.25, 0.3), record(-0.05, 0.4, problems=3)])
    assert two == pytest.approx((0.1, 0.5 / 2, 9))
    four = pooled_gap([record(0.1, 0.2)] * 4)
    assert four == pytest.approx((0.1, 0.1, 28))
    # Student's t in tables: 2.048 for 28 degrees of freedom, both sides 5 %; 3.499 for 7, 1 %
    assert four is not None and four.half(0.05) == pytest.approx(0.1 * 2.048, rel=1e-3)
    assert PooledGap(0.0, 1.0, 7).half(0.01) == pytest.approx(3.499, rel=1e-3)


REMEDIES: list[tuple[dict[str, Any], str]] = [
    ({"rule": "held"}, "raise reuse.refresh, or set reuse.rule = 'fresh'"),
    ({"rule": "held", "refresh": "trained"}, "policy's; set reuse.rule = 'fresh'"),
    ({"rule": "lenient"}, "lower reuse.lenience, or set reuse.rule = 'fresh'"),
    ({"rule": "lenient", "cut": "random"}, "policy's; set reuse.rule = 'fresh'"),
    ({"rule": "fresh", "audit": "on"}, "please report it"),
]


@pytest.mark.parametrize(("changes", "remedy"), REMEDIES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_warning_names_gap_and_remedy(changes: dict[str, Any], remedy: str, sign: int) -> None:
    text = gap_warning([record(sign * 0.6, 0.1)], reuse_section(**changes))
    assert text is not None and "\n" not in text
    assert text.startswith("step 5: WARNING: rollouts trained on score ")
    assert f" {sign * 0.6:+.3f} against fresh samples" in text
    assert "(standard error 0.100, 1 audits)" in text
    assert text.endswith(remedy)


@pytest.mark.parametrize(
    ("times", "warned"), [(0.5, False), (0.99, False), (1.01, True), (3, True)]
)
@pytest.mark.parametrize("count", [1, 3])
def test_it_warns_beyond_the_interval_alone(times: float, warned: bool, count: int) -> None:
    bound = 0.1 / math.sqrt(count) * {1: 3.499, 3: 2.831}[count]  # t of 7 and 21
    records = [record(times * bound, 0.1, step + 1) for step in range(count)]
    assert (gap_warning(records, reuse_section(rule="held")) is not None) == warned


def test_it_rests_on_the_last_audits() -> None:
    gaps = [0.9] * POOLED + [0.0] * POOLED
    records: list[dict[str, Any]] = []
    assert gap_warning(records, reuse_section(rule="held")) is None  # no audit yet
    heard = []
    for step, gap in enumerate(gaps, start=1):
        records += [{"kind": "eval", "step": step, "reward": 0.1}, record(gap, 0.4, step)]
        heard.append(gap_warning(records, reuse_section(rule="held")))
    # one is not enough, two to four are; then they fade out one by one
    warned = [text is not None for text in heard]
    assert warned == [False, True, True, True, True, False, False, False]
    assert heard[3] is not None and f"{POOLED} audits" in heard[3]
    assert heard[4] is not None and f"{0.9 * 3 / 4:+.3f}" in heard[4]


@pytest.mark.parametrize(("problems", "audits"), [(8, 1), (8, 4), (4, 2), (2, 4)])
def test_false_alarms_are_as_rare_as_said(problems: int, audits: int) -> None:
    """Groups of 8 on problems of all difficulties, the same law for both sides."""
    rng, trials = np.random.default_rng(problems * audits), 2000
    config, alarms = reuse_section(rule="held"), 0
    for _ in range(trials):
        right = rng.beta(1, 1, (audits, problems))
        on, fresh = rng.binomial(8, right) / 8, rng.binomial(8, right) / 8
        records = [
            {"step": n, **compare(list(zip(on[n].tolist(), fresh[n].tolist(), strict=True)))}
            for n in range(audits)
        ]
        alarms += gap_warning(records, config) is not None
    # a binomial of the said chance, and five of its deviations; rewards are not normal: half more
    expected = 1.5 * FALSE_ALARMS
    assert alarms / trials < expected + 5 * math.sqrt(expected / trials)


# --- in a run -----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reroll.loop, "plot_run", lambda run: None)
    monkeypatch.setattr(LocalEngine, "measure", lambda engine: TYPICAL)


@pytest.mark.usefixtures("quick")
def test_audits_of_a_run_train_on_nothing_else(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = SHORT | FRESH | {"train__steps": 6}
    seen: dict[str, list[Any]] = {}
    lines = {}
    for name in ("on", "off"):
        flags = {"reuse__audit": name}
        if name == "on":
            flags |= {"reuse__audit_every": 2, "reuse__audit_prompts": 2}
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
    # every second step, from the first on that has old rollouts
    audits = [set(line) >= KEYS - {"seconds_audit"} for line in lines["on"]]
    assert audits == [False, False, False, True, False, True]
    for on, off in zip(lines["on"], lines["off"], strict=True):
        assert "reward_gap" not in off
        audited = on.get("tokens_audit", 0)
        assert (audited > 0) == (on["step"] in (4, 6))
        # its forwards are booked with the others, its tokens are in no figure of the rollouts
        assert (on["tokens_prefill"] > off["tokens_prefill"]) == (audited > 0)
        for key in ("reward", "length", "entropy", "loss", "drafted"):
            assert on[key] == pytest.approx(off[key], rel=1e-5)


@pytest.mark.usefixtures("quick")
def test_a_run_is_warned(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([record(0.0, 0.1, 3), record(0.9, 0.1, 4), record(0.9, 0.1, 5)])

    def take(self: Audit, parts: Any, groups: list[Group], step: int) -> dict[str, float]:
        return dict.fromkeys(KEYS, 0.0) | {k: v for k, v in next(found).items() if k in KEYS}

    monkeypatch.setattr(Audit, "take", take)
    flags = SHORT | {
        "reuse__on": "true", "reuse__rule": "held", "reuse__audit_every": 1, "train__steps": 5,
        "log__display": "plain",
    }  # fmt: skip
    assert main(project.train(**flags)) == 0
    out = capsys.readouterr().out
    # the first steps have nothing to reuse, and are not audited
    assert not any(f"step {step}: WARNING" in out for step in (1, 2, 3))
    assert "step 4: WARNING: rollouts trained on score +0.450 against" in out
    assert "step 5: WARNING: rollouts trained on score +0.600 against" in out
    assert out.count("raise reuse.refresh") == 3  # and once more in the summary
