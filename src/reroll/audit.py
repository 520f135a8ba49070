"""Audit: does a run that reuses rollouts train on better ones than its policy writes?

Every few steps some of the batch's problems are sampled again under the same weights with keys
that nothing else uses, losslessly. The mean difference between the rewards trained on and these is
the gap; beyond its interval, the run says so. Under held noise and lenient acceptance the logged
reward alone would hide it.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy.stats import t as student

from reroll.config import Config, ReuseSection
from reroll.pruning import expected_rewards
from reroll.rollout.collect import collect
from reroll.rollout.collected import CollectSpec
from reroll.rollout.decisions import Decisions
from reroll.rollout.reuse import Reuse
from reroll.setup import Parts
from reroll.types import Group, Purpose

POOLED = 4
"""audits that a warning rests on"""
FALSE_ALARMS = 0.01
"""share of audits without a gap after which it would be given (Student's t)"""


class Audit:
    """Audits of one run."""

    def __init__(self, config: Config, spec: CollectSpec, reuse: Reuse) -> None:
        self.config, self.reuse = config.reuse, reuse
        self.spec = replace(spec, purpose=Purpose.AUDIT, label="")

    def due(self, step: int) -> bool:
        """Whether this step is audited."""
        return self.config.audited and step % self.config.audit_every == 0

    def take(self, parts: Parts, groups: list[Group], step: int) -> dict[str, float]:
        """Sample the batch's first problems afresh and compare; see docs/glossary.md.

        groups: as collected; picking them by reward would make a gap. Without two problems to
        compare there is no gap among the figures.
        """
        started = time.perf_counter()
        audited = groups[: self.config.audit_prompts]
        drawn = parts.engine.stats().tokens_drawn
        visits = [group.rollouts[0].visit for group in audited]
        fresh = collect(
            parts.engine,
            parts.graders,
            parts.decode,
            [group.prompt for group in audited],
            visits,
            self.spec,
            decisions=Decisions(self.reuse.start_fresh),
        ).groups
        pairs = [(_mean(group), _mean(again)) for group, again in zip(audited, fresh, strict=True)]
        whole = [(a, b) for a, b in pairs if a is not None and b is not None]
        spent = {
            "tokens_audit": float(parts.engine.stats().tokens_drawn - drawn),
            "seconds_audit": time.perf_counter() - started,
        }
        return spent | (compare(whole) if len(whole) > 1 else {})


def compare(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Figures of an audit; pairs: mean reward trained on and of fresh samples, of each problem."""
    gaps = [a - b for a, b in pairs]
    error = stdev(gaps) / len(gaps) ** 0.5
    half = error * float(student.ppf(0.975, len(gaps) - 1))
    return {
        "reward_trained_on": fmean(a for a, _ in pairs),
        "reward_fresh": fmean(b for _, b in pairs),
        "reward_gap": fmean(gaps),
        "reward_gap_low": fmean(gaps) - half,
        "reward_gap_high": fmean(gaps) + half,
        "reward_gap_error": error,
        "audited": float(len(gaps)),
    }


class PooledGap(NamedTuple):
    """The mean gap of some audits."""

    gap: float
    error: float
    """its standard error"""
    freedom: int
    """degrees of freedom of that"""

    def half(self, chance: float) -> float:
        """Half the width of the interval that misses the true gap with this chance."""
        return self.error * float(student.ppf(1 - chance / 2, self.freedom))


def pooled_gap(records: Iterable[dict[str, Any]]) -> PooledGap | None:
    """Of those lines of metrics.jsonl that hold an audit; None without any."""
    audits = [r for r in records if "reward_gap" in r]
    if not audits:
        return None
    return PooledGap(
        fmean(r["reward_gap"] for r in audits),
        sum(r["reward_gap_error"] ** 2 for r in audits) ** 0.5 / len(audits),
        int(sum(r["audited"] - 1 for r in audits)),
    )


def gap_warning(records: Sequence[dict[str, Any]], config: ReuseSection) -> str | None:
    """A line for the user when the last audits agree on a gap; None otherwise.

    records: lines of metrics.jsonl.
    """
    audits = [r for r in records if "reward_gap" in r][-POOLED:]
    pooled = pooled_gap(audits)
    if pooled is None or abs(pooled.gap) <= pooled.half(FALSE_ALARMS):
        return None
    return (
        f"step {audits[-1]['step']}: WARNING: rollouts trained on score {pooled.gap:+.3f} against "
        f"fresh samples of the same policy (standard error {pooled.error:.3f}, {len(audits)} "
        f"audits): the training reward is not the policy's; {_remedy(config)}"
    )


def _remedy(config: ReuseSection) -> str:
    if config.rule == "fresh":
        return "this should not happen under reuse.rule = 'fresh': please report it"
    milder = None
    if config.rule == "held" and config.refresh != "trained":
        milder = "raise reuse.refresh"
    if config.rule == "lenient" and config.cut == "ratio":
        milder = "lower reuse.lenience"
    return f"{milder}, or set reuse.rule = 'fresh'" if milder else "set reuse.rule = 'fresh'"


def _mean(group: Group) -> float | None:
    rewards = expected_rewards(group)
    return fmean(rewards) if rewards else None
