"""Every equation that a method's specification lists has a function and a test that exist, and the pages say so."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headgate.cli.main import command_line
from headgate.errors import ConfigError
from headgate.experiments.equations import Equation, _in_docstring, equations, every_equation, markdown

ROOT = Path(__file__).parent.parent
LISTED = {
    "schema_bank": {
        "2, 3", "4", "5", "6", "7", "8", "9", "10", "11, 12", "section 3.3", "adaptive k", "reuse",
    },
    "backward_gate": {"step 1", "step 2", "step 3", "step 4", "profitability"},
    "layer_routing": {
        "function", "patch", "gumbel", "exit", "stochastic depth", "topk", "reinforce", "KD", "utilization",
        "budget lagrangian", "budget penalty", "budget target", "budget exact", "bounded logits", "threshold", "adaptivity",
        "kv drop", "kv reuse",
    },
    "lora_experts": {
        "bank", "temperature", "gates", "balance", "z-loss", "entropies", "capacity", "KD", "projection", "orthogonality",
        "embedding", "similarity", "threshold 5.1", "calibrated threshold", "interval", "NT-Xent", "rank doubling", "merge",
        "likeness", "rank law 5.6", "closed-form router", "Bayes router", "Arrow",
    },
}  # fmt: skip
"""Label by label what each method's specification writes as a formula."""
COUNTED = {"backward_gate": {"step 1": 4, "step 2": 3, "step 3": 3, "step 4": 3}}
"""Steps of a recipe that hold several formulas."""


@pytest.mark.parametrize("method", LISTED)
def test_every_listed_equation_is_written_down(method: str) -> None:
    found = equations(method)
    assert {e.label for e in found} == LISTED[method]
    for label, count in COUNTED.get(method, {}).items():
        assert sum(e.label == label for e in found) == count, label


def test_no_equation_is_of_a_method_that_does_not_exist() -> None:
    assert {e.method for e in every_equation()} == set(LISTED)


@pytest.mark.parametrize("equation", every_equation(), ids=lambda e: f"{e.method}-{e.label}-{e.function}")
def test_function_and_tests_exist(equation: Equation) -> None:
    module = importlib.import_module(equation.file.removesuffix(".py").replace("/", "."))
    target = module
    for part in equation.function.split("."):
        target = getattr(target, part)
    assert callable(target)
    for test in equation.tests:
        path, _, name = test.partition("::")
        functions = {
            node.name
            for node in ast.parse((ROOT / path).read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{equation.file}:{equation.line} is proved by {test}, which does not exist"


@pytest.mark.parametrize("method", LISTED)
def test_the_page_has_the_current_table(method: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text()
    assert (
        f"<!-- equations: {method} -->\n{markdown(equations(method))}\n<!-- end of equations -->" in page
    ), "stale: run python scripts/write_equations.py"


def parsed(docstring: str) -> list[Equation]:
    node = ast.parse(f'def f():\n    """{docstring}"""').body[0]
    assert isinstance(node, ast.FunctionDef)
    return list(_in_docstring("a.py", "f", node))


@pytest.mark.parametrize(
    ("docstring", "message"),
    [
        ("x\n\n    Equation: m (1): y = x", "needs a 'Proved by:' line"),
        ("x\n\n    Proved by: tests/test_a.py::test_b", "needs a 'Proved by:' line"),
        ("x\n\n    Equation: y = x\n    Proved by: tests/test_a.py::test_b", "is not of the form METHOD"),
        (
            "x\n\n    Equation: m (1): y = x\n    Proved by: test_b",
            "is not of the form tests/file.py::test_name",
        ),
    ],
)
def test_a_line_that_breaks_the_convention_is_named(docstring: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"a.py:1 f: .*{message}"):
        parsed(docstring)


def test_several_equations_share_their_tests() -> None:
    both = parsed(
        "x\n\n    Equation: m (1): y = |x|\n    Equation: n (2): z\n    Proved by: t.py::a\n    Proved by: t.py::b"
    )
    assert [(e.method, e.label, e.formula, e.tests) for e in both] == [
        ("m", "1", "y = |x|", ("t.py::a", "t.py::b")),
        ("n", "2", "z", ("t.py::a", "t.py::b")),
    ]
    assert "`y = \\|x\\|`" in markdown(both)


def test_the_command() -> None:
    runner = CliRunner()
    told = runner.invoke(command_line("equations"), ["equations", "schema_bank"])
    assert told.exit_code == 0 and "(7)  L_orth" in told.output and "ops/low_rank.py:" in told.output
    listed = json.loads(
        runner.invoke(command_line("equations"), ["equations", "layer_routing", "--json"]).output
    )
    assert {row["label"] for row in listed} == LISTED["layer_routing"] and all(
        row["line"] > 0 for row in listed
    )
    unknown = runner.invoke(command_line("equations"), ["equations", "schemabank"])
    assert isinstance(unknown.exception, ConfigError) and "did you mean 'schema_bank'" in str(
        unknown.exception
    )
    none = runner.invoke(command_line("equations"), ["equations", "ewc"])
    assert isinstance(none.exception, ConfigError) and "ewc writes no equation down" in str(none.exception)
