"""The README.md of a checkpoint: what it was trained on, how, and what it measured."""

from __future__ import annotations

import json
from collections.abc import Mapping

import yaml

from headgate.config import StrictConfig
from headgate.experiments.recipe import Recipe
from headgate.experiments.records import RunRecord
from headgate.experiments.redaction import published, shown_path


def model_card(recipe: Recipe, result: RunRecord) -> str:
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
        *loading(recipe),
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
    lines += ["", "## Evaluation", "", "| task | metric | value |", "|---|---|---|"]
    for task, metrics in result["evaluation"].items():
        lines += [f"| {task} | {k} | {v:.4g} |" for k, v in metrics.items() if isinstance(v, (int, float))]
    lines += ["", "## Versions", "", "```json", json.dumps(result["versions"], indent=1), "```"]
    lines += ["", "## Recipe", "", "```yaml", _shown(recipe), "```", ""]
    return "\n".join(lines)


LEFT_OUT = {
    "layer_routing": "its router: every block runs",
    "lora_experts": "its experts and their router: the base model answers",
    "schema_bank": "its bank, which was kept at inference",
}
"""What a loader that knows base and adapter alone leaves out, by method."""


def loading(recipe: Recipe) -> list[str]:
    """The section that says how a checkpoint is loaded, and what plain loading leaves out."""
    left = [LEFT_OUT[name] for name, options in recipe.methods.items() if _acts(name, options)]
    lines = ["## Loading", ""]
    if not left:
        return [*lines, "PEFT loads all of it: `AutoPeftModelForCausalLM.from_pretrained(FOLDER)`.", ""]
    return [
        *lines,
        f"**`transformers` and PEFT load a part of this.** They leave out {'; '.join(left)}. The whole of it:",
        "",
        "```python",
        "import headgate as hg",
        'model, tokenizer = hg.load("FOLDER")',
        "```",
        "",
        "For programs without Headgate: `headgate export RUN --to transformers`.",
        "",
    ]


def _acts(name: str, options: Mapping[str, object] | StrictConfig) -> bool:
    """Whether a method of these options does something at inference."""
    told = options if isinstance(options, Mapping) else options.model_dump()
    acts = {
        "layer_routing": told.get("policy", "gumbel") != "dense" and told.get("eval_routing") != "removed",
        "lora_experts": told.get("eval_routing") != "removed",
        "schema_bank": told.get("eval_routing", "removed") != "removed",
    }
    return acts.get(name, False)


def _shown(recipe: Recipe) -> str:
    """The recipe as YAML, without secrets and without anybody's folders."""
    content = published(recipe.model_dump(mode="json"))
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip()
