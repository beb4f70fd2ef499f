"""Every leaf of every setting, given what it cannot be: one line with its dotted place and the value, and no model loaded."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import annotated_types
import pytest
from pydantic import BaseModel

from headgate.errors import ConfigError
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import recipe_from
from headgate.methods.names import METHODS
from headgate.methods.registry import method_class

BESIDE: dict[str, dict[str, Any]] = {
    "SkillConfig": {"skill": "farm"},
    "Stage": {"name": "first", "train": {"lora": 1e-4}},
    "CompareConfig": {"arms": {"lora": {}}},
    "TuneConfig": {"values": [1e-4]},
}
"""What a block must have besides the leaf that is wrong."""
WRONG_FOR_ALL = (None, True, 5, 1.5, "no such thing", ["a"], {"a": 1}, math.inf, -math.inf, math.nan)
OPEN = (dict, list)
"""Kinds whose content is judged elsewhere: only what is no mapping, or no list, is wrong here."""


def members(annotation: Any) -> list[tuple[Any, list[Any]]]:
    """The kinds that a value may have, each with its bounds."""
    if typing.get_origin(annotation) is Annotated:
        inner, *bounds = typing.get_args(annotation)
        return [(kind, [*own, *unfolded(bounds)]) for kind, own in members(inner)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [one for inner in typing.get_args(annotation) for one in members(inner)]
    return [(annotation, [])]


def unfolded(metadata: Any) -> Iterator[Any]:
    """Bounds as annotated_types tells them, also where pydantic's Field holds them."""
    for one in metadata:
        yield from getattr(one, "metadata", [one])


def admits(kind: Any, value: Any) -> bool:
    """Whether a value is of a kind, bounds aside."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return True
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(kind))
    if origin is list:
        inner = members(typing.get_args(kind)[0])
        return isinstance(value, list) and all(any(admits(k, v) for k, _ in inner) for v in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(typing.get_args(kind))
    if origin is dict:
        inner = members(typing.get_args(kind)[1])
        return isinstance(value, dict) and all(any(admits(k, v) for k, _ in inner) for v in value.values())
    if kind in (int, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return number and (kind is float or value == int(value))
    if kind is type(None):
        return value is None
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return isinstance(value, dict)  # its own leaves are walked
    return isinstance(value, kind)


def beyond(bounds: list[Any]) -> Iterator[float]:
    """Numbers just outside the bounds."""
    for bound in bounds:
        match bound:
            case annotated_types.Ge(ge=low):
                yield low - 1
            case annotated_types.Gt(gt=low):
                yield from (low, low - 1)
            case annotated_types.Le(le=high):
                yield high + 1
            case annotated_types.Lt(lt=high):
                yield from (high, high + 1)


def wrong_values(annotation: Any, metadata: list[Any]) -> list[Any]:
    """What a field of this annotation cannot be: of another kind, beyond a bound, misspelt, no finite number."""
    kinds = [(kind, [*bounds, *unfolded(metadata)]) for kind, bounds in members(annotation)]
    numbers = [bounds for kind, bounds in kinds if kind in (int, float)]
    candidates = list(WRONG_FOR_ALL)
    candidates += [f"{choice}x" for kind, _ in kinds if typing.get_origin(kind) is typing.Literal for choice in typing.get_args(kind)]  # fmt: skip
    candidates += [2**60] if any(kind is int for kind, _ in kinds) else []
    wrong = [value for value in candidates if not any(admits(kind, value) for kind, _ in kinds)]
    if any(kind is int for kind, _ in kinds):
        wrong.append(2**60)
    if len(numbers) == 1:
        wrong += list(beyond(numbers[0]))
    return wrong


def leaves(model: type[BaseModel], place: tuple[str, ...] = (), seen: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[Any]]]:  # fmt: skip
    """(place, wrong values) of every field below a model; lists and mappings of models are entered once."""
    for name, field in model.model_fields.items():
        here = (*place, name)
        yield here, wrong_values(field.annotation, field.metadata)
        for kind, _ in members(field.annotation):
            inner, below = kind, here
            if typing.get_origin(kind) is list:
                inner, below = typing.get_args(kind)[0], (*here, "0")
            elif typing.get_origin(kind) is dict:
                inner, below = typing.get_args(kind)[1], (*here, "one")
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner not in seen:
                yield from leaves(inner, below, (*seen, inner))


def content_with(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A recipe that is right but for ``value`` at ``place``."""
    content: Any = value
    for index in range(len(place) - 1, -1, -1):
        content = [content] if place[index] == "0" else {**_beside(place[:index]), place[index]: content}
    return content


def _beside(place: tuple[str, ...]) -> dict[str, Any]:
    """What the block at ``place`` must have."""
    return dict(BESIDE.get(_block_at(place), {}))


def _block_at(place: tuple[str, ...]) -> str:
    model: Any = Recipe
    for part in place:
        if part in ("0", "one"):
            continue
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return ""
        found = [a for kind, _ in members(field.annotation) for a in (kind, *typing.get_args(kind)) if isinstance(a, type) and issubclass(a, BaseModel)]  # fmt: skip
        model = found[0] if found else None
    return getattr(model, "__name__", "")


LEAVES = dict(leaves(Recipe))
LEAVES |= {
    ("methods", name, *place): wrong
    for name in METHODS.names()
    for place, wrong in leaves(method_class(name).Config)
}
LEAVES["evaluation", "0", "source"].remove(None)  # the task's own source
COUNT = sum(map(len, LEAVES.values()))


def test_the_walk_reaches_every_block() -> None:
    assert COUNT > 2000 and len(LEAVES) > 300, (COUNT, len(LEAVES))
    for place in ("training.learning_rate", "data.stream.0.steps", "evaluation.0.top_p", "compare.tune.seed", "methods.lora_experts.spawn.confidence"):  # fmt: skip
        assert LEAVES[tuple(place.split("."))], place


@pytest.mark.parametrize("place", LEAVES, ids=".".join)
def test_every_invalid_leaf_is_one_line_with_place_and_value(place: tuple[str, ...]) -> None:
    dotted = ".".join(place)
    for value in LEAVES[place]:
        try:
            recipe_from(content_with(place, value), "r.yaml")
        except ConfigError as error:
            said = str(error)
            assert "\n" not in said, said
            assert dotted in said or dotted.removesuffix(".0") in said, f"{dotted}={value!r}: {said}"
            assert said.startswith("r.yaml: "), said
            if not isinstance(value, (dict, list)):
                assert repr(value) in said or (value is None and "null" in said), (
                    f"{dotted}={value!r}: {said}"
                )
        else:
            pytest.fail(f"{dotted}={value!r} is taken for valid")
