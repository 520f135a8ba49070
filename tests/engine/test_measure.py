"""What forwards cost: measured once, kept with the run, never measured again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reroll.engine.measure as measure
import reroll.loop
from reroll.cli import main
from reroll.engine.costs import CHUNKS, TYPICAL, Costs, load_costs
from reroll.engine.local import LocalEngine, Speculation
from reroll.loop import train
from reroll.setup import prepare
from reroll.train.trainer import Trainer
from reroll.types import Request, Sampling
from tests.project import Killed, Project, at_call, kill, records
from tests.tiny import tiny

# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "batches"),
    [(1, (1,)), (3, (1, 3)), (4, (1, 4)), (5, (1, 4, 5)), (17, (1, 4, 16, 17))],
)
def test_a_table_covers_one_slot_to_all(slots: int, batches: tuple[int, ...]) -> None:
    engine = LocalEngine(
        tiny("qwen3"), slots=slots, capacity=12, prefill_tokens=64,
        speculation=Speculation(redraft=8),
    )  # fmt: skip
    costs = engine.measure()
    assert costs.batches == batches
    assert len(costs.ticks) == len(batches)
    assert {len(row) for row in costs.ticks} == {len(CHUNKS)}
    assert min(seconds for row in costs.ticks for seconds in row) > 0
    assert costs.prefill > 0
    assert not costs.rounded
    for row in costs.ticks:
        assert list(row) == sorted(row)
    for column in zip(*costs.ticks, strict=True):
        assert list(column) == sorted(column)


def test_more_work_takes_no_less_time_whatever_the_clock_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A busy machine may slow down any one of the measurements."""
    said = iter([9.0, 2.0, 8.0, 4.0, 1.0, 5.0, 3.0, 7.0, 2.5])
    monkeypatch.setattr(measure, "_shortest", lambda work, repeats: next(said))
    costs = LocalEngine(tiny("qwen3"), slots=4, capacity=12, prefill_tokens=512).measure()
    assert costs.batches == (1, 4)
    # each is the least of what takes as much work or more
    assert costs.ticks == ((1.0, 2.0, 3.0, 4.0), (1.0, 3.0, 3.0, 7.0))
    assert costs.prefill == 2.5 / (8 * 64)


def test_the_shortest_of_several_counts_and_the_first_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    took = iter([0.5, 4.0, 2.0, 3.0])
    calls = []

    def work() -> None:
        calls.append(None)
        now[0] += next(took)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert measure._shortest(work, 3) == 2.0
    assert len(calls) == 4


@pytest.mark.parametrize("faster", [True, False])
def test_rounding_is_kept_only_where_it_is_faster(
    faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalEngine(tiny("qwen3", torch.float32), slots=1, capacity=12, prefill_tokens=512)
    engine.runner.verify = torch.bfloat16
    dtypes = []

    def shortest(work: Callable[[], None], repeats: int) -> float:
        work()
        dtypes.append(engine.runner.verify)
        return 1.0 if (engine.runner.verify is None) == faster else 0.5

    monkeypatch.setattr(measure, "_shortest", shortest)
    costs = engine.measure()
    assert dtypes[-2:] == [torch.bfloat16, None]
    assert costs.rounded == faster
    assert engine.runner.verify == (torch.bfloat16 if faster else None)
    assert costs.prefill == 0.5 / (8 * 64)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mistral_window", "qwen2_moe"])
def test_other_architectures_are_measured_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_shortest", lambda work, repeats: (work(), 1.0)[1])
    costs = LocalEngine(tiny(name), slots=2, capacity=16, prefill_tokens=64).measure()
    assert costs.ticks == ((1.0,) * 4, (1.0,) * 4)


def test_a_busy_engine_is_not_measured() -> None:
    engine = LocalEngine(tiny("qwen3"), slots=2, capacity=12)
    engine.submit(Request(0, (1, 2), 0, Sampling(6)))
    engine.step()
    with pytest.raises(AssertionError):
        engine.measure()


# --- with a run ---------------------------------------------------------------------------------

SHORT = {
    "train__steps": 4, "task__train_size": 5, "task__eval_size": 1, "eval__every": 0,
    "eval__samples": 1, "rollout__max_tokens": 6, "log__display": "off", "reuse__on": "true",
}  # fmt: skip
OTHER = Costs((1, 8), ((1.0, 2.0, 3.0, 4.0), (2.0, 3.0, 4.0, 5.0)), 0.125)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Costs]:
    """The tables that were measured, each time another one."""
    made: list[Costs] = []

    def measure_(engine: LocalEngine) -> Costs:
        made.append([TYPICAL, OTHER, TYPICAL][len(made)])
        return made[-1]

    monkeypatch.setattr(LocalEngine, "measure", measure_)
    monkeypatch.setattr(reroll.loop, "plot_run", lambda run: None)
    return made


def test_a_run_is_measured_once_and_resumed_with_the_same_table(
    project: Project, measured: list[Costs], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = project.config(**SHORT)
    used = []
    step = Trainer.step

    def watched(trainer: Trainer, groups: Any) -> Any:
        used.append((trainer.batches + 1, engines[-1].costs))
        return step(trainer, groups)

    monkeypatch.setattr(Trainer, "step", watched)
    engines: list[LocalEngine] = []
    make_engine = reroll.setup.make_engine
    monkeypatch.setattr(
        reroll.setup,
        "make_engine",
        lambda *args: (engines.append(make_engine(*args)), engines[-1])[1],
    )
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "step", 3, kill)
        with pytest.raises(Killed):
            train(config)
    path = project.out / "run" / "costs.json"
    written = path.read_bytes()
    assert load_costs(path) == TYPICAL
    train(config)
    train(config)
    assert measured == [TYPICAL]
    assert used == [(number, TYPICAL) for number in (1, 2, 3, 4)]
    assert path.read_bytes() == written
    # another run measures for itself
    train(project.config("other", **SHORT))
    assert measured == [TYPICAL, OTHER]
    assert load_costs(project.out / "other" / "costs.json") == OTHER


@pytest.mark.parametrize("text", ["", "{", json.dumps({"batches": [1]})])
def test_a_damaged_table_is_refused_with_the_remedy(
    text: str, project: Project, measured: list[Costs], capsys: pytest.CaptureFixture[str]
) -> None:
    out = project.out / "run"
    assert main(project.train(**SHORT | {"train__steps": 2})) == 0
    before = records(out)
    measured.clear()
    capsys.readouterr()
    (out / "costs.json").write_text(text)
    assert main(project.train(**SHORT)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"reroll: {out / 'costs.json'}: not the table of costs")
    assert "delete it, and it is measured again" in error
    assert error.count("\n") == 1
    assert measured == []
    assert records(out) == before


def test_the_remedy_helps(
    project: Project, measured: list[Costs], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = SHORT | {"train__steps": 2, "log__display": "plain"}
    assert main(project.train(**flags)) == 0
    path = project.out / "run" / "costs.json"
    path.write_text("[]")
    assert main(project.train(**flags)) == 2
    assert str(path) in capsys.readouterr().err
    path.unlink()
    assert main(project.train(**flags)) == 0
    assert load_costs(path) == OTHER
    out = capsys.readouterr().out
    slots = OTHER.token(8) / OTHER.prefill
    said = f"reuse: a decoded token costs {slots:.1f} verified ones at 8 slots, "
    assert said + f"{OTHER.token(1) / OTHER.prefill:.0f} at one\n" in out


def test_a_model_evaluated_without_a_run_leaves_no_table(
    project: Project, measured: list[Costs], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with prepare(project.config(**SHORT), None, None) as parts:
        assert parts.engine.costs == TYPICAL
    assert sorted(tmp_path.rglob("*")) == before
