from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from reroll.config import load_config, save_config
from reroll.plot import plot_run
from reroll.rundir import RunDir

PNG = b"\x89PNG\r\n\x1a\n"


def run_with(folder: Path, records: list[dict[str, Any]]) -> RunDir:
    run = RunDir(folder)
    for record in records:
        run.log(record)
    return run


def train(step: int) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "reward": 0.1 * step, "length": 9.0, "entropy": 1.0,
        "live_groups": 0.5,
    }  # fmt: skip


def held_out(step: int, low: float, mean: float, high: float) -> dict[str, Any]:
    bounds = {"reward_low": low, "reward_high": high}
    return {"kind": "eval", "step": step, "reward": mean, **bounds}


def test_curves_of_a_run(tmp_path: Path) -> None:
    run = run_with(tmp_path, [held_out(0, 0.1, 0.2, 0.3), train(1), train(2)])
    assert plot_run(run) == tmp_path / "curves.png"
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_nothing_to_draw_yet(tmp_path: Path) -> None:
    assert plot_run(RunDir(tmp_path)) is None
    assert plot_run(run_with(tmp_path, [held_out(0, 0.1, 0.2, 0.3)])) is None
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    "bounds",
    [
        (0.1 + 1e-17, 0.1, 0.1 - 1e-17),
        (0.30000000000000004, 0.3, 0.3),  # equal rewards: bounds and mean differ by rounding
        (0.7, 0.7, 0.6999999999999998),
        (float("nan"), 0.5, float("nan")),  # one problem has no interval
    ],
)
def test_intervals_of_no_width(bounds: tuple[float, float, float], tmp_path: Path) -> None:
    assert plot_run(run_with(tmp_path, [train(1), held_out(1, *bounds)])) is not None


def test_no_evaluations(tmp_path: Path) -> None:
    assert plot_run(run_with(tmp_path, [train(1)])) is not None


@pytest.mark.parametrize(
    ("rule", "audit", "labels"),
    [
        ("fresh", "auto", ["training rollouts"]),
        ("fresh", "on", ["training rollouts", "fresh samples (audit)"]),
        ("held", "auto", ["rollouts trained on (reused)", "fresh samples (audit)"]),
        ("lenient", "off", ["rollouts trained on (reused)"]),
    ],
)
def test_what_reused_rollouts_earn_is_not_called_the_policys(
    rule: str, audit: str, labels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"reuse.on": "true", "reuse.rule": rule, "reuse.audit": audit}
    config = load_config(None, flags)
    reuse = {"reused_tokens": 0.5, "duplicates": 0.25}
    audited = {"reward_gap": 0.1, "reward_fresh": 0.4} if config.reuse.audited else {}
    run = run_with(tmp_path, [train(1) | reuse, train(2) | reuse | audited])
    save_config(config, run.config_path)
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    plot_run(run)
    axes = drawn[0].axes
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == labels
    assert [axis.get_ylabel() for axis in axes[4:]] == [
        "share of tokens taken from drafts", "share of rollouts written before",
    ]  # fmt: skip


def test_a_run_from_prefixes_shows_its_parts_and_its_ladder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = {
        "groups_prefixed": 3.0, "success_prefixed": 0.5, "success_original": 0.1,
        "prefix_share": 0.6,
    }  # fmt: skip
    rungs = {"ladder@0": 0.0, "ladder@0_low": 0.0, "ladder@0.4": 0.2, "ladder@0.8": 0.9}
    run = run_with(
        tmp_path,
        [
            held_out(0, 0.1, 0.2, 0.3) | rungs, train(1) | mixed,
            train(2) | mixed | {"success_prefixed": 0.7}, held_out(2, 0.1, 0.2, 0.3) | rungs,
        ],
    )  # fmt: skip
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    plot_run(run)
    parts, ladder = drawn[0].axes[-2:]
    shown = {line.get_label(): list(line.get_ydata()) for line in parts.get_lines()}
    assert shown["success, prefixed"] == [0.5, 0.7]
    assert shown["success, original"] == [0.1, 0.1]
    assert shown["share of a trace given"] == [0.6, 0.6]
    assert [list(line.get_xdata()) for line in ladder.get_lines()] == [[0.0, 0.4, 0.8]] * 2
    assert [line.get_label() for line in ladder.get_lines()] == ["after step 0", "after step 2"]
    for axis in (parts, ladder):
        assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 0.7


def test_everything_drawn_is_in_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much higher audits and held-out rewards are than the rewards trained on."""
    audited = {"reused_tokens": 0.5, "duplicates": 0.25, "reward_gap": -0.5, "reward_fresh": 0.7}
    run = run_with(tmp_path, [train(1) | audited, train(2) | audited, held_out(2, 0.8, 0.85, 0.9)])
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    plot_run(run)
    low, high = drawn[0].axes[0].get_ylim()
    assert low == 0 and high > 0.9
