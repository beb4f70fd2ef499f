"""Reference solutions pass and their mutants fail; extraction; the unbiased pass@k."""

from __future__ import annotations

import ast
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.data.config import SourceConfig
from headgate.data.sources import load_rows
from headgate.evaluation.code_tasks import (
    extract_code,
    pass_at_k,
    pieces,
    reference_programs,
    replace_returns,
)
from headgate.evaluation.jail.judge import subjects
from headgate.evaluation.sandbox import run_program, run_programs, tally
from headgate.evaluation.sandbox_watch import Limits

SLOW = Limits(seconds=60.0)  # for references: a loaded machine is not their fault


def mbpp(shared: Path, file: str = "mbpp.jsonl") -> list[dict[str, Any]]:
    return [
        row
        for split in ("prompt", "test", "validation", "train")
        for row in load_rows(SourceConfig(source="mbpp", path=str(shared / "data/mbpp" / file), split=split))
    ]


def humaneval(shared: Path) -> list[dict[str, Any]]:
    path = str(shared / "data/humaneval/HumanEval.jsonl.gz")
    return list(load_rows(SourceConfig(source="humaneval", path=path, split="test")))


@pytest.mark.shared
def test_a_sample_of_references_passes_and_of_mutants_fails(shared: Path) -> None:
    rows = mbpp(shared)
    assert len(rows) == 974
    setups = [row for row in rows if row["meta_setup"]]
    sample = [*rows[::33], *setups, *humaneval(shared)[::16]]
    assert setups and tally(run_programs(reference_programs(sample), SLOW)) == {"passed": len(sample)}
    assert "passed" not in tally(run_programs(reference_programs(sample, mutated=True), SLOW))


@pytest.mark.shared
@pytest.mark.slow
def test_all_references_pass_and_all_mutants_fail(shared: Path) -> None:
    """974 MBPP solutions and as many mutants, 427 sanitized, 164 of HumanEval and as many mutants."""
    rows, problems = mbpp(shared), humaneval(shared)
    assert (len(rows), len(problems)) == (974, 164)
    assert tally(run_programs(reference_programs(rows), SLOW)) == {"passed": 974}
    assert tally(run_programs(reference_programs(problems), SLOW)) == {"passed": 164}
    assert tally(run_programs(reference_programs(mbpp(shared, "sanitized-mbpp.json")), SLOW)) == {
        "passed": 427
    }
    assert "passed" not in tally(run_programs(reference_programs(rows, mutated=True), SLOW))
    assert "passed" not in tally(run_programs(reference_programs(problems, mutated=True), Limits(seconds=5)))


@pytest.mark.shared
def test_tests_ask_the_solution_for_values_and_compare_them_themselves(shared: Path) -> None:
    """One name stands for the solution, and a class beside it in three problems; no method of a result is called."""
    several = []
    for row in [*mbpp(shared), *mbpp(shared, "sanitized-mbpp.json"), *humaneval(shared)]:
        tests = pieces(row, row["completion"])[1:]
        ours = subjects(tests)
        if len(ours) != 1:
            several.append((row["meta_task_id"], ours))
        for node in (node for _, source in tests for node in ast.walk(ast.parse(source))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                names = {each.id for each in ast.walk(node.func) if isinstance(each, ast.Name)}
                assert not names & (ours | {"candidate"}), ast.unparse(node)
    assert {(number, min(ours)) for number, ours in several} == {(367, "Node"), (601, "Pair"), (927, "Node")}


def test_setup_runs_after_the_solution_and_before_the_tests() -> None:
    row = {"meta_tests": ["assert f(root) == 1"], "meta_setup": "root = Node(1)"}
    answer = "class Node:\n    def __init__(self, v): self.v = v\ndef f(n): return n.v"
    assert [name for name, _ in pieces(row, answer)] == ["solution", "setup", "test 1"]
    assert run_program(pieces(row, answer)).passed


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([i < correct for i in range(n)], k))
    assert math.isclose(pass_at_k(n, correct, k), sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_beyond_the_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(3, 1, 4)


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("Sure!\n```python\ndef f():\n    return 1\n```\nThat is it.", "def f():\n    return 1"),
        ("```\ndef f(): return 1\n```", "def f(): return 1"),
        ("```py\ndef f(): return 1", "def f(): return 1"),
        ("```python\r\ndef f(): return 1\r\n```", "def f(): return 1"),
        ("```python\nprint(1)\n```\n```python\ndef f(): return 1\n```", "def f(): return 1"),
        ("[BEGIN]\ndef f(): return 1\n[DONE]\nmore", "def f(): return 1"),
        ("[PYTHON]\ndef f(): return 1\n[/PYTHON]", "def f(): return 1"),
        ("def f(): return 1\n```\nExplanation", "def f(): return 1"),
        ("", ""),
    ],
)
def test_extraction(output: str, code: str) -> None:
    assert extract_code(output, "f") == code


@pytest.mark.parametrize(
    "output",
    [
        "    return xs[0]\n",
        "```python\nfrom typing import List\ndef f(xs: List[int]) -> int:\n    return xs[0]\n```",
        "Here:\n```python\ndef f(xs):\n    return helper(xs)\ndef helper(xs):\n    return xs[0]\n```\nDone.",
        "```python\n    return xs[0]\n```",
    ],
)
def test_humaneval_answers_as_body_or_as_whole_function(output: str) -> None:
    row = {
        "prompt": 'from typing import List\n\ndef f(xs: List[int]) -> int:\n    """First."""\n',
        "meta_entry_point": "f",
        "meta_tests": ["def check(candidate):\n    assert candidate([7, 8]) == 7\n"],
    }
    assert run_program(pieces(row, output)).passed


def test_a_helper_of_the_prompt_is_not_the_solutions() -> None:
    """HumanEval 32: a solution that redefines ``poly`` would make every number a root."""
    row = {
        "prompt": "def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\ndef find_zero(xs):\n",
        "meta_entry_point": "find_zero",
        "meta_tests": ["def check(candidate):\n    assert abs(poly([6, 2], candidate([6, 2]))) < 1e-4\n"],
    }
    assert run_program(pieces(row, "    return -3.0\n")).passed
    assert run_program(pieces(row, "    return 1.0\n")).status == "assertion"
    assert (
        run_program(pieces(row, "    return 1.0\n\ndef poly(xs, x):\n    return 0\n")).status == "assertion"
    )


def test_a_mutant_differs_only_in_what_it_returns() -> None:
    code = "import math\nCALLS = []\ndef f(x):\n    CALLS.append(x)\n    return math.sqrt(x)\n"
    mutant = replace_returns(code)
    assert run_program([("solution", mutant), ("test", "f(4); assert CALLS == [4]")]).passed
    for test in ("assert f(4) == 2", "assert f(4)", "assert not (f(4) != 2) and f(4) == 2", "assert {f(4)}"):
        assert not run_program([("solution", mutant), ("test", test)]).passed
