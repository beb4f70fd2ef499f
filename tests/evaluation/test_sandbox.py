"""Model-written code is contained, its failure is named, and nothing is left behind."""

from __future__ import annotations

import glob
import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from headgate.errors import ConfigError
from headgate.evaluation import sandbox
from headgate.evaluation.code_tasks import pieces
from headgate.evaluation.config import EvalTask
from headgate.evaluation.sandbox import isolation, run_program, run_programs, tally
from headgate.evaluation.sandbox_watch import Limits, Outcome
from headgate.methods.base import build_config

FAST = Limits(seconds=1.0, output=1 << 16)


def outcome(code: str, limits: Limits = FAST, tests: str = "pass") -> Outcome:
    return run_program([("solution", code), ("tests", tests)], limits)


def processes() -> set[str]:
    """Command lines of this machine's processes that belong to a sandbox."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    return {line for line in found if "jail.py" in line and " Z" not in line}


@pytest.fixture(autouse=True)
def nothing_left_behind():  # type: ignore[no-untyped-def]
    before = processes(), set(glob.glob(f"{tempfile.gettempdir()}/headgate-sandbox-*"))
    yield
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and processes() - before[0]:
        time.sleep(0.02)
    assert not processes() - before[0]
    assert set(glob.glob(f"{tempfile.gettempdir()}/headgate-sandbox-*")) <= before[1]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("x = 1", "passed"),
        ("def f(:\n", "syntax"),
        ("x = '\x00'", "syntax"),
        ("assert 1 == 2", "assertion"),
        ("1 / 0", "error"),
        ("def f(): return f()\nf()", "error"),
        ("import no_such_module", "error"),
        ("while True: pass", "time"),
        ("import time; time.sleep(60)", "time"),
        ("x = bytearray(1 << 34)", "memory"),
        ("x = [0]\nwhile True: x += x", "memory"),
        ("import sys; sys.exit(0)", "exit"),
        ("raise SystemExit", "exit"),
        ("import os; os._exit(0)", "exit"),
        ("import ctypes; ctypes.string_at(0)", "killed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed"),
        ("input()", "error"),
        ("import sys; assert sys.stdin.read() == ''", "passed"),
        ("if __name__ == '__main__':\n    raise ValueError", "passed"),
        ("raise BaseException('x')", "error"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "error"),
        (
            "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 0\nassert A().x == 0",
            "passed",
        ),
        ("import threading\nthreading.Thread(target=lambda: input()).start()", "passed"),
    ],
)
def test_how_it_ended(code: str, status: str) -> None:
    patient = Limits(seconds=20.0)  # a loaded machine is not the program's fault
    assert outcome(code, FAST if status == "time" else patient).status == status


def test_the_part_that_failed_is_named() -> None:
    found = run_program(
        [("solution", "x = 1"), ("test 1", "assert x == 1"), ("test 2", "assert x == 2, 'not two'")]
    )
    assert (found.status, found.piece, found.detail) == ("assertion", "test 2", "AssertionError: not two")


def test_each_part_has_its_own_time() -> None:
    part = "import time; time.sleep(1)"
    assert run_program([("a", part), ("b", part), ("c", part)], Limits(seconds=2.0)).passed


def test_forks_are_contained() -> None:
    found = outcome("import os\nwhile True:\n    os.fork()", Limits(seconds=2.0))
    assert not found.passed


def test_what_it_started_ends_with_it() -> None:
    code = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        time.sleep(1000)\n    os._exit(0)\n"
    )
    assert outcome(code).passed
    assert outcome(code, tests="while True: pass").status == "time"


@pytest.mark.parametrize(
    "code",
    [
        "f = open('a', 'wb')\nwhile True: f.write(b'x' * 1_000_000)",
        "i = 0\nwhile True:\n    open(f'a{i}', 'wb').write(b'x' * 1_000_000)\n    i += 1",
        "i = 0\nwhile True:\n    open(f'a{i}', 'wb').close()\n    i += 1",
    ],
    ids=["one file", "many files", "many names"],
)
def test_a_full_disk_is_only_its_own(code: str) -> None:
    free = os.statvfs(tempfile.gettempdir()).f_bavail
    found = outcome(code, Limits(seconds=5.0))
    assert found.status == "error" and "OSError" in found.detail
    assert os.statvfs(tempfile.gettempdir()).f_bavail > free - (64 << 20) // 4096


def test_it_writes_only_in_its_folder(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    outside = tmp_path / "escaped"
    assert outcome("open('inside', 'w').write('a'); assert open('inside').read() == 'a'").passed
    for place in (str(outside), "/tmp/headgate-escaped", "/usr/headgate-escaped", "/headgate-escaped"):
        found = outcome(f"open({place!r}, 'w').write('a')")
        assert found.status == "error", place
        assert not Path(place).exists()


def test_it_reads_no_home_and_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    monkeypatch.setenv("HEADGATE_TEST_SECRET", "key")
    assert outcome(f"open({str(secret)!r}).read()").status == "error"
    assert outcome("import os; assert 'HEADGATE_TEST_SECRET' not in os.environ").passed
    assert outcome("import os; assert os.getuid() != 0").passed


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('1.1.1.1', 80), timeout=0.5)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))",
        "import urllib.request; urllib.request.urlopen('http://example.com', timeout=0.5)",
    ],
)
def test_it_reaches_no_network(code: str) -> None:
    assert outcome(code).status == "error"


def test_it_cannot_reach_a_server_on_this_machine() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert (
            outcome(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=0.5)").status
            == "error"
        )


def test_a_deaf_program_is_stopped() -> None:
    code = "import signal, time\nfor s in (1, 2, 3, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: time.sleep(1)"
    started = time.monotonic()
    assert outcome(code).status == "time"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "code",
    ["while True: print('x' * 100_000)", "import os\nwhile True: os.write(2, b'x' * 100_000)"],
    ids=["stdout", "stderr"],
)
def test_a_flood_of_output_is_cut(code: str) -> None:
    found = outcome(code, Limits(seconds=10.0, output=1 << 20))
    assert found.status == "output" and len(found.output) <= 1 << 20 and found.seconds < 8


def test_a_flood_on_the_report_is_cut() -> None:
    code = "import os\nwhile True:\n    for fd in range(3, 20):\n        try: os.write(fd, b'end passed\\n' * 9999)\n        except OSError: pass"
    assert not outcome(code, Limits(seconds=2.0)).passed


def test_it_cannot_kill_its_parents() -> None:
    code = (
        f"import os, signal\nfor pid in (os.getppid(), 1, {os.getpid()}):\n    try:\n"
        "        if pid != os.getpid(): os.kill(pid, signal.SIGKILL)\n"
        "    except OSError: pass\nraise ValueError('still here')"
    )
    found = outcome(code)
    assert (found.status, found.detail) == ("error", "ValueError: still here")


def test_privileges_cannot_be_had_again() -> None:
    mount = "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/box', b'tmpfs', 0, None) == 0"
    assert outcome(mount).status == "assertion"
    assert outcome("import os; os.setuid(0)").status == "error"


def test_a_passing_word_cannot_be_guessed() -> None:
    found = outcome(
        "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'end passed 1\\n')\n    except OSError: pass\nos._exit(0)"
    )
    assert found.status == "exit"


def test_workers_in_parallel_keep_the_order() -> None:
    programs = [[("solution", f"assert {i} % 3")] for i in range(12)]
    outcomes = run_programs(programs, FAST, workers=4)
    assert [o.passed for o in outcomes] == [i % 3 != 0 for i in range(12)]
    assert tally(outcomes) == {"passed": 8, "assertion": 4}


def test_without_namespaces_root_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sandbox, "_open_to_others", lambda path: False)
    assert not sandbox.run_program([("solution", "pass")], FAST, mode="limits").passed


def test_this_machine_has_a_real_sandbox() -> None:
    assert isolation() in ("namespaces", "bwrap")


def test_code_is_only_run_when_allowed() -> None:
    with pytest.raises(ConfigError, match="allow-code-execution"):
        build_config(EvalTask, {"task": "mbpp", "source": "mbpp"})


def test_a_solution_that_breaks_the_tests_own_tools_fails() -> None:
    row = {"meta_tests": ["assert f() == 2"], "meta_setup": ""}
    assert run_program(pieces(row, "def f(): return 2")).passed
    assert run_program(pieces(row, "def f(): return 1")).status == "assertion"
