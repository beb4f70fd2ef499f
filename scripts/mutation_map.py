"""Which tests enter which functions, and runs of a few tests in processes forked from one that has imported everything."""

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
import inspect
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from mutation_points import outermost

PACKAGE = "src/headgate"
REPORT = "_entered_"
FUNCTIONS: dict[str, list[FunctionType]] = defaultdict(list)
"""``path:Class.method`` -> the function objects that are it, below whatever wraps them."""


class Recorder:
    """A pytest plugin: the functions of Headgate that each test enters, and its seconds, set-up included.

    Every function of an ``instrumented`` tree reports its name first thing: unlike a tracer, that costs next to nothing.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entered: dict[str, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.now = ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.now.split("::")[0] != nodeid.split("::")[0]:
            self.write()
        self.now = nodeid
        setattr(builtins, REPORT, self.entered[nodeid].add)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.write()

    def write(self) -> None:
        """After every file of tests; what was known of other tests stays."""
        kept = json.loads(self.file.read_text()) if self.file.exists() else {"tests": {}}
        for test, seconds in self.seconds.items():
            if test not in self.failed:
                kept["tests"][test] = {"seconds": round(seconds, 2), "enters": sorted(self.entered[test])}
        self.file.write_text(json.dumps(kept))


def instrument(tree: Path) -> None:
    """Every outermost function of ``tree`` begins by reporting ``path:Class.method``; in processes that ask nobody, to none."""
    (tree / "src" / "sitecustomize.py").write_text(
        f"import builtins\nbuiltins.{REPORT} = lambda name: None\n"
    )
    for path in (tree / PACKAGE).rglob("*.py"):
        lines = path.read_text().splitlines(keepends=True)
        for function, name in sorted(outermost(ast.parse("".join(lines))), key=lambda pair: -pair[0].lineno):
            first = function.body[
                1 if ast.get_docstring(function) is not None and len(function.body) > 1 else 0
            ]
            number = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))])
            if lines[first.lineno - 1][: first.col_offset].strip():  # a body on the last line of its def
                continue
            place = f"{path.relative_to(tree / PACKAGE)}:{name}"
            lines.insert(number - 1, f"{' ' * first.col_offset}{REPORT}({place!r})\n")
        path.write_text("".join(lines))


def _prepare(tree: Path) -> None:
    """This process works in ``tree`` and sees its Headgate, and so do the processes that its tests start."""
    os.chdir(tree)
    packages = [str(tree / "src"), str(tree / "examples" / "headgate-lisa" / "src")]
    os.environ["PYTHONPATH"] = os.pathsep.join(packages)
    sys.path[:] = [str(tree), *packages, *(p for p in sys.path if "headgate" not in p)]
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")


def _in_child(action: Callable[[], int], timeout: float, output: Path) -> int | None:
    """``action``'s exit code from a forked process group of its own; None where it runs past ``timeout``."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            text = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(text, 1)
            os.dup2(text, 2)
            code = action()
        finally:
            os._exit(code)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with contextlib.suppress(ProcessLookupError):  # what its tests started and left
                os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class _Collected:
    """A pytest plugin: the tests that there are."""

    def __init__(self) -> None:
        self.tests: set[str] = set()

    def pytest_collection_finish(self, session: Any) -> None:
        self.tests = {item.nodeid for item in session.items}


def warm_up(tree: Path, tests: Sequence[str] = ("tests",)) -> set[str]:
    """Import Headgate and all tests here, once: a forked child then needs half a second for a mutant, not ten.

    Returns the tests: pytest fails over the name of one that is gone, which would pass for a mutant's death.
    """
    _prepare(tree)
    import pytest

    collected = _Collected()
    files = [test for test in tests if Path(test).exists()]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        pytest.main(["-q", "-m", "", "--collect-only", "-p", "no:cacheprovider", *files], plugins=[collected])
    for item in gc.get_objects():
        if isinstance(item, FunctionType) and item.__code__.co_filename.startswith(f"{tree / PACKAGE}/"):
            path = item.__code__.co_filename.removeprefix(f"{tree / PACKAGE}/")
            FUNCTIONS[f"{path}:{item.__qualname__}"].append(item)
    gc.freeze()
    return collected.tests


def _codes(code: CodeType, within: str = "") -> Iterator[tuple[str, CodeType]]:
    """(qualified name, code object) of everything below ``code``, as functions name themselves."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield f"{within}{inner.co_name}", inner
            is_class = not inner.co_flags & inspect.CO_OPTIMIZED
            yield from _codes(inner, f"{within}{inner.co_name}." + ("" if is_class else "<locals>."))


def _written(code: CodeType) -> tuple[Any, ...]:
    """What a code object does, wherever it stands."""
    constants = tuple(_written(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, constants


def swapped(path: str, function: str, original: str, mutated: str) -> bool:
    """Give the function, and what was made inside it, mutated code wherever it is held; False where that is not enough."""
    if not function:
        return False
    old, new = (
        list(_codes(compile(text, "mutant", "exec", dont_inherit=True))) for text in (original, mutated)
    )
    if [name for name, _ in old] != [name for name, _ in new]:
        return False
    changed = {name: b for (name, a), (_, b) in zip(old, new, strict=True) if _written(a) != _written(b)}
    if function not in changed or not FUNCTIONS.get(f"{path}:{function}"):
        return False  # a default value, or a function that nobody holds
    for name, code in changed.items():
        for item in FUNCTIONS.get(f"{path}:{name}", []):
            if item.__code__.co_freevars != code.co_freevars or sum(other == name for other, _ in new) > 1:
                return False
            item.__code__ = code
    return True


def record(tree: Path, tests: Sequence[str], file: Path) -> None:
    """Run ``tests`` in ``tree``, which is instrumented for it; what was known of other tests stays.

    Exits where pytest could not run them: mutants would be held against an older map.
    """
    instrument(tree)

    def recorded() -> int:
        _prepare(tree)
        setattr(builtins, REPORT, lambda name: None)
        import pytest

        return int(pytest.main(["-q", "-p", "no:cacheprovider", *tests], plugins=[Recorder(file)]))

    print(f"mapping {' '.join(tests)} ...", flush=True)
    code = _in_child(recorded, 3 * 3600, tree / ".output")
    print((tree / ".output").read_text()[-2000:], flush=True)
    if code not in (0, 1):  # 1: some fell, and are left out
        sys.exit(f"the tests could not be mapped (pytest: {code}); all it said is in {tree / '.output'}")


def map_of(file: Path) -> dict[str, Any]:
    """``functions``: ``path:Class.method`` -> tests; ``seconds``: of every test."""
    functions: dict[str, list[str]] = defaultdict(list)
    tests = json.loads(file.read_text())["tests"]
    for test, row in tests.items():
        for function in row["enters"]:
            functions[function].append(test)
    return {"functions": functions, "seconds": {test: row["seconds"] for test, row in tests.items()}}


def fork(
    tree: Path, tests: Sequence[str], timeout: float, swap: Callable[[], bool] = lambda: True
) -> tuple[str, str]:
    """(killed or survived, by what) of ``tests``. Where ``swap`` cannot change what is imported, the child starts anew in
    ``tree``, whose files hold the mutant."""

    def run() -> int:
        if not swap():
            command = [sys.executable, __file__, str(tree), *tests]
            os.execv(sys.executable, command)
        return _tested(tree, tests)

    output = tree / f".output-{threading.get_ident()}"
    code = _in_child(run, timeout, output)
    text = output.read_text(errors="replace")
    if code == 0:
        return "survived", f"{len(tests)} tests"
    if code is None:
        return "killed", "time"
    fallen = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "killed", fallen[0].split(" - ")[0] if fallen else f"exit code {code}"


def _tested(tree: Path, tests: Sequence[str]) -> int:
    _prepare(tree)
    import pytest

    return int(
        pytest.main(["-x", "-q", "-m", "", "-p", "no:cacheprovider", "--tb=no", "--no-header", *tests])
    )


if __name__ == "__main__":
    sys.exit(_tested(Path(sys.argv[1]), sys.argv[2:]))
