"""Audit: does a run that reuses rollouts train on better ones than its policy writes?

Every few steps some of the batch's problems are sampled again under the same weights with keys
that nothing else uses, losslessly. The mean difference between the rewards trained on and these is
the gap; beyond its interval, the run says so. Under held noise and lenient acceptance the logged
reward alone would hide it.
"""

import time
from dataclasses import replace
from statistics import fmean
from typing import Any

from reroll.algo.passk import bootstrap_interval
from reroll.config import Config
from reroll.rollout.collect import CollectSpec, collect
from reroll.rollout.decisions import Decisions
from reroll.rollout.reuse import Reuse
from reroll.rundir import RunDir
from reroll.setup import Parts
from reroll.types import Group, Purpose

POOLED = 4
"""audits that a warning rests on"""
DEVIATIONS = 2.58
"""standard errors of their mean gap that it takes: one false alarm in a hundred"""


class Audit:
    """Audits of one run; what earlier ones found is read from its log."""

    def __init__(self, config: Config, run: RunDir, spec: CollectSpec, reuse: Reuse) -> None:
        self.config, self.run, self.reuse = config.reuse, run, reuse
        self.spec = replace(spec, purpose=Purpose.AUDIT, label="")

    def due(self, step: int) -> bool:
        """Whether this step is audited."""
        return self.config.audited and step % self.config.audit_every == 0

    def take(self, parts: Parts, groups: list[Group], step: int) -> dict[str, float]:
        """Sample the batch's first problems afresh and compare; see docs/glossary.md."""
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
        gaps = [a - b for a, b in whole]
        low, high = bootstrap_interval(gaps) if gaps else (0.0, 0.0)
        return {
            "reward_trained_on": fmean(a for a, _ in whole) if whole else 0.0,
            "reward_fresh": fmean(b for _, b in whole) if whole else 0.0,
            "reward_gap": fmean(gaps) if gaps else 0.0,
            "reward_gap_low": low,
            "reward_gap_high": high,
            "tokens_audit": float(parts.engine.stats().tokens_drawn - drawn),
            "seconds_audit": time.perf_counter() - started,
        }

    def warning(self, step: int) -> str | None:
        """A line for the user when the last audits agree on a gap; None otherwise."""
        if not self.due(step):
            return None
        audits = [r for r in self.run.records() if "reward_gap" in r][-POOLED:]
        gap, error = pooled_gap(audits)
        if abs(gap) <= DEVIATIONS * error:
            return None
        remedy = {
            "held": "raise reuse.refresh, or set reuse.rule = 'fresh'",
            "lenient": "lower reuse.lenience, or set reuse.rule = 'fresh'",
            "fresh": "this should not happen under reuse.rule = 'fresh': please report it",
        }[self.config.rule]
        return (
            f"step {step}: WARNING: rollouts trained on score {gap:+.3f} against fresh samples of "
            f"the same policy (standard error {error:.3f}, {len(audits)} audits): the training "
            f"reward is not the policy's; {remedy}"
        )


def pooled_gap(audits: list[dict[str, Any]]) -> tuple[float, float]:
    """(mean gap of these audits, its standard error, from their 95 % intervals)."""
    if not audits:
        return 0.0, float("inf")
    errors = [(r["reward_gap_high"] - r["reward_gap_low"]) / 3.92 for r in audits]
    return (
        fmean(r["reward_gap"] for r in audits),
        sum(e * e for e in errors) ** 0.5 / len(audits),
    )


def _mean(group: Group) -> float | None:
    rewards = [r.reward for r in group.rollouts if r.reward is not None]
    return fmean(rewards) if rewards else None
