"""Supervised training on traces: what prefixes have to be compared with.

Next-token cross-entropy on completions, averaged over the tokens of a whole batch however it is cut
into forwards: the mean of the forwards' means would weigh short ones more, and dropping all but the
last forward's gradient, as some frameworks did, would waste most of the batch (arXiv 2604.23747).
"""

import random
from collections.abc import Iterator, Sequence

import torch

from reroll.config import SftSection
from reroll.model.layout import lay_out
from reroll.train.forwards import Forwards
from reroll.train.trainer import Trainer

Pair = tuple[Sequence[int], Sequence[int]]
"""tokens of a prompt and of what is to be written after it"""


def supervise(
    trainer: Trainer, pairs: Sequence[Pair], config: SftSection, seed: int
) -> Iterator[tuple[int, float]]:
    """Train the trainer's module on pairs; yields (optimizer step, mean loss in nats a token).

    It has an optimizer of its own, so that what follows starts with none of its moments. Every pair
    comes once an epoch, in an order drawn from (seed, epoch).
    """
    model, step = trainer.model, 0
    forwards = Forwards(model.device, 1.0, trainer.forwards.autocast)
    optimizer = torch.optim.AdamW(
        trainer.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    for epoch in range(config.epochs):
        order = random.Random(f"{seed} sft {epoch}").sample(range(len(pairs)), len(pairs))
        for start in range(0, len(order), config.batch):
            batch = [pairs[i] for i in order[start : start + config.batch]]
            optimizer.zero_grad(set_to_none=True)
            loss = backward(trainer, forwards, batch)
            torch.nn.utils.clip_grad_norm_(trainer.parameters.values(), trainer.train.max_grad_norm)
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1.0, step / max(1, config.warmup))
            optimizer.step()
            yield step, loss
    optimizer.zero_grad(set_to_none=True)


def backward(trainer: Trainer, forwards: Forwards, batch: Sequence[Pair]) -> float:
    """Gradient of the mean loss over all tokens of a batch; the loss."""
    tokens, total = sum(len(completion) for _, completion in batch), 0.0
    rows = trainer.train.microbatch_tokens
    for layout in lay_out(list(batch), rows, trainer.cost, trainer.behind):
        now = forwards.logprobs(trainer.model, layout)
        loss = -now.logprobs.sum() / tokens
        loss.backward()
        total += loss.item()
        trainer.forwards.book(trainer.passes, layout)
    return total
