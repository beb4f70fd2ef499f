"""What a sandboxed program may use, and how it ended: the watching half of the sandbox."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Per program. ``seconds``: wall-clock and CPU of each piece (the solution, then each test); memory in MiB."""

    seconds: float = 5.0
    memory: int = 1024
    disk: int = 16
    processes: int = 16
    files: int = 64
    output: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program ended. ``status``: passed, syntax, assertion, error, time, memory, output, exit, or killed.

    ``piece``: the part that it ended in; ``detail``: the exception, the signal or the limit.
    """

    status: str
    piece: str
    detail: str
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == "passed"


class Watch:
    """Reads the report and the output of a program, and notices when its time or its output is used up."""

    def __init__(
        self, process: subprocess.Popen[bytes], report: int, word: str, limits: Limits, pieces: int
    ) -> None:
        self.process, self.report, self.word, self.limits = process, report, word, limits
        self.output, self.pending = bytearray(), b""
        self.piece, self.end, self.code = 0, None, None  # type: tuple[int, list[str] | None, int | None]
        self.stopped: str | None = None
        now = time.monotonic()
        # The first piece also pays for starting the interpreter on a loaded machine.
        self.deadline, self.last = now + limits.seconds + 5, now + limits.seconds * pieces + 10
        self.noise = 0

    def until_gone(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.report, selectors.EVENT_READ)
            selector.register(self.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            while self.code is None and selector.get_map():
                wait = min(self.deadline, self.last) - time.monotonic()
                if wait <= 0:
                    self.stopped = "time"
                    return
                for key, _ in selector.select(min(wait, 0.5)):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.fd == self.report:
                        self.hear(data)
                    else:
                        self.output += data[: self.limits.output - len(self.output)]
                        self.noise += len(data)
                    if self.noise > self.limits.output:
                        self.stopped = "output"
                        return
                if self.process.poll() is not None and not selector.select(0):
                    return

    def hear(self, data: bytes) -> None:
        self.noise += len(data)
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            parts = line.decode(errors="replace").split(" ")
            if parts[0] != self.word or len(parts) < 3:
                continue
            if parts[1] == "start":
                self.piece = int(parts[2])
                self.deadline = time.monotonic() + self.limits.seconds
            elif parts[1] == "end" and self.end is None:
                self.end = parts[2:]
                self.deadline = time.monotonic() + 5
            elif parts[1] == "gone":
                self.code = int(parts[2])

    def outcome(self, pieces: list[tuple[str, str]], seconds: float) -> Outcome:
        output = self.output.decode(errors="replace")
        name = pieces[self.piece][0] if pieces else ""
        if self.end is not None and self.stopped != "output":
            return Outcome(self.end[0], name, " ".join(self.end[2:]), output, seconds)
        if self.stopped == "time":
            status, detail = "time", f"longer than {self.limits.seconds:g} s"
        elif self.stopped == "output":
            status, detail = "output", f"more than {self.limits.output} bytes"
        elif self.code is None:
            status, detail = "killed", f"the sandbox ended early: {output[-300:]}"
        elif self.code == -signal.SIGXCPU:
            status, detail = "time", f"more than {self.limits.seconds:g} s of CPU for each part"
        elif self.code < 0:
            status, detail = "killed", f"by {signal.Signals(-self.code).name}"
        else:
            status, detail = "exit", f"left with code {self.code} before the tests were done"
        return Outcome(status, name, detail, output, seconds)
