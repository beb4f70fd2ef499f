"""The folder is composed, not tangled: no file imports one that imports it, by whatever way."""

from __future__ import annotations

import ast
from pathlib import Path

import headgate.methods.layer_routing as package

FOLDER = Path(package.__file__).parent
PREFIX = package.__name__


def imports(path: Path) -> set[str]:
    """Files of the folder that ``path`` imports, inside functions and under TYPE_CHECKING too."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            modules |= {
                f"{PREFIX}.{node.module}" if node.module else f"{PREFIX}.{a.name}" for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {module.removeprefix(f"{PREFIX}.") for module in modules if module.startswith(f"{PREFIX}.")}
    return {name for name in files if (FOLDER / f"{name}.py").exists()}


def circle(graph: dict[str, set[str]], start: str) -> list[str]:
    """A way from ``start`` back to it, or []."""
    stack = [[start, after] for after in graph[start]]
    visited: set[str] = set()
    while stack:
        way = stack.pop()
        if way[-1] == start:
            return way
        if way[-1] not in visited:
            visited.add(way[-1])
            stack += [[*way, after] for after in graph[way[-1]]]
    return []


def test_no_import_circle() -> None:
    graph = {path.stem: imports(path) for path in FOLDER.glob("*.py")}
    assert graph["method"] >= {"budget", "forward", "teacher", "figures"}, "the walk sees no import"
    for name in graph:
        assert not circle(graph, name), " -> ".join(circle(graph, name))


def test_no_mixin() -> None:
    """One base: what LayerRouting is made of, it owns."""
    from headgate.methods.base import Method

    assert package.LayerRouting.__bases__ == (Method,)
