"""What a hostile program is, and the forms that it comes in.

An *attempt* defines ``attack()``: it answers "refused" only when the kernel said no to exactly what it tried, and
anything else (success, or a program that broke before it tried) fails. A *forgery* is a wrong solution that must not
pass. Braces name what ``hostile_place`` sets up: {secret!r}, {folder!r}, {token!r}, {environment!r}, {port}, {pid}.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from headgate.evaluation.sandbox_watch import Limits

ANY_BUT_PASSED = ("syntax", "assertion", "error", "time", "memory", "output", "exit", "killed")
WRONG = ("assert f(2) == 3", "assert f(5) == 6")
PRELUDE = """
import ctypes, errno, mmap, os, platform, resource, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"
def call(function, *arguments):
    answer = getattr(libc, function)(*arguments)
    if answer < 0:
        raise OSError(ctypes.get_errno(), function)
    return answer
FULL = errno.EFBIG, errno.ENOSPC, errno.EACCES, errno.EPERM
def system_call(numbers, *arguments):
    return call("syscall", ctypes.c_long(numbers[0 if X86 else 1]), *map(ctypes.c_long, arguments))
def refused(attempt, *numbers):
    try:
        answer = attempt()
    except OSError as error:
        allowed = numbers or (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EROFS, errno.ENOENT)
        return "refused" if error.errno in allowed else repr(error)
    return f"escaped: {answer!r}"
"""


USUAL = Limits(seconds=4.0, wall=20.0, memory=256)


@dataclass(frozen=True)
class Hostile:
    """``kind``: its row in the table of docs/evaluation.md. ``ends``: the statuses that mean it was held."""

    name: str
    kind: str
    code: str
    tests: tuple[str, ...] = ("assert (a := attack()) == 'refused', a",)
    ends: tuple[str, ...] = ("passed",)
    limits: Limits = USUAL
    quick: bool = False
    not_held: dict[str, str] = field(default_factory=dict)  # mode: why


def attempt(name: str, kind: str, body: str, quick: bool = False, **rest: object) -> Hostile:
    """An attack by the lines of a function; a single expression is refused or escapes by itself."""
    if "\n" not in body and "return" not in body:
        body = f"return refused(lambda: {body})"
    lines = "\n".join("    " + line for line in body.splitlines())
    return Hostile(name, kind, f"{PRELUDE}\ndef attack():\n{lines}\n", quick=quick, **rest)  # type: ignore[arg-type]


def forgery(
    name: str, code: str, tests: tuple[str, ...] = WRONG, quick: bool = False, **rest: object
) -> Hostile:
    return Hostile(name, "forged verdicts", code, tests, ANY_BUT_PASSED, quick=quick, **rest)  # type: ignore[arg-type]


def ended(name: str, kind: str, code: str, *ends: str, quick: bool = False, **rest: object) -> Hostile:
    """A program that must end so."""
    return Hostile(name, kind, PRELUDE + code, ("pass",), ends, quick=quick, **rest)  # type: ignore[arg-type]
