"""Reuse: how a rollout starts when its problem has been tried before.

Three rules (docs/techniques/reuse.md). `fresh`: new noise, the prompt's old rollouts as drafts;
exact, and exact given the drafts. `held`: a sample keeps its noise key from epoch to epoch, so that
most of its old rollout comes out again; exact too, but the weights were trained on that noise.
`lenient`: SPEC-RL's acceptance on the sample's own old rollout (arXiv 2509.23232); not exact.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from statistics import fmean

import numpy as np

from reroll.algo.noise import share
from reroll.config import ReuseSection
from reroll.rollout.decisions import RESTART, Decisions, Graded, Start
from reroll.rollout.store import Past, Store, prompt_hash
from reroll.types import Draft, Finish, Group, Lenience, Prompt, Rollout

Identity = tuple[int, int, int]
"""of a prompt with its prefix; see `Prompt.identity`"""


class Reuse:
    """Start and grade decisions from a store of past rollouts.

    seed: of the run. graders: digest of what grades; "": grades are never taken over.
    """

    def __init__(self, config: ReuseSection, store: Store, seed: int, graders: str = "") -> None:
        self.config, self.store, self.seed, self.graders = config, store, seed, graders
        self._past: dict[Identity, list[Past]] = {}
        """what the store holds of this step's prompts"""

    def decisions(self) -> Decisions:
        """What `collect` asks."""
        return Decisions(self.start, self.known_grade, stagger=self.config.stagger)

    def start(self, prompt: Prompt, visit: int, samples: int) -> list[Start]:
        """How the samples of one prompt start."""
        past = self._look_up(prompt, visit)
        if self.config.rule == "lenient":
            return [self._lenient(prompt, past, visit, sample) for sample in range(samples)]
        near = [p for p in past if p.visit >= visit - self.config.epochs]
        if self.config.rule == "fresh":
            drafts = _own_first(prompt, near[: self.config.rollouts], samples)
            return [Start(visit, its) for its in drafts]
        # a held key without the text it wrote would be worth nothing: the last visit comes whole
        drafts = _own_first(prompt, near[: max(self.config.rollouts, samples)], samples)
        return [
            Start(self._held_visit(prompt, past, visit, sample), its)
            for sample, its in enumerate(drafts)
        ]

    def start_fresh(self, prompt: Prompt, visit: int, samples: int) -> list[Start]:
        """The same prompt's drafts for an audit: lossless whatever the rule."""
        past = self._look_up(prompt, visit)[: self.config.rollouts]
        return [Start(visit, drafts) for drafts in _own_first(prompt, past, samples)]

    def known_grade(self, rollout: Rollout) -> Graded | None:
        """The grade of the same text from the same graders, unless the limit cut it."""
        if not self.graders or rollout.completion.finish is not Finish.STOP:
            return None
        text = _packed(rollout.completion.token_ids)
        for past in self._past.get(rollout.prompt.identity, ()):
            same = past.graders == self.graders and past.finish == Finish.STOP
            if same and past.reward is not None and past.token_ids.tobytes() == text:
                return Graded(past.reward, dict(past.rewards))
        return None

    def remember(
        self,
        groups: Iterable[Group],
        step: int,
        version: int,
        trained: set[int],
        under_way: Collection[Identity] = (),
    ) -> None:
        """Write a step's rollouts; one transaction. trained: ids of those with gradient. under_way:
        the problems that have other rollouts begun."""
        rows = []
        for group in groups:
            name = _name(group.prompt)
            rows += [
                (name, self._as_past(r, step, version, id(r) in trained))
                for r in (*group.rollouts, *group.pruned)
            ]
        self.store.put(step, rows)
        self._past = {one: past for one, past in self._past.items() if one in under_way}

    def metrics(self, groups: Sequence[Group], version: int) -> dict[str, float]:
        """What was reused of a batch; see docs/glossary.md."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        lengths = [r.drawn for r in rollouts]
        drafted = [r for r in rollouts if self._past.get(r.prompt.identity)]
        whole = [r for r in drafted if _whole(r)]
        ages, repeats = [], 0
        for rollout in drafted:
            past, text = self._past[rollout.prompt.identity], _packed(rollout.completion.token_ids)
            repeats += any(p.token_ids.tobytes() == text for p in past)
            walked = rollout.completion.walked
            end = len(rollout.prompt.prefix_ids) + walked
            begin = _packed(rollout.completion.token_ids[:end])
            versions = [p.version for p in past if p.token_ids[:end].tobytes() == begin]
            ages += [version - min(versions)] if walked and versions else []
        return {
            "drafted": len(drafted) / len(rollouts),
            "reused_tokens": sum(r.completion.accepted for r in rollouts) / max(1, sum(lengths)),
            "accept_prefix": fmean(_share(r) for r in drafted) if drafted else 0.0,
            "full_reuse": len(whole) / len(rollouts),
            "duplicates": repeats / len(rollouts),
            "reuse_age": fmean(ages) if ages else 0.0,
        }

    def _look_up(self, prompt: Prompt, visit: int) -> list[Past]:
        """Everything kept of a prompt's earlier visits, newest first."""
        if prompt.identity not in self._past:
            name = _name(prompt)
            # no further than is kept for good: what has not been evicted yet must not matter
            self._past[prompt.identity] = self.store.get(
                name, prompt.row, before_visit=visit, visits=min(visit, self.store.keep_visits)
            )
        return self._past[prompt.identity]

    def _lenient(self, prompt: Prompt, past: Sequence[Past], visit: int, sample: int) -> Start:
        config, given = self.config, len(prompt.prefix_ids)
        before = visit - config.delay
        own = [p for p in past if p.sample == sample and before - config.epochs <= p.visit < before]
        if not own:
            return Start(visit)
        lenience = Lenience(
            math.inf if config.cut == "none" else config.lenience,
            random_cut=config.cut == "random",
            keep_writer=config.anchor == "generator",
        )
        streams = own[0].token_ids, own[0].logprobs, own[0].versions
        return Start(visit, (Draft(*(stream[given:].tolist() for stream in streams)),), lenience)

    def _held_visit(self, prompt: Prompt, past: Sequence[Past], visit: int, sample: int) -> int:
        """The visit whose noise this sample gets: the last one's, unless its key is redrawn."""
        own = next((p for p in past if p.sample == sample), None)
        if own is None or visit - own.noise_visit % RESTART > self.config.max_age:
            return visit
        if own.visit < visit - 1:  # one in between is under way in this step, on that very key
            return visit
        if self.config.refresh == "trained":
            return visit if own.trained else own.noise_visit
        row, trace, cut = prompt.identity
        redrawn = share(self.seed, "refresh", row, sample, visit, trace, cut) < self.config.refresh
        return visit if redrawn else own.noise_visit

    def _as_past(self, rollout: Rollout, step: int, version: int, trained: bool) -> Past:
        completion = rollout.completion
        # a policy for truncated ones may have changed the reward; the graders' own is kept
        settled = completion.finish is Finish.LENGTH
        return Past(
            row=rollout.prompt.row,
            sample=rollout.sample,
            visit=rollout.visit,
            step=step,
            noise_visit=rollout.key_visit,
            version=version,
            token_ids=completion.token_ids,  # type: ignore[arg-type]
            logprobs=completion.behaviour_logprobs,  # type: ignore[arg-type]
            versions=completion.versions,  # type: ignore[arg-type]
            reward=None if settled else rollout.reward,
            rewards={} if settled else rollout.rewards,
            graders=self.graders,
            finish="pruned" if completion.finish is Finish.ABORT else completion.finish,
            trained=trained,
            pruning=_pruning(rollout),
        )


def _pruning(rollout: Rollout) -> str:
    """What the store keeps of the looks at a rollout."""
    if not rollout.looks:
        return ""
    return json.dumps({"looks": [asdict(look) for look in rollout.looks], "saved": rollout.saved})


def _name(prompt: Prompt) -> bytes:
    """What the store finds a prompt's rollouts by."""
    return prompt_hash(prompt.token_ids, prompt.trace, prompt.cut)


def _own_first(prompt: Prompt, past: Sequence[Past], samples: int) -> list[tuple[Draft, ...]]:
    """The drafts of each sample, without the prompt's prefix: the same ones, its own old rollouts
    first."""
    given = len(prompt.prefix_ids)
    drafts = [(p.sample, Draft(p.token_ids[given:].tolist())) for p in past]
    return [
        tuple(draft for _, draft in sorted(drafts, key=lambda pair: pair[0] != sample))
        for sample in range(samples)
    ]


def _packed(token_ids: Sequence[int]) -> bytes:
    """As in the store, where comparing is fast."""
    return np.array(token_ids, np.int32).tobytes()


def _share(rollout: Rollout) -> float:
    """Of a completion's tokens, those found on the draft tree; an ending counts with its text."""
    return 1.0 if _whole(rollout) else rollout.completion.walked / max(1, rollout.drawn)


def _whole(rollout: Rollout) -> bool:
    """Nothing of it was decoded: it ended on the tree."""
    return rollout.completion.walked >= rollout.drawn - 1 > 0
