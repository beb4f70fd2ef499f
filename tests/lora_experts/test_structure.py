"""Laws of form: no import circle, one owner for every attribute, files of one idea."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import headgate.methods.lora_experts as package

ROOT = Path(package.__file__).parent
FILES = sorted(ROOT.glob("*.py"))


def imports(path: Path) -> set[str]:
    """Files of this package that a file imports: at its top, inside functions and for type checkers alike."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    prefix = package.__name__ + "."
    return {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)} & {
        file.stem for file in FILES
    }


def test_no_file_imports_itself_through_others() -> None:
    graph = {file.stem: imports(file) for file in FILES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert order.index("config") < order.index("experts") < order.index("stream") < order.index("method")


def test_no_part_writes_another_ones_private_attribute() -> None:
    """``self.x._y = ...`` and ``other._y = ...`` are written by the owner only."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute) and target.attr.startswith("_"):
                    owner = target.value
                    assert isinstance(owner, ast.Name) and owner.id == "self", f"{file.name}:{node.lineno}"


def test_a_file_is_one_idea() -> None:
    assert {file.name for file in FILES if len(file.read_text().splitlines()) > 300} == set()
