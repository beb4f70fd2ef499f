"""What a model is asked: worked examples before the question, as text or through its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headgate.data.readers.base import RawRow
from headgate.data.rendering import chat_text
from headgate.data.sources import load_rows
from headgate.data.templates import prompt_ids
from headgate.errors import ConfigError
from headgate.evaluation.config import EvalTask
from headgate.methods.compose import methods_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SHOT_SEPARATOR = "\n\n"
SHOT_SPLITS = {"mmlu": "dev"}
"""Where worked examples come from, for sources that set some aside; elsewhere from the training split."""

Rows = Sequence[RawRow]


def uses_chat(task: EvalTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts go through the chat template.

    ``auto``: where there is one and the model is as it came. A model that was trained here on plain prompts is asked
    in the form it was trained on: ``chat: on`` says otherwise. Raises ConfigError for ``on`` without a template.
    """
    template = getattr(tokenizer, "chat_template", None)
    if task.chat == "on" and not template:
        raise ConfigError("chat: on needs a tokenizer with a chat template: set it to auto, or choose an instruct model")  # fmt: skip
    if task.chat != "auto":
        return task.chat == "on"
    trained = hasattr(model, "peft_config") or len(methods_of(model)) > 0
    return bool(template) and not trained


def shots(task: EvalTask) -> list[dict[str, object]]:
    """The rows that worked examples are taken from, always the same ones for a seed; empty without ``few_shot``."""
    if not task.few_shot:
        return []
    source = task.source_config()
    options = {name: value for name, value in source.options.items() if name != "sample_seed"}
    split = SHOT_SPLITS.get(source.source, "train")
    if source.path is not None and Path(source.path).is_file() and source.source != "mbpp":
        sibling = Path(source.path).with_name(Path(source.path).name.replace(source.split, split, 1))
        if not sibling.exists() or sibling == Path(source.path):
            raise ConfigError(
                f"few_shot={task.few_shot} takes its examples from the training split, and there is none beside "
                f"{source.path}: give the folder that holds {split} and {source.split}"
            )
        source = source.model_copy(update={"path": str(sibling)})
    limit = None if task.few_shot_by else task.few_shot
    pool = load_rows(source.model_copy(update={"split": split, "limit": limit, "options": options}))
    if task.few_shot_by and task.few_shot_by not in pool.column_names:
        raise ConfigError(
            f"few_shot_by={task.few_shot_by}: the rows have no such column (they have: {', '.join(pool.column_names)})"
        )
    return list(pool)


def chosen_shots(task: EvalTask, pool: Rows, row: Mapping[str, object]) -> list[RawRow]:
    """Examples for one question: the first ones, or the first of its own field with ``few_shot_by``."""
    field = task.few_shot_by
    own = pool if field is None else [shot for shot in pool if shot[field] == row.get(field)]
    return list(own[: task.few_shot])


def few_shot_prefix(task: EvalTask) -> str:
    """Worked examples as text, the same for every question."""
    return "".join(f"{row['prompt']}{row['completion']}{SHOT_SEPARATOR}" for row in shots(task))


def prompts_of(
    task: EvalTask, rows: Rows, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[str | list[int]], list[str], bool]:
    """(what to generate from, its text for the records, whether a chat template made it)."""
    pool, chat = shots(task), uses_chat(task, model, tokenizer)
    asked: list[str | list[int]] = []
    texts = []
    for row in rows:
        if row.get("messages") is not None:
            asked.append(prompt_ids(row, tokenizer))
            texts.append(
                chat_text(tokenizer, _before_answer(row["messages"]), row.get("tools"), generation=True)
            )
        elif chat:
            turns = []
            for shot in chosen_shots(task, pool, row):
                turns += [_turn("user", shot["prompt"]), _turn("assistant", shot["completion"])]
            turns.append(_turn("user", row["prompt"]))
            asked.append(prompt_ids({"messages": turns}, tokenizer))
            texts.append(chat_text(tokenizer, turns, generation=True))
        else:
            prefix = "".join(
                f"{s['prompt']}{s['completion']}{SHOT_SEPARATOR}" for s in chosen_shots(task, pool, row)
            )
            asked.append(prefix + row["prompt"])
            texts.append(prefix + row["prompt"])
    return asked, texts, chat


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content.strip()}


def _before_answer(turns: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    kept = list(turns)
    while kept and kept[-1]["role"] == "assistant":
        kept.pop()
    return kept
