import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reroll.config import LogSection
from reroll.errors import UserError
from reroll.log import Display, open_trackers

METRICS = {"reward": 0.25, "live_groups": 0.5, "length": 12.4, "tokens_per_second": 12345.6}


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("plain", total=20, done=4) as display:
        display.say("a note")
        display.rollouts(1, 2)
        display.step(5, METRICS)
    note, step = capsys.readouterr().out.splitlines()
    assert note == "a note"
    assert re.fullmatch(
        r"step 5/20  reward 0\.250  live 0\.50  length 12  12,346 tok/s  \d+:\d\d left", step
    )


def test_off_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("off", total=2, done=0) as display:
        display.say("a note")
        display.rollouts(1, 2)
        display.step(1, METRICS)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_auto_is_plain_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert Display("auto", total=2, done=0).mode == "plain"


def test_the_live_display_keeps_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("rich", total=2, done=0) as display:
        display.say("a note")
        display.rollouts(1, 2)
        display.step(1, METRICS)
    out = capsys.readouterr().out
    assert "a note" in out
    assert "reward 0.250" in out


def test_a_long_line_with_brackets_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]not markup[/bold] " + "word " * 60 + "[0.1, 0.2] 17"
    for mode in ("plain", "rich"):
        with Display(mode, total=2, done=0) as display:
            display.say(text)
        assert text in capsys.readouterr().out.splitlines()


def test_time_left_counts_the_steps_of_this_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("reroll.log.time.perf_counter", lambda: now[0])
    display = Display("off", total=20, done=10)
    now[0] += 30.0
    display.step(13, METRICS)
    assert display.time_left() == "1:10"  # 7 steps of 10 seconds


def test_steps_left_where_flops_end_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """As if those to come cost what those of this start did; never more than train.steps."""
    display = Display("plain", total=50, done=10, flops=1000.0)
    for step, spent in ((11, 400.0), (12, 420.0), (13, 500.0)):
        display.step(step, METRICS | {"flops_total_paper": spent})
    said = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert said == ["11/50", "12/41", "13/23"]
    display.step(14, METRICS | {"flops_total_paper": 501.0})
    assert display.total == 29
    display.step(15, METRICS | {"flops_total_paper": 1000.0})
    assert (display.total, display.time_left()) == (15, "0:00")


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    (tracker,) = open_trackers(LogSection(trackers=["tensorboard"]), tmp_path, {"train.steps": 3})
    for step in (1, 2):
        tracker({"train/reward": 0.5 * step, "train/epoch": step, "train/name": "text"}, step)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/epoch", "train/reward"]
    read = [(event.step, event.value) for event in events.Scalars("train/reward")]
    assert read == [(1, 0.5), (2, 1.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_go_on_in_the_same_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, Any], int]] = []

    def init(**settings: Any) -> SimpleNamespace:
        opened.append(settings)
        return SimpleNamespace(log=lambda metrics, step: logged.append((metrics, step)))

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    (tracker,) = open_trackers(LogSection(trackers=[name]), tmp_path / "run-a", {"train.steps": 3})
    tracker({"train/reward": 0.5}, 7)
    assert logged == [({"train/reward": 0.5}, 7)]
    (settings,) = opened
    assert settings["project"] == "reroll"
    assert settings["resume"] == "allow"
    assert settings["config"] == {"train.steps": 3}
    assert settings["id" if name == "wandb" else "name"] == "run-a"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=rf"log\.trackers: {name} is not installed; .* {name}$"):
        open_trackers(LogSection(trackers=[name]), tmp_path, {})


def test_no_trackers_are_no_trackers(tmp_path: Path) -> None:
    assert open_trackers(LogSection(), tmp_path, {}) == []
    assert list(tmp_path.iterdir()) == []
