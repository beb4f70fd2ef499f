"""``headgate verify RUN|FOLDER``: is a run what it saved?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headgate.cli.console import live_console, out
from headgate.cli.options import JsonOption
from headgate.errors import CheckpointError, HeadgateError
from headgate.experiments.records import Verification
from headgate.experiments.run_directory import find_runs
from headgate.experiments.verification import verify_run
from headgate.files import write_json


def verify(
    target: Annotated[Path, typer.Argument(help="A run directory, or a folder of them.", show_default=False)],
    json_file: JsonOption = None,
) -> None:
    """Load what was saved, measure it again, and say what differs from what is reported. Exit code 1 if anything does."""
    runs = list(find_runs(target))
    if not runs:
        raise CheckpointError(
            f"no run at or below {target}: give a run directory or a folder that holds some"
        )
    checks: list[dict[str, object]] = []
    verified = True
    for directory in runs:
        record: Verification
        with live_console():
            try:
                record = verify_run(directory)
                write_json(directory.verification_file, record)
            except HeadgateError as error:
                record = {"verified": False, "checks": [{"name": "run", "ok": False, "detail": str(error)}]}
        verified &= record["verified"]
        checks += [{"run": str(directory.path), **check} for check in record["checks"]]
        out.print(f"{directory.path}: {'verified' if record['verified'] else 'NOT VERIFIED'}", markup=False)
        for check in record["checks"]:
            mark = {True: "ok  ", False: "FAIL", None: "-   "}[check["ok"]]
            out.print(f"  {mark} {check['name']}: {check['detail']}", markup=False)
        if record.get("machine", "").startswith(("torch", "transformers", "processor", "threads", "gpus")):
            out.print(
                f"  compared within 1e-3, since this is another machine: {record['machine']}", markup=False
            )
    out.print(f"{len(runs)} runs: {'all verified' if verified else 'not all are what they report'}")
    if json_file is not None:
        write_json(json_file, {"verified": verified, "checks": checks})
    if not verified:
        raise typer.Exit(1)
