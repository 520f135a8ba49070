"""What every benchmark shares: arguments, results that resume, tables, the last line of JSON."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

RESULTS = Path(__file__).parent / "results"


def arguments(description: str, **others: str) -> argparse.Namespace:
    """`--quick`: end within a minute on 2 cores; `--fresh`: forget saved parts of a full run.

    others: further options that take a text, with their help.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick", action="store_true", help="shrunk, ends within a minute; prints every key"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="measure everything again instead of resuming"
    )
    for name, text in others.items():
        parser.add_argument(f"--{name}", default="", help=text)
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class Parts:
    """Measured parts of one benchmark, a file each, so that a full run can resume, and several
    processes can measure parts of one."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.folder = RESULTS / f"{name}.parts"
        self.quick = args.quick
        self.commit = commit()
        """of the code that measures; a long run may end under a later one"""
        self.commits: set[str] = set()
        if args.fresh and not args.quick:
            shutil.rmtree(self.folder, ignore_errors=True)

    def measure(self, key: str, function: Callable[[], Any]) -> Any:
        """The saved value of `key`, or `function()`'s, saved."""
        path = self.folder / f"{key.replace('/', '_')}.json"
        if not self.quick and path.exists():
            saved = json.loads(path.read_text())
            if saved["commit"] != self.commit:
                print(f"{key}: measured before, at commit {saved['commit']}", flush=True)
        else:
            saved = {"commit": self.commit, "value": function()}
            if not self.quick:
                self.folder.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(saved))
                temporary.replace(path)
        self.commits.add(saved["commit"])
        return saved["value"]

    def finish(self, name: str, summary: dict[str, Any], seeds: Sequence[int], detail: Any) -> None:
        """Keep a full run's output in `bench/results/NAME.json`; print the last line of JSON."""
        summary = summary | {"quick": self.quick}
        if not self.quick:
            record = {
                "summary": summary,
                "detail": detail,
                "seeds": list(seeds),
                "machine": machine(),
                "command": f"python -m bench.{name}",
                "commit": ", ".join(sorted(self.commits)) or self.commit,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            short = json.loads(json.dumps(record), parse_float=lambda x: float(f"{float(x):.6g}"))
            (RESULTS / f"{name}.json").write_text(json.dumps(short) + "\n")
            shutil.rmtree(self.folder, ignore_errors=True)
        print(json.dumps(summary))
        sys.stdout.flush()


def commit() -> str:
    """The checked-out commit, with a mark if the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return (head.stdout.strip() or "unknown") + ("+changes" if dirty.stdout.strip() else "")


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], width: int = 100
) -> None:
    """Print a table, first column left, the others right."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*map(str, row))
    Console(width=max(width, Console().width)).print(made)


def reached(curve: Sequence[Sequence[float]], reward: float) -> float | None:
    """FLOPs at which a run first has this reward, straight between evaluations; None: it never has.

    curve: (step, FLOPs, reward) of each evaluation.
    """
    before: tuple[float, float] | None = None
    for _, flops, now in curve:
        if now >= reward:
            if before is None:
                return flops
            return before[0] + (flops - before[0]) * (reward - before[1]) / (now - before[1])
        before = flops, now
    return None


def interval(values: Sequence[float]) -> list[float] | None:
    """Student's t, 95 %; None for a single seed."""
    if len(values) < 2:
        return None
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return [round(fmean(values) - half, 4), round(fmean(values) + half, 4)]
