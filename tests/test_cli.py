import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import reroll
from reroll.cli import main, parse_overrides, split_settings
from reroll.config import ALGORITHMS, describe, load_config
from reroll.config.simulate import SimulateConfig
from tests.project import Project

COMMANDS = ["demo", "train", "eval"]

Mistake = Callable[[Sequence[str]], str]


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]) -> Mistake:
    """Run a command that fails by the user's mistake; gives its line on standard error."""

    def run(arguments: Sequence[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("reroll: ")
        return captured.err.removeprefix("reroll: ").rstrip("\n")

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_setting(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: reroll {command}")
    for key, kind, default, text in describe():
        assert f"  --{key} {kind} (default {default})\n        {text}\n" in f"{out}\n"
    for name, filled in ALGORITHMS.items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {name}: ")]
        shown = line.partition(": ")[2].split(", ")
        assert shown == [f"{key} = {value}" for key, value in filled.items()]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in [*COMMANDS, "simulate"])
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"reroll {reroll.__version__}\n"


def test_help_of_the_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reroll", "train", "--help"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "--train.learning_rate float" in done.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train"], ["eval"], ["eval", "x", "--step", "y"]]
)
def test_words_that_are_no_command(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: reroll")


def test_settings_that_are_not_there(project: Project, mistake: Mistake) -> None:
    message = mistake(project.train(train__stepz=3))
    assert message == "--train.stepz: unknown setting; did you mean train.steps?"
    assert "--rollout.samples: a value is missing" in mistake(
        [*project.train(), "--rollout.samples"]
    )
    message = mistake(["eval", str(project.out / "empty.toml"), "--eval.smaples", "3"])
    assert message == "--eval.smaples: unknown setting; did you mean eval.samples?"
    assert not (project.out / "run").exists()


def test_a_configuration_that_is_not_there(project: Project, mistake: Mistake) -> None:
    message = mistake(["train", "nowhere.toml"])
    assert message == "nowhere.toml: cannot read the configuration: No such file or directory"


def test_a_model_that_is_not_there(project: Project, mistake: Mistake) -> None:
    for path in ("polizy", "./polizy", "/nowhere/at/all", "nobody/no-such-model"):
        message = mistake(project.train(model__path=path))
        assert message.startswith(f"model.path = '{path}': no such folder, and not to be had from")


def test_a_folder_that_is_no_model(project: Project, mistake: Mistake) -> None:
    (project.out / "empty").mkdir()
    for path in (project.out / "empty", project.folder / "digits.py"):
        message = mistake(project.train(model__path=path))
        assert message.startswith(f"model.path = '{path}': cannot be loaded: ")


def test_a_mistake_put_right_is_not_another_run(project: Project, mistake: Mistake) -> None:
    mistake(project.train(model__path="polizy"))
    mistake(project.train(task__graders='[{name = "digits:shore"}]'))
    assert main(project.train(train__steps=1)) == 0


def problems(project: Project, text: str) -> Path:
    path = project.out / "rows.jsonl"
    path.write_text(text)
    return path


def test_datasets_that_cannot_be_used(project: Project, mistake: Mistake) -> None:
    message = mistake(project.train(task__name="problem.jsonl"))
    assert message == (
        "task.name = 'problem.jsonl': cannot read it: No such file or directory; "
        "did you mean problems.jsonl?"
    )
    empty = problems(project, "\n\n")
    message = mistake(project.train(task__name=empty))
    assert message == f"task.name = '{empty}': the file has no rows"
    broken = problems(project, '{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "1 +')
    assert f"{broken}: line 2 is not valid JSON" in mistake(project.train(task__name=broken))
    message = mistake(project.train(task__source="reasoning_gym", task__name="chain_sun"))
    assert "did you mean chain_sum?" in message


def test_columns_that_are_not_there(project: Project, mistake: Mistake) -> None:
    message = mistake(project.train(task__answer_column="anser"))
    assert re.fullmatch(
        r"problems\.jsonl: line \d+: task\.answer_column = 'anser': no such column; "
        r"there are: prompt, answer; did you mean answer\?",
        message,
    )
    assert "task.prompt_column = 'question'" in mistake(
        project.train(task__prompt_column="question")
    )
    assert "unknown field {expresion}" in mistake(project.train(task__template="{expresion} ="))


def test_prompts_that_are_all_too_long(project: Project, mistake: Mistake) -> None:
    message = mistake(project.train(task__max_prompt_tokens=3))
    assert message == (
        "task.max_prompt_tokens = 3: all 10 training prompts are longer; the shortest has 8 tokens"
    )


def test_devices_that_are_not_there(project: Project, mistake: Mistake) -> None:
    assert "model.device = 'cuda:99': not there" in mistake(project.train(model__device="cuda:99"))
    assert "model.device = 'gpu': not a device" in mistake(project.train(model__device="gpu"))
    assert "runs on cpu and cuda" in mistake(project.train(model__device="meta"))


def test_a_run_directory_of_another_configuration(project: Project, mistake: Mistake) -> None:
    assert main(project.train(train__steps=1)) == 0
    message = mistake(project.train(train__steps=1, rollout__prompts=5))
    assert message == (
        f"run.out = '{project.out / 'run'}': holds a run of another configuration "
        "(rollout.prompts: 3 -> 5); choose another directory, or undo the change to resume that run"
    )


def test_a_directory_that_is_no_run(project: Project, mistake: Mistake) -> None:
    (project.out / "thesis").mkdir()
    (project.out / "thesis" / "chapter.tex").touch()
    message = mistake(project.train("thesis"))
    assert "thesis': not a run directory (it holds chapter.tex); choose another" in message
    assert "cannot be used" in mistake(project.train("empty.toml"))


def test_slots_that_do_not_fit_and_the_advice(project: Project, mistake: Mistake) -> None:
    # 2 layers x (key + value) x 16 wide x 4 bytes a token; prompts of up to 9 tokens + 10
    token, capacity, bound = 256, 9 + 10, 1e-4
    slots = int(bound * 2**30 // (token * capacity))
    message = mistake(project.train(engine__slots=64, engine__cache_gb=bound))
    assert message.startswith("engine.cache_gb = 0.0001: 64 slots x 19 tokens x 256 bytes = ")
    assert f"what would fit: {slots} slots of 19 tokens (engine.slots)" in message
    assert f"or 64 slots of {int(bound * 2**30 // (token * 64))} " in message
    assert slots == 22
    too_many = mistake(project.train(engine__slots=slots + 1, engine__cache_gb=bound))
    assert f"{slots} slots of 19 tokens" in too_many
    assert main(project.train(engine__slots=slots, engine__cache_gb=bound, train__steps=1)) == 0


def test_replies_longer_than_the_model_can_read(project: Project, mistake: Mistake) -> None:
    message = mistake(project.train(rollout__max_tokens=120))
    assert message.startswith(
        "rollout.max_tokens = 120: with prompts of up to 9 tokens a sequence "
    )
    assert "has 129, but the model has 128 positions" in message


@pytest.mark.parametrize(
    ("graders", "expected"),
    [
        ("digit:share", r"no module 'digit' in .*; did you mean digits\?"),
        ("digits:shares", r"digits\.py has no function 'shares'; did you mean share\?"),
        ("mth", r"unknown grader 'mth'; .*; did you mean math\?"),
        ("task", r"'task' is the scorer of reasoning_gym"),
    ],
)
def test_graders_misspelt(graders: str, expected: str, project: Project, mistake: Mistake) -> None:
    message = mistake(project.train(task__graders=f'[{{name = "{graders}"}}]'))
    assert re.search(rf"^task\.graders: .*{expected}", message)


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_trackers_that_are_not_installed(
    tracker: str, project: Project, mistake: Mistake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = mistake(project.train(log__trackers=f'["{tracker}"]'))
    assert message == f"log.trackers: {tracker} is not installed; run pip install {tracker}"


def test_the_demo_is_a_run_like_others(project: Project) -> None:
    run = project.out / "demo"
    small = {
        "model.path": "policy", "model.device": "cpu", "run.threads": 1, "task.train_size": 6,
        "task.eval_size": 3, "rollout.prompts": 2, "rollout.max_tokens": 8, "train.steps": 1,
        "log.display": "off",
    }  # fmt: skip
    flags = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    assert main(["demo", "--out", str(run), *flags]) == 0
    config = load_config(run / "config.toml")
    assert (config.run.out, config.task.name, config.train.steps) == (str(run), "chain_sum", 1)
    assert config.task.params["min_terms"] == 5
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_evaluating_what_is_not_there(project: Project, mistake: Mistake) -> None:
    empty = str(project.out)
    assert mistake(["eval", empty]) == f"{empty}: no checkpoint; there are: none"
    assert main(project.train(train__steps=2, checkpoint__every=1)) == 0
    run = str(project.out / "run")
    assert mistake(["eval", run, "--step", "7"]) == (
        f"{run}: no checkpoint of step 7; there are: 1, 2"
    )
    arguments = ["eval", str(project.out / "empty.toml"), "--step", "1"]
    assert "--step: needs a run directory as TARGET" in mistake(arguments)
    assert "missing.toml: cannot read" in mistake(["eval", "missing.toml"])


def test_evaluating_a_run_gives_what_the_run_measured(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(project.train(train__steps=2, eval__every=1, checkpoint__every=1)) == 0
    run = project.out / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    during = {line["step"]: line for line in lines if line["kind"] == "eval"}
    before = (run / "metrics.jsonl").read_bytes()
    for arguments, step in (([], 2), (["--step", "1"], 1)):
        capsys.readouterr()
        assert main(["eval", str(run), *arguments]) == 0
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (record.pop("target"), record.pop("step")) == (str(run), step)
        assert record == {key: during[step][key] for key in record}
        assert {"reward", "pass@2", "maj@2", "greedy_reward", "reward_low"} <= set(record)
    assert (run / "metrics.jsonl").read_bytes() == before
    capsys.readouterr()
    assert main(["eval", str(run), "--eval.samples", "3", "--eval.greedy", "false"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["samples"] == 3
    assert "greedy_reward" not in record


def test_votes_come_from_a_run_that_prunes(
    project: Project, mistake: Mistake, capsys: pytest.CaptureFixture[str]
) -> None:
    prunes = {
        "rollout__samples": 6, "prune__on": "true", "prune__least": 2, "prune__when": "tokens",
        "prune__at": "[2]", "prune__warmup": 1, "train__steps": 2,
    }  # fmt: skip
    for signal, flags in (("confidence", {}), ("quality", {"prune__signal": "quality"})):
        assert main(project.train(**prunes, **flags, run__out=str(project.out / signal))) == 0
        run = str(project.out / signal)
        capsys.readouterr()
        for votes in (signal, signal, "majority"):
            assert main(["eval", run, "--vote", votes, "--eval.samples", "3"]) == 0
        last, again, majority = (
            json.loads(line)
            for line in capsys.readouterr().out.splitlines()
            if line.startswith('{"target"')
        )
        assert last == again and 0 <= last["vote@3"] <= 1
        assert majority == {key: value for key, value in last.items() if "vote" not in key}
    assert mistake(["eval", str(project.out / "confidence"), "--vote", "quality"]) == (
        f"--vote quality: {project.out / 'confidence'} has learnt no such votes; they come from a "
        "run with prune.on = true and prune.signal = 'quality'"
    )
    assert "--vote confidence" in mistake(["eval", project.train()[1], "--vote", "confidence"])


def test_evaluating_a_configuration(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    _, config, *flags = project.train()
    assert main(["eval", config, *flags]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["step"] is None
    assert record["problems"] == 4
    assert not (project.out / "run").exists()


def test_an_interrupt_before_the_run_has_begun(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reroll.setup.load_task", interrupted)
    assert main(project.train()) == 130


def test_a_damaged_checkpoint(project: Project, mistake: Mistake) -> None:
    assert main(project.train(train__steps=2, checkpoint__every=1)) == 0
    newest = project.out / "run" / "checkpoints" / "step-2"
    whole = (newest / "optimizer.safetensors").read_bytes()
    (newest / "optimizer.safetensors").write_bytes(whole[: len(whole) // 2])
    message = mistake(project.train(train__steps=2, checkpoint__every=1))
    assert message.startswith(f"{newest}: not a whole checkpoint (")
    (newest / "optimizer.safetensors").write_bytes(whole)
    weights = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    message = mistake(project.train(train__steps=2, checkpoint__every=1))
    assert str(newest) in message


SIMULATE = ["simulate", "--slots", "8", "--prompts=4", "--samples", "2", "--median", "50"]


def test_help_of_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: reroll simulate")
    for key, kind, default, text in describe(SimulateConfig):
        assert f"  --{key} {kind} (default {default})\n        {text}\n" in f"{out}\n"
    assert all(flag in out for flag in ("--out PNG", "--timeline PNG", "--json", "[CONFIG]"))


def test_simulating(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "a.toml"
    config.write_text('schedules = ["sync", "april"]\nover = 2\nslots = 100\nupdates = 3\n')
    pictures = {f"--{name}": str(tmp_path / f"{name}.png") for name in ("out", "timeline")}
    flags = [word for pair in pictures.items() for word in pair]
    assert main([*SIMULATE, str(config), *flags, "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert (record["settings"]["slots"], record["settings"]["updates"]) == (8, 3)
    assert [row["schedule"] for row in record["rows"]] == ["sync", "april 2"]
    assert [row["relative"] == 1 for row in record["rows"]] == [True, False]
    shown = [line for line in lines if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in shown] == ["sync", "april 2"]
    names = ["out.png", "timeline_sync.png", "timeline_april_2.png"]
    assert lines[-3:] == [f"Written: {tmp_path / name}" for name in names]
    assert all((tmp_path / name).exists() for name in names)


def test_simulating_by_mistake(mistake: Mistake, tmp_path: Path) -> None:
    assert mistake(["simulate", "--slotz", "4"]) == "--slotz: unknown setting; did you mean slots?"
    assert mistake(["simulate", "--run.seed", "4"]).startswith("--run.seed: unknown setting")
    assert "not understood" in mistake(["simulate", "a.toml", "b.toml"])
    assert mistake(["simulate", "a.toml"]).startswith("a.toml: cannot read the configuration: ")
    message = mistake([*SIMULATE, "--replicas", "4,1000", "--timeline", "t.png"])
    assert message.startswith("--timeline = 't.png': 8,000 slots cannot be told apart")
    nowhere = str(tmp_path / "no" / "a.png")
    message = mistake([*SIMULATE, "--out", nowhere])
    assert message == f"--out = {nowhere!r}: no folder {str(tmp_path / 'no')!r}"
    assert "no costs.json there" in mistake(["simulate", "--costs", str(tmp_path)])
    assert "no rollouts.sqlite there" in mistake(["simulate", "--run", str(tmp_path)])


def test_settings_may_stand_before_the_config() -> None:
    words = ["train", "--run.seed", "5", "c.toml", "--run.out=x", "--lr"]
    assert split_settings(words) == (
        ["train", "c.toml", "--lr"],
        ["--run.seed", "5", "--run.out=x"],
    )


ROOT = Path(__file__).parent.parent
WRITTEN = [
    line.partition("#")[0].split()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for line in page.read_text(encoding="utf-8").splitlines()
    if re.match(r"reroll (train|collect) recipes/", line)
]


def test_there_are_commands_with_recipes_in_the_docs() -> None:
    assert len(WRITTEN) > 12


@pytest.mark.parametrize("words", WRITTEN, ids=" ".join)
def test_a_command_of_the_docs_is_understood(words: list[str]) -> None:
    others, settings = split_settings(words)
    load_config(ROOT / others[2], parse_overrides(settings))
