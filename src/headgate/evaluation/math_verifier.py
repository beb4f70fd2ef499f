"""math-verify in a process of its own, so that no output can hold up or exhaust the evaluation.

The library's own time limit is an alarm signal, which cannot interrupt a long computation inside one C call
(``9^{9^{9^9}}``) and does not work in threads. Here a worker answers one question after the other under a
memory limit; one that takes too long is killed, counts as not equal, and is replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import re
import select
import subprocess
import sys
import threading
import time

SECONDS = 5.0
START_SECONDS = 120.0
LONGEST = 8000  # characters from the end of an output: answers stand last
_WORKER = """
import json, logging, sys
logging.disable(logging.CRITICAL)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
except (ImportError, ValueError, OSError):
    pass
answers, sys.stdout = sys.stdout, sys.stderr
from math_verify import parse, verify
def say(equal):
    answers.write(json.dumps(equal) + "\\n")
    answers.flush()
say(True)
for line in sys.stdin:
    gold, output = json.loads(line)
    try:
        say(bool(verify(parse(gold, parsing_timeout=None), parse(output, parsing_timeout=None), timeout_seconds=None)))
    except BaseException:
        say(False)
"""


class _Verifier:
    """Keeps one worker alive."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()

    def equal(self, gold: str, output: str) -> bool:
        with self.lock:
            process = self._running()
            try:
                process.stdin.write(json.dumps([gold, output]) + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
            except OSError:
                self.stop()
                return False
            return bool(self._hear(process, SECONDS))

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            if not self._hear(self.process, START_SECONDS):
                raise RuntimeError(
                    "math-verify could not be started: is it installed (pip install headgate)?"
                )
        return self.process

    def _hear(self, process: subprocess.Popen[str], seconds: float) -> object:
        """The worker's next answer; False when it dies or takes too long, and then it is stopped."""
        answers = process.stdout
        assert answers is not None  # opened as a pipe
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([answers], [], [], left)
            if ready:
                line = answers.readline()
                if line:
                    return json.loads(line)
                break
        self.stop()
        return False

    def stop(self) -> None:
        """Kill the worker, if there is one."""
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(OSError):
                self.process.communicate()
            self.process = None


_verifier = _Verifier()
atexit.register(_verifier.stop)


@functools.lru_cache(maxsize=4096)
def math_verify_equal(gold: str, output: str) -> bool:
    """Whether math-verify takes the output's answer for the gold one; within a few seconds, whatever they are.

    The gold is marked as LaTeX: bare, math-verify reads ``2k+2`` as 2 and ``6 - 5i`` not at all.
    """
    if not output.strip() or not gold.strip():
        return False
    marked = gold if re.search(r"(?<!\\)\$", gold) or "\\boxed" in gold else f"${gold}$"
    return _verifier.equal(marked, output[-LONGEST:])
