import pytest

from reroll.config import TaskSection
from reroll.errors import UserError
from reroll.tasks.gym import generate_problems, gym_scorer, problems_here
from reroll.tasks.problem import Problems

DATASETS = [
    "chain_sum",
    "spell_backward",
    "countdown",
    "mini_sudoku",
    "propositional_logic",
    "simple_equations",
    "word_sorting",
    "maze",
    "prime_factorization",
]


@pytest.mark.parametrize("name", DATASETS)
def test_reference_answers_score_one(name: str) -> None:
    config = TaskSection(name=name, train_size=4, eval_size=3)
    problems = problems_here(config)
    assert (len(problems.train), len(problems.held_out)) == (4, 3)
    score = gym_scorer(config)
    for problem in problems.train + problems.held_out:
        reference = problem.answer
        if reference is None:  # several are right; the generator keeps one in the metadata
            reference = problem.columns["example_answer"]
        assert score(reference, problem.columns["entry"]) == 1.0
        assert score("no such answer (", problem.columns["entry"]) < 1.0
        assert problem.text == problem.columns["entry"]["question"]


def test_rows_metadata_and_seeds() -> None:
    config = TaskSection(train_size=5, eval_size=5, params={"min_terms": 3, "max_terms": 3})
    problems = problems_here(config)
    assert [problem.row for problem in problems.train] == [0, 1, 2, 3, 4]
    assert all(problem.columns["num_terms"] == 3 for problem in problems.train)
    assert problems_here(config) == problems
    other = problems_here(config.model_copy(update={"seed": 1}))
    assert other.train != problems.train and other.held_out != problems.held_out


def small_space(train_size: int, eval_size: int) -> Problems:
    digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    return problems_here(TaskSection(params=digits, train_size=train_size, eval_size=eval_size))


def test_held_out_problems_are_new_and_distinct() -> None:
    # 9 * 9 sums and differences: the first held-out draws often stand in the training split.
    problems = small_space(60, 60)
    train = {problem.text for problem in problems.train}
    held_out = [problem.text for problem in problems.held_out]
    assert len(set(held_out)) == len(held_out) == 60
    assert not train & set(held_out)
    rows = [problem.row for problem in problems.held_out]
    assert rows == sorted(set(rows)) and rows[-1] >= 60
    assert not problems.notes


def test_too_small_a_space_gives_fewer_and_says_so() -> None:
    problems = small_space(200, 200)
    assert 0 < len(problems.held_out) < 200
    (note,) = problems.notes
    assert f"only {len(problems.held_out)} held-out problems instead of 200: chain_sum" in note
    with pytest.raises(UserError, match=r"no problem left to hold out.*task\.train_size = 5000"):
        small_space(5000, 10)


def test_scorer_knows_the_parameters() -> None:
    # Its tolerance is the last decimal place that the parameters allow.
    places = {"min_num_decimal_places": 1, "max_num_decimal_places": 1}
    entry = {"answer": "2.0", "metadata": {}}
    config = TaskSection(name="decimal_arithmetic", params=places)
    assert gym_scorer(config)("2.05", entry) == 1.0
    assert gym_scorer(TaskSection(name="decimal_arithmetic"))("2.05", entry) == 0.0


def test_a_scorer_that_fails_on_its_own_reference_is_not_hidden() -> None:
    score = gym_scorer(TaskSection(name="prime_factorization"))
    assert score("two", {"answer": "2"}) == 0.0
    with pytest.raises(ValueError, match="nonsense"):
        score("2", {"answer": "nonsense"})


def test_composite() -> None:
    parts = [{"name": name, "weight": 1, "config": {}} for name in ("chain_sum", "spell_backward")]
    config = TaskSection(name="composite", params={"datasets": parts}, train_size=12, eval_size=2)
    problems = problems_here(config)
    sources = {problem.columns["source_dataset"] for problem in problems.train}
    assert sources == {"chain_sum", "spell_backward"}
    entry = problems.train[0].columns["entry"]
    assert gym_scorer(config)(entry["answer"], entry) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "chain_sun"}, "task.name = 'chain_sun': .* did you mean chain_sum?"),
        ({"params": {"min_term": 1}}, "task.params.min_term: .* did you mean min_terms?"),
        ({"params": {"min_terms": 5, "max_terms": 2}}, "task.params: .*max_terms must be >="),
        ({"params": {"min_terms": "2"}}, "task.params: chain_sum refuses them: .*'str'"),
        ({"params": {"size": 10}}, "task.params.size: set .*task.train_size"),
        ({"name": "composite"}, "task.params: composite refuses them"),
        (
            {"name": "spell_backward", "params": {"min_word_len": 90, "max_word_len": 99}},
            "spell_backward",
        ),
    ],
)
def test_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        problems_here(TaskSection(train_size=2, eval_size=2, **settings))
    assert "\n" not in str(error.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        problems_here(TaskSection())


def test_child_process_fixes_hash_order_and_global_generators() -> None:
    # list_functions draws from the global generator, polynomial_multiplication iterates over sets.
    parts = ("list_functions", "polynomial_multiplication", "isomorphic_strings")
    datasets = [{"name": name, "weight": 1, "config": {}} for name in parts]
    config = TaskSection(
        name="composite", params={"datasets": datasets}, train_size=60, eval_size=5
    )
    assert generate_problems(config) == generate_problems(config)


def test_child_process_passes_errors_on() -> None:
    with pytest.raises(UserError, match=r"did you mean chain_sum\?"):
        generate_problems(TaskSection(name="chain_sun"))
