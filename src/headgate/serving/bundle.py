"""One self-contained modeling file, put together from Headgate's own sources.

An exported folder must run where Headgate is not installed, and compute to the last bit what Headgate computes. A second
implementation would drift; so the file is made of the definitions that the served classes reach, copied as they stand:
what is served is what is tested. Annotations are not evaluated (every module has ``from __future__ import annotations``)
and reach nothing. Two definitions of one name get the name of their package appended.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import headgate

ROOT = Path(headgate.__file__).parent
START = ("headgate.serving.modeling", ("HeadgateConfig", "HeadgateForCausalLM"))
ANNOTATED = ("from typing", "from collections.abc")
"""What annotations read; imported too, so that a reader finds every such name."""
HEAD = '''"""A model trained with Headgate {version}: its base architecture, with its routing. Needs torch and transformers.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Written by `headgate export --to transformers` from Headgate's own sources; each part names the module it comes from.
"""

from __future__ import annotations

'''


@dataclass
class Source:
    """One module of Headgate: what it defines, what it imports, and what each definition reaches."""

    name: str
    needed: set[str] = field(default_factory=set)

    @cached_property
    def text(self) -> str:
        return (ROOT.parent / (self.name.replace(".", "/") + ".py")).read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def definitions(self) -> dict[str, ast.stmt]:
        """Top-level functions, classes and values by name."""
        found: dict[str, ast.stmt] = {}
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name] = node
            elif isinstance(node, ast.Assign):
                bound = (name for target in node.targets for name in every_name(target))
                found |= {name.id: node for name in bound}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = node
        return found

    @cached_property
    def internal(self) -> dict[str, tuple[str, str]]:
        """What is imported from Headgate: local name -> (module, name there)."""
        return {
            alias.asname or alias.name: (node.module, alias.name)
            for node in self.tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "headgate"
            for alias in node.names
            if node.module
        }

    @cached_property
    def external(self) -> dict[str, str]:
        """Imports from elsewhere: local name -> the statement that binds it."""
        found = {}
        for node in self.tree.body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    told = alias.name + (f" as {alias.asname}" if alias.asname else "")
                    found[alias.asname or alias.name.split(".")[0]] = f"import {told}"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "headgate":
                for alias in node.names:
                    told = alias.name + (f" as {alias.asname}" if alias.asname else "")
                    found[alias.asname or alias.name] = f"from {node.module} import {told}"
        return found

    def lines_of(self, node: ast.stmt) -> tuple[int, int]:
        """First and last line of a definition, its decorators included, counted from 1."""
        decorated = getattr(node, "decorator_list", [])
        return min([node.lineno, *(d.lineno for d in decorated)]), node.end_lineno or node.lineno


def reached(node: ast.AST) -> Iterator[ast.Name]:
    """The names that a definition reads when it runs: annotations are left out."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Name):
                yield child
            if isinstance(child, ast.AST):
                yield from reached(child)


def closure(module: str, names: tuple[str, ...]) -> list[Source]:
    """The modules that ``names`` reach, each with the definitions needed, dependencies first."""
    sources: dict[str, Source] = {}
    order: list[str] = []

    def visit(module: str, name: str) -> None:
        source = sources.setdefault(module, Source(module))
        if name in source.needed:
            return
        if name not in source.definitions:
            if name in source.internal:
                visit(*source.internal[name])
                return
            raise ImportError(f"{module} defines no {name!r}: a served definition reaches it")
        source.needed.add(name)
        for used in reached(source.definitions[name]):
            if used.id in source.internal:
                visit(*source.internal[used.id])
            elif used.id in source.definitions:
                visit(module, used.id)

    for name in names:
        visit(module, name)

    def place(module: str) -> None:
        if module in order:
            return
        for used in sorted({module for module, _ in sources[module].internal.values()}):
            if used in sources:
                place(used)
        order.append(module)

    for name in sorted(sources):
        place(name)
    return [sources[name] for name in order]


def renamed(sources: list[Source]) -> dict[tuple[str, str], str]:
    """(module, name) -> the name in the file, where two modules define the same one."""
    owners: dict[str, list[str]] = {}
    for source in sources:
        for name in source.needed:
            owners.setdefault(name, []).append(source.name)
    return {
        (module, name): f"{name}_of_{module.split('.')[-2]}"
        for name, modules in owners.items()
        if len(modules) > 1
        for module in modules[1:]
    }


def text_of(source: Source, names: dict[tuple[str, str], str]) -> str:
    """The needed definitions of a module in its own order, under their names in the file."""
    local = {name: names[source.name, name] for name in source.definitions if (source.name, name) in names}
    local |= {alias: names.get(place, place[1]) for alias, place in source.internal.items()}
    local = {old: new for old, new in local.items() if old != new}
    lines, parts, seen = source.text.splitlines(), [], set()
    for name, node in source.definitions.items():
        first, last = source.lines_of(node)
        if name not in source.needed or first in seen:
            continue
        seen.add(first)
        body = lines[first - 1 : last]
        changes = [(name.lineno, name.col_offset, name.id) for name in every_name(node) if name.id in local]
        for row, column, old in sorted(changes, reverse=True):
            at = len(lines[row - 1].encode()[:column].decode())
            line = body[row - first]
            body[row - first] = line[:at] + local[old] + line[at + len(old) :]
        defined = getattr(node, "name", None)
        if defined in local:
            at = node.lineno - first
            body[at] = body[at].replace(defined, local[defined], 1)
        if bound := {arg.arg for arg in ast.walk(node) if isinstance(arg, ast.arg)} & local.keys():
            raise ImportError(f"{source.name}.{name} has arguments {sorted(bound)}, which the file renames")
        parts.append("\n".join(body))
    return "\n\n\n".join(parts)


def every_name(node: ast.AST) -> Iterator[ast.Name]:
    return (child for child in ast.walk(node) if isinstance(child, ast.Name))


@cache
def modeling_file() -> str:
    """The text of ``modeling_headgate.py``. Raises ImportError where it would need more than torch and transformers.

    Reading and joining the sources takes a second, and they do not change while they run.
    """
    sources = closure(*START)
    names = renamed(sources)
    imports: dict[str, str] = {}
    for source in sources:
        nodes = [source.definitions[one] for one in source.needed]
        used = {name.id for node in nodes for name in reached(node)}
        every = {name.id for node in nodes for name in every_name(node)}
        for name in sorted(every & source.external.keys()):
            statement = source.external[name]
            if name not in used and not statement.startswith(ANNOTATED):
                continue
            if imports.setdefault(name, statement) != statement:
                raise ImportError(
                    f"{source.name} binds {name} by {statement!r}, another by {imports[name]!r}"
                )
    body = [
        f"# -- {source.name} {'-' * (96 - len(source.name))}\n\n{text_of(source, names)}"
        for source in sources
    ]
    head = HEAD.format(version=headgate.__version__)
    return head + "\n".join(sorted(set(imports.values()))) + "\n\n\n" + "\n\n\n".join(body) + "\n"
