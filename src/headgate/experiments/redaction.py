"""What a published file must not show: secrets given on the command line, and where somebody's files lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

HIDDEN = "***"
_SECRET_NAME = re.compile(r"(token|secret|passw(or)?d|api[_-]?key|credential)", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b"
)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def without_secrets(text: str) -> str:
    """Tokens of known forms and the credentials of an address are replaced by ``***``."""
    return _CREDENTIALS.sub(f"{HIDDEN}@", _SECRET_VALUE.sub(HIDDEN, text))


def command_line(arguments: Sequence[str]) -> list[str]:
    """A command line fit to be kept: no secret values, no absolute paths outside the working directory."""
    kept: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if hide_next:
            kept.append(HIDDEN)
            hide_next = False
        elif equals and _SECRET_NAME.search(name):
            kept.append(f"{name}={HIDDEN}")
        else:
            hide_next = argument.startswith("-") and not equals and bool(_SECRET_NAME.search(name))
            kept.append(without_secrets(f"{name}={shown_path(value)}" if equals else shown_path(argument)))
    return kept


def shown_path(text: str) -> str:
    """An absolute path relative to the working directory, or its last part with ``...`` before; other text as it is."""
    path = Path(text)
    if not path.is_absolute() or "\n" in text:
        return text
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return f".../{path.name}" if path.name else text


def published(content: object) -> object:
    """Recipe or result content as a card may show it: paths shortened, secrets hidden."""
    if isinstance(content, Mapping):
        return {key: HIDDEN if _is_secret(key, value) else published(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [published(item) for item in content]
    return without_secrets(shown_path(content)) if isinstance(content, str) else content


def _is_secret(key: object, value: object) -> bool:
    return isinstance(value, str) and bool(value) and bool(_SECRET_NAME.search(str(key)))
