import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reroll
from reroll.config import GradingSection, TaskSection
from reroll.errors import UserError
from reroll.tasks.grade import GraderSpec
from reroll.tasks.pool import Grade, GradeJob, GraderPool

FILE = TaskSection(source="jsonl", name="unused.jsonl")


def pool(*names: str, path: Path | None = None, **grading: Any) -> GraderPool:
    settings = GradingSection(**{"seconds": 60.0, **grading})
    return GraderPool([GraderSpec(f"rewards:{name}") for name in names], FILE, settings, path)


def jobs(*completions: str) -> list[GradeJob]:
    return [
        GradeJob(id=n, name=f"train/{n}/0/0", prompt="", completion=completion, answer="yes")
        for n, completion in enumerate(completions)
    ]


def drain(graders: GraderPool) -> dict[int, Grade]:
    grades = {}
    while graders.pending:
        for grade in graders.poll(wait=True):
            assert grade.id not in grades
            grades[grade.id] = grade
    return grades


def grade_all(graders: GraderPool, *completions: str) -> list[Grade]:
    for job in jobs(*completions):
        graders.submit(job)
    return [grade for _, grade in sorted(drain(graders).items())]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def gone(pid: int) -> bool:
    """No such process, or one that only waits for its parent to notice."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def test_weighted_graders(workdir: Path) -> None:
    specs = [GraderSpec("rewards:exact", 2.0), GraderSpec("rewards:length", -0.5)]
    specs += [GraderSpec("rewards:level"), GraderSpec("math", 0.0)]
    with GraderPool(specs, FILE, GradingSection()) as graders:
        graders.submit(GradeJob(5, "train/0/0/0", "", "12", "12", {"level": 3}))
        assert graders.pending == 1
        (grade,) = graders.poll(wait=True)
        assert graders.pending == 0 and graders.poll(wait=True) == []
    rewards = {"rewards:exact": 1.0, "rewards:length": 2.0, "rewards:level": 3.0, "math": 1.0}
    assert (grade.id, grade.rewards, grade.reward, grade.failure) == (5, rewards, 4.0, "")
    assert grade.seconds > 0


def test_failures_are_ungraded_and_harm_no_others(workdir: Path) -> None:
    completions = ["fine", "raise", "nan", "none", "text", "sys.exit", "fine"]
    with pool("act") as graders:
        grades = grade_all(graders, *completions)
    assert [grade.reward for grade in grades] == [1.0, None, None, None, None, None, 1.0]
    assert all((grade.rewards is None) == bool(grade.failure) for grade in grades)
    words = ["", "RuntimeError: boom", "finite number, not nan", "not NoneType", "not str", "Exit"]
    for grade, word in zip(grades, words, strict=False):
        assert word in grade.failure
    assert grades[1].failure.startswith("rewards:act: Traceback") and "line" in grades[1].failure


def test_first_failure_is_the_one_told(workdir: Path) -> None:
    with pool("exact", "act", "level") as graders:
        (grade,) = grade_all(graders, "raise")
    assert grade.failure.startswith("rewards:act: ") and grade.rewards is None


def test_processes_that_die_are_replaced(workdir: Path) -> None:
    with pool("act") as graders:
        grade_all(graders, *["fine"] * 20)  # the process is quick: it is given jobs ahead
        completions = ["exit", "fine", "kill", "fine", "fine", "exit"] + ["fine"] * 5
        grades = grade_all(graders, *completions)
    failures = {grade.id: grade.failure for grade in grades if grade.reward is None}
    assert set(failures) == {0, 2, 5}
    assert failures[0] == failures[5] == "died: exit status 3"
    assert failures[2].startswith("killed: SIGKILL")


@pytest.mark.skipif(sys.platform != "linux", reason="no limit of the address space")
def test_memory_limit(workdir: Path) -> None:
    with pool("act", memory_gb=1.0) as graders:
        grade_all(graders, *["fine"] * 20)
        grades = grade_all(graders, "fine", "hog", "fine", "fine")
    assert [grade.reward for grade in grades] == [1.0, None, 1.0, 1.0]
    assert grades[1].failure == "killed: memory limit of 1 GB (grading.memory_gb)"


@pytest.mark.skipif(sys.platform != "linux", reason="no limit of the address space")
def test_memory_limit_below_what_the_graders_need(workdir: Path) -> None:
    grading = GradingSection(memory_gb=0.05)
    for name, task in (("math", FILE), ("task", TaskSection())):
        with pytest.raises(UserError, match=r"grading\.memory_gb = 0\.05") as error:
            GraderPool([GraderSpec(name)], task, grading)
        assert "\n" not in str(error.value)


def test_timeouts_are_recorded_and_replayed(workdir: Path) -> None:
    path = workdir / "timeouts.txt"
    with pool("act", path=path, seconds=3.0) as graders:
        grade_all(graders, *["fine"] * 20)
        grades = grade_all(graders, "fine", "hang", "fine", "fine")
        assert [grade.reward for grade in grades] == [1.0, None, 1.0, 1.0]
        assert grades[1].failure == "timed out after 3 s"
        assert path.read_text() == "train/1/0/0\n"
        pids = [int(pid) for pid in Path("pids").read_text().split()]
        assert eventually(lambda: all(gone(pid) for pid in pids))  # what it had started too

    for name in ("ran-hang", "ran-fine"):
        Path(name).unlink()
    with pool("act", path=path, seconds=3.0) as graders:
        for job in jobs("fine", "hang"):
            graders.submit(job)
        grades = [grade for _, grade in sorted(drain(graders).items())]
        assert [grade.failure for grade in grades] == ["", "timed out after 3 s"]
        graders.submit(jobs("fine", "hang")[1])
        (replayed,) = graders.poll()
        assert replayed.rewards is None and replayed.reward is None
    assert Path("ran-fine").exists() and not Path("ran-hang").exists()
    assert path.read_text() == "train/1/0/0\n"


def test_poll_does_not_wait_for_a_grader(workdir: Path) -> None:
    with pool("act", workers=2) as graders:
        for job in jobs("wait", "wait", "wait"):
            graders.submit(job)
        assert graders.poll() == [] and graders.poll() == []
        assert graders.pending == 3
        Path("go").touch()
        assert set(drain(graders)) == {0, 1, 2}


def test_large_jobs_do_not_block_behind_a_busy_grader(workdir: Path) -> None:
    with pool("act", "length") as graders:
        grade_all(graders, *["fine"] * 20)
        large = "x" * 3_000_000
        batch = [GradeJob(n, f"train/{n}/0/0", large, "wait") for n in range(20)]
        for job in batch:
            graders.submit(job)
        assert graders.poll() == []
        Path("go").touch()
        assert all(grade.reward == 5.0 for grade in drain(graders).values())


def test_many_jobs_give_the_same_grades_on_any_number_of_processes(workdir: Path) -> None:
    completions = ["yes" if n % 3 else "no" * n for n in range(500)]
    outcomes = []
    for workers in (1, 3):
        with pool("exact", "length", workers=workers) as graders:
            grades = grade_all(graders, *completions)
        outcomes.append([(grade.id, grade.rewards, grade.reward) for grade in grades])
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) == 500


def test_job_that_cannot_be_pickled(workdir: Path) -> None:
    with pool("exact") as graders:
        graders.submit(GradeJob(1, "train/1/0/0", "", "", "", {"f": lambda: None}))
        (grade,) = graders.poll()
    assert grade.rewards is None and "cannot be pickled" in grade.failure


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rewrds:exact", "no module 'rewrds' in .*did you mean rewards"),
        ("rewards:exakt", "has no function 'exakt'; did you mean exact"),
    ],
)
def test_misspelt_graders_are_found_before_any_job(workdir: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"task.graders: '{name}'.*{message}"):
        GraderPool([GraderSpec(name)], FILE, GradingSection(workers=2))


def test_processes_that_no_longer_start_end_the_run(workdir: Path) -> None:
    with pool("act") as graders:
        Path("rewards.py").write_text("1 / 0\n")
        with pytest.raises(UserError, match="importing rewards fails"):
            grade_all(graders, "exit", "fine")


def test_no_torch_in_a_grader_process() -> None:
    # Where the parent has it, and with all of reasoning-gym and math-verify loaded.
    pytest.importorskip("torch")
    task = TaskSection(name="chain_sum")
    specs = [GraderSpec("task"), GraderSpec("math"), GraderSpec("tests.tasks.test_pool:no_torch")]
    entry = {"question": "1 + 1 =", "answer": "2", "metadata": {}}
    with GraderPool(specs, task, GradingSection()) as graders:
        graders.submit(GradeJob(0, "train/0/0/0", "1 + 1 =", "2", "2", {"entry": entry}))
        (grade,) = graders.poll(wait=True)
    assert grade.failure == "" and grade.reward == 3.0


def no_torch(prompt: str, completion: str, answer: str | None, **columns: Any) -> bool:
    """A grader for the test above; runs in the grader process."""
    return not {"torch", "transformers"} & set(sys.modules)


def test_prints_of_graders_go_nowhere(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pool("act") as graders:
        grade_all(graders, "fine", "raise", "exit")
    assert capfd.readouterr() == ("", "")


def test_interrupts_are_the_parents_business(workdir: Path) -> None:
    with pool("act") as graders:
        (process,) = graders._processes
        assert os.getsid(process.pid) == process.pid  # Ctrl-C on the terminal does not reach it
        os.kill(process.pid, signal.SIGINT)
        assert [grade.reward for grade in grade_all(graders, "fine", "fine")] == [1.0, 1.0]
        assert graders._processes == [process]


def test_close_leaves_no_process(workdir: Path) -> None:
    graders = pool("act", workers=3)
    for job in jobs("hang", "hang", "hang", "fine"):
        graders.submit(job)
    pids = [process.pid for process in graders._processes]
    assert eventually(lambda: graders.poll() == [] and Path("ran-hang").exists())
    graders.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)  # a zombie would still be there
    graders.close()
    assert graders.pending == 0 and graders.poll(wait=True) == []


MAIN = """
import sys
from reroll.config import GradingSection, TaskSection
from reroll.tasks.grade import GraderSpec
from reroll.tasks.pool import GradeJob, GraderPool

print("main runs")
task = TaskSection(source="jsonl")
graders = GraderPool([GraderSpec("rewards:act")], task, GradingSection(seconds=1000))
graders.submit(GradeJob(0, "train/0/0/0", "", sys.argv[1]))
print(graders.poll(wait=True)[0].reward)
"""


@pytest.mark.parametrize("arguments", [["recipe.py"], ["-m", "recipe"]])
def test_an_unguarded_script_as_main_module(workdir: Path, arguments: list[str]) -> None:
    (workdir / "recipe.py").write_text(MAIN)
    done = subprocess.run(
        [sys.executable, *arguments, "fine"], capture_output=True, text=True, env=environment()
    )
    assert (done.stdout, done.stderr) == ("main runs\n1.0\n", "")  # closed at exit, in silence


def test_a_hanging_grader_ends_with_its_parent(workdir: Path) -> None:
    (workdir / "recipe.py").write_text(MAIN)
    parent = subprocess.Popen(
        [sys.executable, "recipe.py", "hang"], stdout=subprocess.DEVNULL, env=environment()
    )
    try:
        assert eventually(lambda: Path("pids").exists() and " " in Path("pids").read_text())
    finally:
        parent.kill()
        parent.wait()
    pids = [int(pid) for pid in Path("pids").read_text().split()]
    assert eventually(lambda: all(gone(pid) for pid in pids))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(reroll.__file__).parents[1])}
