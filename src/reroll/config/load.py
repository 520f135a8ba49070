"""Read a configuration: TOML file, then `--section.key value` flags, then checks.

Every mistake raises `UserError` with one line that names the file, the key, the value and, for
an unknown key, the nearest valid one. A configuration is frozen; derived numbers are properties.
"""

import difflib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import ValidationError, model_validator

from reroll.config.algo import (
    AlgoSection,
    CorrectSection,
    CriticSection,
    LoraSection,
    TrainSection,
)
from reroll.config.check import contradiction
from reroll.config.reuse import ReuseSection, StoreSection
from reroll.config.sections import (
    CheckpointSection,
    EngineSection,
    EvalSection,
    GradingSection,
    LogSection,
    ModelSection,
    RolloutSection,
    RunSection,
    Section,
    TaskSection,
)
from reroll.errors import UserError


class Config(Section):
    """A whole run."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    task: TaskSection = TaskSection()
    grading: GradingSection = GradingSection()
    rollout: RolloutSection = RolloutSection()
    engine: EngineSection = EngineSection()
    reuse: ReuseSection = ReuseSection()
    store: StoreSection = StoreSection()
    algo: AlgoSection = AlgoSection()
    critic: CriticSection = CriticSection()
    correct: CorrectSection = CorrectSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _make_sense_together(self) -> "Config":
        if text := contradiction(self):
            raise ValueError(text)
        return self


def load_config(path: str | Path | None, overrides: dict[str, str] | None = None) -> Config:
    """Read `path` (TOML; None: all defaults), apply `overrides` (`section.key` -> text), check.

    Raises UserError for a missing or malformed file, unknown keys, wrong types and ranges.
    """
    name, values = str(path or "defaults"), {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
    for key, text in (overrides or {}).items():
        _set(values, key, _parse(key, text), flag=f"--{key}")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, name, set(overrides or {}))) from None


def save_config(config: Config, path: Path) -> None:
    """Write the whole configuration, defaults included, as TOML."""
    path.write_text(tomli_w.dumps(config.model_dump()), encoding="utf-8")


def differences(old: Config, new: Config) -> list[str]:
    """Keys (`section.key: old -> new`) in which two configurations differ."""
    before, after = dict(settings(old)), dict(settings(new))
    return [
        f"{key}: {before[key]!r} -> {after[key]!r}" for key in before if before[key] != after[key]
    ]


def settings(config: Config) -> Iterator[tuple[str, Any]]:
    """(`section.key`, value) of every setting."""
    for section, values in config.model_dump().items():
        for key, value in values.items():
            yield f"{section}.{key}", value


def describe() -> Iterator[tuple[str, str, str, str]]:
    """(`section.key`, type, default, description) of every setting, for `--help`."""
    for section, outer in Config.model_fields.items():
        for key, inner in outer.annotation.model_fields.items():  # type: ignore[union-attr]
            default = inner.get_default(call_default_factory=True)
            yield (
                f"{section}.{key}",
                _choices(inner.annotation) or type(default).__name__,
                repr(default),
                inner.description or "",
            )


def _choices(annotation: Any) -> str:
    """What a setting of named values takes; empty for others."""
    if "Literal" not in str(annotation) or get_origin(annotation) is list:
        return ""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    return "|".join(_choices(kind) or kind.__name__ for kind in get_args(annotation))


def _parse(key: str, text: str) -> Any:
    """A flag's text as TOML would read it; as it stands if that is no value, or text is wanted."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    is_text = any(name == key and kind == "str" for name, kind, *_ in describe())
    return value if isinstance(value, str) or not is_text else text


def _set(values: dict[str, Any], key: str, value: Any, flag: str) -> None:
    *path, last = key.split(".")
    if not path:
        raise UserError(f"{flag}: settings are --section.key value{_nearest(key, _all_keys())}")
    table, place = values, ""
    for part in path:
        table, place = table.setdefault(part, {}), f"{place}{part}."
        if not isinstance(table, dict):
            raise UserError(f"{flag}: {place[:-1]} = {table!r} is not a table")
    table[last] = value


def _explain(error: ValidationError, name: str, flags: set[str]) -> str:
    """The first mistake as one line: file or flag, key, value, remedy."""
    first, *others = error.errors()
    place = first["loc"]
    messages = [_message(first)]
    if len(place) == 3 and isinstance(place[2], str):  # a setting of several types: one after each
        place = place[:2]
        messages += [_message(other) for other in others if other["loc"][:2] == place]
    key, text = ".".join(map(str, place)), ", or ".join(messages)
    if first["type"] == "value_error":  # of settings that do not go together: it names the key
        text = str(first.get("ctx", {})["error"])
        return f"--{text}" if text.partition(" ")[0] in flags else f"{name}: {text}"
    flag = next((f for f in sorted(flags) if _overlap(f, key)), None)
    where = f"--{flag}" if flag else f"{name}: {key}"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown setting{_nearest(flag or key, _all_keys())}"
    return f"{where} = {first['input']!r}: {text}"


def _message(error: Any) -> str:
    return error["msg"][0].lower() + error["msg"][1:]


def _overlap(one: str, other: str) -> bool:
    """Whether a dotted key is another one, or stands inside or around it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _all_keys() -> list[str]:
    return [key for key, *_ in describe()] + list(Config.model_fields)


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        tails = {name.partition(".")[2]: name for name in known}
        close = [
            tails[t]
            for t in difflib.get_close_matches(key.rpartition(".")[2], list(tails), n=1, cutoff=0.6)
        ]
    return f"; did you mean {close[0]}?" if close else "; `reroll train --help` lists them all"
