"""Readers: one raw row of a known data set becomes one normalised row.

A normalised row has ``example_id`` and one of: ``prompt`` + ``completion``; ``messages``; ``text``. It may have
``answer`` (gold), ``family``, and ``meta_*`` columns that a scorer needs. A reader gets the raw row, the place it
came from (for errors) and the source's configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from headgate.errors import DataError

from .config import SourceConfig

Row = dict[str, Any]
Reader = Callable[[Mapping[str, Any], str, SourceConfig], Iterator[Row]]

PROMPTS = {
    "gsm8k": "{question}\nThe answer is: ",
    "mbpp": "{text}\nYour code should pass these tests:\n{tests}\n",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    "alpaca_input": "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n### Response:\n",
}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
          "bot": "assistant", "model": "assistant", "system": "system"}  # fmt: skip


def field(raw: Mapping[str, Any], where: str, *names: str) -> Any:
    """The first of ``names`` that the row has; DataError names the place and what it has instead."""
    for name in names:
        if raw.get(name) is not None:
            return raw[name]
    wanted = " or ".join(f"'{name}'" for name in names)
    raise DataError(f"{where}: no field {wanted} (the row has: {', '.join(map(str, raw)) or 'nothing'})")


def gsm8k(raw: Mapping[str, Any], where: str, config: SourceConfig) -> Iterator[Row]:
    """Style ``rationale``: the worked solution with its ``#### n``; style ``answer``: the number alone."""
    question, solution = field(raw, where, "question"), field(raw, where, "answer")
    if "####" not in solution:
        raise DataError(f"{where}: field 'answer' has no '#### <number>' line")
    gold = solution.rsplit("####", 1)[1].strip().replace(",", "")
    row = {
        "prompt": _fill(config, PROMPTS["gsm8k"], where, question=question),
        "completion": gold if config.style == "answer" else solution.strip(),
        "answer": gold,
        "meta_question": question,
    }
    for name in ("family", "difficulty", "operations", "structure"):
        if name in raw:
            row[name if name == "family" else f"meta_{name}"] = raw[name]
    yield row


def mbpp(raw: Mapping[str, Any], where: str, config: SourceConfig) -> Iterator[Row]:
    """Task text and its tests as the prompt, the reference program as the completion."""
    text, code, tests = (
        field(raw, where, "text", "prompt"),
        field(raw, where, "code"),
        field(raw, where, "test_list"),
    )
    setup = raw.get("test_setup_code") or "\n".join(raw.get("test_imports") or [])
    yield {
        "prompt": _fill(config, PROMPTS["mbpp"], where, text=text, tests="\n".join(tests)),
        "completion": code.replace("\r\n", "\n").replace("\t", "    ").strip("\n"),
        "meta_tests": list(tests),
        "meta_setup": setup,
        "meta_task_id": int(field(raw, where, "task_id")),
    }


def humaneval(raw: Mapping[str, Any], where: str, config: SourceConfig) -> Iterator[Row]:
    yield {
        "prompt": field(raw, where, "prompt"),
        "completion": field(raw, where, "canonical_solution"),
        "meta_tests": [field(raw, where, "test")],
        "meta_entry_point": field(raw, where, "entry_point"),
        "meta_task_id": field(raw, where, "task_id"),
    }


def alpaca(raw: Mapping[str, Any], where: str, config: SourceConfig) -> Iterator[Row]:
    """Alpaca and CodeAlpaca: ``instruction``, optional ``input``, ``output`` or ``response``."""
    context = (raw.get("input") or "").strip()
    template = PROMPTS["alpaca_input" if context else "alpaca"]
    yield {
        "prompt": _fill(config, template, where, instruction=field(raw, where, "instruction"), input=context),
        "completion": field(raw, where, "output", "response"),
    }


def sharegpt(raw: Mapping[str, Any], where: str, config: SourceConfig) -> Iterator[Row]:
    turns = []
    for number, turn in enumerate(field(raw, where, "conversations", "conversation"), start=1):
        role = _ROLES.get(str(turn.get("from", turn.get("role"))))
        if role is None:
            raise DataError(
                f"{where}: turn {number} is from '{turn.get('from')}' (known: {', '.join(_ROLES)})"
            )
        turns.append({"role": role, "content": field(turn, f"{where}, turn {number}", "value", "content")})
    yield {"messages": turns}


def messages(raw: Mapping[str, Any], where: str, config: SourceConfig) -> Iterator[Row]:
    turns = field(raw, where, "messages")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: field 'messages' must be a list of role/content objects that is not empty")
    cleaned = []
    for number, turn in enumerate(turns, start=1):
        place = f"{where}, message {number}"
        cleaned.append({"role": field(turn, place, "role"), "content": field(turn, place, "content")})
    yield {"messages": cleaned}


def prompt_completion(raw: Mapping[str, Any], where: str, config: SourceConfig) -> Iterator[Row]:
    prompt, completion = field(raw, where, "prompt"), field(raw, where, "completion")
    if isinstance(prompt, list):  # TRL's conversational form
        yield {"messages": [*prompt, *completion]}
    else:
        row = {"prompt": prompt, "completion": completion}
        yield {**row, "answer": str(raw["answer"])} if raw.get("answer") is not None else row


_HEADING = re.compile(r"^ = [^=].* = *$", re.MULTILINE)


def text(raw: Mapping[str, Any], where: str, config: SourceConfig) -> Iterator[Row]:
    """Plain text, one document per row.

    A long string is divided at ``options.separator``, else at ``<|endoftext|>``, else at WikiText's top-level
    headings, else into runs of whole paragraphs of about ``options.chunk_characters`` (2,000).
    """
    content = str(field(raw, where, "text")).replace("\r\n", "\n")
    limit = int(config.options.get("chunk_characters", 2000))
    separator = config.options.get("separator") or ("<|endoftext|>" if "<|endoftext|>" in content else None)
    if separator:
        parts = content.split(separator)
    elif len(_HEADING.findall(content)) > 1:
        starts = [match.start() for match in _HEADING.finditer(content)]
        parts = [content[: starts[0]], *(content[a:b] for a, b in zip(starts, [*starts[1:], len(content)]))]
    elif len(content) > limit:
        parts = list(_chunks(content, limit))
    else:
        parts = [content]
    for part in parts:
        if part.strip():
            yield {"text": part.strip()}


def _chunks(content: str, limit: int) -> Iterator[str]:
    held = ""
    for paragraph in content.splitlines(keepends=True):
        if held and len(held) + len(paragraph) > limit:
            yield held
            held = ""
        held += paragraph
    yield held


def auto(raw: Mapping[str, Any], where: str, config: SourceConfig) -> Iterator[Row]:
    """The reader that the row's columns call for."""
    has = set(raw)
    if "messages" in has:
        reader = messages
    elif has & {"conversations", "conversation"}:
        reader = sharegpt
    elif {"prompt", "completion"} <= has:
        reader = prompt_completion
    elif {"prompt", "canonical_solution"} <= has:
        reader = humaneval
    elif {"question", "answer"} <= has and "####" in str(raw["answer"]):
        reader = gsm8k
    elif {"code", "test_list"} <= has:
        reader = mbpp
    elif "instruction" in has:
        reader = alpaca
    elif "text" in has:
        reader = text
    else:
        raise DataError(
            f"{where}: columns {sorted(map(str, has))} fit no reader; rename them to prompt/completion, messages or "
            "text, or name the reader with data.train.source"
        )
    return reader(raw, where, config)


def _fill(config: SourceConfig, default: str, where: str, **values: str) -> str:
    template = str(config.options.get("prompt_template", default))
    try:
        return template.format(**values)
    except (KeyError, IndexError) as error:
        raise DataError(
            f"options.prompt_template {json.dumps(template)} asks for {error}, but {where} offers {', '.join(values)}"
        ) from error


READERS: dict[str, Reader] = {
    "auto": auto, "gsm8k": gsm8k, "wordmath": gsm8k, "mbpp": mbpp, "humaneval": humaneval, "alpaca": alpaca,
    "codealpaca": alpaca, "sharegpt": sharegpt, "messages": messages, "prompt_completion": prompt_completion,
    "text": text, "tinystories": text, "wikitext": text, "shakespeare": text,
    "json": auto, "jsonl": auto, "parquet": auto, "csv": auto,
}  # fmt: skip
HUB = {
    "gsm8k": ("openai/gsm8k", "main"),
    "mbpp": ("google-research-datasets/mbpp", "full"),
    "humaneval": ("openai/openai_humaneval", None),
    "codealpaca": ("sahil2801/CodeAlpaca-20k", None),
    "tinystories": ("roneneldan/TinyStories", None),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
