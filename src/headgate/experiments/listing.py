"""Look over many runs: list them, set two side by side, cite what a run used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from headgate.errors import CheckpointError, ConfigError
from headgate.experiments.records import Figures
from headgate.experiments.run_directory import RunDirectory, find_runs
from headgate.files import read_json

HEADGATE_CITATION = "@software{headgate2026,\n  title={Headgate: routed and gated fine-tuning of language models},\n  year={2026},\n  version={VERSION}\n}"


def flatten(content: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested mappings and lists as dotted keys."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, list) and any(isinstance(item, (Mapping, list)) for item in content):
        for index, value in enumerate(content):
            yield from flatten(value, f"{prefix}.{index}")
    else:
        yield prefix, content


def run_row(directory: RunDirectory) -> dict[str, object]:
    """One flat row a run: where, status, name, seed, methods, and every number of its result.

    A run whose files are damaged has the status ``damaged`` and says what is: it hides no other run.
    """
    row: Figures = {"run": str(directory.path), "status": "damaged"}
    try:
        recipe = directory.recipe_content()
        row |= {
            "status": directory.status,
            "name": recipe.get("name"),
            "seed": recipe.get("seed"),
            "model": (recipe.get("model") or {}).get("name_or_path"),
            "methods": "+".join(recipe.get("methods") or {}) or "none",
        }
        if row["status"] == "complete":
            result = directory.result()
            for section in ("training", "evaluation"):
                numbers = flatten(result[section], section)
                row.update({k: v for k, v in numbers if isinstance(v, (int, float))})
            record = directory.verification()
            row["verified"] = None if record is None else bool(record["verified"])
        elif row["status"] == "failed":
            row["error"] = read_json(directory.path / "failed.json").get("error", "unknown")
        elif directory.result_file.exists():
            row["error"] = directory.damage()
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        row["error"] = str(error)
    return row


def list_runs(root: Path, conditions: list[str]) -> list[dict[str, object]]:
    """Rows of the runs below ``root`` that fit every ``key=value`` condition."""
    wanted = []
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not equals:
            raise ConfigError(f"--where {condition}: write it as key=value")
        wanted.append((key, value))
    rows = [run_row(directory) for directory in find_runs(root)]
    return [row for row in rows if all(str(row.get(key)) == value for key, value in wanted)]


def difference(a: RunDirectory, b: RunDirectory) -> dict[str, dict[str, tuple[object, object]]]:
    """What differs between two runs, by section: recipe, environment, result."""
    found: dict[str, dict[str, tuple[object, object]]] = {}
    sections: dict[str, tuple[object, object]] = {
        "recipe": (a.recipe().model_dump(mode="json"), b.recipe().model_dump(mode="json")),
        "environment": (a.environment(), b.environment()),
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
    from headgate.methods.registry import method_class

    version = directory.environment()["versions"]["headgate"]
    methods = [method_class(name).citation for name in directory.recipe().methods]
    return [HEADGATE_CITATION.replace("VERSION", version), *methods]
