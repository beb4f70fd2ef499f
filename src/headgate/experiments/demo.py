"""The demo: four comparisons, each of one method at what it is for, beside the baseline that it has to beat.

Each comparison is the same ``headgate compare`` that anybody can run, in a process of its own; ``workers`` run at a time. What is
complete is skipped, what is partial resumes. The end is one page over the four (``report.overview``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headgate.errors import ConfigError, TrainingError
from headgate.experiments.compare import Comparison
from headgate.experiments.recipe_file import load_recipe
from headgate.experiments.shipped import find_shipped

POLL_SECONDS = 0.5
PARTS = {
    "experts": "lora_experts",
    "routing": "layer_routing",
    "gate": "backward_gate",
    "bank": "schema_bank",
}
"""Name -> the method that it shows; the longest first, so that two workers end together."""


@dataclass(frozen=True)
class Part:
    """One of the four: its recipe, the folder of its comparison, the log of its process."""

    name: str
    recipe: Path
    folder: Path
    log: Path

    @property
    def done(self) -> bool:
        return (self.folder / "comparison.json").exists()


def parts(output: Path, only: Sequence[str] = (), overrides: Sequence[str] = ()) -> list[Part]:
    """The comparisons of the demo below ``output``. Raises ConfigError for a name that there is not."""
    for name in only:
        if name not in PARTS:
            raise ConfigError(f"--only {name}: the demo has {', '.join(PARTS)}")
    found = []
    for name in only or PARTS:
        path = find_shipped(f"demo/{name}")
        recipe = load_recipe(path, changes(output, overrides))
        found.append(Part(name, path, Comparison(recipe).folder, output / f"{name}.log"))
    return found


def changes(output: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides of every part, its folder first."""
    return [f"output_dir={output}", *overrides]


def execute(
    planned: Sequence[Part],
    output: Path,
    workers: int,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> None:
    """Run every part, ``workers`` at a time. Raises TrainingError naming the log of one that failed.

    Each process gets its share of the cores as threads, unless OMP_NUM_THREADS is set. An error or
    Ctrl-C here ends them too, with what they did saved.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers}: give at least one")
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    output.mkdir(parents=True, exist_ok=True)
    waiting, running = deque(planned), dict[str, tuple[Part, subprocess.Popen[bytes], float]]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                part = waiting.popleft()
                say(f"{part.name}: {PARTS[part.name]}, log {part.log}")
                running[part.name] = (part, _start(part, output, overrides, environment), time.monotonic())
            time.sleep(POLL_SECONDS)
            for name, (part, process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    raise TrainingError(
                        f"the {name} part of the demo failed: see {part.log}; run again to resume"
                    )
                say(f"{name}: done in {time.monotonic() - began:.0f} s")
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


def _start(
    part: Part, output: Path, overrides: Sequence[str], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    settings = [word for change in changes(output, overrides) for word in ("--set", change)]
    with part.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "headgate.cli.main", "compare", str(part.recipe), *settings],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
