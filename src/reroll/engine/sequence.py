"""A request's private running state in the embedded engine: token lists, no tensors of its own.

prompt | prefix + resumed                    before prefill: `given` tokens, and drafts behind them
prompt | completion so far        | last     after: `length` tokens have keys and values, the
                                             last drawn token has none until the next tick
"""

import math
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self

from reroll.engine.redraft import Texts
from reroll.types import Completion, Draft, Finish, Request

STREAMS = ("token_ids", "logprobs", "behaviour_logprobs", "versions", "loss_mask", "entropies")
"""of a completion, one entry a token"""


@dataclass(slots=True, eq=False)
class Sequence:
    """See the module. Compared by identity."""

    request: Request
    completion: Completion
    given: int
    """prompt, prefix and resumed tokens: what is read before anything new is drawn"""
    texts: Texts
    """what has been written for the same prompt and prefix, shared with its group"""
    length: int = 0
    """tokens whose keys and values are held"""
    source: Any = None
    """(prefilled cache, row, columns of its tokens) that holds them while the sequence is ready"""
    text: int = -1
    """which text of its row's tree is its own draft (under lenience)"""
    finished: bool = False
    began: float = 0.0
    """engine's seconds when it got its slot"""
    _given: tuple[int, ...] = field(default=())

    @classmethod
    def start(cls, request: Request, texts: Texts) -> Self:
        """A sequence that has drawn nothing yet, or goes on from `request.partial`."""
        completion = _resume(request)
        tokens = (*request.prompt_ids, *completion.token_ids)
        return cls(request, completion, len(tokens), texts, _given=tokens)

    @property
    def _weighs(self) -> bool:
        """Whether entropies are kept."""
        return self.request.watch is not None and self.request.watch.entropy

    @property
    def done(self) -> int:
        """Completion tokens after the prefix."""
        return len(self.completion.token_ids) - len(self.request.prefix_ids)

    @property
    def resumed(self) -> int:
        """Of these, what was drawn before an interruption."""
        return self.done if self.request.partial else 0

    def given_tokens(self) -> tuple[int, ...]:
        """Prompt, prefix and resumed tokens."""
        return self._given

    def drafts(self) -> tuple[Draft, ...]:
        """Guesses of the whole completion: the request's, and its finished siblings. Under lenience
        its own first one, until it is decided how much of it is kept."""
        if self.request.lenience:
            return () if self.done else self.request.drafts[:1]
        return self.texts.drafts

    def first_draft(self) -> tuple[Draft, ...]:
        """The one to verify where a row can have no more; empty without any."""
        if self.request.lenience:
            return self.drafts()
        return (self.request.drafts or self.texts.drafts)[:1]

    def rest_of(self, draft: Draft) -> list[int]:
        """What a draft says comes next, up to its end of text; empty if it began otherwise.

        At most limit - 1 tokens help: after them, the last one is drawn anyway.
        """
        drawn = self.completion.token_ids[len(self.request.prefix_ids) :]
        tokens = list(draft.token_ids[: self.request.sampling.max_tokens - 1])
        if tokens[: len(drawn)] != drawn:
            return []
        ends = [tokens.index(i) for i in self.request.sampling.stop_ids if i in tokens]
        return tokens[len(drawn) : min(ends, default=len(tokens))]

    def guessed(self) -> list[int]:
        """The tokens of its own draft under lenience, its end of text included, up to the limit."""
        if not self.drafts():
            return []
        (draft,) = self.drafts()
        tokens = draft.token_ids[: self.request.sampling.max_tokens]
        return list(tokens[: len(self.rest_of(draft)) + 1])

    def take_walked(
        self,
        tokens: list[int],
        logprobs: list[float],
        behaviour: list[float],
        entropies: list[float],
        version: int,
        accepted: int,
    ) -> None:
        """Take tokens drawn along a draft tree; the first `accepted` of them stood in it."""
        before = self.done
        for token, *of_it in zip(tokens, logprobs, behaviour, entropies, strict=True):
            self.take(token, of_it[0], of_it[1], of_it[2], version)
            if self.finished:
                break
        taken = min(self.done - before, accepted)
        self.completion.accepted += taken
        self.completion.walked += taken
        self.length = len(self.request.prompt_ids) + len(self.completion.token_ids) - 1

    def take_kept(
        self, count: int, logprobs: list[float], entropies: list[float], version: int
    ) -> None:
        """Take the first tokens of its own draft under lenience, with these log-probs of now."""
        draft, rule, start = self.request.drafts[0], self.request.lenience, self.done
        assert rule is not None
        kept = self.guessed()[:count]
        for token, logprob, entropy in zip(kept, logprobs, entropies, strict=True):
            at = self.done
            writer = rule.keep_writer
            logprob = float(draft.logprobs[at]) if writer else logprob
            written = int(draft.versions[at]) if writer else version
            self.take(token, logprob, logprob, entropy, written)
        self.completion.accepted += self.done - start
        self.completion.walked += self.done - start
        self.length = len(self.request.prompt_ids) + len(self.completion.token_ids) - 1

    def take(
        self, token: int, logprob: float, behaviour_logprob: float, entropy: float, version: int
    ) -> None:
        """Append one drawn token; set `finished` at a stop id or the limit."""
        completion = self.completion
        completion.token_ids.append(token)
        completion.logprobs.append(logprob)
        completion.behaviour_logprobs.append(behaviour_logprob)
        completion.versions.append(version)
        completion.loss_mask.append(True)
        if self._weighs:
            completion.entropies.append(entropy)
        self.length += 1
        sampling = self.request.sampling
        if token in sampling.stop_ids:
            completion.finish, self.finished = Finish.STOP, True
        elif len(completion.token_ids) - len(self.request.prefix_ids) >= sampling.max_tokens:
            completion.finish, self.finished = Finish.LENGTH, True

    def expected_left(self) -> float:
        """Tokens still to come, by the mean length of earlier texts; unknown: up to the limit. What
        was interrupted goes first: it was long, and its tokens grow old."""
        if self.request.partial is not None:
            return math.inf
        sampling = self.request.sampling
        mean = self.texts.mean_length()
        return (sampling.max_tokens if mean is None else mean) - self.done

    def abort(self, reason: str) -> Completion:
        """What it has so far, marked as aborted."""
        self.completion.finish, self.completion.abort_reason = Finish.ABORT, reason
        return self.completion

    def check(self, capacity: int = 1 << 62) -> None:
        """Streams are aligned, and all tokens but the last have keys and values, in one slot."""
        c = self.completion
        assert self._weighs or not c.entropies
        streams = [getattr(c, name) for name in STREAMS[: 5 + self._weighs]]
        assert all(len(stream) == len(c.token_ids) for stream in streams)
        assert self.length == len(self.request.prompt_ids) + len(c.token_ids) - 1 < capacity


def _resume(request: Request) -> Completion:
    """A completion that holds the prefix, or a copy of the partial one."""
    if request.partial is None:
        size = len(request.prefix_ids)
        zeros = [0.0] * size
        entropies = list(zeros) if request.watch is not None and request.watch.entropy else []
        given = list(request.prefix_ids), zeros, list(zeros), [-1] * size, [False] * size
        return Completion(request.id, *given, entropies)
    partial = copy(request.partial)
    prefix = tuple(partial.token_ids[: len(request.prefix_ids)])
    if prefix != request.prefix_ids:
        raise ValueError(
            f"request {request.id}: the partial completion does not begin with its prefix"
        )
    partial.request_id, partial.abort_reason = request.id, ""
    for stream in STREAMS:
        setattr(partial, stream, list(getattr(partial, stream)))
    return partial
