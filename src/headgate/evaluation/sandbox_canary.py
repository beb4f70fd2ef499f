"""A program that tries to get out, run once before any other: a wall that does not hold here is named, not assumed."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

from headgate.evaluation.sandbox_watch import Limits, Outcome

LIMITS = Limits(seconds=20.0, memory=512)
# Each attempt is a line that raises where the wall holds.
ATTEMPTS = {
    "reads a file of this user": "open({file!r}).read()",
    "writes where it should not": "open({file!r}, 'a').close()",
    "changes the mode of a device": "os.chmod('/dev/null', 0o666)",
    "opens a socket": "socket.socket(socket.AF_UNIX)",
    "starts a process": "os.fork() or os._exit(0)",
    "executes a program": "os.execv('/bin/true', ['true'])",
    "signals its parents": "os.kill(os.getppid(), 0)",
    "becomes root": "os.setuid(0)",
    "makes a user namespace": "call('unshare', 0x10000000)",
    "traces a process": "call('ptrace', 0, 0, 0, 0)",
    "holds memory outside its own": "os.memfd_create('x')",
    "sets up io_uring": "call('syscall', 425, 1, ctypes.create_string_buffer(120))",
    "allocates past its limit": "bytearray(513 << 20)",
}
PROGRAM = """
import ctypes, os, socket
def call(name, *arguments):
    if getattr(ctypes.CDLL(None), name)(*arguments) < 0:
        raise OSError
def escapes():
    names = []
    for name, attempt in ATTEMPTS:
        try:
            exec(attempt, globals())
        except (OSError, MemoryError):
            continue
        names.append(name)
    return names
class Equal:
    def __eq__(self, other): return True
"""
FORGERIES = {
    "passes by leaving": ("import os\nos._exit(0)", "pass"),
    "passes by an equality of its own": (PROGRAM, "assert Equal() == 1"),
}


def escapes(run: Callable[[list[tuple[str, str]], Limits], Outcome]) -> list[str]:
    """What a program can do that it should not, in the sandbox that ``run`` runs it in."""
    with tempfile.TemporaryDirectory(prefix="headgate-canary-") as folder:
        os.chmod(folder, 0o777)
        file = Path(folder, "secret")
        file.write_text(secrets.token_hex(8))
        file.chmod(0o666)
        attempts = [(name, line.format(file=str(file))) for name, line in ATTEMPTS.items()]
        program = PROGRAM.replace("ATTEMPTS", repr(attempts))
        outcome = run([("solution", program), ("test", "assert not (e := escapes()), '; '.join(e)")], LIMITS)
    if outcome.status == "refused":
        return [f"cannot be set up ({outcome.detail.strip()})"]
    if not outcome.passed:
        return [outcome.detail.removeprefix("AssertionError: ")]
    return [
        name for name, (code, test) in FORGERIES.items() if run([("s", code), ("t", test)], LIMITS).passed
    ]
