"""Run model-written code so that it cannot hurt the machine or score itself, and say how each failure failed.

A program is pieces: the solution, which the model wrote, then tests, which it did not. The solution runs in a
process of its own with one job, to answer calls; the judge, in another, runs the tests and compares plain values of
its own making, so that nothing the solution does to its interpreter can make a wrong answer right. Both may use only
the system calls that a computation needs, the files named by ``sandbox_modes`` and the resources named by ``Limits``;
CPU time decides, so that a verdict does not depend on what else the machine does. What a mode promises is tried
before the first program runs, and a mode that does not hold here is refused.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from headgate.errors import ConfigError
from headgate.evaluation import sandbox_modes as modes
from headgate.evaluation.jail import landlock
from headgate.evaluation.sandbox_canary import escapes
from headgate.evaluation.sandbox_modes import MODES
from headgate.evaluation.sandbox_watch import Limits, Outcome, Watch

JUDGE_MEMORY = 512  # MiB
PAUSES = (0.5, 2.0)  # seconds before a sandbox that could not be set up is tried again
REFUSAL = (
    "this task runs code written by a model: pass --allow-code-execution (allow_code_execution: true in a recipe) "
    "to allow it, in a sandbox"
)
Pieces = Sequence[tuple[str, str]]


def run_program(pieces: Pieces, limits: Limits | None = None, mode: str | None = None) -> Outcome:
    """Execute the first (name, source) piece, then judge it by the others.

    Never raises for what the code does. Raises ConfigError where the sandbox does not hold, see ``establish``.
    """
    return run_programs([pieces], limits, workers=1, mode=mode)[0]


def run_programs(
    programs: Iterable[Pieces],
    limits: Limits | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    mode: str | None = None,
) -> list[Outcome]:
    """Every program in parallel workers; outcomes in order. Raises ConfigError, see ``establish``."""
    programs = list(programs)
    chosen, limits = mode or isolation(), limits or Limits()
    establish(chosen)
    outcomes = []
    with modes.memory_kept_private(chosen), ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for outcome in pool.map(lambda pieces: _run_patiently(list(pieces), limits, chosen), programs):
            if outcome.status == "refused":
                raise ConfigError(f"the sandbox could not be set up ({chosen}): {outcome.detail}")
            outcomes.append(outcome)
            if progress is not None:
                progress(len(outcomes), len(programs))
    return outcomes


def tally(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many ended how."""
    return dict(Counter(outcome.status for outcome in outcomes).most_common())


@functools.cache
def isolation() -> str:
    """The strongest of MODES that holds here. Raises ConfigError, with a reason and a cure for each, if none does."""
    reasons = []
    for mode in MODES:
        try:
            establish(mode)
        except ConfigError as error:
            reasons.append(str(error))
        else:
            return mode
    raise ConfigError("no sandbox holds on this system:\n" + "\n".join(f"- {reason}" for reason in reasons))


@functools.cache
def establish(mode: str) -> None:
    """Try what ``mode`` promises, once. Raises ConfigError with what does not hold, and what to do about it."""
    if mode not in MODES:
        raise ConfigError(f"unknown sandbox mode {mode!r}: choose from {', '.join(MODES)}")
    broken = (
        [lack]
        if (lack := modes.missing(mode))
        else escapes(lambda pieces, limits: _run(pieces, limits, mode))
    )
    if broken:
        raise ConfigError(
            f"sandbox mode {mode} does not hold here: {'; '.join(broken)}. Cure: {modes.CURES[mode]}"
        )


def describe_isolation() -> str:
    """One line for reports."""
    walls = {
        "namespaces": "own process, network and mount namespaces, read-only root",
        "bwrap": "bubblewrap's namespaces, read-only root",
        "limits": "no namespaces: nothing is writable, metadata of files stays visible",
    }[isolation()]
    version = landlock.abi()
    return (
        f"{walls}; system-call filter, " + (f"Landlock {version}" if version else "no Landlock") + ", limits"
    )


def require_permission(allowed: bool) -> None:
    """Raises ConfigError unless code execution was allowed."""
    if not allowed:
        raise ConfigError(REFUSAL)


def _run_patiently(pieces: list[tuple[str, str]], limits: Limits, mode: str) -> Outcome:
    """A machine that is short of processes or memory for a moment gets two more chances: nothing ran yet."""
    for pause in PAUSES:
        if (outcome := _run(pieces, limits, mode)).status != "refused":
            return outcome
        time.sleep(pause)
    return _run(pieces, limits, mode)


def _run(pieces: list[tuple[str, str]], limits: Limits, mode: str) -> Outcome:
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        root = tempfile.mkdtemp(prefix="headgate-sandbox-")
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        source = stack.enter_context(
            _nameless(pieces[0][1].encode(errors="surrogatepass") if pieces else b"")
        )
        tests = stack.enter_context(_nameless(json.dumps(pieces[1:]).encode()))
        report, guards_report = os.pipe()
        stack.callback(os.close, report)
        config = _config(pieces, limits, mode) | {
            "root": root,
            "report": guards_report,
            "source": source,
            "tests": tests,
        }
        process = subprocess.Popen(
            modes.command(mode),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(guards_report, source, tests),
            start_new_session=True,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
            cwd="/",
        )
        os.close(guards_report)
        stack.callback(_end, process)
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # type: ignore[union-attr]
            stdin.write(json.dumps(config).encode())
        watch = Watch(process, report, limits, [name for name, _ in pieces])
        watch.until_gone()
    return watch.outcome(time.monotonic() - started)


def _config(pieces: list[tuple[str, str]], limits: Limits, mode: str) -> dict[str, object]:
    users = modes.users()
    box = modes.box(mode)
    return {
        "mode": mode,
        "box": box,
        "readable": modes.readable(),
        "writable": ["/dev/null"] if mode == "limits" else [box, "/dev/null"],
        "users": users,
        "limits": {
            "seconds": limits.seconds,
            "wall": limits.patience,
            "cpu": math.ceil(limits.seconds * max(1, len(pieces))) + 1,
            "memory": limits.memory << 20,
            "judge_memory": JUDGE_MEMORY << 20,
            "disk": limits.disk << 20,
            "files": limits.files,
            "threads": limits.threads + modes.tasks_beside(mode, users["solution"]),
        },
    }


@contextlib.contextmanager
def _nameless(content: bytes) -> Iterator[int]:
    """A descriptor of a file in memory that holds ``content``."""
    descriptor = os.memfd_create("headgate")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The guard and everything under it: its children are of its group, and cannot leave it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]
