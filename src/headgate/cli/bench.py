"""``headgate bench NAME``: speed and memory against named peers; one JSON line last."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from headgate.cli.options import JsonOption
from headgate.errors import ConfigError
from headgate.files import write_atomically

try:
    from headgate.experiments.benchmarks.frame import benchmark_names, run_benchmark
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("headgate.experiments.benchmarks"):
        raise
    raise ConfigError(
        "the benchmarks are not part of an installed Headgate: run headgate bench from a clone of the repository, "
        "installed with pip install -e ."
    ) from error


def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(benchmark_names())}.", show_default=False)],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions and smaller shapes.")] = False,
    scale: Annotated[
        bool, typer.Option("--scale", help="Of `experts`: from one expert to 1,024, births included.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Measure speed and memory, arms interleaved in one process; exit code 1 if a target is missed."""
    name = f"{name}_scale" if scale else name
    report = run_benchmark(name, quick=quick, say=lambda line: print(line, flush=True))
    text = json.dumps(report)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(json_file, json.dumps(report, indent=1))
    print(text)
    sys.stdout.flush()
    if any(check["ok"] is False for check in report["checks"]):
        raise typer.Exit(1)
