"""The table of a sweep: a row a run, and the runs that differ only in their seed gathered into one row."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from headgate.errors import DamagedFile
from headgate.experiments.listing import run_row
from headgate.experiments.records import Failure, Figures, SweepTable, SweptGroup, SweptRun
from headgate.experiments.run_directory import RunDirectory
from headgate.files import write_atomically

COST = ("seconds", "memory_peak", "tokens_per_second")
"""Last parts of the columns that differ between two executions of the same run."""


def describe(overrides: Mapping[str, object]) -> str:
    """``seed=42 methods=schema_bank``: overrides in a few words."""
    return (
        " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in overrides.items())
        or "defaults"
    )


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return "+".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def sweep_table(name: str, runs: Sequence[tuple[Mapping[str, object], RunDirectory, Path]]) -> SweepTable:
    """``keys`` varied, ``runs`` (a row each), ``groups`` (mean and SD over seeds), ``versions`` of Headgate seen."""
    keys = list(dict.fromkeys(key for overrides, _, _ in runs for key in overrides))
    rows = [_row(overrides, directory, log) for overrides, directory, log in runs]
    versions = set()
    for _, directory, _ in runs:
        with suppress(DamagedFile, KeyError):
            versions.add(directory.environment()["versions"]["headgate"])
    return {"name": name, "keys": keys, "runs": rows, "groups": _groups(rows), "versions": sorted(versions)}


def _row(overrides: Mapping[str, object], directory: RunDirectory, log: Path) -> SweptRun:
    if directory.status == "new":
        error = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        found: Figures = {
            "status": "failed" if error else "new",
            **({"error": error[0]} if error else {}),
        }
    else:
        found = run_row(directory)
    status, error_text = found.pop("status"), found.pop("error", None)
    failure: Failure = {"error": error_text} if error_text else {}
    metrics = {
        key: value
        for key, value in found.items()
        if key.startswith(("training.", "evaluation.", "continual."))
    }
    return {
        "run": str(directory.path),
        "status": status,
        "label": describe(overrides),
        "overrides": dict(overrides),
        "verified": found.get("verified"),
        **failure,
        "metrics": metrics,
    }


def _groups(rows: Sequence[SweptRun]) -> list[SweptGroup]:
    """Complete runs with the same overrides but for the seed: n, and mean and SD (from two runs on) per metric."""
    gathered: dict[str, tuple[dict[str, object], list[dict[str, float]]]] = {}
    for row in rows:
        if row["status"] != "complete":
            continue
        overrides = {key: value for key, value in row["overrides"].items() if key != "seed"}
        gathered.setdefault(json.dumps(overrides, sort_keys=True), (overrides, []))[1].append(row["metrics"])
    return [_group(overrides, members) for overrides, members in gathered.values()]


def _group(overrides: dict[str, object], members: Sequence[Mapping[str, float]]) -> SweptGroup:
    shared = [key for key in members[0] if all(key in member for member in members)]
    return {
        "label": describe(overrides),
        "overrides": overrides,
        "n": len(members),
        "mean": {key: statistics.fmean(member[key] for member in members) for key in shared},
        "sd": {
            key: statistics.stdev([member[key] for member in members]) for key in shared if len(members) > 1
        },
    }


def results_only(table: SweepTable) -> list[dict[str, object]]:
    """The rows without what two executions of the same run may differ in: time and memory."""
    return [
        {
            "label": row["label"],
            "status": row["status"],
            "metrics": {k: v for k, v in row["metrics"].items() if not k.endswith(COST)},
        }
        for row in table["runs"]
    ]


def write_table(folder: Path, table: SweepTable) -> None:
    """``sweep.json``, ``sweep.csv`` (a row a run) and ``sweep.md`` (a row a group)."""
    write_atomically(folder / "sweep.json", json.dumps(table, indent=1))
    columns = list(dict.fromkeys(key for row in table["runs"] for key in row["metrics"]))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["run", "status", *table["keys"], *columns, "error"])
    for row in table["runs"]:
        overrides = [json.dumps(row["overrides"].get(key)) for key in table["keys"]]
        writer.writerow(
            [
                row["run"],
                row["status"],
                *overrides,
                *(row["metrics"].get(c, "") for c in columns),
                row.get("error", ""),
            ]
        )
    write_atomically(folder / "sweep.csv", text.getvalue())
    write_atomically(folder / "sweep.md", markdown(table))


def headline(table: SweepTable) -> list[str]:
    """The columns worth a line: losses and accuracies of the evaluation, else the validation loss, then the cost."""
    known = list(dict.fromkeys(key for group in table["groups"] for key in group["mean"]))
    metrics = [
        key
        for key in known
        if key.split(".")[0] in ("evaluation", "continual")
        and key.count(".") <= 2  # not the parts of a metric: each length, each family
        and key.endswith((".loss", ".accuracy", ".average"))
    ]
    return [
        *(metrics or [key for key in known if key == "training.eval_loss"]),
        *(k for k in known if k == "training.seconds"),
    ]


def markdown(table: SweepTable) -> str:
    """A row a group, mean and SD over its seeds; then what failed."""
    columns = headline(table)
    lines = [f"# {table['name']}", ""]
    if table["groups"]:
        lines += [
            "| " + " | ".join(["runs", "n", *columns]) + " |",
            "|" + "---|" * (len(columns) + 2),
        ]
        lines += [
            "| "
            + " | ".join([group["label"], str(group["n"]), *(cell(group, column) for column in columns)])
            + " |"
            for group in table["groups"]
        ]
    else:
        lines.append("No run is complete.")
    failed = [row for row in table["runs"] if row["status"] != "complete"]
    unverified = [
        row["label"] for row in table["runs"] if row["status"] == "complete" and not row.get("verified")
    ]
    if unverified:
        lines += ["", f"Not verified (see `headgate verify`): {', '.join(unverified)}."]
    lines += [
        "",
        *(
            f"- {row['label']}: {row['status']}" + (f": {row['error']}" if "error" in row else "")
            for row in failed
        ),
    ]
    if len(table["versions"]) > 1:
        lines.append(
            f"\nResults of different Headgate versions are mixed here: {', '.join(table['versions'])}."
        )
    return "\n".join(lines).rstrip() + "\n"


def cell(group: SweptGroup, column: str) -> str:
    """Mean and SD of a column over a group's seeds, as text."""
    if column not in group["mean"]:
        return "-"
    spread = f" ± {group['sd'][column]:.4f}" if column in group["sd"] else ""
    return f"{group['mean'][column]:.4f}{spread}"
