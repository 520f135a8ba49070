"""Problems and scorers of reasoning-gym, any of its datasets by name.

Problem i of a dataset is a function of the name, `task.params` and a seed; held-out problems come
from another seed and share no text with the training split. Some datasets also draw from Python's
global generators or iterate over sets, so `generate_problems` runs in a child process where both
are fixed: a resumed run meets the same problems.
"""

import dataclasses
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from os import dup, dup2, fdopen
from typing import TYPE_CHECKING, Any

from reroll.config import TaskSection
from reroll.errors import UserError
from reroll.tasks.child import child_command, child_environment
from reroll.tasks.problem import Problem, Problems, did_you_mean

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

MAX_ROUNDS = 20
"""seeds tried for held-out problems that the training split does not have"""


def generate_problems(config: TaskSection) -> Problems:
    """Both splits, generated in a child process; raises UserError for a wrong name or params."""
    child = subprocess.run(
        child_command("reroll.tasks.gym"),
        input=pickle.dumps(config),
        capture_output=True,
        env=child_environment(),
        check=False,
    )
    if child.returncode != 0:
        last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"generating {config.name} ended with status {child.returncode}: {last}")
    outcome = pickle.loads(child.stdout)
    if isinstance(outcome, str):
        raise UserError(outcome)
    return outcome


def main() -> None:
    """The child: TaskSection from standard input, Problems or an error text to standard output."""
    config = pickle.load(sys.stdin.buffer)
    with fdopen(dup(1), "wb") as output:
        dup2(2, 1)  # what a generator prints must not mix with the pickle
        try:
            outcome: Problems | str = problems_here(config)
        except UserError as error:
            outcome = str(error)
        pickle.dump(outcome, output)


def problems_here(config: TaskSection) -> Problems:
    """Both splits, generated in this process, whose global generators are seeded."""
    train_set = _create(config, config.seed, config.train_size)
    train = [_problem(config, train_set, index) for index in range(config.train_size)]
    held_out = _unseen(config, {problem.text for problem in train})
    if not held_out:
        raise UserError(
            f"task.params: {config.name} has no problem left to hold out, "
            "the training split has them all; make the problems more varied "
            f"or lower task.train_size = {config.train_size}"
        )
    notes = []
    if len(held_out) < config.eval_size:
        notes.append(
            f"only {len(held_out)} held-out problems instead of {config.eval_size}: "
            f"{config.name} with these task.params has hardly any that the training split lacks"
        )
    return Problems(train, held_out, notes)


def gym_scorer(config: TaskSection) -> Callable[[str, dict[str, Any]], float]:
    """`score_answer(answer, entry)` of the dataset; an answer that it cannot read scores 0."""
    # Not reasoning_gym.get_score_answer_fn: it ignores the parameters, and some scorers read them.
    score_answer = _create(config, seed=0, size=1).score_answer

    def score(answer: str, entry: dict[str, Any]) -> float:
        try:
            return score_answer(answer, entry)
        except MemoryError:
            raise
        except Exception:
            # Some scorers raise on malformed answers. That is the policy's mistake and earns 0,
            # unless the scorer fails on its own reference too.
            score_answer(entry["answer"], entry)
            return 0.0

    return score


def _unseen(config: TaskSection, seen: set[str]) -> list[Problem]:
    """Up to eval_size distinct problems whose text is not in `seen`."""
    found: list[Problem] = []
    for round_ in range(MAX_ROUNDS):
        # Seeds far apart: reasoning-gym draws problem i from seed + i.
        seed = random.Random(f"held-out {config.seed} {round_}").getrandbits(31)
        dataset = _create(config, seed, config.eval_size)
        before = len(found)
        for index in range(config.eval_size):
            problem = _problem(config, dataset, index, first_row=round_ * config.eval_size)
            if problem.text not in seen:
                seen.add(problem.text)
                found.append(problem)
            if len(found) == config.eval_size:
                return found
        if len(found) == before:
            return found
    return found


def _create(config: TaskSection, seed: int, size: int) -> "ProceduralDataset":
    try:
        from reasoning_gym.composite import DatasetSpec
        from reasoning_gym.factory import DATASETS, create_dataset
    except ModuleNotFoundError:
        raise UserError(
            "task.source = 'reasoning_gym' needs a package: pip install reasoning-gym"
        ) from None
    if config.name not in DATASETS:
        raise UserError(
            f"task.name = {config.name!r}: reasoning-gym has no such dataset"
            f"{did_you_mean(config.name, DATASETS)}"
        )
    params = dict(config.params)
    known = {field.name for field in dataclasses.fields(DATASETS[config.name][1])} - {
        "seed",
        "size",
    }
    for key in params:
        if key in ("seed", "size"):
            raise UserError(
                f"task.params.{key}: set task.seed, task.train_size and task.eval_size instead"
            )
        if key not in known:
            raise UserError(
                f"task.params.{key}: {config.name} has no such parameter; "
                f"it has: {', '.join(sorted(known))}{did_you_mean(key, known)}"
            )
    _seed_globals(seed)
    try:
        if config.name == "composite":
            params["datasets"] = [DatasetSpec(**spec) for spec in params.get("datasets", [])]
        return create_dataset(config.name, seed=seed, size=size, **params)
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"task.params: {config.name} refuses them: {_reason(error)}") from None


def _problem(
    config: TaskSection, dataset: "ProceduralDataset", index: int, first_row: int = 0
) -> Problem:
    where = f"{config.name}: problem {first_row + index}"
    try:
        entry = dataset[index]
    except Exception as error:  # whatever a generator trips over, the parameters led it there
        raise UserError(
            f"{where} cannot be generated with these task.params: {_reason(error)}"
        ) from None
    answer = None if entry["answer"] is None else str(entry["answer"])
    return Problem(
        first_row + index, where, entry["question"], answer, {**entry["metadata"], "entry": entry}
    )


def _seed_globals(seed: int) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
