"""Collection: sample every problem until it is solved once, and keep how.

Screening and collecting are one run: a problem that is solved within `collect.screen` attempts is
not a hard one, and its trace is kept all the same. Attempts come in waves over the problems that
are open; within a wave the lowest attempt that succeeded counts, not the first to end, which would
favour short traces. Attempt i at a problem draws its noise from (problem, i): what is collected is
a function of the configuration, and a collection that was killed goes on where its last wave
ended.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from reroll.config import Config, settings
from reroll.evaluate import success_rate
from reroll.ledger import Ledger
from reroll.model.digest import tokenizer_digest, weights_digest
from reroll.rollout.collect import collect
from reroll.rollout.collected import CollectSpec, check_failures
from reroll.rollout.harvest import Origin, trace_of
from reroll.rollout.prefix import with_prefix
from reroll.rollout.traces import Trace, TraceStore, Tried, problem_hash
from reroll.setup import Parts
from reroll.tasks.grade import grader_digest, graders_of
from reroll.types import Group, Prompt, Purpose

ROUNDS = 4
"""times that the engine's slots are filled in one wave, at least"""
AT_ONCE = 64
"""the same, at most: what a kill may lose"""
MATTERS = (
    "run.seed", "model.path", "model.dtype", "task.", "rollout.max_tokens", "rollout.temperature",
    "rollout.truncated", "rollout.penalty", "collect.wave", "collect.problems", "eval.correct_at",
)  # fmt: skip
"""settings that a collection cannot go on with if they are others"""


def gather(
    config: Config, parts: Parts, store: TraceStore, say: Callable[[int, int, int], None]
) -> None:
    """Sample until every problem is solved or has had `collect.cap` attempts, or there are
    `collect.traces` of hard ones.

    say: told of (problems solved, problems settled, problems) after each wave. Raises UserError for
    a store of another collection.
    """
    problems = parts.task.train[: config.collect.problems or None]
    store.claim(_claims(config))
    origin = _origin_of(config, parts)
    tried = {p.row: Tried(p.row, problem_hash(p)) for p in problems} | store.tried()
    while True:
        open_ = [p for p in problems if _is_open(tried[p.row], config)]
        solved = sum(tried[p.row].solved_at is not None for p in problems)
        say(solved, len(problems) - len(open_), len(problems))
        if not open_ or _has_enough(tried.values(), config):
            store.close_with({"cap": config.collect.cap, "problems": len(problems)})
            return
        prompts, visits = _wave(open_, tried, config)
        groups, spent = _sample(config, parts, prompts, visits)
        traces = _settle(groups, tried, config, parts, origin)
        rows = {prompt.row for prompt in prompts}
        store.add(traces, [tried[row] for row in sorted(rows)], spent)


def _is_open(one: Tried, config: Config) -> bool:
    return one.solved_at is None and one.attempts < config.collect.cap


def _has_enough(tried: Iterable[Tried], config: Config) -> bool:
    solved = [one.solved_at for one in tried if one.solved_at is not None]
    hard = sum(at >= config.collect.screen for at in solved)
    return 0 < config.collect.traces <= hard


def _wave(
    open_: Sequence[Prompt], tried: dict[int, Tried], config: Config
) -> tuple[list[Prompt], list[int]]:
    """Problems and their visits: those with the fewest attempts first, each as often as the engine
    needs to be full."""
    wave, slots = config.collect.wave, config.engine.slots
    chosen = sorted(open_, key=lambda p: (tried[p.row].attempts, p.row))
    chosen = chosen[: max(1, AT_ONCE * slots // wave)]
    rounds = max(1, -(-ROUNDS * slots // (len(chosen) * wave)))
    prompts, visits = [], []
    for prompt in chosen:
        begun = tried[prompt.row].attempts // wave
        left = -(-config.collect.cap // wave) - begun
        for visit in range(begun, begun + min(rounds, left)):
            prompts.append(prompt)
            visits.append(visit)
    return prompts, visits


def _sample(
    config: Config,
    parts: Parts,
    prompts: Sequence[Prompt],
    visits: Sequence[int],
    purpose: Purpose = Purpose.COLLECT,
    samples: int = 0,
) -> tuple[list[Group], dict[str, float]]:
    """Graded groups of a wave, and what they cost."""
    spec = CollectSpec(
        purpose,
        config.run.seed,
        samples or config.collect.wave,
        replace(parts.sampling, temperature=config.rollout.temperature),
        config.rollout.truncated,
        config.rollout.penalty,
        label=f"{purpose}-{min(visits)}",
    )
    ledger, stats, started = Ledger(), deepcopy(parts.engine.stats()), time.perf_counter()
    collected = collect(parts.engine, parts.graders, parts.decode, prompts, visits, spec)
    check_failures(collected, config.grading.max_failures)
    ledger.add_engine(stats, parts.engine.stats(), parts.cost)
    rollouts = [r for group in collected.groups for r in group.rollouts]
    whole = sum(len(r.prompt.token_ids) + len(r.completion.token_ids) for r in rollouts)
    spent = {
        "rollouts": float(len(rollouts)),
        "tokens": float(sum(r.drawn for r in rollouts)),
        "flops": sum(ledger.flops.values()),
        "flops_paper": parts.cost.per_token * whole,
        "seconds": time.perf_counter() - started,
    }
    return collected.groups, spent


def _settle(
    groups: Sequence[Group],
    tried: dict[int, Tried],
    config: Config,
    parts: Parts,
    origin: Origin,
) -> list[Trace]:
    """Book the attempts of a wave; the traces of problems that are solved by now."""
    found = []
    for group in groups:
        one = tried[group.prompt.row]
        for rollout in group.rollouts:
            attempt = group.rollouts[0].visit * config.collect.wave + rollout.sample
            one.attempts += 1
            if rollout.reward is None or rollout.reward < config.eval.correct_at:
                continue
            one.successes += 1
            if one.solved_at is None:
                one.solved_at = attempt
                length = len(rollout.prompt.token_ids) + len(rollout.completion.token_ids)
                flops = parts.cost.per_token * length * (attempt + 1)  # as if all were as long
                found.append(trace_of(rollout, parts.decode, origin, "collected", attempt, flops))
    return found


def probe(
    config: Config, parts: Parts, store: TraceStore, cuts: dict[int, list[int]], most: int
) -> dict[str, Any]:
    """Fresh groups of hard problems, without prefix and from each cut of their traces: whether
    starting from prefixes can pay. most: problems."""
    traces = {trace.row: trace for trace in store.traces()}
    prompts = {p.row: p for p in parts.task.train}
    rows = [row for row in cuts if row in traces][:most]
    every = [prompts[row] for row in rows]
    given = [with_prefix(prompts[row], traces[row], cut) for row in rows for cut in cuts[row]]
    found: dict[str, Any] = {"problems_probed": len(rows)}
    for name, some in (("original", every), ("prefixed", given)):
        if not some:
            continue
        groups, spent = _sample(
            config, parts, some, [0] * len(some), Purpose.AUDIT, config.rollout.samples
        )
        store.add([], [], spent)
        rates = [success_rate(group, config.eval.correct_at) for group in groups]
        found[f"success_{name}"] = sum(rates) / len(rates)
        found[f"live_{name}"] = sum(0 < rate < 1 for rate in rates) / len(rates)
        drawn = [r.drawn for group in groups for r in group.rollouts]
        found[f"length_{name}"] = sum(drawn) / len(drawn)
    return found


# --- what it was made with ------------------------------------------------------------------------


def _claims(config: Config) -> dict[str, Any]:
    return {key: value for key, value in settings(config) if key.startswith(MATTERS)}


def _origin_of(config: Config, parts: Parts) -> Origin:
    """What a trace written now says of its writer."""
    sampling = {"temperature": config.rollout.temperature, "max_tokens": config.rollout.max_tokens}
    return Origin(
        sampling=json.dumps(sampling),
        model=weights_digest(parts.model),
        tokenizer=tokenizer_digest(config.task, parts.tokenizer),
        graders=grader_digest(graders_of(config.task), config.task),
    )
