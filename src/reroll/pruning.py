"""What pruning did to a batch, and what it earns against its rivals, from the run's own groups.

Two cheaper ways give a group of k rollouts: start only k, or let all n end and train on the k that
differ most (PODS, arXiv 2504.13818). Groups that were left whole, by lot or before pruning began,
know the rewards and the scores of all n; so each way is tried on them afterwards, and nothing of
the comparison was selected. docs/glossary.md has the names.
"""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from reroll.algo.survive import widest
from reroll.algo.thinned import estimates
from reroll.rollout.prune import Pruner
from reroll.train.credit import looks_of
from reroll.types import Finish, Group

ARMS = ("all", "fewer", "pods", "pruned")
"""all n; k started; the k of n that differ most; pruned as the run prunes"""
DRAWS = 32
"""draws that a rule's lot is averaged over"""


def expected_rewards(group: Group) -> list[float]:
    """An unbiased estimate of each started rollout's expected reward (`algo/thinned.py`); the
    rewards themselves where nothing was thinned out. Ungraded ones are left out."""
    every = [*group.rollouts, *group.pruned]
    looks = [looks_of(rollout) for rollout in every]
    known = [*(r.reward for r in group.rollouts), *[None] * len(group.pruned)]
    return [x for x in estimates(looks, known) if not math.isnan(x)]


def prune_metrics(groups: Sequence[Group], pruner: Pruner) -> dict[str, float]:
    """Figures of a batch."""
    started = sum(len(group.rollouts) + len(group.pruned) for group in groups)
    pruned = [rollout for group in groups for rollout in group.pruned]
    stopped = [rollout for rollout in pruned if rollout.completion.finish is Finish.ABORT]
    rewards = [r.reward for g in groups for r in g.rollouts if r.reward is not None]
    return {
        "pruned": len(pruned) / started,
        "pruned_running": len(stopped) / started,
        "tokens_pruned_saved": sum(rollout.saved for rollout in stopped),
        "reward_survivors": fmean(rewards) if rewards else 0.0,
        "seconds_head": pruner.take_seconds(),
        **pruner.predictor.metrics(),
        **rivals(groups, pruner),
    }


def rivals(groups: Sequence[Group], pruner: Pruner) -> dict[str, float]:
    """Of each arm, means over the whole groups: share with signal, variance of the rewards trained
    on, tokens drawn, tokens trained on; of none without a whole group."""
    found: dict[str, list[float]] = {}
    whole = [group for group in groups if _is_whole(group)]
    for group in whole:
        for arm in ARMS:
            for name, value in zip(
                ("live", "variance", "drawn", "trained"), _try(arm, group, pruner), strict=True
            ):
                found.setdefault(f"{name}_{arm}", []).append(value)
    means = {name: fmean(values) for name, values in found.items()}
    return {"whole_groups": float(len(whole)), **means}


def _is_whole(group: Group) -> bool:
    return (
        not group.pruned
        and len(group.rollouts) > 1
        and all(r.reward is not None and r.looks for r in group.rollouts)
        and all(look.survival == 1 for r in group.rollouts for look in r.looks)
    )


def _try(arm: str, group: Group, pruner: Pruner) -> tuple[float, float, float, float]:
    """(share with signal, variance, tokens drawn, tokens trained on), expected."""
    rewards = [r.reward for r in group.rollouts if r.reward is not None]
    lengths = [r.drawn for r in group.rollouts]
    keep = pruner.keep(len(rewards), pruner.stages - 1)
    if arm == "fewer":
        count, total = len(rewards), float(sum(lengths))
        same = sum(math.comb(n, keep) for n in Counter(rewards).values())
        live = 1 - same / math.comb(count, keep)
        return live, _variance(rewards), total * keep / count, total * keep / count * live
    if arm == "pruned":
        draws = _pruned(group, pruner)
    else:
        kept = widest(rewards, keep) if arm == "pods" else [True] * len(rewards)
        draws = [(kept, lengths)]
    tried = [_figures(kept, drawn, rewards, lengths) for kept, drawn in draws]
    live, variance, drawn, trained = (fmean(column) for column in zip(*tried, strict=True))
    return live, variance, drawn, trained


def _pruned(group: Group, pruner: Pruner) -> list[tuple[list[bool], list[int]]]:
    """Who would be kept, and the tokens that each would have drawn, for lots spread evenly."""
    lengths = [r.drawn for r in group.rollouts]
    draws = [([True] * len(lengths), list(lengths)) for _ in range(DRAWS)]
    known: dict[tuple[int, ...], list[float]] = {}
    for stage in range(pruner.stages):
        keep = pruner.keep(len(lengths), stage)
        for index, (kept, drawn) in enumerate(draws):
            left = [i for i, r in enumerate(group.rollouts) if kept[i] and len(r.looks) > stage]
            if keep >= len(left):
                continue
            looks = [group.rollouts[i].looks[stage] for i in left]
            chances = [pruner.predictor.share(look.probability) for look in looks]
            if (name := (stage, *left)) not in known:
                known[name] = pruner.survival(chances, keep)
            lot = (index + 0.5) / DRAWS
            stay = pruner.pick(chances, known[name], keep, chances, lot)
            given = len(group.prompt.prefix_ids)
            last = max((look.position - given for look in looks if not look.ended), default=0)
            for i, look, stays in zip(left, looks, stay, strict=True):
                if not stays:
                    kept[i] = False
                    drawn[i] = drawn[i] if look.ended else min(drawn[i], last)
    return draws


def _figures(
    kept: Sequence[bool], drawn: Sequence[int], rewards: Sequence[float], lengths: Sequence[int]
) -> tuple[float, float, float, float]:
    mine = [reward for reward, stays in zip(rewards, kept, strict=True) if stays]
    live = float(len(set(mine)) > 1)
    trained = live * sum(n for n, stays in zip(lengths, kept, strict=True) if stays)
    return live, _variance(mine), float(sum(drawn)), trained


def _variance(rewards: Sequence[float]) -> float:
    """Without bias by the number of rewards."""
    if len(rewards) < 2:
        return 0.0
    mean = fmean(rewards)
    return sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)


def earnings(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an arm over a run's training records: its figures, and the seconds that a group would
    have cost, at what a token drawn and a token trained on cost in this run."""
    whole = [r for r in steps if r.get("whole_groups")]
    if not whole:
        return []
    drawing = sum(r[f"seconds_{x}"] for r in steps for x in ("prefill", "verify", "decode"))
    training = sum(r[f"seconds_{x}"] for r in steps for x in ("score", "train"))
    per_drawn = drawing / max(1, sum(r["tokens_decode"] for r in steps))
    per_trained = training / max(1, sum(r["tokens_trained"] for r in steps))
    counts = sum(r["whole_groups"] for r in whole)
    rows = []
    for arm in ARMS:
        row: dict[str, Any] = {"arm": arm}
        for name in ("live", "variance", "drawn", "trained"):
            key = f"{name}_{arm}"
            row[name] = sum(r[key] * r["whole_groups"] for r in whole) / counts
        row["seconds"] = row["drawn"] * per_drawn + row["trained"] * per_trained
        rows.append(row)
    return rows
