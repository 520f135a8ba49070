import json
from pathlib import Path

import pytest

from reroll.config import Config, load_config
from reroll.errors import UserError
from reroll.rundir import RunDir


def configured(**changes: object) -> Config:
    return load_config(None, {k.replace("__", "."): str(v) for k, v in changes.items()})


def begun(path: Path, config: Config, steps: int = 0) -> RunDir:
    """A run directory in use, with a line a step."""
    run = RunDir(path)
    assert run.open(config) is None
    run.claim(config)
    for step in range(1, steps + 1):
        run.log({"kind": "train", "step": step})
        run.sample([{"step": step, "text": "a"}, {"step": step, "text": "b"}])
    return run


def checkpoint(run: RunDir, step: int) -> None:
    folder = run.checkpoints / f"step-{step}"
    folder.mkdir()
    (folder / "state.json").write_text("{}")


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def refusal(run: RunDir, config: Config) -> str:
    with pytest.raises(UserError) as raised:
        run.open(config)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_new_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    run = begun(tmp_path / "a" / "b", Config())
    assert load_config(run.config_path) == Config()
    assert run.records() == []
    assert RunDir(run.path).open(Config()) is None


def test_it_goes_on_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", Config(), steps=5)
    checkpoint(run, 2)
    checkpoint(run, 4)
    (run.checkpoints / "step-5").mkdir()  # not whole
    (run.checkpoints / ".step-5.tmp").mkdir()
    assert RunDir(run.path).open(Config()) == 4
    assert steps_in(run.metrics_path) == [1, 2, 3, 4]
    assert steps_in(run.samples_path) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [r["step"] for r in run.records()] == [1, 2, 3, 4]


def test_without_a_checkpoint_it_starts_from_the_beginning(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", Config(), steps=2)
    run.log({"kind": "eval", "step": 0})
    assert RunDir(run.path).open(Config()) is None
    assert run.metrics_path.read_text() == run.samples_path.read_text() == ""


@pytest.mark.parametrize("tail", ['{"kind": "tr', "{", '{"kind": "train", "step": 3', "\0\0\0"])
def test_a_line_cut_short_is_dropped(tail: str, tmp_path: Path) -> None:
    run = begun(tmp_path / "run", Config(), steps=2)
    checkpoint(run, 4)
    with run.metrics_path.open("a") as file:
        file.write(tail)
    assert RunDir(run.path).open(Config()) == 4
    run.log({"kind": "train", "step": 3})
    assert steps_in(run.metrics_path) == [1, 2, 3]


def test_a_last_line_without_its_newline_is_kept_whole(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", Config(), steps=2)
    checkpoint(run, 2)
    run.metrics_path.write_text(run.metrics_path.read_text().rstrip("\n"))
    RunDir(run.path).open(Config())
    run.log({"kind": "train", "step": 3})
    assert steps_in(run.metrics_path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("train.learning_rate", "1e-06", "0.001"),
        ("run.seed", "0", "1"),
        ("rollout.prompts", "32", "2"),
        ("algo.clip_high", "0.2", "0.25"),
        ("train.epochs", "1", "2"),
        ("lora.rank", "0", "4"),
        ("reuse.on", "False", "True"),
    ],
)
def test_another_configuration_is_refused_by_name_of_the_key(
    key: str, old: str, new: str, tmp_path: Path
) -> None:
    run = begun(tmp_path / "run", Config())
    message = refusal(run, load_config(None, {key: new}))
    assert message.startswith(f"run.out = '{run.path}': holds a run of another configuration ")
    assert f"({key}: {old} -> {new})" in message
    both = refusal(run, load_config(None, {key: new, "eval.every": "3", "eval.greedy": "false"}))
    assert "and 2 more)" in both


def test_another_algorithm_is_refused_with_what_its_name_stands_for(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", configured(algo__name="grpo"))
    message = refusal(run, configured(algo__name="rloo"))
    # its advantage, ratio, and estimator and place of the KL
    assert "(algo.name: 'grpo' -> 'rloo' and 4 more); choose another directory" in message
    # the same settings by another name are another run too: config.toml would not say so
    spelled = configured(
        algo__name="rloo", algo__advantage="grpo", algo__ratio="token", algo__kl_in="loss",
        algo__kl_estimator="k3",
    )  # fmt: skip
    assert "(algo.name: 'grpo' -> 'rloo'); choose" in refusal(run, spelled)


def test_settings_that_change_nothing_may_change(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", Config())
    other = configured(
        run__out="elsewhere", log__samples=7, log__display="off", checkpoint__every=3,
        checkpoint__keep_best=0, engine__cache_gb=1, grading__workers=2,
    )  # fmt: skip
    assert RunDir(run.path).open(other) is None


def test_what_a_run_with_a_store_may_change(tmp_path: Path) -> None:
    for rule in ("fresh", "held"):
        own = {"reuse__on": True, "reuse__rule": rule}
        run = begun(tmp_path / rule, configured(**own))
        assert RunDir(run.path).open(configured(**own, store__memory_gb=0)) is None
        assert "(store.max_gb: 4.0 -> 1.0)" in refusal(run, configured(**own, store__max_gb=1.0))
        # old rollouts are let go at checkpoints: lossless on fresh noise alone
        other = configured(**own, checkpoint__every=3, checkpoint__keep_best=0)
        if rule == "fresh":
            assert RunDir(run.path).open(other) is None
        else:
            assert "(checkpoint.every: " in refusal(run, other)


def test_more_steps_may_be_asked_for_where_the_schedule_allows_it(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", configured(train__steps=10))
    assert RunDir(run.path).open(configured(train__steps=20)) is None
    assert "train.steps: 10 -> 9" in refusal(run, configured(train__steps=9))
    short = begun(tmp_path / "short", configured(train__flops=1e9))
    assert RunDir(short.path).open(configured(train__flops=2e9)) is None
    assert RunDir(short.path).open(configured(train__flops=0)) is None
    assert "train.flops: 1000000000.0 -> 500000000.0" in refusal(
        short, configured(train__flops=5e8)
    )
    assert "train.flops: 0.0 -> 1000000000.0" in refusal(
        run, configured(train__steps=10, train__flops=1e9)
    )
    linear = begun(tmp_path / "linear", configured(train__steps=10, train__decay="linear"))
    message = refusal(linear, configured(train__steps=20, train__decay="linear"))
    assert "train.steps: 10 -> 20" in message


def test_somebody_elses_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("hello")
    assert "not a run directory (it holds thesis.tex)" in refusal(RunDir(tmp_path), Config())
    assert (tmp_path / "thesis.tex").read_text() == "hello"
    assert not (tmp_path / "config.toml").exists()


def test_somebody_elses_config_toml_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[server]\nport = 80\n")
    assert "config.toml: server: unknown setting" in refusal(RunDir(tmp_path), Config())
    assert (tmp_path / "config.toml").read_text() == "[server]\nport = 80\n"


def test_a_start_that_failed_early_does_not_claim_the_directory(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.open(configured(model__path="mistyped"))
    (run.path / "timeouts.txt").touch()
    run.costs_path.touch()
    for suffix in ("", "-wal", "-shm"):
        run.store_path.with_name(run.store_path.name + suffix).touch()
    assert RunDir(run.path).open(configured(model__path="right")) is None
    (run.path / "rollouts.csv").touch()
    assert "(it holds rollouts.csv)" in refusal(run, Config())


def test_a_claim_is_made_once(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", configured(log__samples=1))
    written = run.config_path.read_text()
    run.claim(configured(log__samples=2))
    assert run.config_path.read_text() == written
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "config.toml"]
    assert list(run.checkpoints.iterdir()) == []


def test_a_path_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refusal(RunDir(path), Config())
        assert message.startswith(f"run.out = '{path}': cannot be used: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without space")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", Config())
    run.metrics_path.symlink_to("/dev/full")
    with pytest.raises(UserError) as raised:
        run.log({"kind": "train", "step": 1})
    assert "metrics.jsonl: cannot write: No space left on device; free space" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_metrics_are_strict_json(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.log({"kind": "train", "step": 1, "loss": float("nan"), "reward": 0.5})
    assert "NaN" not in run.metrics_path.read_text()
    (record,) = run.records()
    assert record["loss"] != record["loss"] and record["reward"] == 0.5
