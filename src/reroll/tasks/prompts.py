"""From a problem to the tokens that the model reads: template, chat template, tokenizer."""

import re
from dataclasses import replace
from typing import Any, Protocol

from reroll.config import TaskSection
from reroll.errors import UserError
from reroll.tasks.problem import Problem, did_you_mean
from reroll.types import Prompt

# Doubled braces stand for single ones, as in str.format. Other than there, braces around nothing
# or around what is no name, as in \boxed{} and x^{2}, are left alone.
_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_][^{}]*)\}")


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that prompts need."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **settings: Any) -> Any:
        """The conversation as text, under tokenize=False."""
        ...


def uses_chat(config: TaskSection, tokenizer: Tokenizer) -> bool:
    """Whether prompts go through the tokenizer's chat template."""
    return config.chat == "auto" and bool(tokenizer.chat_template)


def make_prompt(problem: Problem, config: TaskSection, tokenizer: Tokenizer) -> Prompt:
    """Text and tokens of one problem; raises UserError for an unknown field or an empty prompt."""
    if uses_chat(config, tokenizer):
        content = _fill(config.template, problem, config) if config.template else problem.text
        text = _render_chat(content, config, tokenizer)
        # The template has written the special tokens already.
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        text = _fill(config.template, problem, config) if config.template else problem.text + "\n"
        ids = _encode(text, tokenizer)
    if not ids:
        raise UserError(
            f"{problem.where}: the prompt {text!r} has no tokens; "
            "see task.template and the tokenizer"
        )
    return Prompt(problem.row, text, tuple(ids), problem.answer, problem.columns)


def hinted(
    prompt: Prompt, problem: Problem, hint: str, config: TaskSection, tokenizer: Tokenizer
) -> Prompt:
    """The prompt of a problem with a hint behind it; the same row, answer and columns."""
    if uses_chat(config, tokenizer):
        content = _fill(config.template, problem, config) if config.template else problem.text
        text = _render_chat(content + hint, config, tokenizer)
        return replace(
            prompt, text=text, token_ids=tuple(tokenizer.encode(text, add_special_tokens=False))
        )
    text = prompt.text + hint
    return replace(prompt, text=text, token_ids=tuple(_encode(text, tokenizer)))


def _fill(template: str, problem: Problem, config: TaskSection) -> str:
    fields = {"question": problem.text, **problem.columns, config.prompt_column: problem.text}

    def put(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        if match[1] not in fields:
            raise UserError(
                f"task.template: unknown field {match[0]}; there are: "
                f"{', '.join(fields)} (write {{{{ }}}} for plain braces)"
                f"{did_you_mean(match[1], fields)}"
            )
        return str(fields[match[1]])

    return _FIELD.sub(put, template)


def _render_chat(content: str, config: TaskSection, tokenizer: Tokenizer) -> str:
    messages = [{"role": "system", "content": config.system}] if config.system else []
    messages.append({"role": "user", "content": content})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs: jinja2 and their own raise_exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        system = " of task.system" if config.system else ""
        raise UserError(
            f"the tokenizer's chat template fails{system}: {reason}; "
            f"{'leave task.system empty or ' if system else ''}set task.chat = 'off'"
        ) from None


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids with whatever the tokenizer puts before, but no end-of-sequence token after."""
    ids = list(tokenizer.encode(text, add_special_tokens=True))
    end = getattr(tokenizer, "eos_token_id", None)
    if ids and ids[-1] == end and tokenizer.encode(text, add_special_tokens=False)[-1:] != [end]:
        ids.pop()
    return ids
