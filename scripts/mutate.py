"""Do the tests notice? Single-point mutants of the code that computes, each run against the tests that reach it.

    python scripts/mutate.py                      200 mutants, drawn with a fixed seed; goes on where it stopped
    python scripts/mutate.py --at ops/depth.py:27 every mutant of one line
    python scripts/mutate.py --again              survivors once more, after new tests

The first run maps tests to the functions they enter (the default suite once, in a copy that tells). A mutant is then one changed
node in a copy of the tree: the tests that enter its function run, shortest first, until one falls or ``--budget`` seconds
of them have passed. Children are forked from a process that has imported everything, and a function's code is swapped in them;
what stands outside a function's code (constants, defaults, classes) is imported anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from mutation_map import PACKAGE, fork, map_of, record, swapped, warm_up
from mutation_points import Mutant, mutants_of

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".mutate"
PLACES = (
    "ops/**/*.py", "modules/**/*.py", "methods/**/*.py", "training/**/*.py", "experiments/statistics.py",
    "experiments/paired.py", "evaluation/scorers*.py",
)  # fmt: skip
CONFIGS = (
    "methods/backward_gate/config.py", "methods/layer_routing/config.py", "methods/lora_experts/config.py", "methods/schema_bank/config.py",
    "methods/lora_experts/spawn_config.py", "methods/continual_config.py", "methods/stage.py", "training/config.py",
)  # fmt: skip
ALSO = {
    "training/replicas.py": ["tests/training/test_replicas.py"],
    **{config: ["tests/experiments/test_numbers.py"] for config in CONFIGS},
}
"""Tests that reach a file in processes of their own, which tell nothing, or without entering a function."""
MOST = 60
"""Tests of one mutant."""


def drawn_by(seed: int, mutants: list[Mutant]) -> list[Mutant]:
    """In an order that a change of one function leaves as it is for the mutants of all others."""
    return sorted(mutants, key=lambda m: hashlib.sha256(f"{seed} {m.id}".encode()).digest())


def population() -> list[Mutant]:
    """Every mutant of every file."""
    files = sorted({path for place in PLACES for path in (ROOT / PACKAGE).glob(place)})
    return [mutant for path in files for mutant in mutants_of(path, ROOT / PACKAGE)]


def tests_for(mutant: Mutant, reached: dict[str, Any], budget: float) -> list[str]:
    """Tests that enter the mutant's function (or its file, for a line outside any), those of its own name first."""
    at = reached["functions"].get(f"{mutant.path}:{mutant.function}", [])
    if not mutant.function:
        at = {
            t
            for key, tests in reached["functions"].items()
            if key.startswith(f"{mutant.path}:")
            for t in tests
        }
    stem = Path(mutant.path).stem
    seconds = reached["seconds"]
    ordered = sorted(at, key=lambda test: (stem not in test.split("::")[0], seconds[test], test))
    chosen, spent = list(ALSO.get(mutant.path, [])), 0.0
    for test in ordered[:MOST]:
        if spent + seconds[test] <= budget or not chosen:
            chosen.append(test)
            spent += seconds[test]
    return chosen


def judge(mutant: Mutant, tree: Path, tests: list[str], timeout: float) -> dict[str, Any]:
    """Run the tests over the mutated tree: killed (by a test, by time, at import) or survived."""
    file = tree / PACKAGE / mutant.path
    original = file.read_text()
    begun = time.monotonic()
    if not tests:
        verdict, by = "survived", "no test reaches it"
    else:
        mutated = mutant.applied(original)
        file.write_text(mutated)  # for processes that the tests start
        try:
            change = partial(swapped, mutant.path, mutant.function, original, mutated)
            verdict, by = fork(tree, tests, timeout, change)
        finally:
            file.write_text(original)
    return {"id": mutant.id, "verdict": verdict, "by": by, "seconds": round(time.monotonic() - begun, 1), "tests": len(tests), **mutant.row()}  # fmt: skip


def make_tree(number: int | str) -> Path:
    """A copy of what git knows of, so that workers and the user's editor do not meet."""
    tree = STATE / f"tree-{number}"
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def report(results: list[dict[str, Any]]) -> None:
    killed = [r for r in results if r["verdict"] == "killed"]
    print(
        f"\n{len(killed)} of {len(results)} mutants killed ({100 * len(killed) / max(1, len(results)):.0f}%)"
    )
    kinds = Counter(r["kind"] for r in results)
    lost = Counter(r["kind"] for r in results if r["verdict"] != "killed")
    print("survived by kind: " + ", ".join(f"{kind} {lost[kind]}/{kinds[kind]}" for kind in sorted(kinds)))
    for r in sorted((r for r in results if r["verdict"] != "killed"), key=lambda r: (r["path"], r["line"])):
        print(f"  {r['path']}:{r['line']}  {r['old']}  ->  {r['new']}   ({r['by']})")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of tests for one mutant")
    parser.add_argument(
        "--at", action="append", help="FILE:LINE below src/headgate: all mutants of it (repeatable)"
    )
    parser.add_argument("--files", action="append", help="only files like this: 'ops/*' (repeatable)")
    parser.add_argument("--again", action="store_true", help="run the survivors of before once more")
    parser.add_argument("--map", action="store_true", help="map the tests anew (after tests were added)")
    parser.add_argument(
        "--tests", nargs="*", default=["tests"], help="with --map: only these paths are mapped anew"
    )
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    arguments = parser.parse_args()

    drawn = [m for m in population() if any(fnmatch(m.path, f) for f in arguments.files or ["*"])]
    if arguments.at:
        drawn = [m for m in drawn if f"{m.path}:{m.line}" in arguments.at]
    else:
        drawn = drawn_by(arguments.seed, drawn)[: arguments.count]
    if arguments.list:
        for mutant in drawn:
            print(f"{mutant.path}:{mutant.line}  {mutant.old}  ->  {mutant.new}")
        return 0

    STATE.mkdir(exist_ok=True)
    os.environ.setdefault("HEADGATE_SHARED", str(ROOT.parent / "shared"))
    os.environ |= {"CI": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    trees = [make_tree(number) for number in range(arguments.workers)]
    if arguments.map or not (STATE / "map.json").exists():
        record(make_tree("map"), arguments.tests, STATE / "map.json")
    reached = map_of(STATE / "map.json")

    wanted_tests = {test.split("::")[0] for m in drawn for test in tests_for(m, reached, arguments.budget)}
    there = warm_up(trees[0], sorted(wanted_tests))

    log = STATE / "results.jsonl"
    known = {r["id"]: r for r in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    wanted = [
        m
        for m in drawn
        if m.id not in known or arguments.at or (arguments.again and known[m.id]["verdict"] != "killed")
    ]
    free: SimpleQueue[Path] = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def one(mutant: Mutant) -> None:
        tree = free.get()
        tests = [
            test for test in tests_for(mutant, reached, arguments.budget) if test in there or "::" not in test
        ]
        result = judge(mutant, tree, tests, 30 + 6 * arguments.budget)
        free.put(tree)
        known[mutant.id] = result
        with log.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"{result['verdict']:8} {mutant.path}:{mutant.line}  {mutant.old}  ->  {mutant.new}   ({result['by']}, {result['seconds']} s)",
            flush=True,
        )

    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(one, wanted))
    report([known[m.id] for m in drawn if m.id in known])
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
