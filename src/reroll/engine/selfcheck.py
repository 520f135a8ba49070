"""Can the embedded engine serve this model? Decided by trying, not by a list of names.

At start, three short ragged sequences are decoded greedily through the slot cache, and each
one's log-probs are compared with a plain forward of the same module over the finished text. A
sliding window longer than the check's sequences is shortened for its duration, so that its mask
is tried too. A model that fails is refused with the reason and with what to use instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from reroll.engine.base import Finished
from reroll.engine.local import LocalEngine, Speculation
from reroll.errors import UserError
from reroll.model.attention import BLOCK, FLEX_BLOCK
from reroll.model.layout import one_tree
from reroll.model.load import embeddings
from reroll.model.logprobs import layout_logprobs, token_logprobs
from reroll.types import Completion, Draft, Request, Sampling

_LENGTHS = (3, 9, 6)
_NEW = 8
_WINDOW = 5
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}


def check_servable(
    model: PreTrainedModel, *, slots: int = 2, autocast: torch.dtype | None = None
) -> float:
    """Largest log-prob difference between slot decoding and plain forwards, in nats.

    Raises UserError, with the reason, when the model cannot be served.
    """
    if model.config.is_encoder_decoder:
        raise _refusal(model, "it is an encoder-decoder")
    try:
        with _short_window(model):
            difference = _decode_and_compare(model, slots, autocast)
    except UserError:
        raise
    except Exception as error:  # whatever an unknown architecture does wrong, it cannot be served
        reason = (str(error).splitlines() or [""])[0]
        raise _refusal(model, f"its forward failed: {type(error).__name__}: {reason}") from None
    tolerance = _TOLERANCE[autocast or model.dtype]
    if not difference <= tolerance:
        reason = "its attention state is not plain keys and values, or it takes another mask"
        raise _refusal(
            model,
            f"decoding in slots differs from plain forwards by {difference:.2g} nats (at most "
            f"{tolerance:g} is float noise): {reason}",
        )
    return difference


def takes_trees(model: PreTrainedModel, autocast: torch.dtype | None = None) -> bool:
    """Whether draft trees and ticks of several tokens give what plain forwards of the model give.

    Greedy replies are offered back with wrong branches beside them; what comes out must have the
    log-probs that plain forwards give it.
    """
    try:
        with _short_window(model):
            return _trees_differ(model, autocast) <= _TOLERANCE[autocast or model.dtype]
    except Exception:  # whatever it does wrong, it does not take trees
        return False


def trains_on_trees(
    model: PreTrainedModel,
    autocast: torch.dtype | None = None,
    *,
    leafy: bool = False,
    flex: bool = False,
) -> bool:
    """Whether forwards over a prefix tree (leafy: in two stages; flex: through flex attention, and
    then with a gradient) give what plain ones give."""
    if leafy and _turns_by_length(model):
        return False
    vocabulary = embeddings(model)[1].shape[0]
    # the row is wider than a block of attention
    half = (FLEX_BLOCK if flex else BLOCK) // 2
    prompt, one, other = ([(i * k + k) % vocabulary for i in range(half)] for k in (1, 3, 5))
    pairs = [(prompt, one), (prompt, [*one[:3], *other]), (prompt, other), (prompt[:4], one[:1])]
    try:
        with (
            _short_window(model),
            torch.set_grad_enabled(flex),
            torch.autocast(model.device.type, autocast, enabled=autocast is not None),
        ):
            shared = layout_logprobs(model, one_tree(pairs, leafy, flex)).logprobs
            plain = token_logprobs(model, pairs).logprobs
            if flex and not _same_gradient(
                model, shared, plain, _TOLERANCE[autocast or model.dtype]
            ):
                return False
    except Exception:  # whatever it does wrong, it does not take trees
        return False
    return (shared - plain).abs().max().item() <= _TOLERANCE[autocast or model.dtype]


def _same_gradient(
    model: PreTrainedModel, one: torch.Tensor, other: torch.Tensor, tolerance: float
) -> bool:
    """Whether the first trained weights get the same gradient, relative to its norm."""
    weight = next(p for p in model.parameters() if p.requires_grad)
    mine, plain = (torch.autograd.grad(x.sum(), weight)[0] for x in (one, other))
    return bool((mine - plain).norm() <= tolerance * plain.norm())


def _turns_by_length(model: PreTrainedModel) -> bool:
    """Whether positions are encoded by the longest one of a call: what short texts cannot show, and
    a tree and its leaves would be encoded differently."""
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    each = [found, *(part for part in found.values() if isinstance(part, dict))]
    return any(part.get("rope_type") in ("dynamic", "longrope") for part in each)


def _trees_differ(model: PreTrainedModel, autocast: torch.dtype | None) -> float:
    vocabulary = embeddings(model)[1].shape[0]
    capacity, requests = max(_LENGTHS) + _NEW, _requests(vocabulary)
    true = _finish(LocalEngine(model, slots=2, capacity=capacity, autocast=autocast), requests)
    offered = []
    for request, reply in zip(requests, true, strict=True):
        ids = reply.token_ids
        wrong = [[*ids[:at], (ids[at] + 1) % vocabulary, *ids[at:]] for at in (1, 3, 4)]
        drafts = tuple(Draft(text) for text in [*wrong, ids[:5]])
        offered.append(replace(request, drafts=drafts))
    largest = 0.0
    for window, slots in ((2, 2), (64, 3)):
        speculation = Speculation(window=window, redraft=4, siblings=True)
        engine = LocalEngine(
            model, slots=slots, capacity=capacity, autocast=autocast, speculation=speculation
        )
        again = _finish(engine, offered)
        pairs = [(r.prompt_ids, c.token_ids) for r, c in zip(requests, again, strict=True)]
        scored = engine.score(pairs)
        for reply, plain in zip(again, scored, strict=True):
            difference = torch.tensor(reply.logprobs) - torch.tensor(plain)
            largest = max(largest, difference.abs().max().item())
    return largest


def _requests(vocabulary: int) -> list[Request]:
    """Short ragged prompts, greedy."""
    sampling = Sampling(max_tokens=_NEW, temperature=0.0)
    return [
        Request(i, tuple((7 * i + 3 * j + 1) % vocabulary for j in range(n)), 0, sampling)
        for i, n in enumerate(_LENGTHS)
    ]


def _finish(engine: LocalEngine, requests: list[Request]) -> list[Completion]:
    for request in requests:
        engine.submit(request)
    found: dict[int, Completion] = {}
    while len(found) < len(requests):
        for event in engine.step():
            assert isinstance(event, Finished)
            found[event.completion.request_id] = event.completion
    return [found[request.id] for request in requests]


def _decode_and_compare(model: PreTrainedModel, slots: int, autocast: torch.dtype | None) -> float:
    requests = _requests(embeddings(model)[1].shape[0])
    capacity = max(_LENGTHS) + _NEW
    engine = LocalEngine(model, slots=slots, capacity=capacity, autocast=autocast)
    found = _finish(engine, requests)
    pairs = [(r.prompt_ids, c.token_ids) for r, c in zip(requests, found, strict=True)]
    decoded = [torch.tensor(c.logprobs, dtype=torch.float64) for c in found]
    plain = [torch.tensor(row, dtype=torch.float64) for row in engine.score(pairs)]
    return max((a - b).abs().max().item() for a, b in zip(decoded, plain, strict=True))


@contextmanager
def _short_window(model: PreTrainedModel) -> Iterator[None]:
    """Shorten a long sliding window while checking: both sides read it from the configuration."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is None or window <= max(_LENGTHS):
        yield
        return
    config.sliding_window = _WINDOW
    try:
        yield
    finally:
        config.sliding_window = window


def _refusal(model: PreTrainedModel, reason: str) -> UserError:
    kind = model.config.model_type
    return UserError(
        f"model.path: the embedded engine cannot serve this model ({kind}): {reason}; use a "
        "decoder-only model with ordinary attention (Llama, Qwen, Mistral, Gemma, Phi, OLMo, ...)"
    )
