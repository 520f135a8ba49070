"""What a run shows while it runs: a live display on a terminal, plain lines elsewhere, trackers.

Trackers (TensorBoard, W&B, trackio) are imported here only, and only when asked for.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from reroll.config import LogSection
from reroll.errors import UserError

Tracker = Callable[[dict[str, Any], int], None]
"""takes (metrics, step)"""


class Display:
    """Progress of one run; a context manager. `total` steps, `done` of them at the start.

    flops: `train.flops`, with which a run may end sooner; the total is then an estimate.
    """

    def __init__(self, mode: str, total: int, done: int, flops: float = 0.0) -> None:
        self.console = Console()
        if mode == "auto":
            mode = "rich" if self.console.is_terminal else "plain"
        self.mode, self.total, self.done = mode, total, done
        self.flops, self.steps = flops, total
        self._first: tuple[int, float] | None = None
        """first step of this start, and the FLOPs spent by then"""
        self._started, self._begun_at = time.perf_counter(), done
        self._bars: Progress | None = None

    def __enter__(self) -> Self:
        if self.mode == "rich":
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._bars.start()
            self._steps = self._bars.add_task(
                "steps", total=self.total, completed=self.done, note=""
            )
            self._rollouts = self._bars.add_task("rollouts", total=None, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.mode != "off":
            console = self._bars.console if self._bars is not None else self.console
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    def rollouts(self, done: int, total: int) -> None:
        """Progress inside a collect."""
        if self._bars is not None:
            self._bars.update(self._rollouts, completed=done, total=total)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """After training step `step` (from 1)."""
        self.done = step
        if self.flops:
            self._estimate(step, metrics["flops_total_paper"])
        note = (
            f"reward {metrics['reward']:.3f}  live {metrics['live_groups']:.2f}  "
            f"length {metrics['length']:.0f}  {metrics['tokens_per_second']:,.0f} tok/s"
        )
        if self._bars is not None:
            self._bars.update(TaskID(self._steps), completed=step, total=self.total, note=note)
        elif self.mode == "plain":
            self.say(f"step {step}/{self.total}  {note}  {self.time_left()} left")

    def _estimate(self, step: int, spent: float) -> None:
        """Steps until the FLOPs are spent, if those to come cost what those so far did."""
        if self._first is None:
            self._first = step, spent
            return
        each = (spent - self._first[1]) / (step - self._first[0])
        self.total = min(self.steps, step + max(0, math.ceil((self.flops - spent) / each)))

    def time_left(self) -> str:
        """Estimate from the steps of this start."""
        took = time.perf_counter() - self._started
        left = took / max(1, self.done - self._begun_at) * (self.total - self.done)
        return f"{int(left // 60)}:{int(left % 60):02d}"


def open_trackers(config: LogSection, folder: Path, settings: dict[str, Any]) -> list[Tracker]:
    """One function for each tracker asked for. Raises UserError when its package is missing."""
    openers = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
    trackers = []
    for name in config.trackers:
        try:
            trackers.append(openers[name](folder, settings))
        except ImportError:
            raise UserError(
                f"log.trackers: {name} is not installed; run pip install {name}"
            ) from None
    return trackers


def _tensorboard(folder: Path, settings: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(metrics: dict[str, Any], step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _wandb(folder: Path, settings: dict[str, Any]) -> Tracker:
    import wandb  # type: ignore[import-not-found]

    # the id makes a resumed run go on in the same place
    run = wandb.init(
        project="reroll", id=folder.name, resume="allow", dir=str(folder), config=settings
    )
    return lambda metrics, step: run.log(metrics, step=step)


def _trackio(folder: Path, settings: dict[str, Any]) -> Tracker:
    import trackio  # type: ignore[import-not-found]

    run = trackio.init(project="reroll", name=folder.name, resume="allow", config=settings)
    return lambda metrics, step: run.log(metrics, step=step)
