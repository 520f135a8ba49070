import pytest

from reroll.config import TaskSection
from reroll.errors import UserError
from reroll.tasks.problem import Problem
from reroll.tasks.prompts import make_prompt
from tests.tasks.conftest import CharTokenizer

PROBLEM = Problem(7, "sums.jsonl: line 8", "2 + {x} =", "5", {"level": 3, "hint": "{question}"})


def test_plain_problem_ends_in_a_newline(tokenizer: CharTokenizer) -> None:
    prompt = make_prompt(PROBLEM, TaskSection(), tokenizer)
    assert prompt.text == "2 + {x} =\n"
    assert prompt.token_ids == (1, *map(ord, "2 + {x} =\n"))
    assert (prompt.row, prompt.answer, prompt.columns) == (7, "5", PROBLEM.columns)


def test_template_fields_are_filled_once(tokenizer: CharTokenizer) -> None:
    template = r"{question}|{prompt}|{level}|{hint}|{{level}}|\boxed{}|x^{2}"
    prompt = make_prompt(PROBLEM, TaskSection(template=template), tokenizer)
    assert prompt.text == r"2 + {x} =|2 + {x} =|3|{question}|{level}|\boxed{}|x^{2}"


def test_prompt_column_is_a_field(tokenizer: CharTokenizer) -> None:
    config = TaskSection(template="Q: {problem}", prompt_column="problem")
    assert make_prompt(PROBLEM, config, tokenizer).text == "Q: 2 + {x} ="


@pytest.mark.parametrize("field", ["levl", "answer", "level!r", "level.real"])
def test_unknown_field_lists_the_fields(tokenizer: CharTokenizer, field: str) -> None:
    with pytest.raises(UserError, match=r"task\.template: unknown field") as error:
        make_prompt(PROBLEM, TaskSection(template=f"{{{field}}}"), tokenizer)
    assert "question, level, hint, prompt" in str(error.value)
    assert field == "answer" or "did you mean level?" in str(error.value)


def test_no_end_of_sequence_token_is_appended() -> None:
    tokenizer = CharTokenizer(end=True)
    assert make_prompt(PROBLEM, TaskSection(), tokenizer).token_ids[-1] == ord("\n")
    ending = make_prompt(PROBLEM, TaskSection(template="{question}\x02"), CharTokenizer())
    assert ending.token_ids[-1] == 2  # the text's own


def test_chat_template_with_and_without_system() -> None:
    tokenizer = CharTokenizer("a template")
    prompt = make_prompt(PROBLEM, TaskSection(), tokenizer)
    assert prompt.text == "[user]2 + {x} =[assistant]"
    assert prompt.token_ids == tuple(map(ord, prompt.text))
    config = TaskSection(system="Be brief.", template="Q: {question}")
    text = make_prompt(PROBLEM, config, tokenizer).text
    assert text == "[system]Be brief.[user]Q: 2 + {x} =[assistant]"
    assert make_prompt(PROBLEM, TaskSection(chat="off"), tokenizer).text == "2 + {x} =\n"


def test_chat_template_that_fails() -> None:
    tokenizer = CharTokenizer("no system")
    assert make_prompt(PROBLEM, TaskSection(), tokenizer).text
    with pytest.raises(UserError, match=r"task\.system: System role not supported;") as error:
        make_prompt(PROBLEM, TaskSection(system="Be brief."), tokenizer)
    assert "task.chat = 'off'" in str(error.value)


def test_empty_prompt_is_refused() -> None:
    class Nothing(CharTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return []

    with pytest.raises(UserError, match=r"sums\.jsonl: line 8: .*no tokens; see task\.template"):
        make_prompt(PROBLEM, TaskSection(), Nothing())


def test_transformers_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"[UNK]": 0, "<s>": 1, "</s>": 2, "user": 3, "assistant": 4, "system": 5, "hi": 6}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )
    problem = Problem(0, "here", "hi hi", None)
    assert make_prompt(problem, TaskSection(), tokenizer).token_ids == (1, 6, 6)
    tokenizer.chat_template = (
        "<s>{% for m in messages %} {{ m.role }} {{ m.content }} </s>{% endfor %}"
        "{% if add_generation_prompt %} assistant{% endif %}"
    )
    prompt = make_prompt(problem, TaskSection(system="hi"), tokenizer)
    assert prompt.text == "<s> system hi </s> user hi hi </s> assistant"
    assert prompt.token_ids == (1, 5, 6, 2, 3, 6, 6, 2, 4)
