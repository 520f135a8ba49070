"""What each command takes, and what its `--help` says."""

import argparse

from reroll import __version__
from reroll.config import ALGORITHMS, Config, Section, describe
from reroll.config.simulate import SimulateConfig
from reroll.helptext import COLLECT, DEMO, EVAL, SIMULATE, TRAIN


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; settings are left to `cli.parse_overrides`."""
    parser = argparse.ArgumentParser(
        prog="reroll",
        description="Reinforcement learning with verifiable rewards, rollouts made cheap.",
    )
    parser.add_argument("--version", action="version", version=f"reroll {__version__}")
    names = "demo | train | eval | collect | simulate"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for name, short, text in (
        ("demo", "train the packaged policy on this machine and see its reward rise", DEMO),
        ("train", "train a policy from a TOML file, or go on with a run", TRAIN),
        ("eval", "held-out reward, pass@k and maj@k of a run or a model", EVAL),
        ("collect", "traces of hard problems, and whether starting from them can pay", COLLECT),
        ("simulate", "compare schedules on simulated machines, without a model", SIMULATE),
    ):
        command = commands.add_parser(
            name,
            help=short,
            description=text,
            epilog=_simulate_settings() if name == "simulate" else _settings(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == "demo":
            command.add_argument(
                "--out", default="runs/demo", help="run directory (default: runs/demo)"
            )
        elif name == "train":
            command.add_argument("config", metavar="CONFIG", help="TOML file")
        elif name == "simulate":
            _simulate_arguments(command)
        elif name == "collect":
            _collect_arguments(command)
        else:
            _eval_arguments(command)
    return parser


def _collect_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="TOML file")
    command.add_argument(
        "--out", default="traces.sqlite", help="file to write (default: traces.sqlite)"
    )
    command.add_argument(
        "--texts",
        default="",
        metavar="JSONL",
        help="take in these solutions instead of sampling: lines with text, and row or prompt",
    )
    command.add_argument(
        "--run", default="", help="take in the successes of this run's store instead"
    )
    command.add_argument(
        "--probe",
        type=int,
        default=32,
        help="hard problems of which fresh groups are sampled afterwards (default: 32)",
    )


def _eval_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", metavar="TARGET", help="run directory or TOML file")
    command.add_argument("--step", type=int, help="checkpoint to evaluate (default: the newest)")
    command.add_argument(
        "--vote",
        choices=("majority", "confidence", "quality"),
        default="majority",
        help="beside the majority of the answers, their vote weighted by what a run that prunes by "
        "this signal has learnt (default: majority alone)",
    )


def _simulate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", nargs="?", help="TOML file (default: none)")
    command.add_argument("--out", metavar="PNG", help="draw the share of slots in use over time")
    command.add_argument(
        "--timeline", metavar="PNG", help="draw what ran in each slot; a picture a schedule"
    )
    command.add_argument("--json", action="store_true", help="last line: one JSON object")
    for key in SimulateConfig.model_fields:  # listed below with what they mean
        command.add_argument(f"--{key}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _settings() -> str:
    lines = [
        "settings (--section.key value; in the file: [section] key = value):",
        *_listed(Config),
    ]
    lines.append("what algo.name fills in where [algo] leaves a setting out:")
    for name, filled in ALGORITHMS.items():
        lines.append(f"  {name}: " + ", ".join(f"{k} = {v}" for k, v in filled.items()))
    return "\n".join(lines)


def _simulate_settings() -> str:
    return "\n".join(
        ["settings (--key value; in the file: key = value):", *_listed(SimulateConfig)]
    )


def _listed(kind: type[Section]) -> list[str]:
    return [
        f"  --{key} {type_} (default {default})\n        {text}"
        for key, type_, default, text in describe(kind)
    ]
