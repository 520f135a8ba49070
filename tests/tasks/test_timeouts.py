from pathlib import Path

from reroll.tasks.timeouts import Timeouts


def test_names_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "timeouts.txt"
    Timeouts(path).add("train/1/0/0")
    Timeouts(path).add("train/2/0/0")
    assert path.read_text() == "train/1/0/0\ntrain/2/0/0\n"
    again = Timeouts(path)
    assert "train/1/0/0" in again and "train/2/0/0" in again
    assert "train/1/0" not in again and "" not in again


def test_a_torn_last_line_never_happened(tmp_path: Path) -> None:
    path = tmp_path / "timeouts.txt"
    path.write_text("train/1/0/0\ntrain/2")
    timeouts = Timeouts(path)
    assert "train/2" not in timeouts
    timeouts.add("train/3/0/0")
    assert path.read_text() == "train/1/0/0\ntrain/3/0/0\n"
    path.write_text("train/1")
    Timeouts(path).add("train/4/0/0")
    assert path.read_text() == "train/4/0/0\n"


def test_no_path_keeps_no_record() -> None:
    timeouts = Timeouts(None)
    timeouts.add("train/1/0/0")
    assert "train/1/0/0" not in timeouts
