"""The grader of whole derivations."""

import random

import pytest

from reroll.config import TaskSection
from reroll.tasks.derivation import derivation
from reroll.tasks.grade import check_graders, grader_digest, graders_of
from reroll.tasks.gym import generate_problems
from tests.project import recipe

SUM = {"expression": "12 - 5 + 33"}


def grade(completion: str, expression: str = SUM["expression"]) -> float:
    return derivation("", completion, None, {"expression": expression})


@pytest.mark.parametrize(
    "right",
    [
        "steps: 12-5=7; 7+33=40; so 40",
        "12-5=7\n7+33=40\nso 40",
        "12 - 5 = 7\n7 + 33 = 40\n\nso 40.",
        "quick: 12-5+33=40; so 40",
    ],
)
def test_right_ones(right: str) -> None:
    assert grade(right) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        "so 40",
        "steps: 12-5=8; 8+33=41; so 40",
        "steps: 12-5=8; 8+32=40; so 40",
        "steps: 12-5=7; 8+33=41; so 41",
        "steps: 12-5=7; so 40",
        "steps: 12-5=7; so 7",
        "steps: 12-5=7; 7+33=40; 40+0=40; so 40",
        "steps: 12+33=45; 45-5=40; so 40",
        "steps: 12-5=7; 7+33=40; so 41",
        "steps: 12-5=7; 7+33=40; so 40; so 40 or 41",
        "steps: 12-5=7; 7+33=40",
        "steps: 12-5=7; seven more makes 40; 7+33=40; so 40",
        "",
    ],
)
def test_wrong_ones(wrong: str) -> None:
    assert grade(wrong) == 0.0


def test_negative_totals_and_single_terms() -> None:
    assert grade("5-12=-7; -7-3=-10; so -10", "5 - 12 - 3") == 1.0
    assert grade("so 7", "7") == 1.0


def test_what_is_no_sum_is_refused() -> None:
    with pytest.raises(KeyError):
        derivation("", "so 1", "1", {})
    for expression in ("2 * 3", "x + 1", ""):
        with pytest.raises(ValueError, match="not a sum"):
            grade("so 1", expression)


def test_agrees_with_the_demo_s_teacher_and_sees_lucky_slips() -> None:
    """Right by the teacher's own arithmetic; a right answer after wrong steps is not."""
    teach, rng = recipe("demo_policy"), random.Random(5)
    task = TaskSection(params={"min_terms": 3, "max_terms": 9}, train_size=200, eval_size=1)
    lucky = 0
    for problem in generate_problems(task).train:
        expression = problem.columns["expression"]
        assert grade(teach.solution("steps", expression, rng), expression) == 1.0
        assert grade(teach.solution("guess", expression, rng), expression) == 0.0
        quick = teach.solution("quick", expression, rng)
        answer = quick.rpartition("so ")[2] == problem.answer
        lucky += answer and not grade(quick, expression)
        assert answer or not grade(quick, expression)
    assert lucky > 0  # two slips that cancel


def test_is_a_grader_by_name() -> None:
    config = TaskSection(graders=[{"name": "derivation"}])  # type: ignore[list-item]
    assert check_graders(graders_of(config), config) == {"derivation": derivation}
    other = TaskSection()
    assert grader_digest(graders_of(config), config) != grader_digest(graders_of(other), other)
