"""The command line: `reroll demo | train | eval`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from rich.console import Console

from reroll import __version__
from reroll.config import ALGORITHMS, Config, describe, load_config
from reroll.errors import UserError

DEMO = """\
Train the packaged demo policy (1M parameters, Qwen3 architecture) on chain sums it has never
seen, on this machine, and print held-out reward before and after. Takes a few minutes on two
CPU cores. Starting it again goes on where it stopped."""

TRAIN = """\
Train a policy. CONFIG is a TOML file (see recipes/ in the repository); every setting can also be
given as a flag, which wins over the file. Starting again with the same command goes on from the
last checkpoint; the run that was killed and started again is the run that was not killed.

  reroll train recipes/chain_sum.toml
  reroll train recipes/own_data.toml --model.path Qwen/Qwen3-0.6B --task.name problems.jsonl
  reroll train recipes/chain_sum.toml --run.out runs/b --algo.name gspo
  reroll train recipes/ppo.toml --train.learning_rate 5e-5"""

EVAL = """\
Evaluate a policy on its task's held-out problems: mean reward, pass@k, maj@k, greedy, each with a
95 % bootstrap interval over problems. TARGET is a run directory (its newest checkpoint) or a
configuration file. The last line is one JSON object.

  reroll eval runs/demo
  reroll eval runs/demo --step 20 --eval.samples 16
  reroll eval recipes/chain_sum.toml --task.eval_size 500"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the status: 0 done, 1 stopped, 2 user's mistake, 130 interrupted."""
    # progress bars and advice of libraries would garble our own
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = _parser()
    words, flags = split_settings(sys.argv[1:] if arguments is None else arguments)
    args, rest = parser.parse_known_args(words)
    try:
        overrides = parse_overrides([*flags, *rest])
        if args.command == "demo":
            return _train(load_config(_demo_config(), {"run.out": args.out, **overrides}))
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


def _evaluate(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from transformers.utils import logging

    from reroll.evaluate import evaluate
    from reroll.rundir import RunDir
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
        )
    record = {"target": str(target), "step": step, **metrics}
    Console(highlight=False).print(evaluation_table(record))
    print(json.dumps(record))
    return 0


def _demo_config() -> str:
    return str(resources.files("reroll") / "assets" / "demo.toml")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reroll",
        description="Reinforcement learning with verifiable rewards, rollouts made cheap.",
    )
    parser.add_argument("--version", action="version", version=f"reroll {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | train | eval")
    for name, short, text in (
        ("demo", "train the packaged policy on this machine and see its reward rise", DEMO),
        ("train", "train a policy from a TOML file, or go on with a run", TRAIN),
        ("eval", "held-out reward, pass@k and maj@k of a run or a model", EVAL),
    ):
        command = commands.add_parser(
            name,
            help=short,
            description=text,
            epilog=_settings(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == "demo":
            command.add_argument(
                "--out", default="runs/demo", help="run directory (default: runs/demo)"
            )
        elif name == "train":
            command.add_argument("config", metavar="CONFIG", help="TOML file")
        else:
            command.add_argument("target", metavar="TARGET", help="run directory or TOML file")
            command.add_argument(
                "--step", type=int, help="checkpoint to evaluate (default: the newest)"
            )
    return parser


def _settings() -> str:
    lines = ["settings (--section.key value; in the file: [section] key = value):"]
    for key, kind, default, text in describe():
        lines.append(f"  --{key} {kind} (default {default})\n        {text}")
    lines.append("what algo.name fills in where [algo] leaves a setting out:")
    for name, filled in ALGORITHMS.items():
        lines.append(f"  {name}: " + ", ".join(f"{k} = {v}" for k, v in filled.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
