"""Pages of the documentation site that are made, not written: a hook of mkdocs (``mkdocs.yml``).

README, EXPERIMENTS, CHANGELOG and CONTRIBUTING become pages with their links turned; the reference comes from the recipe's schema, the
command line's own help and the public docstrings, so that it cannot differ from the code.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))  # mkdocs loads a hook by its file, alone

import gallery  # noqa: E402

PAGES = {
    "README.md": "index.md",
    "EXPERIMENTS.md": "evidence.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs' event: the made pages join those of ``docs/``."""
    from mkdocs.structure.files import File

    for name, text in {**made(), **gallery.pages()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def made() -> dict[str, str]:
    """Path below ``docs/`` -> its Markdown."""
    pages = {page: turned((ROOT / source).read_text()) for source, page in PAGES.items()}
    return {
        **pages,
        "reference/keys.md": keys(),
        "reference/commands.md": commands(),
        "reference/python.md": python(),
    }


def turned(text: str) -> str:
    """Links of a file at the root as links of a page of the site."""
    for source, page in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}")
    text = text.replace("](docs/methods/)", "](methods/schema_bank.md)").replace(
        "](docs/methods)", "](methods/schema_bank.md)"
    )
    text = re.sub(
        r"\[([^\]]*)\]\(examples/[^)]*\)", r"\1", text
    )  # code is in the repository, not on the site
    return re.sub(r"\]\(docs/", "](", text)


def keys() -> str:
    """Every key of a recipe with its type and default, from the JSON schema."""
    from headgate.experiments.recipe_file import json_schema

    schema = json_schema()
    lines = [
        "# Every key",
        "",
        "From the schema itself (`headgate schema`). [recipes.md](../recipes.md) explains them.",
        "",
    ]
    lines += ["| key | type | default |", "|---|---|---|"]
    for name, node in _leaves(schema, schema.get("$defs", {}), ""):
        default = f"`{node['default']!r}`" if "default" in node else ""
        lines.append(f"| `{name}` | {_type(node)} | {_cell(default)} |")
    return "\n".join(lines) + "\n"


def _leaves(
    node: Mapping[str, Any], defs: Mapping[str, Any], prefix: str, depth: int = 0
) -> Iterator[tuple[str, Any]]:
    for name, child in node.get("properties", {}).items():
        path = f"{prefix}{name}"
        inner = _inner(child, defs)
        if inner is not None and depth < 4:
            yield from _leaves(inner, defs, f"{path}.", depth + 1)
        else:
            yield path, child


def _inner(node: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The object that a key holds, through references and ``anyOf``; None for a plain value."""
    for candidate in (node, *node.get("anyOf", ()), *node.get("allOf", ())):
        found = defs[candidate["$ref"].rpartition("/")[2]] if "$ref" in candidate else candidate
        if found.get("properties"):
            return dict(found)
    return None


def _type(node: Mapping[str, Any]) -> str:
    if "enum" in node:
        return _cell(", ".join(f"`{value}`" for value in node["enum"]))
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(_type(each) for each in node["anyOf"]))
    if "const" in node:
        return f"`{node['const']}`"
    if "$ref" in node:
        return str(node["$ref"].rpartition("/")[2])
    return str(node.get("type", "any")).replace("null", "null (none)")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def commands() -> str:
    """Every verb with its arguments and options, from the command line itself."""
    import typer

    from headgate.cli.main import VERBS, command_line

    lines = [
        "# Commands",
        "",
        "From the program's own help. `--debug` shows the traceback of an error. Exit codes: 0 done; 1 something failed;",
    ]
    lines += ["2 a recipe or an argument is wrong; 130 interrupted, with the state saved.", ""]
    for verb, (_, summary) in VERBS.items():
        command: Any = typer.main.get_command(command_line(verb)).commands[verb]  # type: ignore[attr-defined]
        lines += [f"## headgate {verb}", "", summary, "", "| | |", "|---|---|"]
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            name = (
                ", ".join(parameter.opts)
                if parameter.param_type_name == "option"
                else str(parameter.name).upper()
            )
            lines.append(f"| `{_cell(name)}` | {_cell(getattr(parameter, 'help', None) or '')} |")
        lines.append("")
    return "\n".join(lines)


def python() -> str:
    """The public names of the package, their signatures and docstrings."""
    import headgate

    lines = ["# Python", ""]
    for name in headgate._PUBLIC:
        value = getattr(importlib.import_module(headgate._PUBLIC[name]), name)
        lines += [f"## headgate.{name}", "", *_described(f"{name}", value)]
        if inspect.isclass(value):
            for member, function in vars(value).items():
                if member.startswith("_") or not (
                    inspect.isfunction(function) or isinstance(function, property)
                ):
                    continue
                lines += [f"### {name}.{member}", "", *_described(member, function)]
    return "\n".join(lines)


def _described(name: str, value: Any) -> list[str]:
    text = inspect.getdoc(value) or ""
    try:
        signature = "" if isinstance(value, property) else str(inspect.signature(value))
    except (TypeError, ValueError):
        signature = ""
    return (
        ["```python", f"{name}{signature}", "```", "", "```text", text, "```", ""]
        if text
        else ["```python", f"{name}{signature}", "```", ""]
    )
