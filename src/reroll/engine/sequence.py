"""A request's private running state in the embedded engine: token lists, no tensors of its own.

prompt | prefix + resumed | draft ...        before prefill: `given` tokens, then the draft
prompt | completion so far        | last     after: `length` tokens have keys and values, the
                                             last drawn token has none until the next tick
"""

from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self

from reroll.types import Completion, Finish, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """See the module. Compared by identity."""

    request: Request
    completion: Completion
    given: int
    """prompt, prefix and resumed tokens: what is read before anything new is drawn"""
    draft: tuple[int, ...]
    length: int = 0
    """tokens whose keys and values are held"""
    source: Any = None
    """(prefilled cache, row) that holds them while the sequence is ready"""
    drawn_at_prefill: int = 0
    reused_at_prefill: int = 0
    """of these, taken over from the draft"""
    finished: bool = False
    _tokens: tuple[int, ...] = field(default=())

    @classmethod
    def start(cls, request: Request) -> Self:
        """A sequence that has drawn nothing yet, or goes on from `request.partial`."""
        completion = _resume(request)
        done = len(completion.token_ids) - len(request.prefix_ids)
        draft = request.draft.token_ids if request.draft else ()
        # at most limit - 1 tokens of a draft help: after them, the last one is drawn anyway
        draft = draft[done : request.sampling.max_tokens - 1]
        if request.partial and request.draft:
            drawn = tuple(completion.token_ids[len(request.prefix_ids) :])
            draft = draft if request.draft.token_ids[:done] == drawn else ()
        tokens = (*request.prompt_ids, *completion.token_ids)
        return cls(request, completion, len(tokens), draft, _tokens=(*tokens, *draft))

    def tokens_to_prefill(self) -> tuple[int, ...]:
        """Everything to run through the model: what is given, then the draft."""
        return self._tokens

    def take_verified(
        self, tokens: list[int], logprobs: list[float], behaviour: list[float], version: int
    ) -> None:
        """Take the accepted draft tokens and the one drawn after them, up to a stop id."""
        self.completion.drafted += len(self.draft)
        before = len(self.completion.token_ids)
        for token, logprob, behaviour_logprob in zip(tokens, logprobs, behaviour, strict=True):
            self.take(token, logprob, behaviour_logprob, version)
            if self.finished:
                break
        self.drawn_at_prefill = len(self.completion.token_ids) - before
        self.reused_at_prefill = min(self.drawn_at_prefill, len(tokens) - 1)
        self.completion.accepted += self.reused_at_prefill
        self.length = self.given + self.drawn_at_prefill - 1

    def take(self, token: int, logprob: float, behaviour_logprob: float, version: int) -> None:
        """Append one drawn token; set `finished` at a stop id or the limit."""
        completion = self.completion
        completion.token_ids.append(token)
        completion.logprobs.append(logprob)
        completion.behaviour_logprobs.append(behaviour_logprob)
        completion.versions.append(version)
        completion.loss_mask.append(True)
        self.length += 1
        sampling = self.request.sampling
        if token in sampling.stop_ids:
            completion.finish, self.finished = Finish.STOP, True
        elif len(completion.token_ids) - len(self.request.prefix_ids) >= sampling.max_tokens:
            completion.finish, self.finished = Finish.LENGTH, True

    def abort(self, reason: str) -> Completion:
        """What it has so far, marked as aborted."""
        self.completion.finish, self.completion.abort_reason = Finish.ABORT, reason
        return self.completion

    def check(self) -> None:
        """Streams are aligned, and all tokens but the last have keys and values."""
        c = self.completion
        streams = (c.logprobs, c.behaviour_logprobs, c.versions, c.loss_mask)
        assert all(len(stream) == len(c.token_ids) for stream in streams)
        assert self.length == len(self.request.prompt_ids) + len(c.token_ids) - 1


def _resume(request: Request) -> Completion:
    """A completion that holds the prefix, or a copy of the partial one."""
    if request.partial is None:
        size = len(request.prefix_ids)
        zeros = [0.0] * size
        return Completion(
            request.id, list(request.prefix_ids), zeros, list(zeros), [-1] * size, [False] * size
        )
    partial = copy(request.partial)
    prefix = tuple(partial.token_ids[: len(request.prefix_ids)])
    if prefix != request.prefix_ids:
        raise ValueError(
            f"request {request.id}: the partial completion does not begin with its prefix"
        )
    partial.request_id, partial.abort_reason = request.id, ""
    for stream in ("token_ids", "logprobs", "behaviour_logprobs", "versions", "loss_mask"):
        setattr(partial, stream, list(getattr(partial, stream)))
    return partial
