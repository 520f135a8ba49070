"""The training loop: configuration in, trained policy out.

    for each step: collect a batch of groups -> credit -> optimizer steps -> version + 1

Everything that decides what is sampled or trained is a function of the configuration, the weights
and the step number, so a run killed at any moment and started again from its last checkpoint is
the run that was not killed.
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

from reroll import figures
from reroll.audit import Audit, gap_warning
from reroll.config import Config, settings
from reroll.evaluate import evaluate
from reroll.gathering import collect_first
from reroll.interrupt import Interrupts
from reroll.ladder import climb
from reroll.ledger import Ledger
from reroll.log import Display, Tracker, open_trackers
from reroll.notes import resumed_notes
from reroll.occupancy import schedule_metrics
from reroll.plot import plot_run
from reroll.prefixes import make_source, take_outcomes
from reroll.pruning import prune_metrics
from reroll.rollout.collected import Collected, check_failures
from reroll.rollout.decisions import NOTHING
from reroll.rollout.mix import Mix
from reroll.rollout.reuse import Reuse
from reroll.rollout.saved import restore, snapshot
from reroll.rundir import RunDir
from reroll.scheduling import make_collector, make_pruner, make_spec
from reroll.setup import Parts, open_reuse, prepare
from reroll.timeline import batch_of
from reroll.train import checkpoint
from reroll.train.trainer import Diverged
from reroll.types import Group
from reroll.warmstart import warm_start


def train(config: Config) -> RunDir:
    """Run (or go on with) the run of `config`; returns its directory.

    Raises UserError for the user's mistakes, KeyboardInterrupt after saving a checkpoint, and
    Diverged, also after saving one, when loss or gradient is not finite three steps in a row.
    """
    run = RunDir(config.run.out)
    start = run.open(config)
    if config.prefix.on and start is None and not config.prefix.traces:
        collect_first(config)
    with prepare(config, run, start) as parts, open_reuse(config, run, start) as reuse:
        run.claim(config)
        display = Display(config.log.display, config.train.steps, start or 0, config.train.flops)
        trackers = open_trackers(config.log, run.path, dict(settings(config)))
        with display, Interrupts() as interrupts:
            _Run(config, run, parts, reuse, display, trackers, interrupts).go(start)
    return run


class _Run:
    """One start of a run: what the steps share."""

    def __init__(
        self,
        config: Config,
        run: RunDir,
        parts: Parts,
        reuse: Reuse | None,
        display: Display,
        trackers: Sequence[Tracker],
        interrupts: Interrupts,
    ) -> None:
        self.config, self.run, self.parts = config, run, parts
        self.past = reuse
        """what past rollouts are written to"""
        self.reuse = reuse if config.reuse.on else None
        self.pruner = make_pruner(config, parts)
        self.decisions = replace(
            self.reuse.decisions() if self.reuse else NOTHING, prune=self.pruner
        )
        self.display, self.trackers, self.interrupts = display, trackers, interrupts
        self.ledger = Ledger()
        self.done = 0
        """steps that are whole: trained and logged"""
        self.under_way: dict[str, Any] = {}
        """what the collector has after these steps"""
        self.head: dict[str, Any] = {}
        """what pruning has learnt by then; likewise where the mix of prefixes stands"""
        self.mixed: dict[str, Any] = {}
        self.held_out: float | None = None
        self.counted: dict[str, Any] = {}
        """the engine's counts after these steps and their evaluations"""
        self.spec = make_spec(config, parts)
        self.source = make_source(config, parts.task, parts.start, parts.decode, parts.tokenizer)
        self.mix = self.source if isinstance(self.source, Mix) else None
        self.collector = make_collector(config, parts, self.source, self.spec, self.decisions)
        self.audit = Audit(config, self.spec, self.reuse) if self.reuse else None

    def go(self, start: int | None) -> None:
        """All steps that are left, with evaluations and checkpoints when they are due."""
        config = self.config
        self._greet(start)
        self.done, self.counted = start or 0, self.parts.engine.state()
        if start is None and config.sft.epochs:
            said = warm_start(config, self.parts, self.ledger, self.display.rollouts)
            self.display.say(said)
            self._snapshot()
            self._save()
        self._snapshot()
        # an interrupt may have come between a step and its evaluation
        evaluated = {r["step"] for r in self.run.records() if r["kind"] == "eval"}
        try:
            if self._evaluation_due() and self.done not in evaluated:
                self._evaluate(self.done)
            while not self._over():
                self._step(self.done + 1)
                if self._evaluation_due():
                    self._evaluate(self.done)
                if self._checkpoint_due():
                    self._save()
        except KeyboardInterrupt:
            self._save()
            self.display.say(f"stopped after step {self.done}; the same command goes on from here")
            raise
        except Diverged:
            self._save()
            raise
        plot_run(self.run)

    def _over(self) -> bool:
        """Whether the run has had its steps or its FLOPs."""
        train = self.config.train
        return self.done >= train.steps or 0 < train.flops <= self.ledger.paper

    def _evaluation_due(self) -> bool:
        every = self.config.eval.every
        return self.done == 0 or self._over() or (every > 0 and self.done % every == 0)

    def _checkpoint_due(self) -> bool:
        return self._over() or self.done % self.config.checkpoint.every == 0

    def _greet(self, start: int | None) -> None:
        for note in self.parts.notes:
            self.display.say(note)
        if start is not None:
            state = self.parts.restored
            self.ledger = Ledger(**state["ledger"])
            self.held_out = state["held_out_reward"]
            if self.mix is not None:
                self.mix.load_state(state["mix"])
            restore(self.collector, state["under_way"], self.source.find)
            self.parts.engine.load_state(state["engine"])
            self.display.say(f"going on from step {start} of {self.run.path}")
            for note in resumed_notes(self.reuse):
                self.display.say(note)
        elif self.parts.start is not None:
            self.ledger.add_collection(self.parts.start.spent)

    def _step(self, step: int) -> None:
        """One batch of rollouts and its optimizer steps; a line in metrics.jsonl."""
        parts, ledger, before = self.parts, self.ledger, self.ledger.copy()
        stats = deepcopy(parts.engine.stats())
        buffer, shown = self.collector.buffer, step <= self.config.log.timeline
        parts.engine.spans = spans = [] if shown else None
        started = time.perf_counter()
        collected = self.collector.next(self.display.rollouts)
        check_failures(collected, self.config.grading.max_failures)
        parts.engine.spans, groups = None, collected.trained()
        rollout_seconds = time.perf_counter() - started
        metrics = figures.rollout_metrics(collected)
        metrics |= schedule_metrics(
            collected, stats, parts.engine.stats(), rollout_seconds, parts.engine.policy_version
        )
        if self.reuse is not None:
            metrics |= self.reuse.metrics(collected.groups, parts.engine.policy_version)
            metrics |= figures.speculation_metrics(stats, parts.engine.stats())
        if self.pruner is not None:
            metrics |= prune_metrics(collected.groups, self.pruner)
        if self.mix is not None:
            metrics |= take_outcomes(self.mix, collected.groups, parts.decode)
        if self.audit is not None and self.audit.due(step) and metrics["drafted"] > 0:
            self.collector.park()  # audits want the engine for themselves
            metrics |= self.audit.take(parts, collected.groups, step)
        with self.interrupts.held():  # weights, logs and `done` agree whenever it is interrupted
            metrics |= self._train(groups, step, collected)
            ledger.add_engine(stats, parts.engine.stats(), parts.cost)
            ledger.tokens["grade"] += figures.graded_tokens(collected)
            ledger.seconds["grade"] += collected.seconds_grading
            metrics |= ledger.since(before).metrics() | ledger.totals()
            if self.config.algo.dynamic_sampling:
                metrics |= figures.refill_metrics(collected, groups)
            # the earliest of the batch: prompts may have been taken in long before
            metrics["epoch"] = min(r.visit for group in collected.groups for r in group.rollouts)
            metrics["version"] = parts.trainer.version
            metrics["seconds_rollout"] = rollout_seconds
            metrics["tokens_per_second"] = sum(figures.lengths(collected.groups)) / rollout_seconds
            self.run.log({"kind": "train", "step": step, **metrics})
            self.run.sample(figures.samples(step, collected.groups, self.config.log.samples))
            if spans is not None:
                self.run.stays(step, batch_of(step, spans, buffer, collected, stats.clock))
            self.done, self.counted = step, parts.engine.state()
            if self._evaluation_due() or self._checkpoint_due():
                self.collector.park()
            self._snapshot()
        self._report(step, metrics, collected)

    def _snapshot(self) -> None:
        """What is under way, and what pruning has learnt, after the steps that are done."""
        self.under_way = snapshot(self.collector.buffer)
        self.head = self.pruner.state() if self.pruner else {}
        self.mixed = self.mix.state() if self.mix else {}

    def _train(self, groups: list[Group], step: int, collected: Collected) -> dict[str, float]:
        """Credit and optimizer steps; the store gets what was collected."""
        parts, ledger, trainer = self.parts, self.ledger, self.parts.trainer
        started = time.perf_counter()
        credited, scored = trainer.credit(groups)
        ledger.add_forwards("score", trainer.take_work(), time.perf_counter() - started, parts.cost)
        started = time.perf_counter()
        trained = trainer.step(credited)
        ledger.add_forwards("train", trainer.take_work(), time.perf_counter() - started, parts.cost)
        started = time.perf_counter()
        live = {id(c.rollout) for group in credited for c in group if c.carries_gradient()}
        ledger.add_paper(*figures.tokens_read(collected.groups, live), parts.cost)
        if self.past is not None:
            begun = {unit.prompt.identity for unit in self.collector.buffer.units()}
            self.past.remember(collected.groups, step, parts.engine.policy_version, live, begun)
        parts.engine.load_weights(trainer.version, keep=self.config.schedule.keep_cache)
        ledger.seconds["sync"] += time.perf_counter() - started
        return scored | trained

    def _report(self, step: int, metrics: dict[str, Any], collected: Collected) -> None:
        for tracker in self.trackers:
            tracker({f"train/{k}": v for k, v in metrics.items()}, step)
        self.display.step(step, metrics)
        said = self.pruner.said() if self.pruner else []
        said += self.mix.told() if self.mix else []
        rounds = self.parts.trainer.forwards.autocast is not None
        said += figures.warnings(self.config, metrics, collected, rounds)
        for line in said:
            self.display.say(f"step {step}: {line}")
        warning = gap_warning(self.run.records(), self.config.reuse)
        if "reward_gap" in metrics and warning:
            self.display.say(warning)

    def _evaluate(self, step: int) -> None:
        """Held-out evaluation; a line in metrics.jsonl."""
        parts, config = self.parts, self.config
        started = time.perf_counter()
        metrics = evaluate(
            parts.engine,
            parts.graders,
            parts.decode,
            parts.extract,
            parts.task.held_out,
            config.eval,
            step=step,
            seed=config.run.seed,
            sampling=parts.sampling,
            progress=self.display.rollouts,
        )
        metrics |= climb(config, parts, step) if parts.start else {}
        self.held_out, self.counted = metrics["reward"], parts.engine.state()
        metrics["seconds_eval"] = time.perf_counter() - started
        self.run.log({"kind": "eval", "step": step, **metrics})
        for tracker in self.trackers:
            tracker({f"eval/{k}": v for k, v in metrics.items()}, step)
        greedy = f", greedy {metrics['greedy_reward']:.3f}" if config.eval.greedy else ""
        self.display.say(
            f"held-out after step {step}: reward {metrics['reward']:.3f} "
            f"[{metrics['reward_low']:.3f}, {metrics['reward_high']:.3f}]{greedy}"
        )

    def _save(self) -> None:
        """Write the checkpoint of the steps done unless it is there; then let old ones go."""
        folder, keep, step = self.run.checkpoints, self.config.checkpoint, self.done
        if step in checkpoint.checkpoints(folder):
            return
        started = time.perf_counter()
        head = dict(self.head)
        state = {
            "ledger": asdict(self.ledger),
            "held_out_reward": self.held_out,
            "engine": self.counted,
            "under_way": self.under_way,
            "tensors": head.pop("tensors", {}),
            "prune": head,
            "mix": self.mixed,
        }
        with self.interrupts.held():
            checkpoint.save(folder, step, self.parts.trainer, self.parts.tokenizer, state)
            checkpoint.prune(folder, keep.keep_last, keep.keep_best)
            # at an interrupt it stays, or the run would go on with other drafts than without one
            if self.past is not None and step % keep.every == 0:
                self.past.store.evict()
        self.ledger.seconds["sync"] += time.perf_counter() - started
