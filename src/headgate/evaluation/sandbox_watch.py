"""What a sandboxed program may use, and how it ended: the watching half of the sandbox."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass

STARTING = 60.0  # seconds of wall-clock for an interpreter to start on a loaded machine


@dataclass(frozen=True)
class Limits:
    """Per program. ``seconds``: CPU time of each piece (the solution, then each test), which decides; ``wall``: a
    piece that waits is ended after so many seconds, 10 x ``seconds`` + 30 unless given. ``memory``, ``disk`` in MiB:
    all that the solution can hold, together with 512 MiB of the judge; ``output`` in bytes.
    """

    seconds: float = 5.0
    wall: float | None = None
    memory: int = 1024
    disk: int = 16
    threads: int = 16
    files: int = 64
    output: int = 1 << 20

    @property
    def patience(self) -> float:
        return 10 * self.seconds + 30 if self.wall is None else self.wall


@dataclass(frozen=True)
class Outcome:
    """How a program ended. ``status``: passed, syntax, assertion, error, time, memory, output, exit, or killed.

    ``piece``: the part that it ended in; ``detail``: the exception, the signal or the limit. ``refused`` is the
    sandbox's own: it could not be set up, and nothing ran.
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
    """Reads the report and the output of a program, and notices when its output is used up."""

    def __init__(
        self, process: subprocess.Popen[bytes], report: int, limits: Limits, pieces: list[str]
    ) -> None:
        self.process, self.report, self.limits, self.pieces = process, report, limits, pieces
        self.output, self.noise = bytearray(), 0
        self.pending, self.piece = b"", 0
        self.started = False
        self.end: tuple[str, str] | None = None  # status, detail
        # The guard keeps each piece's time; this one is for a guard that does not.
        self.deadline = time.monotonic() + STARTING + self.limits.patience * (len(pieces) + 1)

    def until_gone(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.report, selectors.EVENT_READ)
            selector.register(self.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            while (selector.get_map() and self.process.poll() is None) or selector.select(0):
                if time.monotonic() > self.deadline:
                    self.end = ("time", f"longer than {self.limits.patience:g} s for each part")
                    return
                for key, _ in selector.select(0.2):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.fd == self.report:
                        self.hear(data)
                    else:
                        self.output += data[: self.limits.output - len(self.output)]
                        self.noise += len(data)
                if self.noise > self.limits.output:
                    self.end = ("output", f"more than {self.limits.output} bytes")
                    return

    def hear(self, data: bytes) -> None:
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            kind, *rest = json.loads(line)
            if kind == "start":
                self.piece, self.started = rest[0], True
            elif kind == "end":
                status, piece, detail = rest
                self.piece = self.piece if piece is None else piece
                self.end = (status, detail)
            elif kind == "gone":
                self.end = _ending(*rest)

    def outcome(self, seconds: float) -> Outcome:
        output = self.output.decode(errors="replace")
        status, detail = self.end or ("killed", f"the sandbox ended early: {output[-300:]}")
        if not self.started and status != "output":
            status, detail = "refused", detail if self.end else output[-300:] or "the sandbox ended early"
        return Outcome(status, self.pieces[self.piece] if self.pieces else "", detail, output, seconds)


def _ending(solution: int, judge: int) -> tuple[str, str]:
    """Status and detail where the judge heard nothing more, by the exit codes of both."""
    if solution == -signal.SIGXCPU:
        return "time", "more CPU than all parts together may use"
    if solution == 0 and judge != 0:
        return "killed", f"the judge left with code {judge}"
    if solution < 0:
        return "killed", f"by {signal.Signals(-solution).name}"
    return "exit", f"left with code {solution} before the tests were done"
