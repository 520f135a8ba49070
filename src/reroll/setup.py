"""Put the parts of a run together: model, tokenizer, task, graders, engine, trainer.

Whatever is wrong with the configuration comes out here, before the first rollout.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reroll.config import Config
from reroll.engine.costs import load_costs
from reroll.engine.local import LocalEngine
from reroll.engine.selfcheck import check_servable, takes_trees, trains_on_trees
from reroll.engine.speculation import Speculation
from reroll.errors import UserError
from reroll.model.attention import takes_flex
from reroll.model.digest import tokenizer_digest
from reroll.model.flops import CostModel, cost_model
from reroll.model.load import load_model, load_tokenizer, pick_autocast, stop_ids
from reroll.model.lora import add_lora
from reroll.notes import reuse_notes, trees_notes
from reroll.prefixes import Start, check_whole, read_traces
from reroll.rollout.reuse import Reuse
from reroll.rollout.store import Store
from reroll.rundir import RunDir
from reroll.tasks.grade import grader_digest, graders_of
from reroll.tasks.load import Task, load_task
from reroll.tasks.pool import GraderPool
from reroll.train import checkpoint
from reroll.train.critic import Critic
from reroll.train.forwards import FLAT, Shares
from reroll.train.trainer import Trainer
from reroll.types import Sampling


@dataclass(slots=True)
class Parts:
    """Everything a run works with. Engine and trainer share one module."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    graders: GraderPool
    engine: LocalEngine
    trainer: Trainer
    cost: CostModel
    sampling: Sampling
    """limits and stop ids; temperature is set by who samples"""
    decode: Callable[[list[int]], str]
    extract: Callable[[str], str | None]
    """completion text to the answer that maj@k counts"""
    start: Start | None = None
    """what hard problems start from; None: nothing"""
    notes: list[str] = field(default_factory=list)
    """lines for the user"""
    restored: dict[str, Any] = field(default_factory=dict)
    """state of the checkpoint gone on from"""


@contextmanager
def prepare(config: Config, run: RunDir | None, step: int | None) -> Iterator[Parts]:
    """Build the parts, at checkpoint `step` of `run` or (None) at the start.

    Raises UserError for anything in the configuration that cannot work.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    tokenizer = load_tokenizer(config.model)
    task, start = load_task(config.task, tokenizer), None
    if config.prefix.on:
        start = read_traces(config, task, tokenizer_digest(config.task, tokenizer))
    folder = checkpoint.checkpoints(run.checkpoints)[step] if run and step is not None else None
    model = load_policy(config, folder)
    autocast = pick_autocast(config.model.autocast, model.device)
    difference = check_servable(model, slots=min(2, config.engine.slots), autocast=autocast)
    engine = make_engine(config, model, task, autocast, _given(config, start))
    cost = cost_model(model)
    trainer = make_trainer(config, model, autocast, _shares(config, model, autocast))
    restored = checkpoint.load(folder, trainer) if folder else {}
    engine.load_weights(trainer.version)
    notes = []
    if config.reuse.on:
        _set_costs(config, engine, run)
        notes = reuse_notes(config, engine, len(task.train))
    notes += [
        *task.notes,
        f"{len(task.train)} training and {len(task.held_out)} held-out problems",
        f"{model.num_parameters():,} parameters on {model.device}; {engine.memory}",
        f"self-check: slot decoding and plain forwards agree to {difference:.1g} nats",
    ]
    notes += trees_notes(config, trainer)
    if config.schedule.stale and config.correct.mode == "none":
        notes.append(
            "schedule: tokens of earlier versions are trained on as they are; correct.mode = 'tis' "
            "weighs them"
        )
    timeouts = run.timeouts_path if run else None
    with GraderPool(task.graders, config.task, config.grading, timeouts) as graders:
        if start is not None:
            check_whole(start, config, task, graders, grader_digest(task.graders, config.task))
            notes += start.notes
        yield Parts(
            model,
            tokenizer,
            task,
            graders,
            engine,
            trainer,
            cost,
            Sampling(config.rollout.max_tokens, stop_ids=stop_ids(model, tokenizer)),
            decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            extract=_extractor(config.task.answer_pattern),
            start=start,
            notes=notes,
            restored=restored,
        )


def _given(config: Config, start: Start | None) -> int:
    """Tokens that a prompt may be longer for what it is given; a hint's text has its own."""
    if start is None:
        return 0
    prefix = config.prefix
    longest = max(start.longest, config.rollout.max_tokens if prefix.refresh else 0)
    return longest + len(prefix.hint.encode()) * (prefix.placement == "hint")


@contextmanager
def open_reuse(config: Config, run: RunDir, step: int | None) -> Iterator[Reuse | None]:
    """The run's past rollouts as they were at checkpoint `step`; None if nothing is to be kept.

    A run that prunes keeps what it knew of each, whether or not they are drafts.
    """
    if not (config.reuse.on or config.prune.on):
        yield None
        return
    limits = config.store
    with Store(
        run.store_path,
        max_gb=limits.max_gb,
        keep_visits=limits.epochs,
        memory_gb=limits.memory_gb,
    ) as store:
        if not run.config_path.exists() and len(store):
            raise UserError(
                f"{run.store_path}: holds rollouts of another run; move it away, or choose another "
                "run.out"
            )
        store.cut_back(step or 0)
        if step and step % config.checkpoint.every == 0:
            store.evict()  # a kill may have come between this checkpoint and its eviction
        digest = grader_digest(graders_of(config.task), config.task)
        yield Reuse(config.reuse, store, config.run.seed, digest)


def make_engine(
    config: Config, model: PreTrainedModel, task: Task, autocast: torch.dtype | None, given: int = 0
) -> LocalEngine:
    """An engine whose slots hold the longest prompt, a prefix (`given` tokens) and a full reply."""
    longest = given + max(len(p.token_ids) for p in [*task.train, *task.held_out])
    capacity = longest + config.rollout.max_tokens
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and capacity > positions:
        raise UserError(
            f"rollout.max_tokens = {config.rollout.max_tokens}: with prompts of up to {longest} "
            f"tokens a sequence has {capacity}, but the model has {positions} positions; lower it "
            "or task.max_prompt_tokens"
        )
    reuse, speculation = config.reuse, None
    if reuse.on:
        trees = takes_trees(model, autocast)
        speculation = Speculation(
            branching=trees,
            window=reuse.window,
            gate=reuse.gate and reuse.rule != "lenient",
            redraft=reuse.redraft if trees else 1,
            siblings=reuse.siblings,
            stagger=reuse.stagger,
        )
    return LocalEngine(
        model,
        slots=config.engine.slots,
        capacity=capacity,
        cache_gb=config.engine.cache_gb,
        prefill_tokens=config.engine.prefill_tokens,
        prefill_rows=config.engine.prefill_rows,
        autocast=autocast,
        speculation=speculation,
    )


def _set_costs(config: Config, engine: LocalEngine, run: RunDir | None) -> None:
    """Give the engine its table of costs, the run's or one measured now."""
    # one that a start left which then failed may be of another configuration
    costs = load_costs(run.costs_path) if run and run.config_path.exists() else None
    if costs is None:
        if config.reuse.verify == "bfloat16" and engine.runner.autocast is None:
            engine.runner.verify = torch.bfloat16
        costs = engine.measure()
        if run:
            costs.save(run.costs_path)
    engine.costs, engine.runner.verify = costs, torch.bfloat16 if costs.rounded else None


def load_policy(config: Config, folder: Path | None = None) -> PreTrainedModel:
    """The policy at the start or (folder) at a checkpoint, with adapters where LoRA is on."""
    if config.lora.rank == 0:
        return load_model(config.model, folder)
    model = load_model(config.model)
    add_lora(model, config.lora, config.run.seed, folder)
    return model.eval()


def make_trainer(
    config: Config,
    model: PreTrainedModel,
    autocast: torch.dtype | None,
    shares: Shares,
) -> Trainer:
    """A trainer on the engine's module, with the reference and critic that the algorithm wants.

    shares: what the model takes.
    """
    reference, critic = None, None
    if config.algo.kl_coef > 0:
        lora = config.lora.rank > 0
        reference = model if lora else load_model(config.model).requires_grad_(False)
    if config.algo.advantage == "gae":
        critic = Critic(model, config.critic, config.train)
    return Trainer(
        model,
        config.algo,
        config.train,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
        correct=config.correct,
        prune=config.prune if config.prune.on else None,
        autocast=autocast,
        reference=reference,
        critic=critic,
        shares=shares,
    )


def _shares(config: Config, model: PreTrainedModel, autocast: torch.dtype | None) -> Shares:
    """What of trees is wanted and, tried out, works with this model."""
    if not (config.train.trees and trains_on_trees(model, autocast)):
        return FLAT
    leaves = trains_on_trees(model, autocast, leafy=True)
    flex = config.train.flex and takes_flex(model) and trains_on_trees(model, autocast, flex=True)
    return Shares(True, leaves, flex)


def _extractor(pattern: str) -> Callable[[str], str | None]:
    """The last match of the task's answer pattern; without one the answer tag, or the last line."""

    def extract(text: str) -> str | None:
        if pattern:
            matches = list(re.finditer(pattern, text))
            return matches[-1][1] if matches else None
        tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        if tagged:
            return tagged[-1].strip()
        lines = text.strip().splitlines()
        return lines[-1].strip() if lines else None

    return extract
