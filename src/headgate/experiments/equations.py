"""Equation of the paper -> function and line -> the tests that prove it, read from docstrings.

The convention, in the docstring of any function, method or class below ``ops``, ``modules`` or ``methods``:

    Equation: METHOD (LABEL): FORMULA
    Proved by: tests/folder/test_file.py::test_name

A docstring may hold several of each; every test of it proves every equation of it. ``LABEL`` is the number or the name that
the paper (or the method's page) gives the equation. Nothing is imported: the files are parsed.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from headgate.errors import ConfigError

PACKAGE = Path(__file__).parent.parent
FLOORS = ("ops", "modules", "methods")
_EQUATION = re.compile(r"(?P<method>\w+) \((?P<label>[^)]+)\): (?P<formula>\S.*)")
_TEST = re.compile(r"\S+\.py::\w+")


@dataclass(frozen=True)
class Equation:
    """One equation: where it is computed, and the tests that fall when it is computed wrongly."""

    method: str
    label: str
    formula: str
    file: str
    line: int
    function: str
    tests: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def equations(method: str) -> list[Equation]:
    """A method's equations, by label. Raises ConfigError for a method that does not exist or writes none down.

    A method from another package is looked up in that package's files.
    """
    found = [e for e in every_equation() if e.method == method]
    if not found:
        from headgate.methods.registry import (
            method_class,
        )  # imports torch: only where a name is not one of ours

        folder = Path(inspect.getfile(method_class(method))).parent
        found = [e for e in _in_files(sorted(folder.rglob("*.py")), folder.parent) if e.method == method]
    if not found:
        raise ConfigError(
            f"{method} writes no equation down: put lines 'Equation: {method} (LABEL): FORMULA' and 'Proved by: "
            "tests/test_x.py::test_y' into the docstring of the function that computes it"
        )
    return sorted(found, key=_by_label)


def every_equation() -> list[Equation]:
    """Those of Headgate itself. Raises ConfigError naming a line that does not follow the convention."""
    files = [path for floor in FLOORS for path in sorted((PACKAGE / floor).rglob("*.py"))]
    return list(_in_files(files, PACKAGE.parent))


def _in_files(files: Iterable[Path], root: Path) -> Iterator[Equation]:
    for path in files:
        for name, node in _documented(ast.parse(path.read_text()), ""):
            yield from _in_docstring(str(path.relative_to(root)), name, node)


def _documented(tree: ast.AST, within: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield f"{within}{node.name}", node
            yield from _documented(node, f"{within}{node.name}.")


def _in_docstring(file: str, function: str, node: ast.FunctionDef | ast.ClassDef) -> Iterator[Equation]:
    lines = [line.strip() for line in (ast.get_docstring(node) or "").splitlines()]
    written = [line.removeprefix("Equation: ") for line in lines if line.startswith("Equation:")]
    tests = tuple(line.removeprefix("Proved by: ") for line in lines if line.startswith("Proved by:"))
    place = f"{file}:{node.lineno} {function}"
    for test in tests:
        if not _TEST.fullmatch(test):
            raise ConfigError(f"{place}: 'Proved by: {test}' is not of the form tests/file.py::test_name")
    if bool(written) != bool(tests):
        raise ConfigError(
            f"{place}: an equation needs a 'Proved by:' line beside it, and the other way round"
        )
    for line in written:
        match = _EQUATION.fullmatch(line)
        if match is None:
            raise ConfigError(f"{place}: 'Equation: {line}' is not of the form METHOD (LABEL): FORMULA")
        yield Equation(match["method"], match["label"], match["formula"], file, node.lineno, function, tests)


def _by_label(equation: Equation) -> list[tuple[int, int, str]]:
    """Numbers by value, before words."""
    parts = re.findall(r"\d+|\D+", equation.label)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def markdown(found: Iterable[Equation]) -> str:
    """A table for a page: without line numbers, so that it changes only when what it says does."""
    rows = ["| | equation | computed by | proved by |", "|---|---|---|---|"]
    for e in found:
        formula = e.formula.replace("|", "\\|")
        tests = ", ".join(f"`{test.removeprefix('tests/')}`" for test in e.tests)
        rows.append(f"| {e.label} | `{formula}` | `{e.function}` in `{e.file}` | {tests} |")
    return "\n".join(rows)
