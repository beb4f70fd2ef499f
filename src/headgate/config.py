"""The strict base of every configuration: unknown keys are errors, values are frozen, complaints name the cure."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import ValidationInfo

from headgate.errors import ConfigError

LARGEST = 2**53
"""Of an integer: every reader of JSON agrees up to here, and no setting means more."""


class StrictConfig(BaseModel):
    """A frozen configuration that forbids unknown keys, and numbers that are not finite.

    ``strict`` stays off so that YAML's ``1`` is accepted where a float is meant. A string is never accepted where a
    number is meant, nor ``yes`` where a number, nor a number where yes or no is meant: pydantic would convert them.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields.get(info.field_name or "")
        if field is not None and (wrong := _converted(field.annotation, value)) is not None:
            raise ValueError(wrong)
        return value


Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""What every generator of random numbers takes: numpy's takes no more than 32 bits, and none below zero."""


def _converted(annotation: object, value: object) -> str | None:
    """Why a plain value is not of its field's kind although pydantic would convert it; None where it is."""
    kinds = set(_kinds(annotation))
    if isinstance(value, (list, tuple)):
        inner = next(
            (typing.get_args(kind) for kind in kinds if typing.get_origin(kind) in (list, tuple)), ()
        )
        found = (_converted(inner[0], item) for item in value if inner)
        return next((f"every item {wrong}" for wrong in found if wrong is not None), None)
    numbers, plain = kinds & {int, float}, kinds <= {int, float, bool, type(None)}
    named = "an integer" if numbers == {int} else "a number"
    if isinstance(value, bool):
        return f"should be {named}, not yes or no" if numbers and not kinds & {bool, typing.Any} else None
    if plain and isinstance(value, (str, int, float)) and not (numbers and not isinstance(value, str)):
        return f"should be {named}" if numbers else "should be true or false"
    return _too_large(value) if type(value) is int else None


def _too_large(value: int) -> str | None:
    return f"should be at most {LARGEST}" if abs(value) > LARGEST else None


def _kinds(annotation: object) -> list[object]:
    """The types that a field may have, unions and ``Annotated`` opened."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for inner in typing.get_args(annotation) for kind in _kinds(inner)]
    return [annotation]


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


Config = TypeVar("Config", bound=StrictConfig)


def build_config(config_class: type[Config], options: Mapping[str, object], where: str = "") -> Config:
    """Validate keyword options; pydantic's complaints become one ConfigError, which names ``where`` or the class."""
    try:
        return config_class(**options)
    except ValidationError as error:
        details = "; ".join(complaints(error, config_class, where))
        raise ConfigError(details if where else f"{config_class.__name__}: {details}") from None


def complaints(error: ValidationError, model: type[BaseModel], where: str = "") -> list[str]:
    """What pydantic says of ``model``, a line for each place, however many kinds a value could have had there."""
    by_place: dict[str, list[tuple[str, str]]] = {}
    for item in error.errors():
        said = explain(item, model, where)
        given = _given(item) if said.endswith(_given(item)) else ""
        by_place.setdefault(".".join(place_of(item, model)), []).append((said.removesuffix(given), given))
    lines = []
    for found in by_place.values():  # several of a union: every member says why it is not the one
        first, *others = dict(found)
        rest = [line.split(": ", 1)[-1].removeprefix("should be ") for line in others]
        lines.append(" or ".join([first, *rest]) + found[0][1])
    return lines


def explain(item: ErrorDetails, model: type[BaseModel], where: str = "") -> str:
    """One of pydantic's complaints about ``model``: dotted place below ``where``, what is wrong, the value given."""
    parts = place_of(item, model)
    dotted = ".".join([where, *parts] if where else parts)
    if item["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, parts[:-1]))
        close = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{dotted}: unknown key: {hint}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if dotted and message.startswith(f"{dotted}."):
        return message
    if item["type"] == "literal_error":
        named = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        close = difflib.get_close_matches(str(item.get("input")), named, n=1)
        message = (f"did you mean {close[0]!r}? " if close else "") + f"choose one of {', '.join(named)}"
    return (f"{dotted}: " if dotted else "") + message + _given(item)


def _given(item: ErrorDetails) -> str:
    """The value that was given, where it is one that fits into a line."""
    value = item.get("input")
    if isinstance(value, BaseModel) or item["type"] == "missing":
        return ""
    if isinstance(value, (dict, list)) and (item["type"] == "value_error" or len(repr(value)) > 80):
        return ""  # the message names what it is about
    return f" (got {'null' if value is None else repr(value)})"


def place_of(item: ErrorDetails, model: type[BaseModel]) -> list[str]:
    """Where a complaint points, as the keys that a user wrote: pydantic also names the member of a union that it tried."""
    annotation: object = model
    parts = []
    for part in item["loc"]:
        if isinstance(part, str) and part.startswith("function-"):
            continue
        members = [kind for kind in _kinds(annotation) if kind is not type(None)]
        if len(members) > 1:
            named = [kind for kind in members if getattr(kind, "__name__", None) == part]
            inside = [kind for kind in members if typing.get_origin(kind) is not None]
            annotation = (named or inside or [object])[0]
            continue
        parts.append(str(part))
        annotation = _child(members[0] if members else object, part)
    return parts


def _child(annotation: object, part: int | str) -> object:
    """What stands below a key or an index of something of this type; ``object`` where that is not known."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return object if field is None else field.annotation
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and isinstance(part, int) and part < len(inner):
        return inner[part]
    return inner[-1] if inner else object


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


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, dict, typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            found = _model_in(inner)
            if found is not None:
                return found
    return None
