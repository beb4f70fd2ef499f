"""The whole text of a row, and the character spans of it that are trained.

Assistant spans of a conversation come from the template's own ``{% generation %}`` marks; without marks, from
rendering the conversation up to each turn, which is exact where the template only appends; and where it rewrites
earlier turns (Qwen3 drops old reasoning), from the training form of that template that TRL knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headgate.data.readers.base import RawRow
from headgate.errors import DataError

from .spans import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
NO_TEMPLATE = (
    "the rows are conversations and the tokenizer has no chat template: set data.chat_template (headgate init writes a "
    "plain one), choose an instruct model, or convert the rows to prompt and completion"
)
PLAIN_CHAT = (
    "{% for turn in messages %}{{ turn['role'] | capitalize }}:\n"
    "{% if turn['role'] == 'assistant' %}{% generation %}{{ turn['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ turn['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""A template for a base model, which has none: roles as words, an answer up to its end of sequence trained."""


def render(row: RawRow, tokenizer: PreTrainedTokenizerBase, loss_on: str) -> tuple[str, list[Span], bool]:
    """(text, trained spans, whether a chat template made it). Raises DataError naming the row."""
    if row.get("messages") is not None:
        return *conversation(row, tokenizer, loss_on), True
    if row.get("text") is not None:
        return row["text"], [(0, len(row["text"]))], False
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        raise DataError(f"{_where(row)} has neither prompt and completion, messages nor text")
    bare = prompt.rstrip(" ")
    text = prompt + completion
    return text, [(0 if loss_on == "all" else len(bare), len(text))], False


def conversation(row: RawRow, tokenizer: PreTrainedTokenizerBase, loss_on: str) -> tuple[str, list[Span]]:
    """A conversation's text and assistant spans: all of them, the last one's, or everything."""
    turns, tools = list(row["messages"]), row.get("tools") or None
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(f"{_where(row)}: no message is from the assistant, so there is nothing to learn")
    if loss_on == "all":
        text = chat_text(tokenizer, turns, tools)
        return text, [(0, len(text))]
    template = template_of(tokenizer, tools)
    if _MARK.search(template):
        text, spans = _marked(tokenizer, turns, tools, template, _where(row))
    else:
        found = _appended(tokenizer, turns, tools)
        if found is None:
            text, spans = _marked(
                tokenizer, turns, tools, _training_form(tokenizer, _where(row)), _where(row)
            )
        else:
            text, spans = found
    return text, spans[-1:] if loss_on == "completion" else spans


def chat_text(tokenizer: Any, turns: Sequence[Any], tools: Any = None, *, generation: bool = False) -> str:
    """The conversation in the tokenizer's chat template. Raises DataError without one, or where it refuses."""
    template_of(tokenizer, tools)
    options = {"tools": tools} if tools else {}
    try:
        return str(
            tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=generation, **options
            )
        )
    except Exception as error:  # a template raises what it likes
        raise DataError(
            f"the chat template refuses a conversation of roles {[turn['role'] for turn in turns]}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def template_of(tokenizer: Any, tools: Any = None) -> str:
    """The Jinja text in use. Raises DataError where the tokenizer has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(NO_TEMPLATE)
    return str(tokenizer.get_chat_template(tools=tools))


def _marked(
    tokenizer: Any, turns: Sequence[Any], tools: Any, template: str, where: str
) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [list(turns)],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    texts, marks = rendered
    spans = [(int(low), int(high)) for low, high in marks[0] if high > low]
    if not spans:
        raise DataError(f"{where}: the chat template's generation marks hold no assistant text")
    return str(texts[0]), spans


def _appended(tokenizer: Any, turns: Sequence[Any], tools: Any) -> tuple[str, list[Span]] | None:
    """Spans between two renderings, the turn left out and put in; None where one is no beginning of the next."""
    text, spans = chat_text(tokenizer, turns, tools), []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = chat_text(tokenizer, turns[:index], tools, generation=True) if index else ""
        until = chat_text(tokenizer, turns[: index + 1], tools)
        if not text.startswith(until) or not until.startswith(before):
            return None
        spans.append((len(before), len(until.rstrip())))
    return text, spans


def _training_form(tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    from trl.chat_template_utils import get_training_chat_template

    try:
        template = get_training_chat_template(tokenizer)
    except Exception:  # it knows some families and refuses the others in several ways
        template = None
    if template is None:
        raise DataError(
            f"{where}: the tokenizer's chat template rewrites earlier turns, so assistant tokens cannot be "
            "located exactly: set data.chat_template to a template that only appends, or that has generation marks"
        )
    return str(template)


def _where(row: Mapping[str, object]) -> str:
    return f"row '{row.get('example_id', '?')}'"
