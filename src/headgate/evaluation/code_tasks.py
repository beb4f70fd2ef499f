"""MBPP and HumanEval: prompts, code extraction, pass@1 and pass@k, in the sandbox.

MBPP (Austin et al. 2021, arXiv 2108.07732): ``test_setup_code`` runs *after* the solution and before the tests.
HumanEval and the unbiased pass@k: Chen et al. 2021, arXiv 2107.03374.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from headgate.data.readers.base import RawRow
from headgate.data.sources import load_rows
from headgate.evaluation.code_extraction import extract_code
from headgate.evaluation.config import EvalTask
from headgate.evaluation.generation import generate
from headgate.evaluation.predictions import Figures, Item, prompt_hash
from headgate.evaluation.sandbox import describe_isolation, require_permission, run_programs, tally
from headgate.evaluation.sandbox_watch import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOPS = {
    "mbpp": ["\n[DONE]", "\nassert ", "\nprint(", "\nif __name__", '\n"""', "\n\n\n\n"],
    "humaneval": ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\n```"],
}


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased: ``1 - C(n-c, k) / C(n, k)`` (Chen et al. 2021, eq. 1). Raises ValueError for k > n."""
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} samples is not defined")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def pieces(row: RawRow, output: str) -> list[tuple[str, str]]:
    """What to execute for one item and one answer: the solution, then what judges it, in order."""
    entry = row.get("meta_entry_point")
    if entry is None:
        setup = [("setup", row["meta_setup"])] if row.get("meta_setup") else []
        tests = [(f"test {i}", test) for i, test in enumerate(row["meta_tests"], 1)]
        return [("solution", extract_code(output)), *setup, *tests]
    code = extract_code(output, entry)
    preamble = row["prompt"].split(f"def {entry}")[0]  # imports and helpers that the prompt brings
    if re.search(rf"^def\s+{re.escape(entry)}\b", code, re.MULTILINE):
        code = preamble + code
    elif "```" in output or "~~~" in output:
        code = row["prompt"] + code + "\n"
    else:
        code = row["prompt"] + output.rstrip() + "\n"
    # The helpers again, for the tests: ``poly`` that judges a root (HumanEval 32) must not be the solution's.
    helpers = [("prompt", preamble)] if preamble.strip() else []
    return [("solution", code), *helpers, ("tests", row["meta_tests"][0]), ("check", f"check({entry})")]


def replace_returns(code: str) -> str:
    """The program with every returned value replaced by one that equals nothing: a wrong solution for any test."""

    class Replace(ast.NodeTransformer):
        def visit_Return(self, node: ast.Return) -> ast.Return:
            return ast.Return(ast.Call(ast.Name("_Wrong", ast.Load()), [], []))

    wrong = (
        "class _Wrong:\n    __hash__ = None\n    def __eq__(self, other): return False\n"
        "    def __ne__(self, other): return False\n    def __bool__(self): return False\n"
    )
    return wrong + ast.unparse(ast.fix_missing_locations(Replace().visit(ast.parse(code))))


def code_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvalTask,
    progress: Callable[[int, int], None] | None,
    prefix: str = "",
) -> tuple[Figures, list[Item]]:
    """Metrics (accuracy = pass@1, pass@k, how programs ended) and one item per problem."""
    require_permission(task.allow_code_execution)
    rows = list(load_rows(task.source_config()))
    kind = "humaneval" if rows[0].get("meta_entry_point") else "mbpp"
    prompts = [prefix + row["prompt"] for row in rows]
    n = task.samples_per_item
    outputs = generate(
        model,
        tokenizer,
        [prompt for prompt in prompts for _ in range(n)],
        max_new_tokens=task.max_new_tokens,
        batch_size=task.batch_size,
        do_sample=task.do_sample,
        temperature=task.temperature,
        top_p=task.top_p,
        seed=task.seed,
        stop=STOPS[kind],
        progress=progress,
    )
    programs = [pieces(rows[i // n], output.text) for i, output in enumerate(outputs)]
    outcomes = run_programs(programs, Limits(seconds=task.code_seconds))
    items = []
    for index, (row, prompt) in enumerate(zip(rows, prompts)):
        mine = slice(index * n, (index + 1) * n)
        passed = [outcome.passed for outcome in outcomes[mine]]
        items.append(
            {
                "id": row["example_id"],
                "prompt_hash": prompt_hash(prompt),
                "prompt": row["prompt"],
                "output": outputs[mine][0].text,
                "outputs": [output.text for output in outputs[mine]],
                "correct": passed[0],
                "passed": sum(passed),
                "samples": n,
                "outcomes": [
                    {"status": o.status, "piece": o.piece, "detail": o.detail} for o in outcomes[mine]
                ],
                "truncated": any(output.truncated for output in outputs[mine]),
                "prompt_truncated": outputs[mine][0].prompt_truncated,
                "ended": all(output.ended for output in outputs[mine]),
            }
        )
    metrics: Figures = {
        f"pass@{k}": float(np.mean([pass_at_k(n, item["passed"], k) for item in items]))
        for k in sorted({1, *task.k})
    }
    return metrics | {"outcomes": tally(outcomes), "isolation": describe_isolation()}, items


def reference_programs(rows: Sequence[RawRow], *, mutated: bool = False) -> list[list[tuple[str, str]]]:
    """The data set's own solutions as programs, or their mutants: what a scorer must pass, and fail."""
    programs = []
    for row in rows:
        program = pieces(row, row["completion"])
        if mutated:
            program[0] = ("solution", replace_returns(program[0][1]))
        programs.append(program)
    return programs
