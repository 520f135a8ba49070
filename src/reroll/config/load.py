"""Read a configuration: TOML file, then `--section.key value` flags, then checks.

Every mistake raises `UserError` with one line that names the file, the key, the value and, for
an unknown key, the nearest valid one. A configuration is frozen; derived numbers are properties.
"""

import difflib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

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
from reroll.config.prefix import CollectSection, PrefixSection, SftSection
from reroll.config.prune import PruneSection
from reroll.config.reuse import ReuseSection, StoreSection
from reroll.config.schedule import ScheduleSection
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

S = TypeVar("S", bound=Section)


class Config(Section):
    """A whole run."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    task: TaskSection = TaskSection()
    grading: GradingSection = GradingSection()
    rollout: RolloutSection = RolloutSection()
    engine: EngineSection = EngineSection()
    schedule: ScheduleSection = ScheduleSection()
    reuse: ReuseSection = ReuseSection()
    store: StoreSection = StoreSection()
    prune: PruneSection = PruneSection()
    collect: CollectSection = CollectSection()
    prefix: PrefixSection = PrefixSection()
    sft: SftSection = SftSection()
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
    return load_settings(Config, path, overrides)


def load_settings(
    kind: type[S],
    path: str | Path | None,
    overrides: dict[str, str] | None = None,
    command: str = "reroll train",
) -> S:
    """The same for any group of settings. command: whose `--help` lists them."""
    name, values = str(path or "defaults"), {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
    known = _Known(kind, command)
    for key, text in (overrides or {}).items():
        _set(values, key, _parse(key, text, known), known)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, name, set(overrides or {}), known)) from None


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


def describe(kind: type[Section] = Config) -> Iterator[tuple[str, str, str, str]]:
    """(`section.key`, type, default, description) of every setting, for `--help`."""
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            for key, *rest in describe(inner):
                yield f"{name}.{key}", rest[0], rest[1], rest[2]
            continue
        default = field.get_default(call_default_factory=True)
        shown = _choices(inner) or type(default).__name__
        yield name, shown, repr(default), field.description or ""


def _choices(annotation: Any) -> str:
    """What a setting of named values takes; empty for others."""
    if "Literal" not in str(annotation) or get_origin(annotation) is list:
        return ""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    return "|".join(_choices(kind) or kind.__name__ for kind in get_args(annotation))


class _Known:
    """The keys that there are."""

    def __init__(self, kind: type[Section], command: str) -> None:
        rows = list(describe(kind))
        self.texts = {key for key, type_, *_ in rows if type_ == "str"}
        self.keys = [key for key, *_ in rows]
        self.flat = not any("." in key for key in self.keys)
        self.names = self.keys + ([] if self.flat else list(kind.model_fields))
        self.command = command

    def nearest(self, key: str) -> str:
        """A remedy for a key that is not there."""
        last = key.rpartition(".")[2]
        same = [name for name in self.names if name.partition(".")[2] == last]  # elsewhere
        close = difflib.get_close_matches(key, same or self.names, n=1, cutoff=0.3 if same else 0.5)
        if not close:
            tails = {name.partition(".")[2]: name for name in self.names}
            close = [
                tails[t] for t in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.6)
            ]
        return (
            f"; did you mean {close[0]}?" if close else f"; `{self.command} --help` lists them all"
        )


def _parse(key: str, text: str, known: _Known) -> Any:
    """A flag's text as TOML would read it; as it stands if that is no value, or text is wanted."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, str) or key not in known.texts else text


def _set(values: dict[str, Any], key: str, value: Any, known: _Known) -> None:
    *path, last = key.split(".")
    if not path and not known.flat:
        raise UserError(f"--{key}: settings are --section.key value{known.nearest(key)}")
    if path and known.flat:
        raise UserError(f"--{key}: unknown setting{known.nearest(key)}")
    table, place = values, ""
    for part in path:
        table, place = table.setdefault(part, {}), f"{place}{part}."
        if not isinstance(table, dict):
            raise UserError(f"--{key}: {place[:-1]} = {table!r} is not a table")
    table[last] = value


def _explain(error: ValidationError, name: str, flags: set[str], known: _Known) -> str:
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
        return f"{where}: unknown setting{known.nearest(flag or key)}"
    return f"{where} = {first['input']!r}: {text}"


def _message(error: Any) -> str:
    return error["msg"][0].lower() + error["msg"][1:]


def _overlap(one: str, other: str) -> bool:
    """Whether a dotted key is another one, or stands inside or around it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
