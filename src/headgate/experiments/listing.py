"""Look over many runs: list them, set two side by side, cite what a run used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headgate.errors import ConfigError
from headgate.experiments.run_directory import RunDirectory, find_runs
from headgate.methods.registry import method_class

HEADGATE_CITATION = "@software{headgate2026,\n  title={Headgate: routed and gated fine-tuning of language models},\n  year={2026},\n  version={VERSION}\n}"


def flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings and lists as dotted keys."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, list) and any(isinstance(item, (Mapping, list)) for item in content):
        for index, value in enumerate(content):
            yield from flatten(value, f"{prefix}.{index}")
    else:
        yield prefix, content


def run_row(directory: RunDirectory) -> dict[str, Any]:
    """One flat row a run: where, status, name, seed, methods, and every number of its result."""
    recipe = directory.recipe()
    row: dict[str, Any] = {
        "run": str(directory.path),
        "status": directory.status,
        "name": recipe.name,
        "seed": recipe.seed,
        "model": recipe.model.name_or_path,
        "methods": "+".join(recipe.methods) or "none",
    }
    if directory.status == "complete":
        result = directory.result()
        for section in ("training", "evaluation"):
            row.update({k: v for k, v in flatten(result[section], section) if isinstance(v, (int, float))})
    elif directory.status == "failed":
        row["error"] = json.loads((directory.path / "failed.json").read_text())["error"]
    return row


def list_runs(root: Path, conditions: list[str]) -> list[dict[str, Any]]:
    """Rows of the runs below ``root`` that fit every ``key=value`` condition."""
    wanted = []
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not equals:
            raise ConfigError(f"--where {condition}: write it as key=value")
        wanted.append((key, value))
    rows = [run_row(directory) for directory in find_runs(root)]
    return [row for row in rows if all(str(row.get(key)) == value for key, value in wanted)]


def difference(a: RunDirectory, b: RunDirectory) -> dict[str, dict[str, tuple[Any, Any]]]:
    """What differs between two runs, by section: recipe, environment, result."""
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    sections: dict[str, tuple[Any, Any]] = {
        "recipe": (a.recipe().model_dump(mode="json"), b.recipe().model_dump(mode="json")),
        "environment": tuple(json.loads((d.path / "env.json").read_text()) for d in (a, b)),  # type: ignore[dict-item]
    }
    if a.status == b.status == "complete":
        sections["result"] = (a.result(), b.result())
    for name, (left, right) in sections.items():
        one, two = dict(flatten(left)), dict(flatten(right))
        keys = [*one, *(key for key in two if key not in one)]
        found[name] = {k: (one.get(k), two.get(k)) for k in keys if one.get(k) != two.get(k)}
    return found


def citations(directory: RunDirectory) -> list[str]:
    """BibTeX of Headgate and of every method that the run used."""
    version = json.loads((directory.path / "env.json").read_text())["versions"]["headgate"]
    methods = [method_class(name).citation for name in directory.recipe().methods]
    return [HEADGATE_CITATION.replace("VERSION", version), *methods]
