"""Programs: MBPP, HumanEval, APPS and CodeContests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from headgate.data.readers.base import RawRow
from headgate.errors import DataError

from ..config import SourceConfig
from .base import Row, field, fill, string

MBPP_PROMPT = "{text}\nYour code should pass these tests:\n{tests}\n"
CONTEST_PROMPT = "{question}\nWrite a Python program that reads standard input.\n"


def mbpp(raw: RawRow, where: str, config: SourceConfig) -> Iterator[Row]:
    """Task text and its tests as the prompt, the reference program as the completion."""
    text, code = string(raw, where, "text", "prompt"), string(raw, where, "code")
    tests = field(raw, where, "test_list")
    setup = raw.get("test_setup_code") or "\n".join(raw.get("test_imports") or [])
    yield {
        "prompt": fill(config, MBPP_PROMPT, where, text=text, tests="\n".join(tests)),
        "completion": code.replace("\r\n", "\n").replace("\t", "    ").strip("\n"),
        "meta_tests": list(tests),
        "meta_setup": setup,
        "meta_task_id": int(field(raw, where, "task_id")),
    }


def mbpp_split(raw: dict[str, object], where: str) -> str:
    """The official division of the one-file MBPP by task id."""
    task = int(field(raw, where, "task_id"))
    return "prompt" if task <= 10 else "test" if task <= 510 else "validation" if task <= 600 else "train"


def humaneval(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """A signature with its docstring to complete, and the tests' ``check``."""
    yield {
        "prompt": string(raw, where, "prompt"),
        "completion": string(raw, where, "canonical_solution"),
        "meta_tests": [string(raw, where, "test")],
        "meta_entry_point": string(raw, where, "entry_point"),
        "meta_task_id": field(raw, where, "task_id"),
    }


def _decoded(value: object, where: str, name: str) -> Any:
    """APPS keeps lists as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else []
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: field '{name}' is not JSON ({error.msg})") from error


def apps(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """``question``, ``solutions`` (the first is trained; a problem without one is left out), ``difficulty``."""
    solutions = _decoded(raw.get("solutions"), where, "solutions") or []
    question = string(raw, where, "question")
    starter = str(raw.get("starter_code") or "")
    if solutions:
        yield {
            "prompt": fill(config, CONTEST_PROMPT, where, question=question) + (starter and starter + "\n"),
            "completion": str(solutions[0]).replace("\r\n", "\n").strip("\n"),
            "family": str(raw.get("difficulty") or "unknown"),
            "meta_tests": [json.dumps(_decoded(raw.get("input_output"), where, "input_output") or {})],
        }


def code_contests(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """DeepMind's CodeContests: ``description``, ``solutions`` by language (3 is Python 3; others are left out)."""
    solutions = field(raw, where, "solutions")
    pairs = list(zip(solutions["language"], solutions["solution"]))
    python = [code for language, code in pairs if language in (3, "3", "PYTHON3")]
    if python:
        tests = raw.get("public_tests") or {}
        yield {
            "prompt": fill(config, CONTEST_PROMPT, where, question=string(raw, where, "description")),
            "completion": str(python[0]).replace("\r\n", "\n").strip("\n"),
            "family": str(raw.get("difficulty") or "unknown"),
            "meta_tests": [json.dumps(tests)],
        }
