"""The strict base of every configuration: unknown keys are errors, values are frozen, complaints name the cure."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict


class StrictConfig(BaseModel):
    """A frozen configuration that forbids unknown keys.

    ``strict`` stays off so that YAML's ``1`` is accepted where a float is meant; a string is never
    accepted where a number is meant.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


_FILE_NAME = re.compile(r"[^\W_][\w .+@=,()-]*")
"""A letter or digit, then letters, digits, spaces and a few signs: no separator, no hidden file, no way upwards."""


def file_name(name: str) -> str:
    """``name``, if files may be called so everywhere. Raises ValueError, which pydantic tells with the key's place."""
    if not _FILE_NAME.fullmatch(name) or len(name) > 120 or name.endswith((" ", ".")):
        raise ValueError(
            f"{name!r} names files: begin with a letter or digit and use letters, digits, spaces and - _ . + @ = , ( ) "
            "only, at most 120 of them"
        )
    return name


FileName = Annotated[str, AfterValidator(file_name)]


def explain(item: Mapping[str, Any], model: type[BaseModel], where: str = "") -> str:
    """One of pydantic's complaints about ``model``: dotted place below ``where``, what is wrong, the value given."""
    parts = place_of(item)
    dotted = ".".join([where, *parts] if where else parts)
    if item["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, parts[:-1]))
        close = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{dotted}: unknown key: {hint}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if dotted and message.startswith(f"{dotted}."):
        return message
    given = item.get("input")
    if item["type"] == "literal_error" and isinstance(given, str):
        choices = re.findall(r"'([^']*)'", item.get("ctx", {}).get("expected", ""))
        close = difflib.get_close_matches(given, choices, n=1)
        message += f": did you mean {close[0]!r}?" if close else ""
    told = given is not None and not isinstance(given, (dict, list, BaseModel))
    return (f"{dotted}: " if dotted else "") + message + (f" (got {given!r})" if told else "")


def place_of(item: Mapping[str, Any]) -> list[str]:
    """Where a complaint points, as the keys that a user wrote."""
    return [str(part) for part in item["loc"] if not (isinstance(part, str) and part.startswith("function-"))]


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> set[str]:
    """Field names of the configuration at a path below ``model``."""
    for part in path:
        if part.isdigit():
            continue
        field = model.model_fields.get(part)
        inner = _model_in(field.annotation) if field is not None else None
        if inner is None:
            return set()
        model = inner
    return set(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, dict, typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            found = _model_in(inner)
            if found is not None:
                return found
    return None
