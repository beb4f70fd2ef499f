"""How a sandbox is started in each mode, and what a machine must have for it.

- ``namespaces``: process, network, mount, IPC and user namespaces of its own, a root that holds only the interpreter
  and system libraries, read-only, beside one small folder in memory.
- ``bwrap``: the same by bubblewrap, for systems that allow namespaces to it alone.
- ``limits``: neither is possible. Landlock takes the place of the root: the same paths can be read, nothing written.
"""

from __future__ import annotations

import functools
import os
import platform
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headgate.evaluation.jail import landlock, libc, system_calls

JAIL = Path(__file__).with_name("jail")
MODES = ("namespaces", "bwrap", "limits")
SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
DEVICES = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
BOX = "/box"
NOBODY = 65534
CURES = {
    "namespaces": "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, or the AppArmor "
    "profile of your distribution), or start the container with CAP_SYS_ADMIN",
    "bwrap": "install bubblewrap (apt-get install bubblewrap)",
    "limits": "run on Linux 6.2 or later with Landlock switched on, as an ordinary user or with an interpreter that "
    "every user may read (not one under /root)",
}


def interpreter() -> str:
    """The Python that runs the programs: this one, with what is installed beside it."""
    return sys.executable


def missing(mode: str) -> str | None:
    """What this machine visibly lacks for ``mode``; None if nothing. A canary program says the rest."""
    if sys.platform != "linux" or not system_calls.supported():
        return f"the system-call filter is for Linux on x86-64 and aarch64, not {sys.platform} on {platform.machine()}"
    if mode == "bwrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    if mode == "limits":
        version = landlock.abi()
        if version < landlock.FIRST_TO_GUARD_TRUNCATION:
            return f"Landlock speaks version {version}, and only version 3 guards every way to write"
        if os.geteuid() == 0 and not _open_to_others(os.path.realpath(interpreter())):
            return f"root gives up its user, and others cannot read {interpreter()}"
    return None


def command(mode: str) -> list[str]:
    """The command line of the guard."""
    guard = [interpreter(), "-I", str(JAIL)]
    if mode != "bwrap":
        return guard
    # The guard mounts the folder to write in: bwrap cannot limit how many files it holds.
    wrapper = [
        "bwrap",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "CAP_SYS_ADMIN",
    ]
    if os.geteuid() == 0:
        # Not in a user namespace, where root would stay the owner of root's files: the guard becomes somebody else.
        wrapper += [
            "--unshare-ipc",
            "--unshare-pid",
            "--unshare-net",
            "--unshare-uts",
            "--unshare-cgroup-try",
        ]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            wrapper += ["--cap-add", capability]
    else:
        wrapper += ["--unshare-all"]
    shown = [*readable(), str(JAIL)]
    parents = {str(folder): None for path in shown for folder in reversed(Path(path).parents)}
    for folder in [*parents][1:]:  # made for all to enter, as bwrap would make them for its own user only
        if not any(folder == path or folder.startswith(path + "/") for path in shown):
            wrapper += ["--dir", folder]
    for path in shown:
        if os.path.islink(path):
            wrapper += ["--symlink", os.readlink(path), path]
        elif (
            path in DEVICES
        ):  # their mode and owner are the machine's own: no user and no call that could change them
            wrapper += ["--dev-bind", path, path]
        else:
            wrapper += ["--ro-bind", path, path]
    return [*wrapper, "--dir", BOX, "--remount-ro", "/", *guard]


def box(mode: str) -> str:
    """The folder that a program starts in; writable, except under ``limits``, where nothing is."""
    return "/" if mode == "limits" else BOX


@functools.cache
def readable() -> list[str]:
    """The interpreter, system libraries and a few devices."""
    paths = [path for path in SYSTEM + DEVICES if os.path.exists(path)]
    prefixes = [str(Path(interpreter()).parent.parent), os.path.realpath(interpreter()).rsplit("/bin/", 1)[0]]
    if interpreter() == sys.executable:
        prefixes += [sys.base_prefix, os.path.realpath(sys.base_prefix), sys.prefix]
    for prefix in dict.fromkeys(prefixes):
        if not any(prefix == path or prefix.startswith(path + "/") for path in paths):
            paths.append(prefix)
    return paths


def users() -> dict[str, int | None]:
    """Root gives the solution and its judge a user each that nobody else has; others stay who they are."""
    if os.geteuid() != 0:
        return {"solution": None, "judge": None}
    uid = 200_000 + 2 * secrets.randbelow(150_000)
    users_here = Path("/proc/self/uid_map")
    spans = [line.split() for line in users_here.read_text().splitlines()] if users_here.exists() else []
    if not any(int(first) <= uid < uid + 1 < int(first) + int(count) for first, _, count in spans):
        return {"solution": NOBODY, "judge": NOBODY}
    return {"solution": uid, "judge": uid + 1}


def tasks_beside(mode: str, uid: int | None) -> int:
    """Processes and threads that the kernel counts with the program's own against its limit."""
    if uid not in (None, NOBODY):
        return 1
    if mode != "limits":
        return 4  # the guard's, in a user namespace of their own
    mine = os.geteuid() if uid is None else uid
    tasks = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == mine:
                tasks += len(os.listdir(folder / "task"))
        except OSError:  # it ended
            continue
    return tasks + 4


@contextmanager
def memory_kept_private(mode: str) -> Iterator[None]:
    """Without namespaces the program sees this process: its memory and environment are closed to its own user."""
    if mode != "limits":
        yield
        return
    before = libc.prctl(libc.PR_GET_DUMPABLE, 0)
    libc.keep_memory_private()
    try:
        yield
    finally:
        libc.prctl(libc.PR_SET_DUMPABLE, 1 if before == 1 else 0)


def _open_to_others(path: str) -> bool:
    """Whether any user may enter ``path``."""
    place = Path(path)
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in [place, *place.parents])
