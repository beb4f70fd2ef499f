"""The table of programs that try to hurt the machine, to outlive their time or to score themselves."""

from __future__ import annotations

from headgate.evaluation.sandbox_watch import Limits
from tests.evaluation.hostile import ANY_BUT_PASSED, WRONG, Hostile, attempt, ended
from tests.evaluation.hostile_forgeries import FORGERIES

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
    attempt(
        "capset",
        "kernel surface",
        "call('capset', ctypes.create_string_buffer(b'\\x22\\x05\\x08\\x20' + b'\\0' * 4), ctypes.create_string_buffer(b'\\xff' * 24))",
    ),
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
    attempt("one large file", "disk", "def fill():\n    with open('a', 'wb') as f:\n        for i in range(64): f.write(b'x' * (1 << 20))\nreturn refused(fill, *FULL)"),
    attempt("many files", "disk", "def fill():\n    for i in range(64): open(f'a{i}', 'wb').write(b'x' * (1 << 20))\nreturn refused(fill, *FULL)", True),
    attempt("many names", "disk", "def fill():\n    for i in range(10_000): open(f'a{i}', 'wb').close()\nreturn refused(fill, *FULL)"),
    attempt("a file without blocks", "disk", "def fill():\n    with open('a', 'wb') as f: f.truncate(1 << 40)\nreturn refused(fill, *FULL)"),
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
    attempt("threads without end", "processes", "threading.stack_size(32768)\nover, started = threading.Event(), 0\ntry:\n    while started < 100:\n        threading.Thread(target=over.wait, daemon=True).start()\n        started += 1\nexcept RuntimeError: pass\nover.set()\nreturn 'refused' if 4 < started < 64 else f'{started} threads'", True),
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
MEMORY[-1] = Hostile(
    MEMORY[-1].name, "memory", "def f(x):\n    return ['y' * (1 << 20)] * 200", WRONG, ANY_BUT_PASSED
)
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
PROGRAMS = [*KERNEL, *FILES, *DISK, *NETWORK, *PROCESSES, *PARENT, *MEMORY, *TIME, *FORGERIES]


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
