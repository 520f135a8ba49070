from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from reroll.config import load_config, save_config
from reroll.ledger import CATEGORIES
from reroll.rundir import RunDir
from reroll.summary import evaluation_table, print_summary


def held_out(step: int, reward: float) -> dict[str, Any]:
    record = {"kind": "eval", "step": step, "problems": 8.0, "samples": 2.0, "length": 10.0 + step}
    for key in ("reward", "pass@2"):
        record |= {key: reward, f"{key}_low": reward - 0.1, f"{key}_high": reward + 0.1}
    return record


def train(step: int) -> dict[str, Any]:
    spent = {f"{k}_{c}": 1e9 * step for k in ("tokens", "flops", "seconds") for c in CATEGORIES}
    shown = {"reward": step / 10, "length": 7.0, "entropy": 0.5, "live_groups": 1.0, "truncated": 0}
    return {"kind": "train", "step": step, **shown, **spent}


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the tables' rows, by their first cell."""
    found = {}
    for line in text.splitlines():
        if line.startswith("│"):
            name, *cells = (cell.strip() for cell in line.strip("│").split("│"))
            found[name] = cells
    return found


def printed(run: RunDir) -> tuple[dict[str, Any], str]:
    with open("/dev/null", "w") as nowhere:
        screen = Console(record=True, width=120, highlight=False, file=nowhere)
        return print_summary(run, screen), screen.export_text()


def test_before_and_after_and_where(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.log(held_out(0, 0.2))
    for step in range(1, 6):
        run.log(train(step))
    run.log(held_out(5, 0.55))
    for step in (2, 5):
        (run.checkpoints / f"step-{step}").mkdir()
        (run.checkpoints / f"step-{step}" / "state.json").touch()
    figures, text = printed(run)
    assert figures == {"steps": 5, "before": held_out(0, 0.2), "after": held_out(5, 0.55)}
    table = rows(text)
    assert table["reward at temperature"] == [
        "0.200 [0.100, 0.300]", "0.550 [0.450, 0.650]", "+0.350",
    ]  # fmt: skip
    assert table["pass@2"][2] == "+0.350"
    assert table["completion length (tokens)"] == ["10.0", "15.0", "+5.0"]
    assert {"score", "train"} < set(table)
    assert table["decode"] == ["15,000,000,000", "15", "15000000000.0"]
    assert table["reward"] == ["0.100", "0.500"]
    written = text.partition("Written:")[2].split()
    assert written == [str(run.checkpoints / "step-5"), str(run.metrics_path)]


def test_a_run_with_nothing_in_it(tmp_path: Path) -> None:
    figures, text = printed(RunDir(tmp_path))
    assert figures == {"steps": 0}
    assert text.split() == ["Written:"]


def test_a_single_evaluation_has_one_column() -> None:
    table = evaluation_table({**held_out(3, 0.5), "target": "x", "step": 3})
    assert [str(column.header) for column in table.columns] == ["", "result"]


@pytest.mark.parametrize(("gap", "warned"), [(0.3, True), (0.02, False)])
def test_reuse_and_its_audits(gap: float, warned: bool, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save_config(load_config(None, {"reuse.on": "true", "reuse.rule": "held"}), run.config_path)
    for step in range(1, 11):
        shares = {"reused_tokens": step / 25, "full_reuse": step / 50, "duplicates": 0.0}
        audit = {
            "reward_trained_on": 0.5 + gap, "reward_fresh": 0.5, "reward_gap": gap,
            "reward_gap_error": 0.05, "audited": 8.0,
        }  # fmt: skip
        run.log(train(step) | shares | (audit if step % 5 == 0 else {}))
    _, text = printed(run)
    table = rows(text)
    assert table["tokens taken from drafts"] == ["0.06", "0.38"]
    assert table["rollouts reused whole"] == ["0.03", "0.19"]
    assert table["reward, trained on (audit)"] == [
        f"step 5: {0.5 + gap:.3f}", f"step 10: {0.5 + gap:.3f}",
    ]  # fmt: skip
    # two audits of eight problems: error .05 / sqrt(2), Student's t of 14 degrees of freedom 2.145
    assert table["mean gap of 2 audits"] == ["", f"{gap:+.3f} ± 0.076"]
    assert ("WARNING: rollouts trained on score" in text) == warned
