"""A trainer is composed of parts: each attribute has one writer."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from pathlib import Path

import headgate.training as package
from headgate.training.trainer import HeadgateTrainer

ROOT = Path(package.__file__).parent


def assigned(source: str, owner: str = "self") -> set[str]:
    """Attributes of ``owner`` that a piece of source assigns, augments or deletes."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, (ast.Store, ast.Del))
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
    }


def test_no_attribute_of_the_trainer_is_assigned_in_two_classes() -> None:
    writers: dict[str, list[str]] = defaultdict(list)
    for kind in HeadgateTrainer.__mro__:
        if kind.__module__.startswith("headgate."):
            for name in assigned(textwrap.dedent(inspect.getsource(kind))):
                writers[name].append(kind.__name__)
    shared = {name: kinds for name, kinds in writers.items() if len(kinds) > 1}
    assert writers and not shared, shared


def test_no_part_assigns_an_attribute_of_the_trainer() -> None:
    """A part changes its own state; what is the trainer's, the mixin changes."""
    wrong = {}
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del))):
                continue
            value = node.value
            is_trainer = isinstance(value, ast.Name) and value.id == "trainer"
            is_trainer |= isinstance(value, ast.Attribute) and value.attr in ("trainer", "_trainer")
            if is_trainer:
                wrong[f"{path.name}:{node.lineno}"] = node.attr
    assert not wrong, wrong


def test_an_assignment_is_seen() -> None:
    source = "class A:\n def f(self):\n  self.a = 1\n  self.b += 1\n  keep, self.c = 1, 2\n  self.args.d = 3\n  self.e\n"
    assert assigned(source) == {"a", "b", "c"}
