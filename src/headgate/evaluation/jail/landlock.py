"""Landlock: which files a process may open, enforced by the kernel whatever the user's permissions say.

Only paths named here can be read, only ``writable`` folders can be written, and nothing can be executed. TCP is
closed (Linux 6.7), as are abstract sockets and signals to processes outside (6.12). A process under Landlock
cannot trace one that is not. Metadata (``stat``) and the working directory stay open: Landlock does not cover them.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable

from .libc import call

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
FILE_RIGHTS = WRITE_FILE | READ_FILE | TRUNCATE
CHANGES_IN_A_FOLDER = sum(
    1 << bit for bit in (4, 5, 7, 8, 12)
)  # remove a folder or file; make a folder, file, link
FIRST_TO_GUARD_TRUNCATION = 3


def abi() -> int:
    """The version that the kernel speaks, 0 where Landlock is absent or switched off."""
    try:
        return call("syscall", ctypes.c_long(CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    except OSError:
        return 0


def handled(version: int) -> tuple[int, int, int]:
    """Everything that this version can refuse: file-system rights, network rights, scopes."""
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    return (1 << rights) - 1, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0


def restrict(readable: Iterable[str], writable: Iterable[str]) -> int:
    """Confine this process to the paths; returns the version in force, 0 without Landlock.

    Needs no privilege, only ``no_new_privs``. Raises OSError where the kernel has Landlock and refuses it.
    """
    version = abi()
    if version == 0:
        return 0
    files, network, scopes = handled(version)
    attributes = (ctypes.c_uint64 * 3)(files, network, scopes)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = call(
        "syscall", ctypes.c_long(CREATE_RULESET), attributes, ctypes.c_size_t(size), ctypes.c_uint(0)
    )
    for path in readable:
        _allow(ruleset, path, files & (READ_FILE | READ_DIR))
    for path in writable:
        _allow(ruleset, path, files & (FILE_RIGHTS | READ_DIR | CHANGES_IN_A_FOLDER))
    call("syscall", ctypes.c_long(RESTRICT_SELF), ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)
    return version


def _allow(ruleset: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not stat.S_ISDIR(os.fstat(place).st_mode):
        rights &= FILE_RIGHTS  # the kernel refuses a folder's rights on a file
    rule = (ctypes.c_byte * 12).from_buffer_copy(rights.to_bytes(8, "little") + place.to_bytes(4, "little"))
    call("syscall", ctypes.c_long(ADD_RULE), ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
    os.close(place)
