"""Instructions and conversations: Alpaca, ShareGPT, ``messages`` with tools, prompt and completion."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from headgate.data.readers.base import RawRow
from headgate.errors import DataError

from ..config import SourceConfig
from .base import Row, field, fill, string

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "### Input:\n{input}\n\n### Response:\n"
)
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "function": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
TURN_KEYS = {
    "role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "reasoning", "weight",
}  # fmt: skip


def alpaca(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """Alpaca and CodeAlpaca: ``instruction``, optional ``input``, ``output`` or ``response``, optional ``answer``."""
    context = str(raw.get("input") or "").strip()
    template = ALPACA_INPUT if context else ALPACA
    row = {
        "prompt": fill(config, template, where, instruction=string(raw, where, "instruction"), input=context),
        "completion": string(raw, where, "output", "response"),
    }
    yield with_answers(row, raw)


def with_answers(row: Row, raw: RawRow) -> Row:
    """The gold answers that a raw row carries beside its completion."""
    several = raw.get("answers")
    if isinstance(several, list) and several and not isinstance(several[0], dict):
        row["answers"] = [str(answer) for answer in several]
        row["answer"] = row["answers"][0]
    elif raw.get("answer") is not None and not isinstance(raw["answer"], (list, dict)):
        row["answer"] = str(raw["answer"])
    if isinstance(raw.get("choices"), list) and raw["choices"]:
        row["choices"] = [str(choice) for choice in raw["choices"]]
    if raw.get("family") is not None:
        row["family"] = str(raw["family"])
    return row


def sharegpt(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """``conversations`` of ``from`` and ``value``; an optional ``system`` prompt and ``tools``."""
    turns: list[dict[str, object]] = []
    if raw.get("system"):
        turns.append({"role": "system", "content": str(raw["system"])})
    for number, turn in enumerate(field(raw, where, "conversations", "conversation"), start=1):
        role = ROLES.get(str(turn.get("from") or turn.get("role")))
        if role is None:
            raise DataError(
                f"{where}: turn {number} is from '{turn.get('from')}' (known: {', '.join(ROLES)})"
            )
        turns.append({"role": role, "content": string(turn, f"{where}, turn {number}", "value", "content")})
    yield _conversation(turns, raw, where)


def messages(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """A list of turns with ``role`` and ``content``, ``tool_calls`` and their results; ``tools`` beside it."""
    turns = decoded(field(raw, where, "messages"), where, "messages")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: field 'messages' must be a list of role/content objects that is not empty")
    yield _conversation([clean_turn(turn, f"{where}, message {n}") for n, turn in enumerate(turns, 1)], raw, where)  # fmt: skip


def decoded(value: object, where: str, name: str) -> Any:
    """Conversations and tools are often stored as JSON text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: field '{name}' is not JSON ({error.msg})") from error
    return value


def clean_turn(turn: object, place: str) -> dict[str, object]:
    """A turn as chat templates want it. What a format's columns filled with null is left out; calls are kept."""
    if not isinstance(turn, dict):
        raise DataError(f"{place}: a message is an object with role and content, not {type(turn).__name__}")
    turn = {key: value for key, value in turn.items() if value is not None}
    role = str(field(turn, place, "role"))
    if role not in set(ROLES.values()):
        raise DataError(
            f"{place}: role '{role}' is unknown (known: {', '.join(sorted(set(ROLES.values())))})"
        )
    calls = decoded(turn.get("tool_calls"), place, "tool_calls")
    if calls:
        turn["tool_calls"] = [_clean_call(call, place) for call in calls]
        turn.setdefault("content", "")
    else:
        turn.pop("tool_calls", None)
    field(turn, place, "content")
    unknown = set(turn) - TURN_KEYS
    return {key: value for key, value in turn.items() if key not in unknown}


def _clean_call(call: Any, place: str) -> dict[str, object]:
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function, dict) or not function.get("name"):
        raise DataError(f"{place}: a tool call needs function.name and function.arguments")
    arguments = decoded(function.get("arguments") or {}, place, "arguments")
    cleaned: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    return cleaned | ({"id": call["id"]} if call.get("id") else {})


def _conversation(turns: list[dict[str, object]], raw: Mapping[str, object], where: str) -> Row:
    row: Row = {"messages": turns}
    tools = decoded(raw.get("tools") or None, where, "tools")
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise DataError(f"{where}: field 'tools' must be a list of JSON schemas")
        row["tools"] = tools
    elif any("tool_calls" in turn for turn in turns) and "functions" in raw:
        row["tools"] = [{"type": "function", "function": f} for f in decoded(raw["functions"], where, "functions") or []]  # fmt: skip
    return with_answers(row, raw)


def prompt_completion(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """``prompt`` and ``completion``: text, or TRL's lists of turns; optional ``answer``, ``answers``, ``choices``."""
    prompt, completion = field(raw, where, "prompt"), field(raw, where, "completion")
    if isinstance(prompt, list):  # TRL's conversational form
        turns = [clean_turn(turn, f"{where}, message {n}") for n, turn in enumerate([*prompt, *completion], 1)]  # fmt: skip
        yield _conversation(turns, raw, where)
    else:
        yield with_answers(
            {"prompt": string(raw, where, "prompt"), "completion": string(raw, where, "completion")}, raw
        )
