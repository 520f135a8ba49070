"""Supervised training on a run's traces before its first step."""

import time

from reroll.config import Config
from reroll.ledger import Ledger
from reroll.rollout.collected import Progress
from reroll.setup import Parts
from reroll.train.supervised import supervise


def warm_start(config: Config, parts: Parts, ledger: Ledger, progress: Progress) -> str:
    """Train the policy on the traces of hard problems; books it, and says what came of it."""
    assert parts.start is not None
    prompts = {prompt.row: prompt.token_ids for prompt in parts.task.train}
    pairs = [(prompts[trace.row], trace.token_ids) for trace in parts.start.traces]
    steps = config.sft.epochs * -(-len(pairs) // config.sft.batch)
    started, losses = time.perf_counter(), []
    for step, loss in supervise(parts.trainer, pairs, config.sft, config.run.seed):
        losses.append(loss)
        progress(step, steps)
    tokens = config.sft.epochs * sum(len(prompt) + len(trace) for prompt, trace in pairs)
    ledger.add_paper(0.0, tokens, parts.cost)
    seconds = time.perf_counter() - started
    ledger.add_forwards("train", parts.trainer.take_work(), seconds, parts.cost)
    parts.engine.load_weights(parts.trainer.version)
    return (
        f"sft: {config.sft.epochs} epochs of {len(pairs)} traces, {steps} optimizer steps; loss "
        f"{losses[0]:.3f} to {losses[-1]:.3f} nats a token"
    )
