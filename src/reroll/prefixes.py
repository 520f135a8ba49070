"""Traces at the start of a run: found, checked, and made into the source of its prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from reroll.config import Config
from reroll.errors import UserError
from reroll.order import Stream
from reroll.pruning import expected_rewards
from reroll.rollout.collected import CollectSpec, grade_job
from reroll.rollout.harvest import Origin, trace_of
from reroll.rollout.mix import Mix
from reroll.rollout.prefix import frozen_cuts, limit, step_ends, with_prefix
from reroll.rollout.refill import has_signal
from reroll.rollout.traces import Trace, TraceStore, Tried, problem_hash
from reroll.tasks.load import Task
from reroll.tasks.pool import GraderPool
from reroll.tasks.prompts import Tokenizer, hinted
from reroll.types import Completion, Group, Prompt, Purpose, Rollout, Sampling

UNKNOWN = Origin("", "", "", "")
"""of a run's own successes, which no other run reads"""


@dataclass(slots=True)
class Start:
    """What a run starts hard problems from."""

    traces: list[Trace]
    """one for each hard problem, usable"""
    easy: list[int]
    """rows of problems that were solved while screening"""
    spent: dict[str, float]
    """what collecting has cost"""
    notes: list[str] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens that a prefix has at most."""
        return max((len(trace.token_ids) for trace in self.traces), default=0)


def trace_path(config: Config) -> Path:
    """Where the traces of a run lie."""
    return Path(config.prefix.traces or Path(config.run.out) / "traces.sqlite")


def read_traces(config: Config, task: Task, tokenizer: str) -> Start:
    """The traces of hard problems of this task.

    tokenizer: digest of what makes prompts and tokens here. Raises UserError for traces of another
    tokenizer or template, of held-out problems, or none that can be used.
    """
    path = trace_path(config)
    with TraceStore(path, read_only=True) as store:
        traces, tried, spent = store.traces(), store.tried(), store.ledger()
    foreign = [trace for trace in traces if trace.tokenizer not in ("", tokenizer)]
    if foreign:
        raise UserError(
            f"{path}: written with another tokenizer or prompt template; its token ids mean "
            "something else here; collect again, or import them as text"
        )
    held_out = {problem_hash(prompt) for prompt in task.held_out}
    if leaked := [trace for trace in traces if trace.problem in held_out]:
        raise UserError(
            f"{path}: {len(leaked)} traces are of held-out problems (the first: row "
            f"{leaked[0].row}); what is evaluated must not be trained on: collect from the "
            "training split"
        )
    here = {problem_hash(prompt): prompt.row for prompt in task.train}
    mine = [trace for trace in traces if here.get(trace.problem) == trace.row]
    notes = []
    if len(mine) < len(traces):
        notes.append(f"prefix: {len(traces) - len(mine)} traces are of problems not trained on")
    hard = [trace for trace in mine if _is_hard(trace, tried.get(trace.row), config)]
    usable = [trace for trace in hard if limit(trace, config.prefix) >= 1]
    if len(usable) < len(hard):
        notes.append(
            f"prefix: {len(hard) - len(usable)} traces are of no use: the answer comes at once, or "
            "they are shorter than prefix.least"
        )
    if not usable:
        raise UserError(
            f"{path}: no trace of a hard problem among {len(traces)}: with collect.screen = "
            f"{config.collect.screen} attempts, {len(mine) - len(hard)} problems were solved in "
            "them; lower collect.screen, raise collect.cap, or train without prefix.on"
        )
    first = {trace.row: trace for trace in reversed(usable)}
    rows = {trace.row for trace in mine} - {trace.row for trace in hard}
    if config.prefix.easy and not rows:
        raise UserError(
            f"prefix.easy = {config.prefix.easy}: {path} has no problem that was solved while "
            "screening; set it to 0"
        )
    return Start(sorted(first.values(), key=lambda t: t.row), sorted(rows), spent, notes)


def _is_hard(trace: Trace, tried: Tried | None, config: Config) -> bool:
    if tried is None or tried.solved_at is None:
        return True  # imported: whoever gave it says so
    return tried.solved_at >= config.collect.screen


def check_whole(start: Start, config: Config, task: Task, graders: GraderPool, digest: str) -> None:
    """Every trace, given whole as its own prefix, must grade as a success.

    If it does not, all groups from it would be dead and nothing would say so. With other graders
    than those that found it, such a trace is left out; with the same ones it is an error.
    """
    prompts = {prompt.row: prompt for prompt in task.train}
    spec = CollectSpec(Purpose.COLLECT, config.run.seed, 1, Sampling(1), label="traces")
    by_id: dict[int, Trace] = dict(enumerate(start.traces))
    for number, trace in by_id.items():
        done = Completion(number, list(trace.token_ids))
        rollout = Rollout(prompts[trace.row], 0, 0, done, text=trace.text)
        graders.submit(grade_job(rollout, number, spec))
    failed = []
    while graders.pending:
        for grade in graders.poll(wait=True):
            if grade.reward is None or grade.reward < config.eval.correct_at:
                failed.append((by_id[grade.id], grade.failure))
    same = [(trace, why) for trace, why in failed if digest and trace.graders == digest]
    if same:
        trace, why = same[0]
        raise UserError(
            f"{trace_path(config)}: {len(same)} of {len(start.traces)} traces, given whole, are no "
            f"success to the graders that found them (the first: row {trace.row}"
            f"{', ' + why.strip().splitlines()[-1] if why.strip() else ''}); is eval.correct_at "
            "still the same?"
        )
    gone = {trace.id for trace, _ in failed}
    start.traces = [trace for trace in start.traces if trace.id not in gone]
    if gone:
        start.notes.append(f"prefix: {len(gone)} traces are no success to the graders of this run")
    if not start.traces:
        raise UserError(
            f"{trace_path(config)}: no trace is a success to the graders of this run; collect "
            "again with them"
        )


def make_source(
    config: Config,
    task: Task,
    start: Start | None,
    decode: Callable[[list[int]], str],
    tokenizer: Tokenizer,
) -> Stream | Mix:
    """Where a run's training prompts come from."""
    if start is None:
        return Stream(task.train, config.run.seed)
    prompts = {prompt.row: prompt for prompt in task.train}
    at_least = config.eval.correct_at
    return Mix(
        config.prefix,
        [prompts[trace.row] for trace in start.traces] + _untraced(config, task, start),
        {trace.row: trace for trace in start.traces},
        [prompts[row] for row in start.easy],
        batch=config.rollout.prompts,
        steps=config.train.steps,
        seed=config.run.seed,
        success=lambda reward: reward >= at_least,
        ends=lambda trace: step_ends(trace, config.prefix.boundary, decode),
        place=_as_hint(config, task, decode, tokenizer)
        if config.prefix.placement == "hint"
        else with_prefix,
    )


def _untraced(config: Config, task: Task, start: Start) -> list[Prompt]:
    """Problems of the original part that have no trace."""
    if not config.prefix.untraced:
        return []
    known = {trace.row for trace in start.traces} | set(start.easy)
    return [prompt for prompt in task.train if prompt.row not in known]


def _as_hint(
    config: Config, task: Task, decode: Callable[[list[int]], str], tokenizer: Tokenizer
) -> Callable[[Prompt, Trace, int], Prompt]:
    """Gives what is given at the end of the problem instead of as the reply's beginning."""

    def place(prompt: Prompt, trace: Trace, cut: int) -> Prompt:
        if cut <= 0:
            return prompt
        fragment = decode(list(trace.token_ids[:cut]))
        hint = config.prefix.hint.replace("{fragment}", fragment)
        made = hinted(prompt, task.problems[prompt.row], hint, config.task, tokenizer)
        return replace(made, trace=trace.id, cut=cut)

    return place


def take_outcomes(
    mix: Mix, groups: Sequence[Group], decode: Callable[[list[int]], str]
) -> dict[str, float]:
    """Tell the mix what a batch's groups earned; its metrics of the batch."""
    rates, live = [_rate(group, mix) for group in groups], [has_signal(group) for group in groups]
    metrics = mix.metrics(groups, rates, live)
    mix.learn(groups, rates, live)
    if mix.config.refresh:
        mix.refresh(
            [trace_of(r, decode, UNKNOWN, "training", 0, 0.0) for r in _solved(mix, groups)]
        )
    return metrics


def _solved(mix: Mix, groups: Sequence[Group]) -> list[Rollout]:
    """The first success of each hard problem's group without prefix."""
    plain = [g for g in groups if not g.prompt.trace and g.prompt.row in mix.hard]
    right = (
        [r for r in g.rollouts if r.reward is not None and mix.success(r.reward)] for g in plain
    )
    return [its[0] for its in right if its]


def _rate(group: Group, mix: Mix) -> float:
    if group.pruned:  # what survived has the rate that pruning gives it
        return min(1.0, max(0.0, fmean(expected_rewards(group))))
    known = [mix.success(r.reward) for r in group.rollouts if r.reward is not None]
    return fmean(known) if known else 0.0


def cuts_of(
    config: Config, start: Start, decode: Callable[[list[int]], str]
) -> dict[int, list[int]]:
    """Where PrefixRL's rule cuts each hard problem's trace, by row."""
    return {
        trace.row: frozen_cuts(
            trace, config.prefix, config.run.seed, step_ends(trace, config.prefix.boundary, decode)
        )
        for trace in start.traces
    }
