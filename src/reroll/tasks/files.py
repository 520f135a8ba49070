"""Problems from a JSONL file, a Hugging Face dataset or a folder that `datasets` reads.

Rows keep their place in the file as identity. The held-out split is another file or split where
one is named, else a seeded part of the first; both splits are bounded by seeded samples.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroll.config import TaskSection
from reroll.errors import UserError
from reroll.tasks.problem import Problem, Problems, did_you_mean


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one file or split, and how messages name them."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    numbers: Sequence[int]
    """[rows] identity of each row"""
    places: str
    """message text for a row, with {} for its number from 1"""

    def where(self, index: int) -> str:
        """The row's name in a message."""
        return f"{self.name}: {self.places.format(self.numbers[index] + 1)}"


def read_problems(config: TaskSection) -> Problems:
    """Both splits of a jsonl or datasets source; raises UserError for whatever is wrong with it."""
    _refuse_unused(config)
    if config.source == "jsonl":
        table = _read_jsonl(config.name, "task.name")
        other = _read_jsonl(config.eval_name, "task.eval_name") if config.eval_name else None
    else:
        table = _read_dataset(config, config.train_split, "task.train_split")
        other = (
            _read_dataset(config, config.eval_split, "task.eval_split")
            if config.eval_split
            else None
        )
    if other is None:
        train, held_out, notes = _split(config, table)
    else:
        chosen = random.Random(config.seed)
        train = _sample(chosen, range(len(table.rows)), config.train_size)
        held_out = _sample(chosen, range(len(other.rows)), config.eval_size)
        notes = []
        if len(held_out) < len(other.rows):
            notes.append(
                f"took {len(held_out)} of {len(other.rows)} held-out problems (task.eval_size)"
            )
    spare = len(table.rows) - len(train) - (len(held_out) if other is None else 0)
    if spare:
        notes.append(
            f"took {len(train)} of {len(train) + spare} training problems (task.train_size)"
        )
    return Problems(
        [_problem(config, table, index) for index in train],
        [_problem(config, other or table, index) for index in held_out],
        notes,
    )


def _refuse_unused(config: TaskSection) -> None:
    if config.source == "jsonl":
        if config.params:
            raise UserError("task.params: a jsonl source takes none; remove it")
        if config.eval_split:
            raise UserError(
                "task.eval_split: a jsonl source has no splits; name a file in task.eval_name"
            )
    elif config.eval_name:
        raise UserError("task.eval_name: only for jsonl sources; name a split in task.eval_split")


def _split(config: TaskSection, table: Table) -> tuple[list[int], list[int], list[str]]:
    """Row indices of both splits, in file order, and notes."""
    count = len(table.rows)
    if count < 2:
        raise UserError(
            f"{table.name}: too few rows to split off a held-out part: {count}; "
            "add rows, or name held-out problems in task.eval_name or task.eval_split"
        )
    # A quarter at most: a small file is for training first.
    size = min(config.eval_size, max(1, count // 4))
    order = random.Random(config.seed).sample(range(count), count)
    notes = []
    if size < config.eval_size:
        notes.append(
            f"held out {size} of {count} rows, a quarter: "
            f"fewer than task.eval_size = {config.eval_size}"
        )
    return sorted(order[size : size + config.train_size]), sorted(order[:size]), notes


def _sample(chosen: random.Random, indices: range, size: int) -> list[int]:
    return list(indices) if len(indices) <= size else sorted(chosen.sample(indices, size))


def _problem(config: TaskSection, table: Table, index: int) -> Problem:
    row, where = table.rows[index], table.where(index)
    text = _column(row, config.prompt_column, "task.prompt_column", where)
    if not isinstance(text, str):
        raise UserError(
            f"{where}: task.prompt_column = {config.prompt_column!r} "
            f"holds {type(text).__name__}, not text"
        )
    if not text.strip():
        raise UserError(
            f"{where}: task.prompt_column = {config.prompt_column!r} is empty; remove the row"
        )
    used = {config.prompt_column, config.answer_column}
    answer = (
        _column(row, config.answer_column, "task.answer_column", where)
        if config.answer_column
        else None
    )
    if answer is not None and not isinstance(answer, str):
        answer = json.dumps(answer, default=str)
    columns = {name: value for name, value in row.items() if name not in used}
    return Problem(table.numbers[index], where, text, answer, columns)


def _column(row: Mapping[str, Any], name: str, setting: str, where: str) -> object:
    if name not in row:
        raise UserError(
            f"{where}: {setting} = {name!r}: no such column; "
            f"there are: {', '.join(row)}{did_you_mean(name, row)}"
        )
    return row[name]


def _read_jsonl(name: str, setting: str) -> Table:
    path = Path(name).expanduser()
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"{setting} = {name!r}: cannot read it: {error.strerror}"
            f"{did_you_mean(path.name, beside)}"
        ) from None
    rows, numbers = [], []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:  # malformed JSON or UTF-8
            raise UserError(
                f"{name}: line {number + 1} is not valid JSON ({setting}): {error}"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{name}: line {number + 1} holds a JSON {type(row).__name__} ({setting}); "
                "each line must be an object with a column for each key"
            )
        rows.append(row)
        numbers.append(number)
    if not rows:
        raise UserError(f"{setting} = {name!r}: the file has no rows")
    return Table(name, rows, numbers, "line {}")


def _read_dataset(config: TaskSection, split: str, setting: str) -> Table:
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError("task.source = 'datasets' needs a package: pip install datasets") from None
    for key in ("split", "streaming", "trust_remote_code"):
        if key in config.params:
            raise UserError(
                f"task.params.{key}: not taken; "
                "splits are named by task.train_split and task.eval_split"
            )
    folder = Path(config.name).expanduser()
    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    try:
        if saved:
            loaded: Any = datasets.load_from_disk(str(folder))
        else:
            name = str(folder) if folder.exists() else config.name
            loaded = datasets.load_dataset(name, split=split, **config.params)
    except (
        Exception
    ) as error:  # the hub, the network, a script, a split: each has its own exceptions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"task.name = {config.name!r} ({setting} = {split!r}): cannot load it: {reason}"
        ) from None
    if saved:
        loaded = _pick(loaded, config, split, setting)
    name = f"{config.name}[{split}]"
    if not len(loaded):
        raise UserError(f"{setting} = {split!r}: {config.name} has no rows there")
    return Table(name, loaded, range(len(loaded)), "row {}")


def _pick(loaded: Any, config: TaskSection, split: str, setting: str) -> Any:
    """The split of what load_from_disk returned: a bare dataset counts as its training split."""
    if not isinstance(loaded, dict):
        if setting == "task.eval_split":
            raise UserError(
                f"task.eval_split = {split!r}: {config.name} was saved without splits; "
                "leave it empty"
            )
        return loaded
    if split not in loaded:
        raise UserError(
            f"{setting} = {split!r}: no such split in {config.name}; "
            f"there are: {', '.join(loaded)}{did_you_mean(split, loaded)}"
        )
    return loaded[split]
