"""Imports point down only and go in no circle, file by file, inside a folder too.

An import inside a function counts like any other: it hides a circle from Python's start-up and from nobody who reads. Only
what stands under ``if TYPE_CHECKING`` does not: it names a type and runs no code, yet it still may not point upward. A
package's ``__init__`` is imported with every file of it, so the graph has that edge from outside the package; from inside,
the file and its ``__init__`` belong together, as in Python, where a file of a package starts with its ``__init__`` half done.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "headgate"
FLOORS = {
    "errors": -1,
    "config": -1,
    "files": -1,
    "plugins": -1,
    "ops": 0,
    "modules": 1,
    "models": 2,
    "methods": 3,
    "data": 3,
    "serving": 4,
    "training": 4,
    "evaluation": 5,
    "experiments": 6,
    "testing": 7,
    "cli": 7,
}


@dataclass(frozen=True)
class Edge:
    """``file`` imports ``target``, both dotted below the root; at ``line``, ``runs`` unless only a type is named."""

    file: str
    target: str
    line: int
    runs: bool


def dotted(path: Path, root: Path) -> str:
    """``ops/depth.py`` -> ``ops.depth``; a package by its folder, the root's own by the root's name."""
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def edges_of(root: Path) -> list[Edge]:
    """Every import of one file of ``root`` by another, wherever it stands."""
    files = {dotted(path, root): path for path in sorted(root.rglob("*.py"))}
    found = []
    for name, path in files.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text())
        types_only = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            for statement in node.body
            for inner in ast.walk(statement)
        }
        root_for_itself = _reads_only_its_own(tree, root.name, files)
        for node in ast.walk(tree):
            for target in _targets(node, package, files):
                if target == root.name and root_for_itself:
                    continue
                for imported in {target, *_packages_entered(target, name)} - {name}:
                    found.append(Edge(name, imported, node.lineno, node not in types_only))  # type: ignore[attr-defined]
    return found


def _reads_only_its_own(tree: ast.AST, name: str, files: Mapping[str, Path]) -> bool:
    """Whether a file takes nothing from the root package but ``__version__`` and ``__file__``, which import nothing."""
    uses = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }
    uses |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == name and not node.level
        for alias in node.names
        if f"{name}.{alias.name}" not in files
    }
    return uses <= {"__version__", "__file__"}


def _targets(node: ast.AST, package: str, files: Mapping[str, Path]) -> set[str]:
    """The files that one statement imports; of ``from package import name`` the file ``name`` where there is one."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & files.keys()
    if not isinstance(node, ast.ImportFrom):
        return set()
    base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
    base = ".".join(part for part in (base, node.module or "") if part)
    parts = {f"{base}.{alias.name}" for alias in node.names}
    whole = {base} if parts - files.keys() else set()
    return ((parts | whole) & files.keys()) if base else set()


def _packages_entered(target: str, importer: str) -> set[str]:
    """``__init__`` files that Python runs on the way to ``target`` and has not begun for ``importer``."""
    parts = target.split(".")
    above = {".".join(parts[:n]) for n in range(2, len(parts))}
    return {package for package in above if not f"{importer}.".startswith(f"{package}.")}


def circle_of(edges: list[Edge]) -> list[str]:
    """A way from some file back to itself over imports that run, or []."""
    graph: dict[str, list[str]] = {}
    for edge in edges:
        if edge.runs:
            graph.setdefault(edge.file, []).append(edge.target)
    done: set[str] = set()
    for start in graph:
        way, pending = [start], [iter(graph[start])]
        while pending:
            after = next(pending[-1], None)
            if after is None:
                done.add(way.pop())
                pending.pop()
            elif after in way:
                return [*way[way.index(after) :], after]
            elif after not in done:
                way.append(after)
                pending.append(iter(graph.get(after, [])))
    return []


def upward(edges: list[Edge]) -> list[str]:
    """Imports of a higher floor, or of what stands on none, in words."""
    found = []
    for edge in edges:
        own, other = (name.split(".")[1] if "." in name else "" for name in (edge.file, edge.target))
        if not own:  # headgate/__init__ stands above the house
            continue
        place = f"{edge.file}:{edge.line} (floor {FLOORS.get(own)})"
        if other not in FLOORS:
            found.append(f"{place} imports {edge.target}, which stands on no floor")
        elif FLOORS[other] > FLOORS[own]:
            found.append(f"{place} imports {edge.target} (floor {FLOORS[other]})")
    return found


EDGES = edges_of(ROOT)


def test_the_walk_sees_imports() -> None:
    seen = {(edge.file, edge.target) for edge in EDGES}
    assert ("headgate.ops.depth", "headgate.ops.routing_losses") in seen
    assert ("headgate.testing.laws", "headgate.training.saved") in seen
    assert len({edge.file for edge in EDGES}) > 200


def test_every_file_stands_on_a_floor() -> None:
    for path in ROOT.rglob("*.py"):
        first = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert first in {*FLOORS, "__init__"}, f"{path} stands on no floor"


def test_imports_point_down() -> None:
    assert not upward(EDGES), "\n".join(upward(EDGES))


def test_no_circle_of_files() -> None:
    assert not circle_of(EDGES), " -> ".join(circle_of(EDGES))


PLANTED = {
    "two files": ({"ops/a.py": "from headgate.ops.b import x", "ops/b.py": "import headgate.ops.a"}, ["ops.a", "ops.b"]),
    "inside functions": (
        {"ops/a.py": "def f():\n    from .b import x", "ops/b.py": "def g():\n    from . import a"},
        ["ops.a", "ops.b"],
    ),
    "three files, two folders": (
        {"ops/a.py": "from headgate.modules import b", "modules/b.py": "from ..ops.c import x", "ops/c.py": "from .a import y"},
        ["ops.a", "modules.b", "ops.c"],
    ),
    "through a package's __init__": (
        {"ops/__init__.py": "from headgate.modules.b import x", "ops/a.py": "", "modules/b.py": "from headgate.ops.a import y"},
        ["ops", "modules.b"],
    ),
}  # fmt: skip


def planted(root: Path, files: Mapping[str, str]) -> list[Edge]:
    for name, text in {"__init__.py": "", "ops/__init__.py": "", "modules/__init__.py": "", **files}.items():
        (root / "headgate" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "headgate" / name).write_text(text)
    return edges_of(root / "headgate")


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_circle_is_found(case: str, tmp_path: Path) -> None:
    files, members = PLANTED[case]
    found = circle_of(planted(tmp_path, files))
    assert set(found) == {f"headgate.{name}" for name in members}, found
    assert found[0] == found[-1]


def test_a_type_alone_makes_no_circle_but_may_not_point_up(tmp_path: Path) -> None:
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from headgate.modules.b import X\n"
    edges = planted(tmp_path, {"ops/a.py": typed, "modules/b.py": "from headgate.ops.a import y"})
    assert not circle_of(edges)
    (line,) = {line for line in upward(edges) if "modules.b" in line}
    assert line == "headgate.ops.a:3 (floor 0) imports headgate.modules.b (floor 1)"


@pytest.mark.parametrize("statement", ["from headgate.cli import x", "def f():\n    import headgate.cli.x"])
def test_a_planted_upward_import_is_found(statement: str, tmp_path: Path) -> None:
    edges = planted(tmp_path, {"ops/a.py": statement, "cli/__init__.py": "", "cli/x.py": ""})
    assert any("headgate.cli" in line for line in upward(edges))
    assert not upward(
        planted(
            tmp_path / "down",
            {"cli/x.py": "from headgate.ops import a", "ops/a.py": "", "cli/__init__.py": ""},
        )
    )


def test_the_root_may_be_asked_for_its_version_only(tmp_path: Path) -> None:
    files = {
        "ops/a.py": "import headgate\nprint(headgate.__version__)",
        "ops/b.py": "import headgate\nheadgate.load",
        "ops/c.py": "from headgate import __version__",
        "ops/d.py": "from headgate import load",
    }
    places = [line.split(" ")[0] for line in upward(planted(tmp_path, files))]
    assert places == ["headgate.ops.b:1", "headgate.ops.d:1"]


def test_transformers_internals_stay_in_models() -> None:
    """Only models/ reaches into transformers.models or a PEFT layer's insides."""
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] == "models":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith(("transformers.models", "peft.tuners")), (
                    f"{path}: {node.module}"
                )


def loops_over_methods(path: Path) -> list[int]:
    """Lines of loops and comprehensions over something named ``methods``, ``headgate_methods`` or ``stack``."""
    tree, lines = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.comprehension)):
            iterated = node.iter
            named = {n.id for n in ast.walk(iterated) if isinstance(n, ast.Name)}
            named |= {n.attr for n in ast.walk(iterated) if isinstance(n, ast.Attribute)}
            named |= {
                n.value
                for n in ast.walk(iterated)
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
            target = {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
            if named & {"methods", "headgate_methods", "stack"} and target & {"method", "m"}:
                lines.append(iterated.lineno)
    return sorted(lines)


@pytest.mark.parametrize("floor", ["training", "evaluation", "experiments"])
def test_loops_over_methods_stand_in_the_stack(floor: str) -> None:
    """What a trainer or a run asks of its methods is a verb of MethodStack."""
    found = {
        str(p.relative_to(ROOT)): lines
        for p in sorted((ROOT / floor).rglob("*.py"))
        if (lines := loops_over_methods(p))
    }
    assert not found, f"loops over methods outside MethodStack: {found}"


def test_a_loop_over_methods_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "loops.py"
    source.write_text(
        "for method in self.methods: pass\n"
        "any(m.is_adapter for m in methods)\n"
        "for method in getattr(model, 'headgate_methods', ()): pass\n"
        "for name in recipe.methods: pass\n"
    )
    assert loops_over_methods(source) == [1, 2, 3]


def test_the_walk_names_files_that_exist_and_none_three_times() -> None:
    page = (ROOT.parent.parent / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([a-z_/]+\.py)`", page)
    assert len(named) > 20
    for name in set(named):
        assert (ROOT / name).exists() or (ROOT.parent.parent / name).exists(), f"{name} is gone"
        assert named.count(name) < 3, f"{name} is visited {named.count(name)} times"
