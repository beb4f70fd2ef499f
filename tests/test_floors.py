"""Imports point down only: no floor imports a higher one, and no two packages of a floor import each other."""

from __future__ import annotations

import ast
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
FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem in FLOORS)


def imported(path: Path) -> set[str]:
    """Top-level headgate packages that a file imports, relative imports resolved."""
    package = path.relative_to(ROOT.parent).with_suffix("").parts[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            names.add(".".join(part for part in (base, node.module or "") if part))
    return {name.split(".")[1] for name in names if name.startswith("headgate.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imported(path) - {own}:
        assert other in FLOORS, f"{path} imports headgate.{other}, which stands on no floor"
        assert FLOORS[other] <= FLOORS[own], (
            f"{path} (floor {FLOORS[own]}) imports {other} (floor {FLOORS[other]})"
        )


def test_no_sideways_cycle() -> None:
    edges = {
        (path.relative_to(ROOT).parts[0].removesuffix(".py"), other)
        for path in FILES
        for other in imported(path)
    }
    for a, b in edges:
        assert a == b or (b, a) not in edges, f"{a} and {b} import each other"


def test_transformers_internals_stay_in_models() -> None:
    """Only models/ reaches into transformers.models or a PEFT layer's insides."""
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "models":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith(("transformers.models", "peft.tuners")), (
                    f"{path}: {node.module}"
                )
