"""``python -m headgate.experiments.worker RECIPE``: one run of a sweep, in a process of its own.

Saves and ends when its standard input closes, which is how it learns that whoever started it has died.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

from headgate.errors import HeadgateError, RunBusy
from headgate.experiments.recipe_file import parse_yaml, recipe_from
from headgate.experiments.run import Console, run

WAIT_SECONDS = 120.0
"""How long a run that another process still holds (it may be saving) is waited for."""


def stop_with_parent() -> None:
    """SIGTERM to this process once standard input ends: the trainer then saves, and the run ends."""

    def watch() -> None:
        # the descriptor, not sys.stdin: a thread blocked in the buffered reader aborts the interpreter's exit
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    recipe_file = Path(sys.argv[1])
    stop_with_parent()
    signal.signal(
        signal.SIGTERM, _interrupt
    )  # before and after training; the trainer has its own while it trains
    warnings.simplefilter("ignore", FutureWarning)
    recipe = recipe_from(parse_yaml(recipe_file.read_text(), str(recipe_file)), str(recipe_file))
    console = Console(say=lambda line: print(line, flush=True))
    started = time.monotonic()
    try:
        while True:
            try:
                run(recipe, console=console)
                return 0
            except RunBusy:
                if time.monotonic() - started > WAIT_SECONDS:
                    raise
                time.sleep(1)
    except HeadgateError as error:
        print(f"error: {error}", flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted: saved", flush=True)
        return 130


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
