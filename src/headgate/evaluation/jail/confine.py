"""The order in which a process gives up what it could do: every step needs what the next takes away."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from dataclasses import dataclass

from . import landlock, system_calls
from .libc import PR_SET_NO_NEW_PRIVS, call, die_with_parent, keep_memory_private, prctl


@dataclass(frozen=True)
class Confinement:
    """``uid``: the user to become, None to stay; sizes in bytes, ``cpu`` in seconds. See ``Limits`` for the rest."""

    uid: int | None
    readable: list[str]
    writable: list[str]
    cpu: int
    memory: int
    disk: int
    files: int
    threads: int
    needs_landlock: bool


def confine(to: Confinement) -> None:
    """Nothing is left but reading ``readable``, writing ``writable``, computing and talking on open descriptors.

    Raises OSError or RuntimeError where a step cannot be had here: then no foreign code may run.
    """
    if to.uid is not None:
        os.setgroups([])
        os.setresgid(to.uid, to.uid, to.uid)
        os.setresuid(to.uid, to.uid, to.uid)
    if os.geteuid() == 0 or os.getuid() == 0:
        raise RuntimeError("model-written code does not run as root")
    for limit, value in (
        (resource.RLIMIT_CPU, to.cpu),
        (resource.RLIMIT_AS, to.memory),
        (resource.RLIMIT_FSIZE, to.disk),
        (resource.RLIMIT_NOFILE, to.files),
        (resource.RLIMIT_NPROC, to.threads),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
        grace = 1 if limit == resource.RLIMIT_CPU else 0  # a second to say that it is SIGXCPU
        resource.setrlimit(limit, (min(value, most), min(value + grace, most)))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    keep_memory_private()  # a change of user resets this and the next
    die_with_parent()
    version = landlock.restrict(to.readable, to.writable)
    if to.needs_landlock and version < landlock.FIRST_TO_GUARD_TRUNCATION:
        raise RuntimeError(
            f"Landlock version {version} is too old: Linux 6.2 brings {landlock.FIRST_TO_GUARD_TRUNCATION}"
        )
    system_calls.restrict()
