"""The command line: `reroll demo | train | eval | collect | simulate`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from rich.console import Console

from reroll.arguments import make_parser
from reroll.config import Config, load_config
from reroll.config.load import load_settings
from reroll.config.simulate import SimulateConfig
from reroll.errors import UserError

MOST_SLOTS = 2000
"""that a timeline is drawn of"""
WIDE = 124
"""columns of the table of schedules"""
_SIMULATE = "reroll simulate"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the status: 0 done, 1 stopped, 2 user's mistake, 130 interrupted."""
    # progress bars and advice of libraries would garble our own
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = make_parser()
    words, flags = split_settings(sys.argv[1:] if arguments is None else arguments)
    args, rest = parser.parse_known_args(words)
    try:
        if args.command == "simulate":
            return _simulate(args, [*rest, *flags])
        overrides = parse_overrides([*flags, *rest])
        if args.command == "demo":
            return _train(load_config(_demo_config(), {"run.out": args.out, **overrides}))
        if args.command == "collect":
            return _collect(args, overrides)
        if args.command == "train":
            return _train(load_config(args.config, overrides))
        return _evaluate(args, overrides)
    except UserError as error:
        print(f"reroll: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(other words, settings with their values): settings may stand before CONFIG too."""
    others: list[str] = []
    flags: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            others.append(word)
            continue
        flags.append(word)
        if "=" not in word and left:
            flags.append(left.pop(0))
    return others, flags


def parse_overrides(rest: Sequence[str]) -> dict[str, str]:
    """`--section.key value` or `--section.key=value` pairs. Raises UserError for anything else."""
    overrides: dict[str, str] = {}
    words = list(rest)
    while words:
        flag = words.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"{flag!r}: not understood; settings are --section.key value")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not words:
                raise UserError(f"--{key}: a value is missing")
            value = words.pop(0)
        overrides[key] = value
    return overrides


def _train(config: Config) -> int:
    from transformers.utils import logging

    from reroll.loop import train
    from reroll.summary import print_summary
    from reroll.train.trainer import Diverged

    logging.disable_progress_bar()
    try:
        run = train(config)
    except Diverged as error:
        print(f"reroll: {error}; the state is saved in {config.run.out}", file=sys.stderr)
        return 1
    print_summary(run)
    return 0


def _collect(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from transformers.utils import logging

    from reroll.gathering import collect_traces

    logging.disable_progress_bar()
    config = load_config(args.config, {"prefix.on": "true", **overrides, "prefix.traces": args.out})
    print(json.dumps(collect_traces(config, args.probe, args.texts, args.run)))
    return 0


def _evaluate(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from transformers.utils import logging

    from reroll.evaluate import evaluate
    from reroll.rundir import RunDir
    from reroll.scheduling import make_voter
    from reroll.setup import prepare
    from reroll.summary import evaluation_table
    from reroll.train.checkpoint import checkpoints

    logging.disable_progress_bar()
    target, run, step = Path(args.target), None, None
    if target.is_dir():
        run = RunDir(target)
        found = checkpoints(run.checkpoints)
        step = args.step if args.step is not None else max(found, default=None)
        if step not in found:
            there = ", ".join(map(str, found)) or "none"
            asked = "" if step is None else f" of step {step}"
            raise UserError(f"{target}: no checkpoint{asked}; there are: {there}")
    elif args.step is not None:
        raise UserError("--step: needs a run directory as TARGET, not a configuration file")
    config = load_config(target / "config.toml" if run else target, overrides)
    if args.vote not in ("majority", config.prune.signal if config.prune.learns and run else ""):
        raise UserError(
            f"--vote {args.vote}: {target} has learnt no such votes; they come from a run with "
            f"prune.on = true and prune.signal = {args.vote!r}"
        )
    with prepare(config, run, step) as parts:
        metrics = evaluate(
            parts.engine,
            parts.graders,
            parts.decode,
            parts.extract,
            parts.task.held_out,
            config.eval,
            step=step or 0,
            seed=config.run.seed,
            sampling=parts.sampling,
            voter=make_voter(config, parts) if args.vote != "majority" else None,
        )
    record = {"target": str(target), "step": step, **metrics}
    Console(highlight=False).print(evaluation_table(record))
    print(json.dumps(record))
    return 0


def _simulate(args: argparse.Namespace, unknown: Sequence[str]) -> int:
    from reroll.comparison import comparison, draw, records
    from reroll.simulate import simulate
    from reroll.workload import make_cost, make_replies

    for word in unknown:
        if not word.startswith("--"):
            raise UserError(f"{word!r}: not understood; settings are --key value")
        load_settings(SimulateConfig, None, {word[2:].partition("=")[0]: ""}, _SIMULATE)
    given = {key: vars(args)[key] for key in SimulateConfig.model_fields if key in args}
    config = load_settings(SimulateConfig, args.config, given, _SIMULATE)
    for flag, path in (("out", args.out), ("timeline", args.timeline)):
        if path and not Path(path).parent.is_dir():
            raise UserError(f"--{flag} = {path!r}: no folder {str(Path(path).parent)!r}")
    slots = config.slots * max(config.replicas)
    if args.timeline and slots > MOST_SLOTS:
        raise UserError(
            f"--timeline = {args.timeline!r}: {slots:,} slots cannot be told apart in a picture; "
            f"simulate at most {MOST_SLOTS:,} (slots x replicas), or use --out"
        )
    cost, replies = make_cost(config), make_replies(config)
    with Console(stderr=True).status("simulating") as status:
        results = simulate(
            config, cost, replies, bool(args.timeline), lambda arm: status.update(arm.name)
        )
    rows, console = records(results), Console(highlight=False)
    console.width = max(console.width, WIDE)  # narrower, figures would be cut off
    console.print(comparison(rows))
    for path in draw(results, args.out, args.timeline):
        console.print(f"Written: {path}", soft_wrap=True)
    if args.json:
        print(json.dumps({"settings": config.model_dump(), "rows": rows}))
    return 0


def _demo_config() -> str:
    return str(resources.files("reroll") / "assets" / "demo.toml")


if __name__ == "__main__":
    sys.exit(main())
