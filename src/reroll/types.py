"""The nouns that every layer passes around. Plain data: no torch, no behaviour.

`P` prompts, `G` rollouts of a group, `L` completion tokens of one rollout. A completion is
everything after the prompt: the prefix this run conditions on, then what the policy drew.

    Prompt(row=7, text="2 + 3 =", token_ids=(12, 9, 13, 31), answer="5")
    -> Request(id=0, prompt_ids=(12, 9, 13, 31), key=0x5eed..., sampling=Sampling(max_tokens=8))
    -> Completion(request_id=0, token_ids=[15, 2], logprobs=[-.1, -.0], ..., finish=Finish.STOP)
    -> Rollout(prompt, sample=0, visit=0, completion, text="5", reward=1.0)
    -> Group(prompt, rollouts=[...])
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Finish(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """the policy drew a stop id (kept as the last token)"""
    LENGTH = "length"
    """the request's limit was reached: a truncated completion"""
    ABORT = "abort"
    """taken out of the engine before it ended; `Completion.abort_reason` says why"""


class Purpose(StrEnum):
    """What a rollout is for; part of its noise key, so purposes never share randomness."""

    TRAIN = "train"
    EVAL = "eval"
    AUDIT = "audit"
    COLLECT = "collect"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem of a task. Its tokens are given and never trained on."""

    row: int
    """row in its dataset: the identity of the problem across epochs"""
    text: str
    """what the model reads, before tokenisation"""
    token_ids: tuple[int, ...]
    answer: str | None = None
    """reference answer for the graders"""
    columns: dict[str, Any] = field(default_factory=dict)
    """the row's other columns, handed to graders as keyword arguments"""
    prefix_ids: tuple[int, ...] = ()
    """completion tokens that every rollout of it starts with; never trained on"""
    trace: int = 0
    """the old success that it starts from (`rollout/traces.py`); 0: none"""
    cut: int = 0
    """tokens of that trace that are given"""

    @property
    def identity(self) -> tuple[int, int, int]:
        """What a group is: the rollouts of one problem, one trace, one cut."""
        return self.row, self.trace, self.cut


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn and when a request ends."""

    max_tokens: int
    """limit on completion tokens after the prefix, counted across interruptions"""
    temperature: float = 1.0
    """0 is greedy"""
    top_k: int = 0
    """0 keeps the whole vocabulary"""
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    """drawing one of these ends the completion, that token included"""


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A past completion offered to the engine as a guess of what will be drawn."""

    token_ids: Sequence[int]
    """`[D]` guessed completion tokens after the prefix, ids of the model's vocabulary"""
    logprobs: Sequence[float] = ()
    """`[D]` behaviour log-probs of whoever wrote them; needed under `Lenience` alone"""
    versions: Sequence[int] = ()
    """`[D]` policy versions that wrote them; needed under `Lenience` alone"""


@dataclass(frozen=True, slots=True)
class Lenience:
    """Accept a draft by SPEC-RL's rule instead of the sampler's own choice: not lossless."""

    factor: float
    """l: token i is kept with chance min(1, l * p_new / p_old); inf keeps the whole draft"""
    random_cut: bool = False
    """cut the draft at a place drawn uniformly instead"""
    keep_writer: bool = False
    """kept tokens keep their writer's log-probs and version instead of this visit's"""


@dataclass(frozen=True, slots=True)
class Watch:
    """What an engine is to report of a request on its way, as `Probed` events."""

    at: tuple[int, ...] = ()
    """after so many completion tokens, prefix included"""
    steps: tuple[int, ...] = ()
    """after so many tokens that end a step, counted from 1"""
    step_ids: frozenset[int] = frozenset()
    """the tokens that do"""
    hidden: bool = True
    """with the last hidden state"""
    entropy: bool = False
    """with the entropies of the laws that its tokens were drawn from"""
    last: bool = False
    """once more when its last token is drawn"""


@dataclass(slots=True)
class Completion:
    """Completion tokens with their token-aligned streams, all of length `L` (or not there at all).

    Prefix tokens stand first, with log-probs 0, version -1 and loss mask False.
    """

    request_id: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """tempered, untruncated: the old log-probs of the policy loss"""
    behaviour_logprobs: list[float] = field(default_factory=list)
    """under the law actually sampled (tempered, truncated, renormalised)"""
    versions: list[int] = field(default_factory=list)
    """policy version that drew each token"""
    loss_mask: list[bool] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    """of the tempered law that each token was drawn from, in nats; empty unless watched for"""
    finish: Finish = Finish.ABORT
    abort_reason: str = ""
    accepted: int = 0
    """tokens taken over from drafts, those of re-drafting included"""
    walked: int = 0
    """of these, on the draft tree before the first token was decoded"""


@dataclass(frozen=True, slots=True)
class Request:
    """What the engine is asked: continue `prompt_ids + prefix_ids` under `key`.

    Raises ValueError for a draft under `lenience` that does not say what its writer thought of it.
    """

    id: int
    prompt_ids: tuple[int, ...]
    key: int
    """64-bit noise key; token i of the completion draws its noise from (key, i)"""
    sampling: Sampling
    prefix_ids: tuple[int, ...] = ()
    """completion tokens given, counted in positions, never trained on"""
    drafts: tuple[Draft, ...] = ()
    """guesses; the engine merges those of requests that begin with the same tokens"""
    lenience: Lenience | None = None
    """accept `drafts[0]`, and it alone, by this rule; None: lossless"""
    partial: Completion | None = None
    """an aborted completion of this very request (same key) to go on from"""
    watch: Watch | None = None

    def __post_init__(self) -> None:
        rule = self.lenience
        for draft in self.drafts[:1] if rule else ():
            streams = [draft.logprobs, *([draft.versions] if rule and rule.keep_writer else [])]
            if any(len(stream) != len(draft.token_ids) for stream in streams):
                raise ValueError(f"request {self.id}: a lenient draft needs its writer's streams")


@dataclass(frozen=True, slots=True)
class Look:
    """What pruning knew of a rollout when its group was thinned out, and what came of it."""

    position: int
    """completion tokens that it was judged by; all of them for one that had ended"""
    score: float | None
    """of the signal, in log-odds of success; None: it had ended, or there is no signal"""
    probability: float
    """expected reward given those tokens, in units of reward; its reward if it had ended"""
    survival: float
    """chance to be kept that it was given"""
    kept: bool
    ended: bool
    """its reward was known: it had ended before it was probed"""
    head: int
    """updates of the signal before this"""


@dataclass(slots=True)
class Rollout:
    """One prompt, one completion, one reward."""

    prompt: Prompt
    sample: int
    """index in its group"""
    visit: int
    """how often this (prompt, sample) had been started before"""
    completion: Completion = field(default_factory=lambda: Completion(-1))
    """empty until the engine has finished it"""
    text: str = ""
    """the completion decoded, as the graders read it"""
    reward: float | None = None
    """weighted sum of the graders; None: ungraded, never trained on"""
    rewards: dict[str, float] = field(default_factory=dict)
    """each grader's own number"""
    failure: str = ""
    """why it is ungraded: a traceback, a time-out, a death"""
    seconds_grading: float = 0.0
    weight: float = 1.0
    """in its group's statistics and in the loss; 1 unless its group was thinned out by design"""
    key_visit: int = 0
    """the visit that its noise key was made with; another one than `visit` where noise is held"""
    looks: list[Look] = field(default_factory=list)
    """one for each time that its group was thinned out (or looked at for it) while it was kept"""
    saved: float = 0.0
    """tokens that pruning it is expected to have saved"""

    @property
    def drawn(self) -> int:
        """Completion tokens after the prefix."""
        return max(0, len(self.completion.token_ids) - len(self.prompt.prefix_ids))


@dataclass(slots=True)
class Group:
    """All rollouts of one prompt, with one prefix, in one visit."""

    prompt: Prompt
    rollouts: list[Rollout] = field(default_factory=list)
    pruned: list[Rollout] = field(default_factory=list)
    """those that were started as well and then left out by a rule: ended or not"""
