"""The run directory: what a run leaves on disk, and how a second start finds its place.

config.toml      the whole configuration, as run
metrics.jsonl    one line a training step, one an evaluation
samples.jsonl    a few rollouts of each step, to read
timeline.jsonl   stays in the engine's slots, of the first steps
timeouts.txt     graders that timed out, replayed on resume
rollouts.sqlite  past rollouts, for drafts (with reuse.on)
traces.sqlite    old successes that hard problems start from (with prefix.on)
costs.json       what forwards cost here, measured at the first start (with reuse.on)
checkpoints/     step-N: Hugging Face folders with what is needed to go on
curves.png       reward, held-out reward, length and entropy over the steps
timeline.png     who held which slot, over the first steps
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from reroll.config import Config, differences, load_config, save_config
from reroll.errors import UserError
from reroll.train.checkpoint import checkpoints

HARMLESS = (
    "run.out",
    "log.",
    "checkpoint.",
    "engine.cache_gb",
    "grading.workers",
    "store.memory_gb",
)
"""settings that change neither tokens nor weights, so a run may be resumed with others"""
UNCLAIMED = (
    "checkpoints",
    "timeouts.txt",
    "costs.json",
    "costs.tmp",
    "traces.sqlite",
    "traces.sqlite-journal",
    "rollouts.sqlite",
    "rollouts.sqlite.new",
    "rollouts.sqlite-wal",
    "rollouts.sqlite-shm",
)
"""what a start that failed before its first rollout leaves behind"""


class RunDir:
    """Paths of one run, and its two logs."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.toml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.jsonl"
        self.timeline_path = self.path / "timeline.jsonl"
        self.timeouts_path = self.path / "timeouts.txt"
        self.store_path = self.path / "rollouts.sqlite"
        self.costs_path = self.path / "costs.json"
        self.checkpoints = self.path / "checkpoints"

    def open(self, config: Config) -> int | None:
        """Make it, or find the newest checkpoint's step in it (None: start from the beginning).

        Log lines after that step are cut off. Raises UserError for another run's directory.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            there = sorted(p.name for p in self.path.iterdir())
        except OSError as error:
            raise self._unusable(error) from None
        if self.config_path.name in there:
            self._same_run(load_config(self.config_path), config)
        elif foreign := [name for name in there if name not in UNCLAIMED]:
            raise UserError(
                f"run.out = {str(self.path)!r}: not a run directory (it holds "
                f"{foreign[0]}); choose another"
            )
        step = max(checkpoints(self.checkpoints), default=None)
        for log in (self.metrics_path, self.samples_path, self.timeline_path):
            _cut(log, -1 if step is None else step)
        return step

    def claim(self, config: Config) -> None:
        """Write config.toml if it is not there: from now on the directory is this run's.

        Called when all is prepared, so that a mistake put right does not look like another run.
        """
        if self.config_path.exists():
            return
        fresh = self.checkpoints / "config.toml"
        try:
            save_config(config, fresh)
            os.replace(fresh, self.config_path)
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"run.out = {str(self.path)!r}: cannot be used: {error.strerror}")

    def _same_run(self, old: Config, new: Config) -> None:
        changed = [line for line in differences(old, new) if not line.startswith(HARMLESS)]
        if old.reuse.on and old.reuse.rule != "fresh":  # a store lets old rollouts go then
            changed += [x for x in differences(old, new) if x.startswith("checkpoint.every")]
        if new.train.decay == "constant" and new.train.steps >= old.train.steps:
            changed = [line for line in changed if not line.startswith("train.steps")]
        if new.train.flops == 0 or 0 < old.train.flops <= new.train.flops:
            changed = [line for line in changed if not line.startswith("train.flops")]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UserError(
                f"run.out = {str(self.path)!r}: holds a run of another configuration "
                f"({changed[0]}{more}); choose another directory, or undo the change to resume "
                "that run"
            )

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        # strict JSON has no nan: an interval of one problem, a loss that was not finite
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        _append(self.metrics_path, [finite])

    def sample(self, records: list[dict[str, Any]]) -> None:
        """Append lines to samples.jsonl."""
        _append(self.samples_path, records)

    def stays(self, step: int, batch: dict[str, Any]) -> None:
        """Append a line to timeline.jsonl."""
        _append(self.timeline_path, [{"step": step} | batch])

    def records(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; null comes back as nan."""
        if not self.metrics_path.exists():
            return []
        lines = map(json.loads, self.metrics_path.read_text().splitlines())
        return [{k: math.nan if v is None else v for k, v in line.items()} for line in lines]


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write: {error.strerror}; free space and start again to go on"
        ) from None


def _cut(path: Path, step: int) -> None:
    """Drop lines after `step`, and a last line that was cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
