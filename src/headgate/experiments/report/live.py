"""A report that is rewritten while its runs go on, and served on this machine's loopback address alone.

A process of its own, with low priority: drawing must not slow down what is being timed. The page asks for itself again (a
``meta`` line, no JavaScript) until the last run is complete; the file itself may be opened instead of the address.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headgate.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from headgate.experiments.report.page import Written

POLL_SECONDS = 0.5
DUTY = 10
"""Drawing takes at most one part in so many of a core."""
FIRST_PORT, PORTS = 8400, 1000


def own_port(folder: Path) -> int:
    """The same for a folder every time, so that a page left open finds its comparison again after a restart."""
    digest = hashlib.sha256(str(folder.resolve()).encode()).digest()
    return FIRST_PORT + int.from_bytes(digest[:4], "big") % PORTS


WAITING = b"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="2"><title>Headgate report</title></head>
<body><p>The first run has not logged anything yet. This page asks again by itself.</p></body></html>
"""


class _Handler(SimpleHTTPRequestHandler):
    """The report's folder, never cached, to this machine alone."""

    def __init__(self, *args: Any, seen: threading.Event, directory: str, **options: Any) -> None:
        self.seen = seen
        super().__init__(*args, directory=directory, **options)

    def do_GET(self) -> None:
        name = self.headers.get("Host", "").rsplit(":", 1)[0]
        if name not in ("127.0.0.1", "localhost"):  # another site's name that was made to point here
            self.send_error(403)
            return
        super().do_GET()
        if self.path.split("?")[0] in ("/", "/index.html"):
            self.seen.set()

    def list_directory(self, path: str | os.PathLike[str]) -> io.BytesIO | None:
        """Until the first page is drawn: one that asks again. What lies in the folder is nobody's business."""
        if Path(path) != Path(self.directory):
            self.send_error(404)
            return None
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(WAITING)))
        self.end_headers()
        return io.BytesIO(WAITING)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """A request a few seconds is no news."""


class Server:
    """``folder/report`` on 127.0.0.1. Raises ConfigError where the port is taken."""

    def __init__(self, folder: Path, port: int) -> None:
        self.seen = threading.Event()
        """Set when the page has been asked for."""
        handler = partial(_Handler, seen=self.seen, directory=str(folder / "report"))
        try:
            self.http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--port {port}: {getattr(error, 'strerror', None) or error}: choose another one (0 takes any that is free)"
            ) from None
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}/"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def follow(
    folder: Path,
    port: int | None,
    every: int,
    say: Callable[[str], None] = lambda _line: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Written | None:
    """Write the report of ``folder`` again whenever its runs have moved, and serve it, until all of them are complete.

    The folder need not exist yet. After the last page it is served until somebody has seen it, or three turns have passed.

    Args:
        port: 0 takes any that is free, None the folder's own, or any where that is taken. every: seconds between two pages, at least. stopped: whether to give up.

    Returns the last page that was written; None where there never was anything to show.
    Raises ConfigError where the port is taken or ``every`` is below one second.
    """
    if every < 1:
        raise ConfigError(f"--every {every}: give at least one second")
    (folder / "report").mkdir(parents=True, exist_ok=True)
    server, written, last, next_time = _server(folder, port, say), None, None, 0.0
    say(f"live: {server.address} (or the file {folder / 'report' / 'index.html'})")
    try:
        while not (ended := stopped()):
            now = fingerprint(folder)
            if now != last and time.monotonic() >= next_time:
                spent = time.thread_time()
                finished = is_finished(folder)
                page = _write(folder, None if finished else every)
                written, last = page or written, now
                next_time = time.monotonic() + max(every, DUTY * (time.thread_time() - spent))
                if finished and page is not None:
                    break
            time.sleep(POLL_SECONDS)
        if ended:
            written = _write(folder, every) or written
        else:
            server.seen.clear()
            server.seen.wait(3 * every)
    finally:
        server.close()
    return written


def _server(folder: Path, port: int | None, say: Callable[[str], None]) -> Server:
    """On the port that was asked for. Nobody asked for the folder's own: where it is taken another one is said and used."""
    if port is not None:
        return Server(folder, port)
    try:
        return Server(folder, own_port(folder))
    except ConfigError:
        say(
            f"live: port {own_port(folder)} is taken (by another --live of this folder?), so another one is used"
        )
        return Server(folder, 0)


def _write(folder: Path, refresh: int | None) -> Written | None:
    from headgate.experiments.report.page import write_report  # seconds: after the address is served

    try:
        return write_report(folder, refresh)
    except CheckpointError:  # nothing has begun
        return None


def is_finished(folder: Path) -> bool:
    """Whether every run that the folder's study plans is complete, and a comparison has its verdict."""
    from headgate.experiments.report.reading import read_study

    try:
        study = read_study(folder)
    except CheckpointError:
        return False
    if study.kind == "comparison" and study.summary is None:
        return False
    return not study.missing and all(run.result is not None for run in study.runs)


def fingerprint(folder: Path) -> tuple[tuple[str, int], ...]:
    """What changes when something has happened: the folder's own tables, and the logs and results beside or below it."""
    own = [folder / name for name in ("progress.json", "comparison.json", "sweep.json")]
    names = ("metrics.jsonl", "result.json", "failed.json")
    roots = {folder, folder.parent} if any(path.exists() for path in own) else {folder}
    runs = [path for root in sorted(roots) for name in names for path in root.glob(f"*/{name}")]
    found = []
    for path in [*own, *runs, *(folder / name for name in names)]:
        try:
            found.append((str(path), path.stat().st_mtime_ns))
        except FileNotFoundError:  # not yet, or just being replaced
            continue
    return tuple(found)


@contextmanager
def followed(folder: Path, live: bool) -> Iterator[Callable[[], Path]]:
    """With ``live``, ``headgate report FOLDER --live`` beside this process while the block runs.

    Gives a function that returns the final page: the follower's, who then ends, or one that is written now.
    Where the block fails the follower writes what there is, and ends; it also ends when this process is gone.
    """
    from headgate.experiments.report.page import write_report

    process = _start(folder) if live else None

    def page() -> Path:
        if process is not None and process.wait() == 0:
            return folder / "report" / "index.html"
        return write_report(folder).page

    try:
        yield page
    finally:
        if process is not None and process.stdin is not None:
            process.stdin.close()
            process.wait()


def _start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "headgate.cli.main", "report", str(folder), "--live", "--with-parent"],
        stdin=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C saves the runs first; the page then shows what was saved
    )
