"""A root of its own in namespaces of its own: nothing of the machine but the interpreter, read-only."""

from __future__ import annotations

import ctypes
import os
import platform

from .libc import call

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_SETATTR, AT_RECURSIVE = 442, 0x8000
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    coded: list[object] = [
        None if text is None else text.encode() for text in (source, target, kind, options)
    ]
    call("mount", coded[0], coded[1], coded[2], ctypes.c_ulong(flags), coded[3])


def read_only(path: str) -> None:
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, -100, path.encode(), AT_RECURSIVE, ctypes.byref(attributes), 32)


def unshare() -> None:
    """New process, network, mount, IPC, name and cgroup namespaces; a user namespace first where we are not root."""
    uid, gid = os.geteuid(), os.getegid()
    spaces = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWPID | NEWNET
    if uid == 0:
        call("unshare", spaces)
        return
    call("unshare", spaces | NEWUSER)
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)


def small_folder(path: str, disk: int) -> None:
    """A folder in memory of ``disk`` bytes and a fixed number of files, mounted on ``path``."""
    mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk},nr_inodes=2048,mode=777")


def new_root(root: str, readable: list[str], box: str, disk: int) -> None:
    """Make ``root`` the root: the readable paths, and ``box``, the small folder to write in.

    There is no /proc: what it says of other processes is of use to attackers only.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in readable:
        _show(path, root + path)
    os.makedirs(root + box)
    read_only(root)
    small_folder(root + box, disk)
    os.chdir(root)
    call("syscall", PIVOT_ROOT[platform.machine()], b".", b".")
    call("umount2", b".", MNT_DETACH)


def _show(path: str, target: str) -> None:
    if os.path.lexists(target):
        return  # inside a folder that is shown already
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target)
    else:
        open(target, "w").close()
    mount(path, target, None, MS_BIND | MS_REC)
