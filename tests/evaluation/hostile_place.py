"""What hostile programs go for, and the evidence from outside of whether they got at it.

``python -m tests.evaluation.hostile_place MODE`` runs them all by the standard library alone and prints what was not
held: for other users and other interpreters.
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
from pathlib import Path

from headgate.evaluation.sandbox import run_program
from headgate.evaluation.sandbox_watch import Outcome
from tests.evaluation.hostile import Hostile
from tests.evaluation.hostile_programs import PROGRAMS


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
        happened += [
            f"{name}: {self.before[name]} is now {now[name]}"
            for name in now
            if now[name] != self.before[name]
        ]
        if happened:
            self._repair()
        return happened

    def _repair(self) -> None:
        """As before, so that the next program is judged by what it does itself."""
        self.reached.clear()
        for path in self.folder.iterdir():
            if path.name not in ("secret", "socket"):
                path.rmdir() if path.is_dir() else path.unlink()
        self.secret.unlink(missing_ok=True)
        self.secret.write_text(self.token)
        self.secret.chmod(0o666)
        for path in map(Path, glob.glob("/*/headgate-escaped") + glob.glob("/dev/shm/headgate-escaped")):
            path.unlink(missing_ok=True)
        self.before = self._picture()

    def _picture(self) -> dict[str, object]:
        exists = self.secret.exists()
        state = self.secret.stat() if exists else os.stat_result([0] * 10)
        content = self.secret.read_text() if exists and os.access(self.secret, os.R_OK) else None
        return {
            "secret": (content, state.st_mode, state.st_mtime, state.st_nlink),
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
    return [
        pid
        for pid, (_, state, _) in below(os.getpid()).items()
        if state != "Z" and b"evaluation/jail" in line(pid)
    ]


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
    peak, over, own = [0], threading.Event(), line(os.getpid())

    def look() -> None:
        while not over.wait(0.01):
            # A child between fork and exec still shows this process's pages: it has this process's command line. Who had
            # another one before the pages are read has become another program by then.
            started = {pid for pid in below(os.getpid()) if line(pid) != own}
            resident = {pid: pages for pid, (_, _, pages) in below(os.getpid()).items() if pid in started}
            peak[0] = max(peak[0], sum(resident.values()))

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


def main(mode: str, *names: str) -> None:
    """Print, as JSON, what was not held: {name: reasons}."""
    with tempfile.TemporaryDirectory() as folder, Place(Path(folder)) as place:
        chosen = [program for program in PROGRAMS if not names or program.name in names]
        results = {program.name: run(program, mode, place)[1] for program in chosen}
    print(json.dumps({name: wrong for name, wrong in results.items() if wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
