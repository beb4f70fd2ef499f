"""What every reader shares: the shape of a row, fields with a place, prompt templates.

A normalised row has one of: ``prompt`` + ``completion``; ``messages`` (with ``tools``); ``text``. It may have
``answer`` (the gold one) or ``answers`` (any of them), ``choices`` (their texts, ``answer`` the letter of the right
one), ``family`` (a field or skill), and ``meta_*`` columns that a scorer needs. A reader gets the raw row, the
place it came from (for errors) and the source's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from headgate.errors import DataError

from ..config import SourceConfig

Row = dict[str, Any]
RawRow = Mapping[str, Any]
"""A row as its source has it, or as its reader left it: columns by name, of whatever kind."""
Reader = Callable[[RawRow, str, SourceConfig], Iterator[Row]]


def field(raw: Mapping[str, object], where: str, *names: str) -> Any:
    """The first of ``names`` that the row has; DataError names the place and what it has instead."""
    for name in names:
        if raw.get(name) is not None:
            return raw[name]
    wanted = " or ".join(f"'{name}'" for name in names)
    has = ", ".join(str(name) for name in raw if raw[name] is not None) or "nothing"
    raise DataError(f"{where}: no field {wanted} (the row has: {has})")


def string(raw: Mapping[str, object], where: str, *names: str) -> str:
    """``field`` that must be text or a number."""
    value = field(raw, where, *names)
    if isinstance(value, (dict, list)):
        raise DataError(f"{where}: field '{names[0]}' is {type(value).__name__}, text is needed")
    return str(value)


def fill(config: SourceConfig, default: str, where: str, **values: str) -> str:
    """The prompt: ``options.prompt_template`` or the reader's own."""
    template = str(config.options.get("prompt_template", default))
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"options.prompt_template {json.dumps(template)} asks for {error}, but {where} offers {', '.join(values)}"
        ) from error
