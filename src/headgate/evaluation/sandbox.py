"""Run model-written code so that it cannot hurt the machine, and say how each failure failed.

Every program is a process of its own in a new session, with limits on CPU time, wall-clock, memory, file size,
open files, processes and output. Where the kernel lets us (``isolation`` says what was found):

- ``namespaces``: its own process, network, mount and IPC namespaces, an unprivileged user, a file system that
  holds only the interpreter and system libraries, read-only, beside one small folder in memory. Nothing outlives it.
- ``bwrap``: the same by bubblewrap, for systems that allow namespaces to it alone.
- ``limits``: neither is possible. Limits, killing and (on Linux) a system-call filter that refuses sockets and
  signals; whatever this user may read or write stays open to the code. It is said, with a warning. Never as root.

A program can read its own interpreter's memory: a solution written to attack the scorer could forge success.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from headgate.errors import ConfigError
from headgate.evaluation.sandbox_watch import Limits, Outcome, Watch

JAIL = Path(__file__).with_name("jail.py")
MODES = ("namespaces", "bwrap", "limits")
SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
DEVICES = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
NOBODY = 65534
REFUSAL = (
    "this task runs code written by a model: pass --allow-code-execution (allow_code_execution: true in a recipe) "
    "to allow it, in a sandbox"
)


Pieces = Sequence[tuple[str, str]]


def run_program(pieces: Pieces, limits: Limits | None = None, mode: str | None = None) -> Outcome:
    """Execute (name, source) pieces one after the other in one module. Never raises for what the code does."""
    return _run(list(pieces), limits or Limits(), mode or isolation())


def run_programs(
    programs: Iterable[Pieces],
    limits: Limits | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Every program in parallel workers; outcomes in order."""
    programs = list(programs)
    mode, limits = isolation(), limits or Limits()
    outcomes = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for outcome in pool.map(lambda pieces: _run(list(pieces), limits, mode), programs):
            outcomes.append(outcome)
            if progress is not None:
                progress(len(outcomes), len(programs))
    return outcomes


def tally(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many ended how."""
    return dict(Counter(outcome.status for outcome in outcomes).most_common())


@functools.cache
def isolation() -> str:
    """The strongest of MODES that runs a trivial program here."""
    for mode in MODES:
        if _run([("probe", "pass")], Limits(seconds=20), mode).passed:
            if mode == "limits":
                warnings.warn(
                    "neither namespaces nor bwrap work here: model-written code runs under limits only, and can reach "
                    "this user's files; run it in a container or a virtual machine",
                    stacklevel=3,
                )
            return mode
    raise ConfigError(
        "no sandbox works on this system (namespaces and bwrap are refused, and root does not run such code without "
        "them): install bubblewrap, or run as an ordinary user"
    )


def describe_isolation() -> str:
    """One line for reports."""
    return {
        "namespaces": "own process, network and mount namespaces, read-only root, unprivileged user, limits",
        "bwrap": "bubblewrap --unshare-all, read-only root, limits",
        "limits": "limits, system-call filter and process-group kill: no file-system isolation on this system",
    }[isolation()]


def _run(pieces: list[tuple[str, str]], limits: Limits, mode: str) -> Outcome:
    if mode == "bwrap" and shutil.which("bwrap") is None:
        return Outcome("error", "", "bwrap is not installed", "", 0.0)
    if mode == "limits" and os.geteuid() == 0 and not _open_to_others(os.path.realpath(sys.base_prefix)):
        return Outcome("error", "", "root runs no such code without namespaces", "", 0.0)
    started = time.monotonic()
    folder = tempfile.mkdtemp(prefix="headgate-sandbox-")
    os.chmod(folder, 0o755)
    report, child_report = os.pipe()
    word = secrets.token_hex(16)
    uid = _other_user(folder, mode)
    config = {
        "mode": mode,
        "folder": folder,
        "readable": _readable(),
        "report": child_report,
        "word": word,
        "uid": uid,
        "pieces": pieces,
        "limits": {
            "cpu": max(1, round(limits.seconds * len(pieces))),
            "memory": limits.memory << 20,
            "disk": limits.disk << 20,
            "processes": limits.processes,
            "files": limits.files,
        },
    }
    process = subprocess.Popen(
        [*_wrapper(mode, limits), sys.executable, "-I", str(JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(child_report,),
        start_new_session=True,
        env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
        cwd="/",
    )
    os.close(child_report)
    try:
        with process.stdin as stdin:  # type: ignore[union-attr]
            stdin.write(json.dumps(config).encode())
    except BrokenPipeError:
        pass
    watch = Watch(process, report, word, limits, len(pieces))
    try:
        watch.until_gone()
    finally:
        _end(process, mode)
        os.close(report)
        process.stdout.close()  # type: ignore[union-attr]
        shutil.rmtree(folder, ignore_errors=True)
    return watch.outcome(pieces, time.monotonic() - started)


def _wrapper(mode: str, limits: Limits) -> list[str]:
    if mode != "bwrap":
        return []
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for path in [*_readable(), str(JAIL)]:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif path not in DEVICES:
            command += ["--ro-bind", path, path]
    command += ["--dev", "/dev", "--proc", "/proc", "--remount-ro", "/dev"]
    return [
        *command,
        "--size",
        str(limits.disk << 20),
        "--tmpfs",
        "/box",
        "--remount-ro",
        "/",
        "--chdir",
        "/box",
    ]


@functools.cache
def _readable() -> list[str]:
    paths = [path for path in SYSTEM + DEVICES if os.path.exists(path)]
    for prefix in dict.fromkeys([sys.base_prefix, os.path.realpath(sys.base_prefix), sys.prefix]):
        if not any(prefix == path or prefix.startswith(path + "/") for path in paths):
            paths.append(prefix)
    return paths


def _other_user(folder: str, mode: str) -> int | None:
    """Root does not run such code as root: a user id of its own, whose processes can all be killed together."""
    if os.geteuid() != 0 or mode == "bwrap":
        return None
    uid = 200_000 + secrets.randbelow(300_000)
    spans = (
        [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if os.path.exists("/proc/self/uid_map")
        else []
    )
    if not any(int(first) <= uid < int(first) + int(count) for first, _, count in spans):
        uid = NOBODY
    os.chown(folder, uid, uid)
    return uid


def _open_to_others(path: str) -> bool:
    """Whether any user may enter ``path``."""
    place = Path(path)
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in [place, *place.parents])


def _end(process: subprocess.Popen[bytes], mode: str) -> None:
    """The guard and everything under it."""
    if process.poll() is None and mode == "limits":
        process.send_signal(signal.SIGTERM)  # it kills and sweeps up what the program started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=6)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def require_permission(allowed: bool) -> None:
    """Raises ConfigError unless code execution was allowed."""
    if not allowed:
        raise ConfigError(REFUSAL)


def report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For a task's metrics: how many ended how, and under what isolation."""
    return {"outcomes": tally(outcomes), "isolation": describe_isolation()}
