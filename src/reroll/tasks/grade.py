"""Graders by name: `task`, `math`, `derivation`, or `module:function` of the user's.

A grader maps (prompt, completion, answer, columns) to a reward. Resolving a name imports what it
needs, so it happens in the grader processes; no torch and no transformers here.
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reroll.config import TaskSection
from reroll.errors import UserError
from reroll.tasks.derivation import derivation
from reroll.tasks.gym import gym_scorer
from reroll.tasks.problem import did_you_mean

Grader = Callable[[str, str, str | None, dict[str, Any]], float]
"""(prompt, completion, answer, columns) -> reward"""

BUILT_IN = {"task": "reasoning-gym", "math": "math-verify", "derivation": "reroll"}
"""graders by name, and the package that each comes from"""

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_DELIMITED = re.compile(r"\$.+\$|\\boxed|\\\(|\\\[", re.DOTALL)


@dataclass(frozen=True, slots=True)
class GraderSpec:
    """One grader and its weight in the reward."""

    name: str
    weight: float = 1.0


def graders_of(config: TaskSection) -> list[GraderSpec]:
    """The graders that a task asks for; checks all that needs no import."""
    default = "task" if config.source == "reasoning_gym" else "math"
    specs = [GraderSpec(grader.name, grader.weight) for grader in config.graders] or [
        GraderSpec(default)
    ]
    names = [spec.name for spec in specs]
    for name in names:
        if name not in BUILT_IN and ":" not in name:
            raise UserError(
                f"task.graders: unknown grader {name!r}; there are {', '.join(BUILT_IN)} and "
                f"module:function{did_you_mean(name, BUILT_IN)}"
            )
        if name == "task" and config.source != "reasoning_gym":
            raise UserError(
                "task.graders: 'task' is the scorer of reasoning_gym; "
                f"a {config.source} source has none"
            )
        if names.count(name) > 1:
            raise UserError(
                f"task.graders: {name!r} stands there twice; "
                "give it once, with the sum of the weights"
            )
    try:
        groups = re.compile(config.answer_pattern).groups
    except re.error as error:
        raise UserError(f"task.answer_pattern: not a regular expression: {error}") from None
    if config.answer_pattern and not groups:
        raise UserError("task.answer_pattern: needs a group in parentheses around the answer")
    return specs


def check_graders(specs: list[GraderSpec], config: TaskSection) -> dict[str, Grader]:
    """Every grader by its name, ready to run; raises UserError for one that does not resolve."""
    return {spec.name: resolve(spec, config) for spec in specs}


def grader_digest(specs: list[GraderSpec], config: TaskSection) -> str:
    """Names what would grade: a text graded under the same digest need not be graded again.

    Covers names, weights, answer pattern, versions of the libraries, and the source file of a
    user's grader, though not what that imports. Empty, which equals nothing, if it is not found.
    """
    parts = [config.source, config.name, config.answer_pattern]
    for spec in specs:
        parts += [spec.name, repr(spec.weight)]
        if ":" not in spec.name:
            parts.append(version(BUILT_IN[spec.name]))
            continue
        source = _source_of(spec.name.partition(":")[0])
        if source is None:
            return ""
        parts.append(hashlib.sha256(source.read_bytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _source_of(module: str) -> Path | None:
    """A user's module on disk, found without importing it or its packages: that is the grader
    processes' business."""
    first, *rest = module.split(".")
    with _own_folder():
        try:
            found = importlib.util.find_spec(first)
        except (ImportError, ValueError):
            found = None
    if found is None:
        return None
    places = [Path(found.origin)] if found.origin else []
    if rest:
        folders = [Path(place).joinpath(*rest) for place in found.submodule_search_locations or ()]
        places = [path for one in folders for path in (one.with_suffix(".py"), one / "__init__.py")]
    return next((path for path in places if path.is_file()), None)


@contextmanager
def _own_folder() -> Iterator[None]:
    """Look for modules beside where the run was started, too."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def resolve(spec: GraderSpec, config: TaskSection) -> Grader:
    """Import the grader of that name; raises UserError with the remedy."""
    if spec.name == "task":
        return _task_grader(config)
    if spec.name == "math":
        return _math_grader(config)
    if spec.name == "derivation":
        return derivation
    return _user_grader(spec.name)


def as_reward(value: object) -> float:
    """What a grader returned, as a finite float."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"a grader must return a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"a grader must return a finite number, not {value}")
    return float(value)


def _answer_pattern(config: TaskSection) -> re.Pattern[str]:
    return re.compile(config.answer_pattern) if config.answer_pattern else _TAGGED


def _last(pattern: re.Pattern[str], completion: str) -> str | None:
    """The first group of the pattern's last match."""
    found = None
    for match in pattern.finditer(completion):
        found = match
    return found[1].strip() if found and found[1] is not None else None


def _task_grader(config: TaskSection) -> Grader:
    score = gym_scorer(config)
    pattern = _answer_pattern(config)

    def grade(prompt: str, completion: str, answer: str | None, columns: dict[str, Any]) -> float:
        found = _last(pattern, completion)
        if found is None and config.answer_pattern:
            return 0.0
        return score(completion.strip() if found is None else found, columns["entry"])

    return grade


def _math_grader(config: TaskSection) -> Grader:
    try:
        import math_verify
    except ModuleNotFoundError:
        raise UserError(
            "task.graders: 'math' needs a package: pip install 'math-verify[antlr4_13_2]'"
        ) from None
    pattern = _answer_pattern(config)

    # math-verify's own time limits end in a wrong verdict. The pool's are recorded and replayed.
    def parse(text: str) -> list[Any]:
        return math_verify.parse(text, parsing_timeout=0)

    def parse_alone(text: str) -> list[Any]:
        """An expression that makes up the whole text, delimited or not."""
        if _DELIMITED.search(text):
            return parse(text)
        if "\\" not in text:
            text = re.sub(r"\bpi\b", r"\\pi", text)
        return parse(f"${text}$") or parse(text)

    def grade(prompt: str, completion: str, answer: str | None, columns: dict[str, Any]) -> float:
        # GSM8K's references end in "#### 72".
        reference = parse_alone((answer or "").rpartition("####")[2].strip())
        if not reference:
            raise ValueError(f"math-verify cannot read the reference answer {answer!r}")
        found = _last(pattern, completion)
        if found is None and config.answer_pattern:
            return 0.0
        candidate = parse(completion) if found is None else parse_alone(found)
        return float(math_verify.verify(reference, candidate, timeout_seconds=0))

    return grade


def _user_grader(name: str) -> Grader:
    module_name, _, function_name = name.partition(":")
    function = _find(module_name, function_name, name)
    takes = _keywords(function, name)

    def grade(prompt: str, completion: str, answer: str | None, columns: dict[str, Any]) -> float:
        named = {key: columns[key] for key in columns if takes(key)}
        return function(prompt, completion, answer, **named)

    return grade


def _find(module_name: str, function_name: str, name: str) -> Callable[..., float]:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except MemoryError:
        raise
    except BaseException as error:  # a module may raise anything, SystemExit included
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{error.name}."
        ):
            beside = [path.stem for path in Path.cwd().glob("*.py")]
            raise UserError(
                f"task.graders: {name!r}: no module {module_name!r} in {os.getcwd()} "
                "or on the Python path"
                f"{did_you_mean(module_name, beside)}"
            ) from None
        last = (
            error
            if isinstance(error, SyntaxError)
            else traceback.extract_tb(error.__traceback__)[-1]
        )
        raise UserError(
            f"task.graders: {name!r}: importing {module_name} fails in {last.filename}, "
            f"line {last.lineno}: {type(error).__name__}: {error}"
        ) from None
    functions: dict[str, Any] = {
        key: value for key, value in vars(module).items() if callable(value)
    }
    if function_name not in functions:
        known = [key for key in functions if not key.startswith("_")]
        raise UserError(
            f"task.graders: {name!r}: {module.__file__} has no function {function_name!r}"
            f"{did_you_mean(function_name, known)}"
        )
    return functions[function_name]


def _keywords(function: Callable[..., float], name: str) -> Callable[[str], bool]:
    """Which columns the function takes by name; its first three parameters are never columns."""
    signature = inspect.signature(function)
    try:
        signature.bind_partial("prompt", "completion", "answer")
    except TypeError:
        raise UserError(
            f"task.graders: {name!r}: takes {signature}; "
            "it must take (prompt, completion, answer, **columns)"
        ) from None
    first = list(signature.parameters)[:3]
    rest = any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()
    )
    return lambda key: key not in first and (rest or key in signature.parameters)
