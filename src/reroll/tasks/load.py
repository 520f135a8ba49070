"""A task: prompts of both splits and the graders, from the task section of a configuration."""

from dataclasses import dataclass, field

from reroll.config import TaskSection
from reroll.errors import UserError
from reroll.tasks.files import read_problems
from reroll.tasks.grade import GraderSpec, graders_of
from reroll.tasks.gym import generate_problems
from reroll.tasks.problem import Problem
from reroll.tasks.prompts import Tokenizer, make_prompt, uses_chat
from reroll.types import Prompt


@dataclass(frozen=True, slots=True)
class Task:
    """What a run trains on. The splits share no prompt text."""

    train: list[Prompt]
    held_out: list[Prompt]
    graders: list[GraderSpec]
    notes: list[str] = field(default_factory=list)
    """lines for the user: what was dropped, and settings without effect"""
    problems: dict[int, Problem] = field(default_factory=dict)
    """of the training split, by row"""


def load_task(config: TaskSection, tokenizer: Tokenizer) -> Task:
    """Read or generate problems and tokenize them; raises UserError for what the user can mend."""
    graders = graders_of(config)
    problems = (
        generate_problems(config) if config.source == "reasoning_gym" else read_problems(config)
    )
    if any(grader.name == "math" for grader in graders):
        _check_answers(problems.train + problems.held_out)
    notes = list(problems.notes)
    if config.system and not uses_chat(config, tokenizer):
        why = "task.chat = 'off'" if config.chat == "off" else "the tokenizer has no chat template"
        notes.append(f"task.system is not used: {why}")
    train = _prompts(problems.train, "training", config, tokenizer, notes)
    held_out = _prompts(problems.held_out, "held-out", config, tokenizer, notes)
    rows = {problem.row: problem for problem in problems.train}
    return Task(train, _disjoint(train, held_out, notes), graders, notes, rows)


def _check_answers(problems: list[Problem]) -> None:
    for problem in problems:
        if not (problem.answer or "").strip():
            raise UserError(
                f"{problem.where}: no reference answer, which the math grader compares with; "
                "see task.answer_column and task.graders"
            )


def _prompts(
    problems: list[Problem], split: str, config: TaskSection, tokenizer: Tokenizer, notes: list[str]
) -> list[Prompt]:
    """Prompts of one split that are short enough; what is dropped goes to `notes`."""
    limit = config.max_prompt_tokens
    prompts = [make_prompt(problem, config, tokenizer) for problem in problems]
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    dropped = len(prompts) - len(kept)
    if not kept:
        shortest = min(len(prompt.token_ids) for prompt in prompts)
        raise UserError(
            f"task.max_prompt_tokens = {limit}: all {dropped} {split} prompts are longer; "
            f"the shortest has {shortest} tokens"
        )
    if dropped:
        notes.append(
            f"dropped {dropped} of {len(prompts)} {split} prompts longer than {limit} tokens"
        )
    return kept


def _disjoint(train: list[Prompt], held_out: list[Prompt], notes: list[str]) -> list[Prompt]:
    """The held-out prompts whose text does not stand in the training split."""
    known = {prompt.text for prompt in train}
    kept = [prompt for prompt in held_out if prompt.text not in known]
    if not kept:
        raise UserError(
            f"all {len(held_out)} held-out problems also stand in the training split; "
            "name others in task.eval_name or task.eval_split"
        )
    if len(kept) < len(held_out):
        notes.append(
            f"dropped {len(held_out) - len(kept)} held-out problems "
            "that also stand in the training split"
        )
    return kept
