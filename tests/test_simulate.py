"""`reroll simulate`: what it compares is what the collector does; its lengths, costs and sums."""

import json
import math
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import pytest
from rich.console import Console

from reroll.algo.noise import make_key
from reroll.comparison import comparison, draw, records
from reroll.config.load import describe, load_settings
from reroll.config.simulate import GPUS, SimulateConfig
from reroll.engine.clock import Linear, Roofline
from reroll.engine.costs import Costs
from reroll.errors import UserError
from reroll.occupancy import lag_metrics
from reroll.rollout.past import Past
from reroll.rollout.policies import make_schedule
from reroll.rollout.store import Store, prompt_hash
from reroll.simulate import Result, run_arm, simulate
from reroll.types import Request, Sampling
from reroll.workload import Replies, make_arms, make_cost, make_replies, train_rate
from tests.rollout.simulation import CAP, Simulation

LENGTHS = (2, 9, 4, 1, 6, 3, 12, 5)
CYCLE = Replies(lambda request: LENGTHS[request.prompt_ids[0] % 8], CAP, 0, 1)
SMALL: dict[str, Any] = dict(
    tick_base=1, tick_per_request=0.25, slots=8, prompts=4, samples=2, updates=8, warmup=4,
    median=10, cap=60, prompt_tokens=1,
)  # fmt: skip


def config_of(**settings: Any) -> SimulateConfig:
    return SimulateConfig.model_validate(settings)


def simulated(**settings: Any) -> list[Result]:
    config = config_of(**SMALL | settings)
    return simulate(config, make_cost(config), make_replies(config))


def row_of(**settings: Any) -> dict[str, Any]:
    (row,) = records(simulated(**settings))
    return row


@pytest.mark.parametrize(
    "name", ["sync", "longest_first", "sorted_on_policy", "sorted_strict", "sorted", "april",
             "tail_batch", "async"],
)  # fmt: skip
def test_an_arm_is_the_collector(name: str) -> None:
    config = config_of(**SMALL | dict(slots=4, warmup=0, schedules=name, over=2.0, samples=2))
    (arm,) = make_arms(config)
    figures = run_arm(config, arm, Linear(1, 0.25), CYCLE).figures
    schedule = make_schedule(arm.schedule, 4)
    run = Simulation(schedule, CYCLE.length, batch=4, samples=2, slots=4, b0=4.0)
    stale = tokens = 0.0
    for version in range(8):
        run.run(1)
        every = sum(len(r.completion.token_ids) for r in run.trained()[-1])
        tokens += every
        groups = run.batches[-1].trained()
        stale += lag_metrics(groups, version)["offpolicy_tokens"] * every
    stats = run.engine.stats()
    dropped = sum(batch.tokens_dropped for batch in run.batches)
    assert figures["tokens_trained"] == tokens
    assert figures["seconds"] == pytest.approx(run.engine.clock)
    assert figures["bubble"] == pytest.approx(1 - stats.slot_seconds / (4 * run.engine.clock))
    assert figures["bubble_ticks"] == pytest.approx(1 - stats.tokens_drawn / (4 * stats.ticks))
    assert figures["waste"] == pytest.approx(dropped / (tokens + dropped))
    assert figures["offpolicy_tokens"] == pytest.approx(stale / tokens)
    assert figures["reprefill"] == pytest.approx(stats.tokens_resumed / tokens)
    assert figures["restarts"] == sum(batch.restarts for batch in run.batches)
    assert figures["wait_max"] == max(wait for batch in run.batches for wait in batch.waits)


def test_rates_and_shares_of_all_schedules() -> None:
    rows = records(simulated(over=[1.5, 2], slots=4))
    assert [row["schedule"] for row in rows] == [
        "sync", "sync, split in 4", "longest first", "sorted 4, on-policy", "sorted 4, partial",
        "sorted 4, refill", "april 1.5", "april 2", "tail batch 1.25",
    ]  # fmt: skip
    assert rows[0]["relative"] == 1
    for row in rows:
        assert row["relative"] == pytest.approx(row["goodput"] / rows[0]["goodput"])
        assert row["goodput"] * row["seconds"] == pytest.approx(row["tokens_trained"])
        assert row["seconds"] == pytest.approx(row["updates"] * row["seconds_update"])
        assert row["updates"] == 8
        for key in ("bubble", "waste", "offpolicy_tokens"):
            assert -1e-9 <= row[key] <= 1, key
        assert row["wait_p99"] <= row["wait_max"]
    by_name = {row["schedule"]: row for row in rows}
    for name in ("sync", "longest first", "tail batch 1.25"):
        assert by_name[name]["offpolicy_tokens"] == by_name[name]["lag_max"] == 0
    for name in ("sync", "sorted 4, partial", "april 2"):
        assert by_name[name]["waste"] == by_name[name]["restarts"] == 0
    # of a whole number of groups, all that was started is trained on
    for name in ("sync", "sync, split in 4", "longest first", "sorted 4, partial"):
        assert by_name[name]["length_bias"] == pytest.approx(1)
    for name in ("sorted 4, on-policy", "tail batch 1.25"):
        assert by_name[name]["waste"] > 0 and by_name[name]["length_bias"] < 1


def test_longest_first_is_within_five_percent_of_the_order_of_true_lengths() -> None:
    """16 rollouts a slot, from the second visit on. With fewer, or where samples of a prompt differ
    more, what nobody can know before costs more (bench/order.py)."""
    rows = records(
        simulated(
            tick_per_request=1 / 512, slots=32, prompts=64, samples=8, median=1500, cap=8192,
            prompt_share=0.6, problems=128, warmup=2, updates=8,
            schedules="sync,longest_first,oracle",
        )
    )  # fmt: skip
    seconds = {row["schedule"]: row["seconds"] for row in rows}
    assert seconds["oracle order"] <= seconds["longest first"] < 1.05 * seconds["oracle order"]
    assert seconds["sync"] > 1.08 * seconds["oracle order"]
    assert len({row["tokens_trained"] for row in rows}) == 1


def test_a_split_batch_by_hand() -> None:
    # one length for all: 4 batches of 8 requests on 8 slots, ticks of 1 + 8 / 4 seconds
    row = row_of(schedules="sync_split", spread=0, train_tokens_per_second=20, sync_seconds=6)
    assert row["updates"] == 8
    assert row["tokens_trained"] == 8 * 8 * 10
    assert row["seconds"] == pytest.approx(8 * 10 * 3 + 640 / 20 + 2 * 6)
    assert (row["offpolicy_tokens"], row["lag_max"], row["bubble"]) == (0.75, 3, 0)
    assert (row["relative"], row["split"]) == (None, 4)


def test_sweeps_are_rows() -> None:
    config = config_of(
        schedules="sync,april,sorted_strict,sync_split,tail_batch,april", replicas="1,2",
        over=[1.5, 3], batches=[2, 3], tail_over=[1.25, 1.5],
    )  # fmt: skip
    names = [
        "sync", "april 1.5", "april 3", "sorted 2, partial", "sorted 3, partial",
        "sync, split in 2", "sync, split in 3", "tail batch 1.25", "tail batch 1.5",
    ]  # fmt: skip
    arms = make_arms(config)
    assert [(arm.replicas, arm.name) for arm in arms] == [(n, x) for n in (1, 2) for x in names]
    assert [arm.schedule.over for arm in arms[:3]] == [2.0, 1.5, 3.0]
    assert {arm.schedule.max_lag for arm in arms} == {4}
    rows = records(simulated(schedules="sync,april", replicas=[1, 2], over=2))
    assert [row["relative"] == 1 for row in rows] == [True, False, True, False]
    assert rows[2]["goodput"] > rows[0]["goodput"]


def test_several_machines_do_what_one_does() -> None:
    """As many replicas as prompts, no waiting: a batch takes as long as its longest reply."""
    one = row_of(schedules="sync", slots=2, replicas=4, tick_per_request=0.0, spread=0.0)
    assert one["seconds_update"] == 10


def draws(replies: Replies, prompts: int, samples: int) -> list[list[int]]:
    """Lengths of `samples` requests of each of so many prompts."""
    found, _ = replies.source(0, prompts)
    return [
        [
            replies.length(
                Request(
                    0, one.token_ids, make_key(0, "train", one.row, k, 0), Sampling(replies.cap)
                )
            )
            for k in range(samples)
        ]
        for one in found
    ]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_moments_of_the_length_law(share: float) -> None:
    law = dict(median=1e6, spread=0.5, prompt_share=share, cap=1 << 40)
    logs = [
        [math.log(length / 1e6) for length in group]
        for group in draws(make_replies(config_of(**law)), 2000, 20)
    ]
    within = fmean(variance(group) for group in logs)
    means = [fmean(group) for group in logs]
    between = variance(means) - within / 20
    spread = 0.25 * (share / 2000 + (1 - share) / 40_000)  # variance of the mean
    assert abs(fmean(means)) < 4 * math.sqrt(spread)
    # relative standard errors of a variance of n normal numbers: sqrt(2 / n)
    error = 0.25 * (share + (1 - share) / 20)
    assert abs(within - 0.25 * (1 - share)) < 4 * 0.25 * (1 - share) * math.sqrt(2 / 38_000) + 1e-9
    assert abs(between - 0.25 * share) < 4 * error * math.sqrt(2 / 2000) + 1e-9


def test_lengths_are_whole_and_bounded() -> None:
    replies = make_replies(config_of(median=3.9, spread=0, cap=9, problems=5))
    assert draws(replies, 2, 2) == [[3, 3], [3, 3]]
    wide = make_replies(config_of(median=3, spread=3, cap=9))
    assert {1, 9} <= {x for group in draws(wide, 100, 5) for x in group} <= set(range(1, 10))
    prompts, visits = replies.source(3, 4)
    assert ([p.row for p in prompts], visits) == ([3, 4, 0, 1], [0, 0, 1, 1])
    assert [len(p.token_ids) for p in prompts] == [256] * 4


def test_one_seed_one_table() -> None:
    same, again, other = (records(simulated(seed=seed)) for seed in (3, 3, 4))
    assert same == again
    assert [a["goodput"] for a in same] != [b["goodput"] for b in other]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A run of two problems: row 3 had replies of 5 and 6 tokens, row 8 always of 40."""
    with Store(tmp_path / "rollouts.sqlite") as store:
        for row, visit, length in ((3, 0, 5), (3, 1, 6), (8, 0, 40)):
            streams = ([7] * length, [-0.5] * length, [0] * length)
            past = Past(row, 0, visit, 1, 0, 0, *streams, 1.0, {}, "", "stop", True)  # type: ignore[arg-type]
            store.put(1, [(prompt_hash((row,)), past)])
    return tmp_path


def test_lengths_of_a_recorded_run(recorded: Path) -> None:
    before = (recorded / "rollouts.sqlite").read_bytes()
    replies = make_replies(config_of(run=str(recorded)))
    assert (replies.cap, replies.problems) == (40, 2)
    first, second = draws(replies, 2, 50)
    assert (set(first), set(second)) == ({5, 6}, {40})
    assert (recorded / "rollouts.sqlite").read_bytes() == before
    config = config_of(run=str(recorded), schedules="sync", slots=4, prompts=2, updates=6)
    (result,) = simulate(config, make_cost(config), make_replies(config))
    assert 6 * 8 * 45 < result.figures["tokens_trained"] < 6 * 8 * 46


def test_costs_of_a_recorded_run(tmp_path: Path) -> None:
    costs = Costs((1, 8), ((0.5, 1.0, 1.0, 1.0), (2.0, 3.0, 3.0, 3.0)), 0.25)
    costs.save(tmp_path / "costs.json")
    config = config_of(costs=str(tmp_path))
    cost = make_cost(config)
    assert [cost.tick(batch, 1e9) for batch in (1, 8)] == [0.5, 2.0]
    assert cost.prefill(2) == 0.5
    assert train_rate(config) == math.inf


def test_machines() -> None:
    config = config_of(gpu="l4", parameters=1e9, layers=10, kv_heads=2, head_dim=64)
    cost = make_cost(config)
    assert isinstance(cost, Roofline)
    assert config.kv_bytes == cost.kv_bytes == 2 * 10 * 2 * 64 * 2
    assert cost.bandwidth == pytest.approx(0.3e12 * 0.7)
    assert cost.flops == pytest.approx(121e12 * 0.5)
    assert train_rate(config) == pytest.approx(121e12 * 0.5 / 6e9)
    assert train_rate(config_of(train_tokens_per_second=7.0)) == 7
    own = config_of(bandwidth=2.0, flops=100.0, bandwidth_efficiency=1, compute_efficiency=1)
    assert own.hardware == (2e12, 100e12)
    assert {"h100", "h200", "a100", "l4", "mi300x"} == set(GPUS)
    toy = make_cost(config_of(tick_base=1, tick_per_request=0.5))
    assert toy.tick(4, 1000) == 3


MISTAKES: list[tuple[dict[str, str], str]] = [
    ({"slotz": "4"}, r"--slotz: unknown setting; did you mean slots\?"),
    ({"zzz": "4"}, r"--zzz: unknown setting; `reroll simulate --help` lists them all"),
    ({"slots": "0"}, r"--slots = 0: input should be greater than or equal to 1"),
    ({"slots": "many"}, r"--slots = 'many': input should be a valid integer.*"),
    ({"slots": "true"}, r"--slots = True: should not be true or false"),
    ({"gpu": "h1000"}, r"--gpu = 'h1000': input should be 'h100', .* or 'mi300x'"),
    ({"over": "1.5,x"}, r"--over = 'x': input should be a valid number.*"),
    ({"over": "0.5"}, r"--over = 0.5: at least 1"),
    ({"over": "9"}, r"--over = 9.0: more than max_lag = 4 allows"),
    ({"batches": "6"}, r"--batches = 6: more than max_lag = 4 allows"),
    ({"replicas": "[]"}, r"--replicas = \[\]: list should have at least 1 item.*"),
    ({"schedules": "sync,aprl"}, r"--schedules = 'aprl': input should be 'sync', .*"),
    ({"tick_per_request": "1"}, r"--tick_per_request = 1.0: without tick_base it has no effect"),
    ({"tick_base": "1", "layers": "3"}, r"--layers = 3: tick_base takes the place of a GPU .*"),
    ({"costs": "runs/a", "gpu": "l4"}, r"--gpu = l4: costs takes the place of a GPU .*"),
    ({"costs": "a", "tick_base": "1"}, r"--tick_base = 1.0: costs says what a tick takes; .*"),
    ({"run": "runs/a", "cap": "9"}, r"--cap = 9: run = 'runs/a' says how long replies are"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=lambda x: "-".join(x)[:30])
def test_mistakes_are_one_line(flags: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        load_settings(SimulateConfig, None, flags, "reroll simulate")


def test_runs_that_recorded_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^costs = '.*': no costs\.json there; .*$"):
        make_cost(config_of(costs=str(tmp_path)))
    with pytest.raises(UserError, match=r"^run = '.*': no rollouts\.sqlite there; .*$"):
        make_replies(config_of(run=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    Store(tmp_path / "rollouts.sqlite").close()
    with pytest.raises(UserError, match=r"^run = '.*': its rollouts\.sqlite holds no rollouts$"):
        make_replies(config_of(run=str(tmp_path)))


def test_a_file_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('gpu = "a100"\nslots = 8\nover = [1.5, 3]\nreplicas = 2\n')
    config = load_settings(SimulateConfig, path, {"slots": "16", "schedules": "sync, april"})
    assert (config.gpu, config.slots, config.over, config.replicas) == ("a100", 16, [1.5, 3], [2])
    assert config.schedules == ["sync", "april"]
    path.write_text("slotz = 8\n")
    with pytest.raises(UserError, match=r"a\.toml: slotz: unknown setting; did you mean slots\?"):
        load_settings(SimulateConfig, path)
    for key, kind, default, text in describe(SimulateConfig):
        assert "." not in key and kind and default and text


def cells_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    with open("/dev/null", "w") as nowhere:
        screen = Console(record=True, width=124, highlight=False, file=nowhere)
        screen.print(comparison(rows))
    lines = [line for line in screen.export_text().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_the_table() -> None:
    rows = records(simulated(schedules="sync,april", replicas=[1, 2], over=2))
    cells = cells_of(rows)
    assert [line[:2] for line in cells] == [
        ["sync", "1"], ["april 2", "1"], ["sync", "2"], ["april 2", "2"],
    ]  # fmt: skip
    assert cells[0][3] == "1.00x"
    assert cells[1][3] == f"{rows[1]['relative']:.2f}x"
    assert cells_of(records(simulated(schedules="april", over=2)))[0][2] == "-"


def pictures(folder: Path, **settings: Any) -> list[str]:
    config = config_of(**SMALL | settings)
    results = simulate(config, make_cost(config), make_replies(config), watch=True)
    return [path.name for path in draw(results, str(folder / "s.png"), str(folder / "t.png"))]


def test_pictures(tmp_path: Path) -> None:
    assert pictures(tmp_path, schedules="sync") == ["s.png", "t.png"]
    names = pictures(tmp_path, schedules="sync,april", replicas=[1, 2], over=2)
    assert names[1:3] == ["t_sync_replicas_1.png", "t_april_2_replicas_1.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)


@pytest.mark.parametrize("schedule", ["sync", "sorted", "april", "tail_batch"])
def test_occupancy_and_timeline_are_of_the_measured_updates(schedule: str) -> None:
    config = config_of(**SMALL | dict(schedules=schedule, over=2, train_tokens_per_second=5))
    (result,) = simulate(config, make_cost(config), make_replies(config), watch=True)
    figures, seen = result.figures, result.occupancy
    assert seen.clocks[-1] == pytest.approx(figures["seconds"])
    assert [batch["update"] for batch in result.timeline] == list(range(1, 9))
    stays = [stay for batch in result.timeline for stay in batch["spans"]]
    assert min(begin for begin, _, _ in stays) == 0
    held = sum(end - begin for begin, end, _ in stays)
    assert held == pytest.approx(seen.busy[-1] - seen.busy[0])
    edges, shares = seen.shares(50)
    assert (shares * 8 * (edges[1:] - edges[:-1])).sum() == pytest.approx(held)
    collecting = figures["seconds"] - sum(end - begin for begin, end in seen.pauses)
    assert 1 - held / (8 * collecting) == pytest.approx(figures["bubble"])
    for begin, end in seen.pauses:
        assert not any(b < end - 1e-9 and e > begin + 1e-9 for b, e, _ in stays)
    assert simulated(schedules=schedule, over=2)[0].timeline == []


def test_records_are_json() -> None:
    rows = json.loads(json.dumps(records(simulated(schedules="sorted,sync"))))
    assert rows[0]["settings"]["kind"] == "sorted" and rows[0]["settings"]["refill"]


def test_progress_names_what_runs() -> None:
    names: list[str] = []
    config = config_of(**SMALL | dict(schedules="sync,april", over=2))
    simulate(
        config, make_cost(config), make_replies(config), progress=lambda arm: names.append(arm.name)
    )
    assert names == ["sync", "april 2"]
