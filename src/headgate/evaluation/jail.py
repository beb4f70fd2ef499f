"""The program that runs model-written code, started by ``sandbox`` as a process of its own.

Standard library only, and nothing of Headgate: it is executed as a file by an isolated interpreter. Three
processes: the *guard* (first), the *init* (process 1 of a new process namespace, where there is one: when it
ends the kernel kills everything inside), and the *program*. What the program did is told through a pipe, in
lines that begin with a word the program does not know; leaving early with any exit code is not success.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
import types
from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 38, 36
MOUNT_SETATTR, AT_RECURSIVE = 442, 0x8000
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
BOX = "/box"
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    coded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    call("mount", coded[0], coded[1], coded[2], ctypes.c_ulong(flags), coded[3])


def read_only(path: str) -> None:
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, -100, path.encode(), AT_RECURSIVE, ctypes.byref(attributes), 32)


def unshare() -> None:
    """New process, network, mount, IPC and name namespaces; a user namespace first where we are not root."""
    uid, gid = os.geteuid(), os.getegid()
    spaces = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    if uid == 0:
        call("unshare", spaces)
        return
    call("unshare", spaces | NEWUSER)
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)


def new_root(root: str, readable: list[str], disk: int) -> None:
    """A root of its own: system libraries and the interpreter read-only, one small folder in memory to write in."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in readable:
        target = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
            continue
        if os.path.exists(target):
            continue
        if os.path.isdir(path):
            os.makedirs(target)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
        mount(path, target, None, MS_BIND | MS_REC)
    os.makedirs(root + "/proc")
    os.makedirs(root + BOX)
    with contextlib.suppress(OSError):  # a container that masks /proc: the program goes without
        mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV)
    read_only(root)
    mount("tmpfs", root + BOX, "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk},nr_inodes=2048,mode=777")
    os.chdir(root)
    call("syscall", PIVOT_ROOT[platform.machine()], b".", b".")
    call("umount2", b".", 2)
    os.chdir(BOX)


def limit(limits: dict[str, int]) -> None:
    for name, value in (
        ("RLIMIT_CPU", limits["cpu"]),
        ("RLIMIT_AS", limits["memory"]),
        ("RLIMIT_FSIZE", limits["disk"]),
        ("RLIMIT_NOFILE", limits["files"]),
        ("RLIMIT_NPROC", limits["processes"]),
        ("RLIMIT_CORE", 0),
    ):
        hard = value + 1 if name == "RLIMIT_CPU" else value
        with contextlib.suppress(ValueError, OSError):  # a lower hard limit is already in force
            resource.setrlimit(getattr(resource, name), (value, hard))


def drop(uid: int | None) -> None:
    """No privilege left, and none to be had."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if sys.platform == "linux":
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if os.geteuid() != 0:
            call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def forbid() -> None:
    """Without namespaces: a seccomp filter that refuses signals, sockets, tracing and io_uring with EPERM."""
    audit, refused = {
        "x86_64": (0xC000003E, (41, 62, 101, 129, 200, 234, 297, 310, 311, 424, 425, 434)),
        "aarch64": (0xC00000B7, (198, 129, 117, 138, 130, 131, 240, 270, 271, 424, 425, 434)),
    }[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    refuse, allow = 0x00050001, 0x7FFF0000
    lines: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, audit),
        (give, 0, 0, refuse),
        (load, 0, 0, 0),
    ]
    lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # x86's second table of numbers
    for number in refused:
        lines += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    lines.append((give, 0, 0, allow))
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    held = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HL", len(lines), ctypes.addressof(held))
    call("prctl", 22, 2, header, 0, 0)


def text_of(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
    except BaseException:
        return type(error).__name__


def program(pieces: list[list[str]], report: int, word: str) -> None:
    """Execute the pieces one after the other in one module, telling where it is and how it ended."""
    write, leave = os.write, os._exit

    def tell(*parts: object) -> None:
        write(report, (" ".join(map(str, (word, *parts))) + "\n").encode(errors="replace"))
        if parts[0] == "end":
            with contextlib.suppress(Exception):
                sys.stdout.flush()

    module = types.ModuleType("solution")  # not __main__: a guarded script does not start
    sys.modules["solution"] = module
    sys.argv = ["solution.py"]
    for number, (name, source) in enumerate(pieces):
        tell("start", number)
        try:
            code = compile(source, f"<{name}>", "exec")
        except (SyntaxError, ValueError) as error:
            tell("end", "syntax", number, text_of(error))
            leave(1)
        except (MemoryError, RecursionError) as error:
            tell("end", "memory" if isinstance(error, MemoryError) else "error", number, text_of(error))
            leave(1)
        try:
            exec(code, module.__dict__)
        except BaseException as error:
            kind = "error"
            if isinstance(error, AssertionError):
                kind = "assertion"
            elif isinstance(error, MemoryError):
                kind = "memory"
            elif isinstance(error, SystemExit):
                kind = "exit"
            tell("end", kind, number, text_of(error))
            leave(1)
    tell("end", "passed", len(pieces) - 1)
    leave(0)


def sweep(uid: int | None) -> None:
    """Kill whatever the program left behind where no process namespace does it."""
    if uid is not None:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(OSError):
                os.setresuid(uid, uid, uid)
                os.kill(-1, signal.SIGKILL)
            os._exit(0)
        os.waitpid(child, 0)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
            for orphan in file.read().split():
                os.kill(int(orphan), signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.005)
        except ChildProcessError:
            return


def main() -> None:
    config = json.loads(sys.stdin.buffer.read())
    report, word, uid = config["report"], config["word"], config["uid"]
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    empty = os.open("/dev/null", os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.umask(0o022)
    separate = config["mode"] == "namespaces"
    if separate:
        unshare()
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        new_root(config["folder"], config["readable"], config["limits"]["disk"])
    else:
        os.chdir(BOX if config["mode"] == "bwrap" else config["folder"])
        if sys.platform == "linux":
            libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        os.setsid()
        limit(config["limits"])
        drop(uid)
        if config["mode"] == "limits" and sys.platform == "linux":
            forbid()
        os.set_inheritable(report, False)
        home = os.getcwd()
        os.environ.update(HOME=home, TMPDIR=home)
        program(config["pieces"], report, word)

    def stop(*_: object) -> None:
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)

    signal.signal(signal.SIGTERM, stop)
    while True:
        pid, status = os.wait()
        if pid == child:
            break
    if not separate:
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        sweep(uid)
    code = os.waitstatus_to_exitcode(status)
    os.write(report, f"{word} gone {code}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
