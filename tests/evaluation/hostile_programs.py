"""Programs that try to hurt the machine or to score themselves, and how one knows that the sandbox held.

Two forms. An *attempt* defines ``attack()``: it answers "refused" only when the kernel said no to exactly what it
tried, and anything else (success, or a program that broke before it tried) fails. A *forgery* is a wrong solution
that must not pass. Evidence from outside goes with both: a secret file, a server, a signal, the memory in use.

``python hostile_programs.py MODE`` runs the table by the standard library alone and prints what was not held.
"""

from __future__ import annotations

import glob
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from headgate.evaluation.sandbox import run_program
from headgate.evaluation.sandbox_watch import Limits, Outcome

ANY_BUT_PASSED = ("syntax", "assertion", "error", "time", "memory", "output", "exit", "killed")
WRONG = ("assert f(2) == 3", "assert f(5) == 6", "assert not f(0) == 2")
PRELUDE = """
import ctypes, errno, mmap, os, platform, resource, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"
def call(function, *arguments):
    answer = getattr(libc, function)(*arguments)
    if answer < 0:
        raise OSError(ctypes.get_errno(), function)
    return answer
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


@dataclass(frozen=True)
class Hostile:
    """``kind``: its row in the table of docs/evaluation.md. ``ends``: the statuses that mean it was held."""

    name: str
    kind: str
    code: str
    tests: tuple[str, ...] = ("assert (a := attack()) == 'refused', a",)
    ends: tuple[str, ...] = ("passed",)
    limits: Limits = Limits(seconds=4.0, wall=20.0, memory=256)
    quick: bool = False
    not_held: dict[str, str] = field(default_factory=dict)  # mode: why


def attempt(name: str, kind: str, body: str, quick: bool = False, **rest: object) -> Hostile:
    """An attack by the lines of a function; a single expression is refused or escapes by itself."""
    if "\n" not in body and "return" not in body:
        body = f"return refused(lambda: {body})"
    lines = "\n".join("    " + line for line in body.splitlines())
    return Hostile(name, kind, f"{PRELUDE}\ndef attack():\n{lines}\n", quick=quick, **rest)  # type: ignore[arg-type]


def forgery(name: str, code: str, tests: tuple[str, ...] = WRONG, quick: bool = False, **rest: object) -> Hostile:
    return Hostile(name, "forged verdicts", code, tests, ANY_BUT_PASSED, quick=quick, **rest)  # type: ignore[arg-type]


def ended(name: str, kind: str, code: str, *ends: str, quick: bool = False, **rest: object) -> Hostile:
    """A program that must end so."""
    return Hostile(name, kind, PRELUDE + code, ("pass",), ends, quick=quick, **rest)  # type: ignore[arg-type]


NUMBERS = {  # kernel surface: name, x86-64, aarch64, arguments
    "io_uring_setup": (425, 425, "8, ctypes.addressof(ctypes.create_string_buffer(120))"),
    "keyctl": (250, 219, "0, -3, 1"),
    "add_key": (248, 217, "0, 0, 0, 0, 0"),
    "bpf": (321, 280, "0, 0, 0"),
    "userfaultfd": (323, 282, "1"),
    "perf_event_open": (298, 241, "0, 0, -1, -1, 0"),
    "ptrace traceme": (101, 117, "0, 0, 0, 0"),
    "process_vm_readv": (310, 270, "os.getpid(), 0, 0, 0, 0, 0"),
    "kcmp": (312, 272, "os.getpid(), os.getpid(), 0, 0, 0"),
    "pidfd_open": (434, 434, "os.getpid(), 0"),
    "unshare user": (272, 97, "0x10000000"),
    "clone user": (56, 220, "0x10000011, 0, 0, 0, 0"),
    "clone3": (435, 435, "0, 0"),
    "setns": (308, 268, "0, 0"),
    "mount": (165, 40, "0, 0, 0, 0, 0"),
    "fsopen": (430, 430, "ctypes.addressof(ctypes.create_string_buffer(b'tmpfs')), 0"),
    "open_tree": (428, 428, "-100, 0, 0"),
    "pivot_root": (155, 41, "0, 0"),
    "chroot": (161, 51, "0"),
    "finit_module": (313, 273, "0, 0, 0"),
    "reboot": (169, 142, "0, 0, 0, 0"),
    "clock_settime": (227, 112, "0, 0"),
    "personality": (135, 92, "0x0040000"),
    "seccomp listener": (317, 277, "1, 8, 0"),
    "open_by_handle_at": (304, 265, "-100, 0, 0"),
    "name_to_handle_at": (303, 264, "-100, 0, 0, 0, 0"),
    "fanotify_init": (300, 262, "0, 0"),
    "inotify_init1": (294, 26, "0"),
    "vmsplice": (278, 75, "0, 0, 0, 0"),
    "modify_ldt": (154, 1000, "0, 0, 0"),
    "mlockall": (151, 230, "1"),
    "sched_setscheduler": (144, 119, "0, 3, 0"),
    "mq_open": (240, 180, "0, 0, 0, 0"),
    "semget": (64, 190, "0, 1, 0o1600"),
    "msgget": (68, 186, "0, 0o1600"),
    "shmget": (29, 194, "0, 4096, 0o1600"),
    "memfd_create": (319, 279, "ctypes.addressof(ctypes.create_string_buffer(b'x')), 0"),
    "memfd_secret": (447, 447, "0"),
    "timer_create": (222, 107, "0, 0, 0"),
    "signalfd4": (289, 74, "-1, 0, 8, 0"),
    "landlock_create_ruleset": (444, 444, "0, 0, 1"),
}  # fmt: skip
MEMORY_KINDS = ("mq_open", "semget", "msgget", "shmget", "memfd_create", "memfd_secret")
QUICK_CALLS = ("io_uring_setup", "keyctl", "unshare user", "ptrace traceme", "memfd_create")
CALLS = [
    attempt(
        name,
        "memory" if name in MEMORY_KINDS else "kernel surface",
        f"return refused(lambda: system_call(({x86}, {arm}), {arguments}), errno.EPERM, errno.ENOSYS)",
        quick=name in QUICK_CALLS,
    )
    for name, (x86, arm, arguments) in NUMBERS.items()
]
KERNEL = [
    *CALLS,
    ended(
        "32-bit system calls",
        "kernel surface",
        "page = mmap.mmap(-1, 4096, prot=7)\n"
        "page.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')  # getpid by the old entry\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
        "if not X86: os.kill(os.getpid(), 31)\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(address)()",
        "killed",
    ),
    attempt("x32 system calls", "kernel surface", "system_call((0x40000000 + 39, 1000))"),
    attempt("execute a shell", "kernel surface", "os.execv('/bin/sh', ['sh', '-c', 'true'])", True),
    attempt("allow privileges again", "kernel surface", "call('prctl', 38, 0, 0, 0, 0)"),
    attempt("be root again", "kernel surface", "os.setuid(0)"),
    attempt("capset", "kernel surface", "call('capset', ctypes.create_string_buffer(b'\\x22\\x05\\x08\\x20' + b'\\0' * 4), ctypes.create_string_buffer(b'\\xff' * 24))"),
    attempt("type into the terminal", "kernel surface", "__import__('fcntl').ioctl(0, 0x5412, b'x')"),
]
FILES = [
    attempt("read a file of this user", "files", "open({secret!r}).read()", True),
    attempt("write it", "files", "open({secret!r}, 'a').write('x')", True),
    attempt("truncate it", "files", "os.truncate({secret!r}, 0)", True),
    attempt("truncate it by opening", "files", "os.open({secret!r}, os.O_RDONLY | os.O_TRUNC)"),
    attempt("remove it", "files", "os.unlink({secret!r})"),
    attempt("rename it", "files", "os.rename({secret!r}, {secret!r} + '2')"),
    attempt("change its mode", "files", "os.chmod({secret!r}, 0)", True),
    attempt("change its times", "files", "os.utime({secret!r}, (1, 1))"),
    attempt("change its attributes", "files", "os.setxattr({secret!r}, 'user.x', b'x')"),
    attempt("lock it", "files", "__import__('fcntl').flock(open({secret!r}), 2)"),
    attempt("make a file beside it", "files", "open({folder!r} + '/new', 'w')"),
    attempt("make a folder beside it", "files", "os.mkdir({folder!r} + '/new')"),
    attempt("link it", "files", "os.link({secret!r}, 'link')"),
    attempt("read it through a symbolic link", "files", "try: os.symlink({secret!r}, 'link')\nexcept OSError: return refused(lambda: open({secret!r}))\nreturn refused(lambda: open('link').read())"),
    attempt("read it from its folder", "files", "try: os.chdir({folder!r})\nexcept OSError: pass\nreturn refused(lambda: open(os.path.basename({secret!r})).read())"),
    attempt("list its folder", "files", "os.listdir({folder!r})"),
    attempt("see that it is there", "files", "os.stat({secret!r}).st_size", not_held={"limits": "Landlock does not cover metadata"}),
    attempt("write in /tmp", "files", "open('/tmp/headgate-escaped', 'w')", True),
    attempt("write in /dev/shm", "files", "open('/dev/shm/headgate-escaped', 'w')"),
    attempt("write in /", "files", "open('/headgate-escaped', 'w')"),
    attempt("change the standard library", "files", "open(os.__file__, 'a')"),
    attempt("close /dev/null to everyone", "files", "os.chmod('/dev/null', 0)", True),
    attempt("own /dev/null", "files", "os.chown('/dev/null', os.getuid(), os.getgid())"),
    attempt("make a device", "files", "os.mknod('disk', 0o60666, os.makedev(8, 0))"),
    attempt("read a password file", "files", "open('/etc/passwd').read()"),
    attempt("list the home of root", "files", "os.listdir('/root')"),
    attempt("read the kernel's log", "files", "call('klogctl', 3, ctypes.create_string_buffer(4096), 4096)"),
]  # fmt: skip
DISK = [
    attempt("one large file", "disk", "def fill():\n    with open('a', 'wb') as f:\n        while True: f.write(b'x' * (1 << 20))\nreturn refused(fill, errno.EFBIG, errno.ENOSPC, errno.EACCES, errno.EPERM)"),
    attempt("many files", "disk", "def fill():\n    i = 0\n    while True:\n        open(f'a{i}', 'wb').write(b'x' * (1 << 20))\n        i += 1\nreturn refused(fill, errno.ENOSPC, errno.EACCES, errno.EPERM)", True),
    attempt("many names", "disk", "def fill():\n    for i in range(100_000): open(f'a{i}', 'wb').close()\nreturn refused(fill, errno.ENOSPC, errno.EACCES, errno.EPERM)"),
    attempt("a tmpfs over its folder", "disk", "call('mount', b'none', b'/box', b'tmpfs', 0, None)"),
    attempt("a tmpfs in a user namespace", "disk", "call('unshare', 0x10020000)\ncall('mount', b'none', b'/box', b'tmpfs', 0, None)".replace("\n", " or ")),
]  # fmt: skip
NETWORK = [
    attempt("a server on this machine", "network", "socket.create_connection(('127.0.0.1', {port}), timeout=1)", True),
    attempt("a datagram", "network", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))"),
    attempt("IPv6", "network", "socket.socket(socket.AF_INET6)"),
    attempt("an abstract socket", "network", "socket.socket(socket.AF_UNIX).connect('\\0' + {token!r})", True),
    attempt("a socket in a folder", "network", "socket.socket(socket.AF_UNIX).connect({folder!r} + '/socket')"),
    attempt("netlink", "network", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    attempt("raw packets", "network", "socket.socket(17, socket.SOCK_RAW)"),
    attempt("the kernel's ciphers", "network", "socket.socket(38, 5)"),
    attempt("the hypervisor", "network", "socket.socket(40, socket.SOCK_STREAM)"),
    attempt("a pair outside the local family", "network", "socket.socketpair(socket.AF_INET)"),
]  # fmt: skip
PROCESSES = [
    attempt("fork", "processes", "os.fork() or os._exit(0)", True),
    attempt("spawn", "processes", "os.posix_spawn('/bin/true', ['true'], {})"),
    attempt("subprocess", "processes", "__import__('subprocess').run(['/bin/true'])"),
    attempt("multiprocessing", "processes", "def start():\n    import multiprocessing as m\n    p = m.get_context('fork').Process(target=int)\n    p.start()\nreturn refused(start)"),
    attempt("a session of its own", "processes", "os.setsid()"),
    attempt("a process group of its own", "processes", "os.setpgid(0, 0)"),
    attempt("outlive its parent", "processes", "call('prctl', 1, 0, 0, 0, 0)"),
    attempt("kill its parent", "processes", "os.kill(os.getppid(), signal.SIGKILL)", True),
    attempt("kill everyone", "processes", "os.kill(-1, signal.SIGKILL)"),
    attempt("kill the tests' process", "processes", "os.kill({pid}, signal.SIGIO)", True),
    attempt("kill by thread", "processes", "system_call((200, 130), {pid}, signal.SIGIO)"),
    attempt("queue a signal", "processes", "system_call((129, 138), {pid}, signal.SIGIO, 0)"),
    attempt("signal by a descriptor's owner", "processes", "import fcntl\na, b = socket.socketpair()\ndef own():\n    fcntl.fcntl(a, fcntl.F_SETOWN, {pid})\n    fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC)\n    b.send(b'x')\nreturn refused(own)"),
    attempt("slow its parent down", "processes", "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"),
    attempt("pin its parent", "processes", "os.sched_setaffinity(os.getppid(), {0})"),
    attempt("limit its parent", "processes", "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))"),
    ended("fork without end", "processes", "\nwhile True: os.fork()", "error"),
    ended("threads without end", "processes", "\nl = threading.Event()\nwhile True: threading.Thread(target=l.wait, daemon=True).start()", "error", quick=True),
]  # fmt: skip
PARENT = [
    attempt("its environment", "the parent's memory", "open('/proc/{pid}/environ').read()", True),
    attempt("its memory", "the parent's memory", "open('/proc/{pid}/mem', 'rb')", True),
    attempt("its memory map", "the parent's memory", "open('/proc/{pid}/maps').read()"),
    attempt("its descriptors", "the parent's memory", "os.listdir('/proc/{pid}/fd')"),
    attempt("its command line", "the parent's memory", "open('/proc/{pid}/cmdline').read()"),
    attempt("the guard's environment", "the parent's memory", "open(f'/proc/{os.getppid()}/environ').read()"),
    attempt("the judge's memory", "the parent's memory", "open(f'/proc/{os.getpid() + 1}/mem', 'rb')"),
    attempt("attach to it", "the parent's memory", "system_call((101, 117), 16, {pid}, 0, 0)"),
    attempt("read it directly", "the parent's memory", "b = ctypes.create_string_buffer(8)\nv = (ctypes.c_ulong * 2)(ctypes.addressof(b), 8)\nreturn refused(lambda: system_call((310, 270), {pid}, ctypes.addressof(v), 1, ctypes.addressof(v), 1, 0))"),
    attempt("write it directly", "the parent's memory", "b = ctypes.create_string_buffer(8)\nv = (ctypes.c_ulong * 2)(ctypes.addressof(b), 8)\nreturn refused(lambda: system_call((311, 271), os.getppid(), ctypes.addressof(v), 1, ctypes.addressof(v), 1, 0))"),
    attempt("take its descriptors", "the parent's memory", "system_call((438, 438), 0, 0, 0)"),
    attempt("a token in its own environment", "the parent's memory", "return 'refused' if {environment!r} not in map(str, os.environ.values()) else 'escaped'"),
    attempt("descriptors it inherited", "the parent's memory", "links = []\nfor fd in range(3, 64):\n    try: links.append((fd, os.fstat(fd).st_mode & 0o170000))\n    except OSError: pass\nreturn 'refused' if [m for _, m in links] == [0o010000, 0o010000] else repr(links)"),
]  # fmt: skip
BIG = Limits(seconds=6.0, wall=30.0, memory=256)
MEMORY = [
    ended("one large block", "memory", "\nx = bytearray(300 << 20)", "memory", quick=True),
    ended("a list that doubles", "memory", "\nx = [0]\nwhile True: x += x", "memory", limits=BIG),
    ended("many threads", "memory", "\nkeep, errors = [], []\ndef take():\n    try: keep.append(bytearray(b'x' * (100 << 20)))\n    except MemoryError as e: errors.append(e)\nts = [threading.Thread(target=take) for _ in range(4)]\n[t.start() for t in ts]; [t.join() for t in ts]\nif errors: raise MemoryError", "memory", limits=BIG),
    ended("shared and anonymous", "memory", "\nm = mmap.mmap(-1, 300 << 20)\nfor i in range(0, len(m), 4096): m[i] = 1", "error"),
    ended("three processes of 200 MiB", "memory", "\nfor _ in range(3):\n    if os.fork() == 0:\n        x = bytearray(b'x' * (200 << 20)); time.sleep(3); os._exit(0)\ntime.sleep(3)", "error", quick=True, limits=BIG),
    attempt("raise its own limit", "memory", "def more():\n    try: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n    except ValueError: raise OSError(errno.EPERM, '')\nreturn refused(more)"),
    attempt("a larger pipe", "memory", "r, w = os.pipe()\nreturn refused(lambda: __import__('fcntl').fcntl(w, 1031, 1 << 20))"),
    ended("an answer of a gigabyte", "memory", "\ndef f(): return 'x' * (100 << 20)\n", "memory", "error", limits=BIG),
]  # fmt: skip
MEMORY[-1] = Hostile(MEMORY[-1].name, "memory", "def f(x):\n    return ['y' * (1 << 20)] * 200", WRONG, ANY_BUT_PASSED)
TIME = [
    ended("spin", "time", "\nwhile True: pass", "time", quick=True, limits=Limits(seconds=0.5)),
    ended("spin in threads", "time", "\ndef spin():\n    while True: pass\n[threading.Thread(target=spin).start() for _ in range(4)]\nspin()", "time", limits=Limits(seconds=0.5)),
    ended("spin in C", "time", "\n10 ** 10 ** 9", "time", "memory", limits=Limits(seconds=0.5)),
    ended("spin in a regular expression", "time", "\nimport re; re.match('(a+)+$', 'a' * 40 + 'b')", "time", limits=Limits(seconds=0.5)),
    ended("spin, deaf to signals", "time", "\nfor s in (*range(1, 9), *range(10, 19), 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass", "time", limits=Limits(seconds=0.5)),
    ended("sleep", "time", "\ntime.sleep(1000)", "time", limits=Limits(seconds=0.5, wall=1.5)),
    ended("wait for itself", "time", "\nl = threading.Lock(); l.acquire(); l.acquire()", "time", limits=Limits(seconds=0.5, wall=1.5)),
    Hostile("spin only when asked", "time", "def f(x):\n    while True: pass", WRONG, ("time",), Limits(seconds=0.5)),
    ended("a flood of output", "time", "\nwhile True: print('x' * 100_000)", "output", quick=True),
    ended("a flood of errors", "time", "\nwhile True: os.write(2, b'x' * 100_000)", "output"),
]  # fmt: skip
EQUAL = "class E{base}:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = None\n"
SPEAK = "import json, os, struct, fcntl\ndef say(m, fd):\n    d = json.dumps(m).encode()\n    os.write(fd, struct.pack('<I', len(d)) + d)\n"
SEARCH = '''
import gc, os, re, sys
def f(x=None):
    """Whatever looks like the expected answer, in every object, frame, module and descriptor here."""
    pattern, words = re.compile("token-[0-9a-f]{16}"), []
    frame = sys._getframe()
    while frame: words.append(repr(frame.f_locals)); frame = frame.f_back
    words += [repr(o)[:5000] for o in gc.get_objects() if type(o) in (dict, list, tuple)]
    for fd in range(3, 64):
        try: words.append(os.pread(fd, 1 << 20, 0).decode(errors="replace"))
        except OSError: pass
    for word in words:
        if m := pattern.search(word): return m.group()
'''
FORGERIES = [
    forgery("os._exit(0)", "import os; os._exit(0)", quick=True),
    forgery("sys.exit(0)", "import sys; sys.exit(0)"),
    forgery("leave when asked", "import os\ndef f(x): os._exit(0)", quick=True),
    forgery("leave from a thread", "import os, threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), os._exit(0))).start()\ndef f(x): time.sleep(5)"),
    forgery("always equal", EQUAL.format(base="") + "def f(x): return E()", quick=True),
    forgery("an int that is always equal", EQUAL.format(base="(int)") + "def f(x): return E(7)", quick=True),
    forgery("always equal, in a list", EQUAL.format(base="") + "def f(x): return [E()]", ("assert f(2) == [3]",)),
    forgery("a list that is always equal", EQUAL.format(base="(list)") + "def f(x): return E()", ("assert f(2) == [3]",)),
    forgery("a string that is always equal", EQUAL.format(base="(str)") + "def f(x): return E()", ("assert f(2) == 'x'",)),
    forgery("a dict that is always equal", EQUAL.format(base="(dict)") + "def f(x): return E()", ("assert f(2) == {1: 2}",)),
    forgery("always equal, as a key", "class E:\n    def __eq__(s, o): return True\n    def __hash__(s): return hash(1)\ndef f(x): return {E(): 2}", ("assert f(2) == {1: 2}",)),
    forgery("always contains", "class E:\n    def __contains__(s, o): return True\n    def __iter__(s): return iter(())\ndef f(x): return E()", ("assert 3 in f(2)",)),
    forgery("a class for a function", EQUAL.format(base="") + "class f(E):\n    def __init__(s, x): pass"),
    forgery("a metaclass", "class M(type):\n    def __eq__(s, o): return True\n    def __hash__(s): return 1\n    def __call__(s, x): return s\nclass f(metaclass=M): pass"),
    forgery("always close", "class E(float):\n    def __sub__(s, o): return 0.0\n    __rsub__ = __sub__\n    def __abs__(s): return 0.0\ndef f(x): return E(7)", ("assert abs(f(2) - 3) < 1e-6",)),
    forgery("replaced exec", "import builtins\nbuiltins.exec = lambda *a: None", quick=True),
    forgery("replaced compile", "import builtins\nreal = compile\nbuiltins.compile = lambda s, *a, **k: real('pass', 'x', 'exec')", quick=True),
    forgery("replaced AssertionError", "import builtins\nclass A(Exception):\n    def __new__(c, *a): raise SystemExit(0)\nbuiltins.AssertionError = A\ndef f(x): return 0"),
    forgery("assertions that raise nothing", "import builtins, ctypes\nbuiltins.AssertionError = Warning\ndef f(x): return 0"),
    forgery("replaced set, sorted, len and abs", "set = sorted = len = abs = lambda *a: 3\ndef f(x): return 0", ("assert set(f(2)) == {1}", "assert len([f(1)]) == 3"), quick=True),
    forgery("replaced helpers in builtins", "import builtins\nbuiltins.sorted = builtins.set = lambda *a, **k: [3]\ndef f(x): return 0", ("assert sorted([f(2)]) == [3]",)),
    forgery("a module of its own for math", "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0", ("import math\nassert math.isclose(f(2), 3.0)",), quick=True),
    forgery("math without an import", "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0", ("assert math.isclose(f(2), 3.0)",)),
    forgery("patched math", "import math, sys\nmath.isclose = lambda *a, **k: True\nsys.modules['math'] = math\ndef f(x): return 0", ("import math\nassert math.isclose(f(2), 3.0)",)),
    forgery("a check of its own", "def check(candidate): pass\ndef f(x): return 0", ("def check(candidate):\n    assert candidate(2) == 3", "check(f)"), quick=True),
    forgery("a helper of its own", "def poly(xs, x): return 0\ndef f(xs): return 77", ("def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))", "assert abs(poly([1, 2], f([1, 2]))) < 1e-4")),
    forgery("a changed constant", "import ctypes\ndef f(x):\n    ctypes.memmove(id(3) + 24, ctypes.byref(ctypes.c_int(2)), 4)\n    return 2", quick=True),
    forgery("through its frames", "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for k in list(frame.f_locals): frame.f_locals[k] = 'passed'\n        frame = frame.f_back\n    return 0"),
    forgery("patching the harness", "import sys\nfor n, m in list(sys.modules.items()):\n    if n.startswith('jail.'):\n        for k in ('encode', 'status', 'describe', 'execute', 'decode'):\n            if hasattr(m, k): setattr(m, k, lambda *a: 'passed')\ndef f(x): return 0"),
    forgery("the passing word", SPEAK + "for fd in range(3, 20):\n    for m in (['end', 'passed', 9, ''], ['passed'], ['ready'], ['failed', 'passed', '']):\n        try: say(m, fd)\n        except OSError: pass\n", quick=True),
    forgery("lines for the guard", "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'[\"end\", \"passed\", 1, \"\"]\\n' * 99)\n    except OSError: pass\nos._exit(0)"),
    forgery("garbage for the judge", "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'\\xff\\x00\\x00\\x00' + b'{' * 255)\n    except OSError: pass\n"),
    forgery("an answer without a bottom", "def f(x):\n    l = []\n    for _ in range(100_000): l = [l]\n    return l"),
    forgery("an answer that contains itself", "def f(x):\n    l = []; l.append(l)\n    return l", ("assert f(2) == [3]",)),
    forgery("a reference to nothing", SPEAK + "def f(x):\n    for fd in range(3, 20):\n        try: say(['value', {'ref': 99}], fd); break\n        except OSError: pass\n"),
    forgery("an exception that ends tests", "def f(x): raise KeyboardInterrupt"),
    forgery("StopIteration", "def f(x): raise StopIteration"),
    forgery("an exit when asked", "def f(x): raise SystemExit(0)"),
    forgery("searching for the answer", SEARCH, ("assert f() == {token!r}",), quick=True),
    forgery("closing the judge's pipe", "import os\ndef f(x): os.closerange(3, 64)"),
]  # fmt: skip
PROGRAMS = [*KERNEL, *FILES, *DISK, *NETWORK, *PROCESSES, *PARENT, *MEMORY, *TIME, *FORGERIES]


class Place:
    """What the programs go for, set up outside of any sandbox, and whether they got at it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, f"token-{secrets.token_hex(8)}"
        self.environment = f"key-{secrets.token_hex(8)}"
        self.secret = folder / "secret"
        self.reached: list[str] = []
        self.servers: list[socket.socket] = []

    def __enter__(self) -> Place:
        os.chmod(self.folder, 0o777)
        self.secret.write_text(self.token)
        self.secret.chmod(0o666)
        os.environ["HEADGATE_TEST_KEY"] = self.environment
        for family, address in (
            (socket.AF_INET, ("127.0.0.1", 0)),
            (socket.AF_UNIX, "\0" + self.token),
            (socket.AF_UNIX, str(self.folder / "socket")),
        ):
            server = socket.socket(family)
            server.bind(address)
            server.listen()
            self.servers.append(server)
            threading.Thread(target=self._serve, args=(server, str(address)), daemon=True).start()
        os.chmod(self.folder / "socket", 0o777)
        self.before = self._picture()
        self.handler = signal.signal(signal.SIGIO, lambda *_: self.reached.append("a signal arrived"))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGIO, self.handler)
        del os.environ["HEADGATE_TEST_KEY"]
        for server in self.servers:
            server.close()

    def fill(self, text: str) -> str:
        port = self.servers[0].getsockname()[1]
        for name, value in {
            "secret": str(self.secret),
            "folder": str(self.folder),
            "token": self.token,
            "environment": self.environment,
        }.items():
            text = text.replace("{" + name + "!r}", repr(value))
        return text.replace("{port}", str(port)).replace("{pid}", str(os.getpid()))

    def changes(self) -> list[str]:
        """What is no longer as it was."""
        now, happened = self._picture(), list(self.reached)
        happened += [f"{name}: {self.before[name]} is now {now[name]}" for name in now if now[name] != self.before[name]]
        self.reached.clear()
        return happened

    def _picture(self) -> dict[str, object]:
        state = self.secret.stat()
        return {
            "secret": (self.secret.read_text(), state.st_mode, state.st_mtime, state.st_nlink, os.listxattr(self.secret)),
            "folder": sorted(os.listdir(self.folder)),
            "/dev/null": (os.stat("/dev/null").st_mode, os.stat("/dev/null").st_uid),
            "escaped": glob.glob("/headgate-escaped") + glob.glob("/*/headgate-escaped") + glob.glob("/dev/shm/headgate-*"),
            "parent": (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)),
            "sandboxes": sorted(set(guards())),
        }  # fmt: skip

    def _serve(self, server: socket.socket, address: str) -> None:
        while True:
            try:
                server.accept()[0].close()
            except OSError:
                return
            self.reached.append(f"connected to {address!r}")


def guards() -> list[int]:
    """Live sandbox processes that this process is an ancestor of."""
    return [pid for pid, (_, state, _) in below(os.getpid()).items() if state != "Z" and b"evaluation/jail" in line(pid)]


def line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def below(root: int) -> dict[int, tuple[int, str, int]]:
    """Every process under ``root``: its parent, state and resident bytes."""
    table = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        table[int(folder.name)] = (int(fields[1]), fields[0], int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))
    inside = {root}
    while more := {pid for pid, (parent, _, _) in table.items() if parent in inside} - inside:
        inside |= more
    return {pid: table[pid] for pid in inside - {root} if pid in table}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most bytes that all processes under this one had resident at once, looked at every 10 ms."""
    peak, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            peak[0] = max(peak[0], sum(resident for _, _, resident in below(os.getpid()).values()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def run(program: Hostile, mode: str, place: Place) -> tuple[Outcome, list[str]]:
    """Its outcome, and what shows that it was not held."""
    pieces = [("solution", place.fill(program.code))]
    pieces += [(f"test {i}", place.fill(test)) for i, test in enumerate(program.tests, 1)]
    with peak_memory() as peak:
        outcome = run_program(pieces, program.limits, mode)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and guards():
        time.sleep(0.01)
    wrong = place.changes()
    if outcome.status not in program.ends:
        wrong.append(f"it ended as {outcome.status} ({outcome.detail or outcome.piece})")
    # The judge and the interpreters of the guard stand beside the solution; each is some 20 MiB.
    if peak[0] > (program.limits.memory + 160) << 20:
        wrong.append(f"{peak[0] >> 20} MiB resident at once")
    return outcome, wrong


def table(modes: tuple[str, ...] = ("namespaces", "bwrap", "limits")) -> str:
    """How many programs of each kind a mode holds, as docs/evaluation.md has it."""
    lines = ["| programs that go for | number | " + " | ".join(f"`{mode}`" for mode in modes) + " |"]
    lines.append("|---|--:|" + "---|" * len(modes))
    for kind in dict.fromkeys(program.kind for program in PROGRAMS):
        mine = [program for program in PROGRAMS if program.kind == kind]
        cells = []
        for mode in modes:
            open_ones = [program.name for program in mine if mode in program.not_held]
            cells.append(f"held, but not: {', '.join(open_ones)}" if open_ones else "held")
        lines.append(f"| {kind} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(mode: str, *names: str) -> None:
    """Print, as JSON, what was not held: {name: reasons}."""
    with tempfile.TemporaryDirectory() as folder, Place(Path(folder)) as place:
        chosen = [program for program in PROGRAMS if not names or program.name in names]
        results = {program.name: run(program, mode, place)[1] for program in chosen}
    print(json.dumps({name: wrong for name, wrong in results.items() if wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
