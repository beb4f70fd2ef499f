"""The README.md of a checkpoint: what it was trained on, how, and what it measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from headgate.experiments.recipe import Recipe
from headgate.experiments.redaction import published, shown_path


def model_card(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """A model card with the metadata that hubs read, the metrics and the whole recipe."""
    methods = ", ".join(recipe.methods) or "none (plain LoRA)"
    lines = [
        "---",
        f"base_model: {shown_path(recipe.model.name_or_path)}",
        "library_name: peft",
        "license: other",
        "tags: [headgate, lora]",
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"Trained with [Headgate](https://pypi.org/project/headgate) {result['versions']['headgate']}. Methods: {methods}.",
        "The licence of the base model and of the data applies; fill in `license` above.",
        "",
        "## Data",
        "",
    ]
    for name, report in result["data"].items():
        lines.append(
            f"- {name}: {report['rows']} rows, {report['tokens']} tokens, {report['truncated']} truncated"
        )
    lines += ["", "## Training", ""]
    for name, value in result["training"].items():
        if isinstance(value, (int, float)):
            lines.append(f"- {name}: {value:,.6g}")
    lines += ["", "## Evaluation", ""]
    for task, metrics in result["evaluation"].items():
        shown = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        lines.append(f"- {task}: " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items()))
    lines += ["", "## Versions", "", "```json", json.dumps(result["versions"], indent=1), "```"]
    lines += ["", "## Recipe", "", "```yaml", _shown(recipe), "```", ""]
    return "\n".join(lines)


def _shown(recipe: Recipe) -> str:
    """The recipe as YAML, without secrets and without anybody's folders."""
    content = published(recipe.model_dump(mode="json"))
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip()
