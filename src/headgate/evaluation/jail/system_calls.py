"""A seccomp filter: the system calls that a computation needs, and no others.

An allowlist, because the kernel's surface grows: io_uring, keyctl, bpf, userfaultfd, perf, ptrace, mounts, memfd,
System V memory and sockets to anywhere are absent from it rather than named. One process is all there is: threads
can be started, processes and programs cannot (HumanEval's own harness disables ``os.fork`` too), so that the limit
on a process's memory is the limit on all memory. Calls that could reach another process must name this one.
What is refused fails with EPERM; calls younger than 2019 with ENOSYS, upon which a libc tries the older one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

from .libc import PR_SET_SECCOMP, call

FILTER_MODE = 2
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 4, 16, 24  # offsets in seccomp_data (low words)
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000  # x86's second table of numbers
YOUNG = 424  # from here on (pidfd_send_signal, Linux 5.1) numbers are the same everywhere
CLONE_THREAD, CLONE_NEW_SPACES = 0x00010000, 0x7E020000
AF_UNIX = 1
Line = tuple[int, int, int, int]

# name: number on x86-64, number on aarch64 (None: the architecture has only the newer form)
FREE: dict[str, tuple[int, int | None]] = {
    # open descriptors
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62), "pread64": (17, 67),
    "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "preadv": (295, 69), "pwritev": (296, 70),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46), "flock": (73, 32), "fallocate": (285, 47),
    "close_range": (436, 436), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19), "sendto": (44, 206), "recvfrom": (45, 207),
    "shutdown": (48, 210),
    # names of files: Landlock and the mounts say which. No chmod, chown or utimes, which Landlock leaves open.
    "open": (2, None), "openat": (257, 56), "creat": (85, None), "stat": (4, None), "lstat": (6, None),
    "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "getdents": (78, None),
    "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "symlink": (88, None),
    "symlinkat": (266, 36), "readlink": (89, None), "readlinkat": (267, 78), "umask": (95, 166),
    # memory and threads
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233), "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96),
    "rseq": (334, 293), "membarrier": (324, 283), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "getcpu": (309, 168), "exit": (60, 93),
    "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95),
    # signals to oneself and time
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "pause": (34, None),
    "restart_syscall": (219, 128), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "alarm": (37, None),
    "getitimer": (36, 102), "setitimer": (38, 103), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    # who and where
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150),
    "getgroups": (115, 158), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "getpriority": (140, 141), "getrlimit": (97, 163), "getrusage": (98, 165), "uname": (63, 160),
    "sysinfo": (99, 179), "getrandom": (318, 278),
}  # fmt: skip
CLONE, KILL, TGKILL = (56, 220), (62, 129), (234, 131)
SOCKETPAIR, PRLIMIT = (53, 199), (302, 261)
# The first argument's or the second's only values. fcntl: no F_SETOWN, which sends signals to whom it names, and no
# F_SETPIPE_SZ. ioctl: close-on-exec, non-blocking, bytes waiting, is it a terminal. prctl: a thread's name.
FCNTL, FCNTL_COMMANDS = (72, 25), (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
IOCTL, IOCTL_REQUESTS = (16, 29), (0x5450, 0x5451, 0x5421, 0x541B, 0x5401, 0x5413)
PRCTL, PRCTL_OPTIONS = (157, 167), (15, 16)


def supported() -> bool:
    """Whether the filter knows this machine's numbers: x86-64 and aarch64."""
    return platform.machine() in AUDIT and struct.calcsize("P") == 8


def restrict() -> None:
    """Install the filter for this process and its threads, for good. Raises OSError without ``no_new_privs``."""
    lines = program(platform.machine(), os.getpid())
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(buffer))
    zero = ctypes.c_ulong(0)
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(FILTER_MODE), header, zero, zero)


def program(machine: str, pid: int) -> list[Line]:
    """The filter of ``machine`` for process ``pid``, as BPF."""
    column = list(AUDIT).index(machine)
    refuse = _give(ERRNO | errno.EPERM)
    lines = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, AUDIT[machine]),
        _give(KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        lines += [(AT_LEAST, 0, 1, X32), refuse]
    for numbers in FREE.values():
        number = numbers[column]
        if number is not None:
            lines += [(EQUAL, 0, 1, number), _give(ALLOW)]
    for pair, offset, values in (
        (KILL, FIRST_ARGUMENT, (pid,)),
        (TGKILL, FIRST_ARGUMENT, (pid,)),
        (SOCKETPAIR, FIRST_ARGUMENT, (AF_UNIX,)),
        (PRLIMIT, FIRST_ARGUMENT, (0,)),
        (PRCTL, FIRST_ARGUMENT, PRCTL_OPTIONS),
        (FCNTL, SECOND_ARGUMENT, FCNTL_COMMANDS),
        (IOCTL, SECOND_ARGUMENT, IOCTL_REQUESTS),
    ):
        body: list[Line] = [(LOAD, 0, 0, offset)]
        for value in values:
            body += [(EQUAL, 0, 1, value), _give(ALLOW)]
        lines += _when(pair[column], [*body, refuse])
    threads = [
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (ANY_BIT, 1, 0, CLONE_NEW_SPACES),
        (ANY_BIT, 1, 0, CLONE_THREAD),
        refuse,
        _give(ALLOW),
    ]
    lines += _when(CLONE[column], threads)
    return [*lines, (AT_LEAST, 0, 1, YOUNG), _give(ERRNO | errno.ENOSYS), refuse]


def _give(verdict: int) -> Line:
    return (RETURN, 0, 0, verdict)


def _when(number: int, body: list[Line]) -> list[Line]:
    """``body``, which answers in every case, if the call is ``number``."""
    return [(EQUAL, 0, len(body), number), *body]
