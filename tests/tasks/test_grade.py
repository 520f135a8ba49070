import sys
from pathlib import Path
from typing import Any

import pytest

from reroll.config import TaskSection
from reroll.errors import UserError
from reroll.tasks.grade import (
    Grader,
    GraderSpec,
    as_reward,
    check_graders,
    grader_digest,
    resolve,
)

ENTRY = {"question": "11 + 1 =", "answer": "12", "metadata": {}}


def task(pattern: str = "") -> Grader:
    return resolve(GraderSpec("task"), TaskSection(name="spell_backward", answer_pattern=pattern))


def test_task_grader_reads_the_answer_tag_or_all() -> None:
    grade = task()
    columns = {"entry": ENTRY}
    assert (
        grade("", "I think <answer>99</answer>, no, <answer>\n12 </answer>.", None, columns) == 1.0
    )
    assert grade("", " 12\n", None, columns) == 1.0
    assert grade("", "<answer>13</answer>", None, columns) < 1.0
    assert grade("", "", None, columns) < 1.0


def test_task_grader_reads_the_pattern() -> None:
    grade = task(r"answer: (\w+)|(never)")
    columns = {"entry": ENTRY}
    assert grade("", "answer: 13, answer: 12.", None, columns) == 1.0
    assert grade("", "12", None, columns) == 0.0
    assert grade("", "never", None, columns) == 0.0


@pytest.mark.parametrize(
    ("reference", "completion", "reward"),
    [
        ("72", "She sold 48 + 24 = 72 clips.", 1.0),
        ("72", "She sold 48 clips.", 0.0),
        ("72", "", 0.0),
        ("Half of 48 is 24.\n#### 72", "so \\boxed{72}", 1.0),
        ("1,234", "$1234$", 1.0),
        ("0.5", "\\boxed{\\frac{1}{2}}", 1.0),
        ("1/2", "it is 0.5", 1.0),
        ("\\frac{1}{2}", "\\boxed{1/2}", 1.0),
        ("\\frac{1}{2}", "\\boxed{2}", 0.0),
        ("$\\frac{1}{2}$", "\\boxed{0.5}", 1.0),
        ("so \\boxed{7}", "$7$", 1.0),
        ("\\(7\\)", "$7$", 1.0),
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", 1.0),
        ("2\\sqrt{3}", "\\boxed{2}", 0.0),
        ("x^2 + 1", "\\boxed{1 + x^2}", 1.0),
        ("2*pi", "\\boxed{2\\pi}", 1.0),
        ("x = 5", "\\boxed{5}", 1.0),
        ("(1, 2)", "\\boxed{(1,2)}", 1.0),
        ("Paris", "\\boxed{Paris}", 1.0),
        ("-3", "<answer>-3</answer>", 1.0),
        ("-3", "3 <answer>3</answer>", 0.0),
    ],
)
def test_math_grader(reference: str, completion: str, reward: float) -> None:
    grade = resolve(GraderSpec("math"), TaskSection(source="jsonl"))
    assert grade("", completion, reference, {}) == reward


def test_math_grader_with_a_pattern() -> None:
    config = TaskSection(source="jsonl", answer_pattern=r"(?m)^Answer: (.*)$")
    grade = resolve(GraderSpec("math"), config)
    assert grade("", "Answer: 2\nAnswer: \\frac{1}{2}\nor 7", "0.5", {}) == 1.0
    assert grade("", "0.5", "0.5", {}) == 0.0


def test_math_grader_refuses_an_unreadable_reference() -> None:
    grade = resolve(GraderSpec("math"), TaskSection(source="jsonl"))
    for reference in (None, "", "#### "):
        with pytest.raises(ValueError, match="cannot read the reference answer"):
            grade("", "1", reference, {})


@pytest.mark.parametrize(("value", "reward"), [(True, 1.0), (2, 2.0), (-0.5, -0.5)])
def test_rewards(value: object, reward: float) -> None:
    assert as_reward(value) == reward and type(as_reward(value)) is float


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None, "1.0", [1.0], 10**400])
def test_no_rewards(value: object) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        as_reward(value)


def user(name: str) -> Grader:
    return resolve(GraderSpec(f"rewards:{name}"), TaskSection(source="jsonl"))


def test_user_grader_gets_the_columns_it_takes(workdir: Path) -> None:
    assert user("everything")("p", "c", "a", {"level": 2}) == 1.0
    assert user("level")("p", "c", "a", {"level": 3, "unknown": 4}) == 3
    # Columns that are named like the parameters do not clash with them.
    assert user("everything")("p", "c", "a", {"level": 2, "answer": "b", "prompt": "q"}) == 1.0


def test_several_graders(workdir: Path) -> None:
    specs = [GraderSpec("math"), GraderSpec("rewards:exact")]
    graders = check_graders(specs, TaskSection(source="jsonl"))
    assert list(graders) == ["math", "rewards:exact"]
    assert [grade("", "1/2", "0.5", {}) for grade in graders.values()] == [1.0, False]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rewrds:exact", "'rewrds:exact': no module 'rewrds' in .*; did you mean rewards?"),
        ("rewards:exakt", "rewards.py has no function 'exakt'; did you mean exact?"),
        ("rewards:constant", "rewards.py has no function 'constant'"),
        ("rewards:few", r"takes \(completion\); it must take \(prompt, completion, answer"),
        ("raises:f", "importing raises fails in .*raises.py, line 2: ZeroDivisionError"),
        ("leaves:f", "importing leaves fails in .*leaves.py, line 1: SystemExit"),
        ("needs:f", "importing needs fails in .*needs.py, line 1: ModuleNotFound.*'absent_thing'"),
        ("syntax:f", "importing syntax fails in .*syntax.py, line 1: SyntaxError"),
    ],
)
def test_user_grader_errors(workdir: Path, name: str, message: str) -> None:
    (workdir / "raises.py").write_text("x = 1\n1 / 0\n")
    (workdir / "leaves.py").write_text("raise SystemExit(1)\n")
    (workdir / "needs.py").write_text("import absent_thing\n")
    (workdir / "syntax.py").write_text("def f(:\n")
    with pytest.raises(UserError, match=message) as error:
        resolve(GraderSpec(name), TaskSection(source="jsonl"))
    assert str(error.value).startswith(f"task.graders: '{name}'")
    assert "\n" not in str(error.value)


def test_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="pip install 'math-verify"):
        resolve(GraderSpec("math"), TaskSection(source="jsonl"))


def test_columns_stay_as_they_are(workdir: Path) -> None:
    columns: dict[str, Any] = {"level": 2}
    user("everything")("p", "c", "a", columns)
    assert columns == {"level": 2}


# --- digests ------------------------------------------------------------------------------------


def digest(*names: str, weight: float = 1.0, **config: Any) -> str:
    section = TaskSection(**{"source": "jsonl"} | config)
    return grader_digest([GraderSpec(name, weight) for name in names], section)


def test_a_digest_names_what_would_grade(workdir: Path) -> None:
    (workdir / "other.py").write_text((workdir / "rewards.py").read_text() + "# another file\n")
    digests = [
        digest("math"),
        digest("math", weight=0.5),
        digest("math", answer_pattern="so (.*)"),
        digest("math", source="reasoning_gym"),
        digest("task", source="reasoning_gym"),
        digest("task", source="reasoning_gym", name="spell_backward"),
        digest("rewards:exact"),
        digest("rewards:length"),
        digest("other:exact"),
        digest("math", "rewards:exact"),
        digest("rewards:exact", "math"),
    ]
    assert "" not in digests
    assert len(set(digests)) == len(digests)
    again = [digest("math"), digest("rewards:exact"), digest("rewards:exact", "math")]
    assert again == [digests[0], digests[6], digests[10]]


def test_a_digest_changes_with_the_file_of_a_users_grader(workdir: Path) -> None:
    before = digest("rewards:exact")
    with (workdir / "rewards.py").open("a") as file:
        file.write("\n")
    assert before != digest("rewards:exact") != ""


def test_a_digest_changes_with_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def version(package: str) -> str:
        asked.append(package)
        return "99.9"

    before = digest("math"), digest("task", source="reasoning_gym")
    monkeypatch.setattr("reroll.tasks.grade.version", version)
    after = digest("math"), digest("task", source="reasoning_gym")
    assert asked == ["math-verify", "reasoning-gym"]
    assert before[0] != after[0] and before[1] != after[1]


@pytest.mark.parametrize("name", ["absent:f", "absent.below:f", "sys:exit", "space:f", ".:f"])
def test_graders_whose_source_is_not_found_have_no_digest(name: str, workdir: Path) -> None:
    (workdir / "space").mkdir()  # a namespace, without a file
    assert digest(name) == ""
    assert digest("math", name) == digest(name, "math") == ""


def test_a_digest_runs_no_grader_and_leaves_the_path_as_it_was(workdir: Path) -> None:
    (workdir / "loud.py").write_text("raise RuntimeError('imported')\n")
    path = list(sys.path)
    assert digest("loud:f") != ""
    assert sys.path == path
    assert "loud" not in sys.modules


def test_a_digest_of_a_grader_in_a_package_imports_nothing(workdir: Path) -> None:
    """The package runs in the grader processes alone."""
    (workdir / "loudly" / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py", "inner/graders.py"):
        (workdir / "loudly" / name).write_text("raise RuntimeError('imported')\n")
    found = digest("loudly.inner.graders:f")
    assert found != "" and digest("loudly.inner:f") not in ("", found)
    (workdir / "loudly" / "inner" / "graders.py").write_text("def f(): ...\n")
    assert digest("loudly.inner.graders:f") not in ("", found)
    assert not [name for name in sys.modules if name.startswith("loudly")]
