"""The table and the pictures of simulated schedules."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from reroll.simulate import Result
from reroll.timeline import draw_occupancy, draw_timeline


def records(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One plain record an arm; `relative`: goodput over that of sync with as many replicas."""
    base = {r.arm.replicas: r.figures["goodput"] for r in results if r.arm.name == "sync"}
    rows = []
    for result in results:
        arm, figures = result.arm, result.figures
        sync = base.get(arm.replicas)
        relative = None if sync is None else figures["goodput"] / sync
        settings = arm.schedule.model_dump(include={"kind", "batches", "mode", "refill", "over"})
        head = {"schedule": arm.name, "replicas": arm.replicas, "split": arm.split}
        rows.append(head | {"relative": relative} | figures | {"settings": settings})
    return rows


def draw(results: Sequence[Result], out: str | None, timeline: str | None) -> list[Path]:
    """Draw both pictures, or one of them; returns their paths, a timeline for each arm.

    Raises UserError where a picture cannot be written.
    """
    rows = records(results)
    several = len({row["replicas"] for row in rows}) > 1
    names = [r["schedule"] + (f", replicas {r['replicas']:,}" if several else "") for r in rows]
    written = []
    if out:
        goodput = (f"{_number(row['goodput'])} tokens/s" for row in rows)
        titles = [f"{name}: {text}" for name, text in zip(names, goodput, strict=True)]
        draw_occupancy(list(zip(titles, (r.occupancy for r in results), strict=True)), out)
        written.append(Path(out))
    for name, result in zip(names, results, strict=True) if timeline else ():
        path = Path(timeline or "")
        if len(results) > 1:
            path = path.with_stem(f"{path.stem}_{re.sub('[^a-z0-9.]+', '_', name)}")
        draw_timeline(result.timeline, path)
        written.append(path)
    return written


def comparison(rows: Sequence[dict[str, Any]]) -> Table:
    """The table of `records`."""
    several = len({row["replicas"] for row in rows}) > 1
    table = Table(title="Schedules, simulated", title_justify="left")
    table.add_column("schedule", no_wrap=True)
    heads = [*(["replicas"] if several else []), *(name for name, _ in _COLUMNS)]
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        cells = [f"{row['replicas']:,}"] if several else []
        table.add_row(row["schedule"], *cells, *(show(row) for _, show in _COLUMNS))
    return table


def _number(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _share(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{round(row[key], 3) + 0.0:.3f}"  # plus 0.0: no -0.000


_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("tokens\n/ s", lambda row: _number(row["goodput"])),
    ("over\nsync", lambda row: "-" if row["relative"] is None else f"{row['relative']:.2f}x"),
    ("bubble", _share("bubble")),
    ("waste", _share("waste")),
    ("stale", _share("offpolicy_tokens")),
    ("max\nlag", lambda row: f"{row['lag_max']:.0f}"),
    ("re-\nprefill", _share("reprefill")),
    ("length\nbias", _share("length_bias")),
    ("wait\np99/max", lambda row: f"{row['wait_p99']:.0f}/{row['wait_max']:.0f}"),
    ("seconds\n/update", lambda row: _number(row["seconds_update"])),
)
