"""Traces from elsewhere: texts in a JSONL file, and the successes that a run's store has kept."""

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reroll.config import Config
from reroll.errors import UserError
from reroll.model.digest import tokenizer_digest
from reroll.rollout.collected import CollectSpec, grade_job
from reroll.rollout.harvest import Origin, trace_of
from reroll.rollout.store import prompt_hash
from reroll.rollout.traces import Trace, TraceStore
from reroll.setup import Parts
from reroll.tasks.grade import grader_digest, graders_of
from reroll.types import Completion, Finish, Prompt, Purpose, Rollout, Sampling


def import_texts(config: Config, parts: Parts, store: TraceStore, path: Path) -> tuple[int, int]:
    """Solutions from a JSONL file, one object a line: `text`, and `row` of the training split or
    `prompt` as the model reads it. They are tokenised here, whole, and cut by these tokens.

    Returns how many are successes to the graders, and so taken in, of how many. Raises UserError
    that names file and line.
    """
    texts = {prompt.text: prompt for prompt in parts.task.train}
    rows = {prompt.row: prompt for prompt in parts.task.train}
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    end: list[Any] = [parts.tokenizer.eos_token_id]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        one = _object(line, where)
        prompt = rows.get(one.get("row", -1)) or texts.get(one.get("prompt", ""))
        if prompt is None:
            raise UserError(
                f"{where}: of no training problem: give 'row', its place in the training split, or "
                "'prompt', its text with task.template"
            )
        ids: list[int] = parts.tokenizer.encode(one["text"], add_special_tokens=False)
        found.append(_rollout(prompt, ids + end, one["text"]))
    return _take(config, parts, store, found, "imported, retokenized"), len(found)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        one = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(one, dict) or not isinstance(one.get("text"), str) or not one["text"]:
        raise UserError(f"{where}: needs 'text', the solution, as text that is not empty")
    return one


def import_run(config: Config, parts: Parts, store: TraceStore, run: Path) -> tuple[int, int]:
    """The first success without a prefix that a run's store has of each problem of this task.

    Returns how many were taken in, of how many. Raises UserError for a run without a store.
    """
    path = run / "rollouts.sqlite"
    if not path.is_file():
        raise UserError(f"{run}: has no rollouts.sqlite; a run keeps one with reuse.on or prune.on")
    names = {prompt_hash(prompt.token_ids): prompt for prompt in parts.task.train}
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1.0) as db:
            stored = db.execute(
                "SELECT prompt_hash, token_ids FROM rollouts WHERE reward >= ? AND finish = 'stop' "
                "ORDER BY id",
                (config.eval.correct_at,),
            ).fetchall()
        db.close()
    except sqlite3.Error as error:
        raise UserError(f"{path}: cannot be read ({error}); is the run still going?") from None
    first: dict[int, Rollout] = {}
    for name, packed in stored:
        if (prompt := names.get(name)) is not None and prompt.row not in first:
            ids = np.frombuffer(packed, np.int32).tolist()
            first[prompt.row] = _rollout(prompt, ids, parts.decode(ids))
    found = list(first.values())
    return _take(config, parts, store, found, "training"), len(found)


def _rollout(prompt: Prompt, ids: list[int], text: str) -> Rollout:
    return Rollout(prompt, 0, 0, Completion(-1, ids, finish=Finish.STOP), text=text)


def _take(
    config: Config,
    parts: Parts,
    store: TraceStore,
    rollouts: Sequence[Rollout],
    source: str,
) -> int:
    """Grade them; those that succeed are traces, by whom is not known."""
    task = config.task
    digests = tokenizer_digest(task, parts.tokenizer), grader_digest(graders_of(task), task)
    writer = Origin("{}", "", *digests)
    spec = CollectSpec(Purpose.COLLECT, config.run.seed, 1, Sampling(1), label="imported")
    for number, rollout in enumerate(rollouts):
        parts.graders.submit(grade_job(rollout, number, spec))
    traces: dict[int, Trace] = {}
    while parts.graders.pending:
        for grade in parts.graders.poll(wait=True):
            if grade.reward is None or grade.reward < config.eval.correct_at:
                continue
            rollout = rollouts[grade.id]
            rollout.reward = grade.reward
            traces[grade.id] = trace_of(rollout, parts.decode, writer, source, 0, 0.0)
    store.add([traces[number] for number in sorted(traces)])
    return len(traces)
