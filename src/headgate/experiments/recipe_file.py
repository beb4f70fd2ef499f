"""Read a recipe: YAML, ``base:`` inheritance, ``--set`` overrides, and errors with the dotted path and the cure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from headgate.config import complaints, explain, place_of
from headgate.errors import ConfigError
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_names import ALIASES, REMOVED
from headgate.experiments.records import Content
from headgate.experiments.shipped import shipped, shipped_names

EXCLUSIVE = (("epochs", "max_steps"), ("max_steps", "epochs"))
"""Keys of which one replaces the other: setting it over a recipe that has the other takes that one out."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key written twice is an error, and 1e-4 is a number."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[object, object]:
    seen: set[object] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise ConfigError(
                f"{node.start_mark.name}, line {key_node.start_mark.line + 1}: key {key!r} is written twice"
            )
        seen.add(key)
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    loader = _UniqueKeys(text)
    loader.name = where
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
    finally:
        loader.dispose()


def merge(base: Mapping[str, object], override: Mapping[str, object]) -> Content:
    """``override`` over ``base``: mappings merge, everything else replaces.

    ``methods`` names exactly the methods that run: one that ``override`` leaves out is off.
    """
    merged = dict(base)
    for one, other in EXCLUSIVE:
        if override.get(one) is not None and other not in override:
            merged.pop(other, None)
    for key, value in override.items():
        old = merged.get(key)
        if key == "methods" and isinstance(value, Mapping):
            old = old if isinstance(old, Mapping) else {}
            merged[key] = {name: merge(old.get(name) or {}, options or {}) for name, options in value.items()}
        elif isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def set_dotted(content: dict[str, object], dotted: str, value: object) -> None:
    """``content["a"]["b"] = value`` for ``a.b``; a number indexes a list."""
    node: Any = content
    *parents, last = dotted.split(".")
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, dotted)]
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"{dotted}: {'.'.join(parents[: i + 1])} is a value, not a section")
    if isinstance(node, list):
        node[_index(node, last, dotted)] = value
        return
    for one, other in EXCLUSIVE:
        if last == one and value is not None:  # null takes nothing's place
            node.pop(other, None)
    node[last] = value


def _index(node: list[object], part: str, dotted: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"{dotted}: {part!r} is no index of a list of {len(node)}")
    return int(part)


def _apply_aliases(content: dict[str, object]) -> list[str]:
    """Move aliased keys to their names; return what was moved, for the plan."""
    used = []
    for alias, name in ALIASES.items():
        found, value = _pop_dotted(content, alias)
        if found:
            set_dotted(content, name, value)
            used.append(f"{alias} -> {name}")
    return used


def _pop_dotted(content: object, dotted: str) -> tuple[bool, object]:
    *parents, last = dotted.split(".")
    for part in parents:
        if not isinstance(content, dict) or part not in content:
            return False, None
        content = content[part]
    if not isinstance(content, dict) or last not in content:
        return False, None
    return True, content.pop(last)


def read_content(path: str | Path, _chain: tuple[Path, ...] = ()) -> Content:
    """The file's mapping with its ``base:`` recipes merged underneath."""
    path = Path(path)
    if not path.exists() and not _chain:
        path = shipped(str(path)) or path
    if not path.exists():
        beside = [str(found) for found in path.parent.glob("*.y*ml")]
        short = str(path).removeprefix("recipes/").removesuffix(".yaml")
        close = difflib.get_close_matches(str(path), beside, n=1) or (
            difflib.get_close_matches(short, shipped_names(), n=1) if not _chain else []
        )
        hint = f"did you mean {close[0]}?" if close else "headgate recipes lists those of the package"
        raise ConfigError(f"recipe {path} does not exist: {hint}")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a recipe file")
    resolved = path.resolve()
    if resolved in _chain:
        raise ConfigError(f"base: {path} inherits from itself through {' -> '.join(map(str, _chain))}")
    content = parse_yaml(_text_of(path), str(path))
    if content is None:
        raise ConfigError(f"recipe {path} is empty: give it at least a name, a model or data")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not a mapping of recipe keys")
    used = _apply_aliases(content)
    base = content.pop("base", None)
    if base is not None:
        content = merge(read_content(path.parent / base, (*_chain, resolved)), content)
    content.setdefault("_aliases", []).extend(used)
    return content


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}, line {line}: byte {error.object[error.start]:#04x} is not UTF-8: save the recipe as UTF-8"
        ) from None


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A validated recipe. Raises ConfigError with the dotted path of whatever is wrong."""
    return recipe_of_content(read_content(path), overrides, str(path))


def recipe_of_content(content: dict[str, object], overrides: Iterable[str], where: str) -> Recipe:
    """``content`` with ``--set`` overrides, validated; errors begin with ``where``."""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: write it as --set a.b=value")
        set_dotted(content, dotted.strip(), parse_yaml(text, f"--set {dotted}"))
    return recipe_from(content, where)


def recipe_from(content: Content, where: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe."""
    content = {key: value for key, value in content.items() if key != "_aliases"}
    content = merge(content, {})
    _apply_aliases(content)
    try:
        recipe = Recipe(**content)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "\n  ".join(_told(error))) from None
    recipe._written = content
    return recipe


def aliases_used(path: str | Path) -> list[str]:
    """The seed names that a recipe file uses, with their Headgate names."""
    used: list[str] = read_content(path).get("_aliases", [])
    return used


def _told(error: ValidationError) -> list[str]:
    """A line for each place; a key of an old transformers version is told by its new name."""
    gone = {}
    for item in error.errors():
        parts = place_of(item, Recipe)
        generic = ".".join(part for part in parts if not part.isdigit())
        if item["type"] == "extra_forbidden" and generic in REMOVED:
            gone[explain(item, Recipe)] = f"{'.'.join(parts)}: this name is gone; use {REMOVED[generic]}"
    return [gone.get(line, line) for line in complaints(error, Recipe)]


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, object]:
    """JSON Schema of a recipe, with the methods' own blocks."""
    from headgate.methods.names import METHODS, config_class

    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    blocks = {}
    for name in METHODS.names():
        config = config_class(name)
        own = config.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(own.pop("$defs", {}))
        definitions[config.__name__] = own
        blocks[name] = {"$ref": f"#/$defs/{config.__name__}"}
    schema["properties"]["methods"] = {
        "type": "object",
        "properties": blocks,
        "additionalProperties": False,
        "default": {},
        "title": "Methods",
    }
    return schema
