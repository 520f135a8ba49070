"""The prefix ladder: success on hard problems from nothing, and from more and more of their traces.

If training on prefixed problems carries over to the problems themselves (back-generalisation), the
lowest rung rises too; if the policy only learns to go on, it does not. How much of what is written
without a prefix stands in the trace word for word says whether it was learnt by heart.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from reroll.algo.passk import pass_at_k
from reroll.config import Config
from reroll.evaluate import powers_of_two, success_rate, with_interval
from reroll.rollout.collect import collect
from reroll.rollout.collected import CollectSpec
from reroll.rollout.prefix import with_prefix
from reroll.rollout.traces import Trace
from reroll.setup import Parts
from reroll.types import Group, Purpose

WORDS = 8
"""tokens in a row that count as copied when they stand in the trace"""


def climb(config: Config, parts: Parts, step: int) -> dict[str, float]:
    """Success at each rung of `prefix.ladder`, pass@k and copied share without prefix.

    The same problems, noise and traces at every evaluation: the first of those that the run began
    with. Keys are under purpose `eval`, which training never uses.
    """
    assert parts.start is not None
    traces = parts.start.traces[: config.prefix.ladder_problems]
    problems = {prompt.row: prompt for prompt in parts.task.train}
    spec = CollectSpec(
        Purpose.EVAL,
        config.run.seed,
        config.eval.samples,
        replace(parts.sampling, temperature=config.eval.temperature),
        label=f"ladder-{step}",
    )
    metrics: dict[str, float] = {}
    for share in config.prefix.ladder:
        prompts = [
            with_prefix(problems[t.row], t, min(round(share * len(t.token_ids)), t.answer_at))
            for t in traces
        ]
        visits = [0] * len(prompts)
        groups = collect(parts.engine, parts.graders, parts.decode, prompts, visits, spec).groups
        rates = [success_rate(group, config.eval.correct_at) for group in groups]
        metrics |= with_interval(f"ladder@{share:g}", rates)
        if share == 0:
            metrics |= _without(groups, traces, config)
    return metrics


def _without(groups: Sequence[Group], traces: Sequence[Trace], config: Config) -> dict[str, float]:
    """What is asked of the lowest rung alone."""
    count, metrics = config.eval.samples, {}
    right = [
        round(success_rate(group, config.eval.correct_at) * len(group.rollouts)) for group in groups
    ]
    for k in powers_of_two(count):
        metrics[f"hard_pass@{k}"] = fmean(pass_at_k(count, hits, k) for hits in right)
    copied = [
        copied_share(rollout.completion.token_ids, trace.token_ids)
        for group, trace in zip(groups, traces, strict=True)
        for rollout in group.rollouts
    ]
    return metrics | {"hard_copied": fmean(copied)}


def copied_share(written: Sequence[int], trace: Sequence[int], words: int = WORDS) -> float:
    """Share of the tokens written that stand in runs of `words` which the trace has too."""
    known = {tuple(trace[i : i + words]) for i in range(len(trace) - words + 1)}
    marked = [False] * len(written)
    for i in range(len(written) - words + 1):
        if tuple(written[i : i + words]) in known:
            marked[i : i + words] = [True] * words
    return sum(marked) / max(1, len(written))
