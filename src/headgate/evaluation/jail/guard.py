"""The first process of a sandbox: it makes the walls, starts the solution and its judge behind them, and keeps time.

The solution's source and the tests arrive in two files without a name; each child reads its own and neither the
other's. What the judge says reaches the parent through the guard, which adds how a process ended. CPU time decides:
the judge's and the solution's together, for each piece. Wall-clock only ends what waits for ever.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import sys
import time
from typing import Any

from .confine import Confinement
from .judge import judge
from .libc import die_with_parent, keep_memory_private
from .namespaces import new_root, small_folder, unshare
from .plain_values import Channel
from .solution import solve

TICK = 0.02  # seconds between two looks at the clocks
LAST_WORDS = 2.0  # seconds for a process to end that closed its pipe


def main() -> None:
    config = json.loads(sys.stdin.buffer.read())
    die_with_parent()
    os.umask(0o022)
    if config["mode"] == "namespaces":
        unshare()
        keep_memory_private()  # not before: writing the map of users needs an ordinary process
        child = os.fork()
        if child:
            for descriptor in (config["report"], config["source"], config["tests"]):
                os.close(descriptor)
            os.waitpid(child, 0)
            os._exit(0)
        die_with_parent()
        new_root(config["root"], config["readable"], config["box"], config["limits"]["disk"])
    elif config["mode"] == "bwrap":
        small_folder(config["box"], config["limits"]["disk"])
    keep_memory_private()
    os.chdir(config["box"])
    os.environ.update(HOME=config["box"], TMPDIR=config["box"])
    with open("/dev/null") as empty:
        os.dup2(empty.fileno(), 0)
    guard = Guard(config)
    guard.start()
    guard.watch()
    guard.end()
    os._exit(0)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads, also after its end as long as it was not waited for."""
    return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) computes


class Guard:
    """Parent of the solution and of the judge."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.seconds, self.wall = config["limits"]["seconds"], config["limits"]["wall"]
        self.solution = self.judge = 0
        self.heard = -1  # the judge's reports
        self.ended = False

    def start(self) -> None:
        config = self.config
        questions, ask = os.pipe()
        answers, answer = os.pipe()
        self.heard, report = os.pipe()
        self.solution = os.fork()
        if self.solution == 0:
            source = _read(config["source"])
            _keep_only(questions, answer)
            solve(source, Channel(questions, answer), self.confinement("solution"))
        self.judge = os.fork()
        if self.judge == 0:
            tests = [(name, source) for name, source in json.loads(_read(config["tests"]))]
            _keep_only(answers, ask, report)
            judge(tests, Channel(answers, ask), report, self.confinement("judge"))
        for descriptor in (questions, ask, answers, answer, report, config["source"], config["tests"]):
            os.close(descriptor)

    def confinement(self, who: str) -> Confinement:
        config, limits = self.config, self.config["limits"]
        return Confinement(
            uid=config["users"][who],
            readable=config["readable"],
            writable=config["writable"],
            cpu=limits["cpu"],
            memory=limits["memory"] if who == "solution" else limits["judge_memory"],
            disk=limits["disk"],
            files=limits["files"],
            threads=limits["threads"],
            needs_landlock=config["mode"] == "limits",
        )

    def watch(self) -> None:
        """Relay the judge's lines until it said how it ended, or a piece used up its time."""
        pending, used, began = b"", math.inf, math.inf  # no piece has started yet
        while True:
            ready, _, _ = select.select([self.heard], [], [], TICK)
            spent = self.cpu()
            if spent - used > self.seconds:
                return self.tell("end", "time", None, f"more than {self.seconds:g} s of CPU")
            if time.monotonic() - began > self.wall:
                return self.tell("end", "time", None, f"waited longer than {self.wall:g} s")
            if not ready:
                continue
            data = os.read(self.heard, 1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                self.tell(*json.loads(line))
                used, began = spent, time.monotonic()
            if self.ended:
                return

    def cpu(self) -> float:
        return cpu_seconds(self.solution) + cpu_seconds(self.judge)

    def end(self) -> None:
        """Whoever ended first without a word is named; nobody is left."""
        if not self.ended:
            deadline = time.monotonic() + LAST_WORDS
            while time.monotonic() < deadline:
                left = os.waitid(os.P_PID, self.solution, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if left is not None:
                    break
                time.sleep(TICK / 10)
        for pid in (self.solution, self.judge):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (self.solution, self.judge)]
        if not self.ended:
            self.tell("gone", *codes)

    def tell(self, *parts: object) -> None:
        os.write(self.config["report"], json.dumps(parts).encode() + b"\n")
        self.ended = self.ended or parts[0] == "end"


def _read(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read().decode(errors="surrogatepass")


def _keep_only(*descriptors: int) -> None:
    """Every other descriptor but the standard three is closed."""
    first = 3
    for descriptor in sorted(descriptors):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, 1 << 16)
