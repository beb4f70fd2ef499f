"""Which tests enter which functions, and runs of a few tests in processes forked from one that has imported the libraries."""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mutation_points import outermost

PACKAGE = "src/headgate"
REPORT = "_entered_"
OWN = ("headgate", "tests", "scripts", "conftest", "_pytest", "pytest")


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
            if number == function.lineno or first.col_offset == 0:  # a body on the line of its def
                continue
            place = f"{path.relative_to(tree / PACKAGE)}:{name}"
            lines.insert(number - 1, f"{' ' * first.col_offset}{REPORT}({place!r})\n")
        path.write_text("".join(lines))


def _prepare(tree: Path) -> None:
    """This process works in ``tree`` and sees its Headgate, and so do the processes that its tests start."""
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree / "src")
    sys.path[:] = [str(tree), str(tree / "src"), *(p for p in sys.path if "headgate" not in p)]
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


def imports_everything(tree: Path) -> None:
    """Import here what Headgate and its tests import, but for themselves: a child tells what that is."""
    listing = tree / ".modules"

    def told() -> int:
        _prepare(tree)
        import pytest

        pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "tests"])
        names = [n for n in sys.modules if n.split(".")[0] not in OWN]
        listing.write_text("\n".join(names))
        return 0

    _in_child(told, 600, tree / ".output")
    for name in listing.read_text().splitlines():
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)


def record(tree: Path, tests: Sequence[str], file: Path) -> None:
    """Run ``tests`` in ``tree``, which is instrumented for it; what was known of other tests stays."""
    instrument(tree)

    def recorded() -> int:
        _prepare(tree)
        setattr(builtins, REPORT, lambda name: None)
        import pytest

        return int(pytest.main(["-q", "-p", "no:cacheprovider", *tests], plugins=[Recorder(file)]))

    print(f"mapping {' '.join(tests)} ...", flush=True)
    _in_child(recorded, 3 * 3600, tree / ".output")
    print((tree / ".output").read_text()[-2000:], flush=True)


def map_of(file: Path) -> dict[str, Any]:
    """``functions``: ``path:Class.method`` -> tests; ``seconds``: of every test."""
    functions: dict[str, list[str]] = defaultdict(list)
    tests = json.loads(file.read_text())["tests"]
    for test, row in tests.items():
        for function in row["enters"]:
            functions[function].append(test)
    return {"functions": functions, "seconds": {test: row["seconds"] for test, row in tests.items()}}


def fork(tree: Path, tests: Sequence[str], timeout: float) -> tuple[str, str]:
    """(killed or survived, by what) of ``tests`` over ``tree`` as it now is."""

    def run() -> int:
        _prepare(tree)
        import pytest

        return int(
            pytest.main(["-x", "-q", "-m", "", "-p", "no:cacheprovider", "--tb=no", "--no-header", *tests])
        )

    output = tree / f".output-{threading.get_ident()}"
    code = _in_child(run, timeout, output)
    text = output.read_text(errors="replace")
    if code == 0:
        return "survived", f"{len(tests)} tests"
    if code is None:
        return "killed", "time"
    fallen = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "killed", fallen[0].split(" - ")[0] if fallen else f"exit code {code}"
