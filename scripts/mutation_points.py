"""Where a source file can be mutated, and to what: one AST node at a time, the rest of the file byte for byte."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
CALLS = {
    "min": "max", "max": "min", "amin": "amax", "amax": "amin", "sum": "mean", "mean": "sum", "any": "all", "all": "any",
    "argmax": "argmin", "argmin": "argmax", "MIN": "MAX", "MAX": "MIN", "cummax": "cummin", "cummin": "cummax",
}  # fmt: skip
PLAIN = {"strict", "frozen", "kw_only", "slots", "help"}
"""Keyword arguments whose value decides nothing that a test could see."""


@dataclass(frozen=True)
class Mutant:
    """One node of one file: its place in bytes of lines, what stood there and what stands there now."""

    path: str
    line: int
    column: int
    end_line: int
    end_column: int
    kind: str
    old: str
    new: str
    function: str
    """The function or method around it, as in ``Class.method``; empty at module level."""
    digest: str
    nth: int
    """Which of its function's mutants of this kind and text it is."""

    @property
    def id(self) -> str:
        """The same wherever its function stands in its file."""
        return f"{self.path}:{self.function}:{self.digest}:{self.kind}:{self.old}:{self.new}:{self.nth}"

    def row(self) -> dict[str, Any]:
        return {"path": self.path, "line": self.line, "kind": self.kind, "old": self.old, "new": self.new}

    def applied(self, text: str) -> str:
        lines = [line.encode() for line in text.splitlines(keepends=True)]
        head = lines[self.line - 1][: self.column]
        tail = lines[self.end_line - 1][self.end_column :]
        lines[self.line - 1 : self.end_line] = [head + self.new.encode() + tail]
        return b"".join(lines).decode()


def mutants_of(path: Path, root: Path) -> list[Mutant]:
    """All mutants of a file, in the order of its nodes."""
    text = path.read_text()
    found = []
    alike: Counter[tuple[str, ...]] = Counter()
    for node, kind, changed, function, around in _points(ast.parse(text), "", "", ""):
        new = ast.unparse(changed)
        if isinstance(node, ast.expr) and not isinstance(
            node, (ast.Constant, ast.Name, ast.Attribute, ast.Call)
        ):
            new = f"({new})"
        old = " ".join((ast.get_source_segment(text, node) or "").split())
        assert node.end_lineno is not None and node.end_col_offset is not None
        # a file's other functions may change without this result growing stale
        digest = hashlib.sha1(around.encode()).hexdigest()[:8]
        start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        name = str(path.relative_to(root))
        same = (function, digest, kind, old, new)
        found.append(Mutant(name, *start, *end, kind, old, new, function, digest, alike[same]))
        alike[same] += 1
    return found


def outermost(
    tree: ast.AST, within: str = ""
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """(function, ``Class.method``) of every function that stands in no other function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, f"{within}{node.name}"
        elif isinstance(node, ast.ClassDef):
            yield from outermost(node, f"{within}{node.name}.")
        else:
            yield from outermost(node, within)


def _points(
    node: ast.AST, within: str, function: str, around: str
) -> Iterator[tuple[Any, str, ast.AST, str, str]]:
    if isinstance(node, ast.ClassDef) and not function:
        within += f"{node.name}."
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not function:
        function, around = f"{within}{node.name}", ast.unparse(node)
    for kind, changed in _changes(node):
        yield node, kind, changed, function, around or ast.unparse(node)
    if isinstance(node, (ast.If, ast.While)):  # the test is replaced, not the block below it
        yield node.test, "condition", ast.UnaryOp(ast.Not(), node.test), function, around or ast.unparse(node)
    for child in _children(node):
        yield from _points(child, within, function, around)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Without annotations, decorators, messages of errors and the insides of f-strings."""
    if isinstance(node, (ast.JoinedStr, ast.Raise, ast.Assert)):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.keyword) and child.arg in PLAIN:
                continue
            if isinstance(child, ast.AST):
                yield child


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(kind, the node changed) of every mutation of this very node."""

    def but(**fields: Any) -> Any:
        changed = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(changed, name, value)
        return changed

    match node:
        case ast.Constant(value=bool() as value):
            yield "constant", but(value=not value)
        case ast.Constant(value=int() as value):
            yield "constant", but(value=value + 1)
        case ast.Constant(value=float() as value):
            yield "constant", but(value=value * 2 if value else 1.0)
        case ast.Compare(ops=[op]) if type(op) in COMPARE:
            yield "comparison", but(ops=[COMPARE[type(op)]()])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in ARITHMETIC:
            yield "arithmetic", but(op=ARITHMETIC[type(op)]())
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()):
            yield "negation", node.operand
        case ast.BoolOp(op=op):
            yield "logic", but(op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.Call(func=ast.Name(id=name)) if name in CALLS:
            yield "reduction", but(func=ast.Name(CALLS[name], ast.Load()))
        case ast.Attribute(attr=name) if name in CALLS:
            yield "reduction", but(attr=CALLS[name])
        case ast.IfExp():
            yield "condition", but(test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield "return", but(value=ast.Constant(None))
