"""The README.md of an export: metadata for hubs, how to load it in four lines, and what the run was."""

from __future__ import annotations

import json
from pathlib import Path

from headgate.experiments.environment import environment
from headgate.experiments.model_card import model_card
from headgate.experiments.redaction import shown_path
from headgate.experiments.run_directory import RunDirectory
from headgate.training import checkpoint

LINES = {
    "transformers": """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS", trust_remote_code=True)  # routing included
tokenizer = AutoTokenizer.from_pretrained("THIS", trust_remote_code=True)
print(tokenizer.decode(model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=40)[0]))""",
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS")
tokenizer = AutoTokenizer.from_pretrained("THIS")
print(tokenizer.decode(model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=40)[0]))""",
    "peft": """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained("THIS")
tokenizer = AutoTokenizer.from_pretrained("THIS")""",
}
LINES["pruned"] = LINES["merged"]
LINES["experts"] = """from peft import AutoPeftModelForCausalLM
from chooser import choose  # chooser.py in this folder: Python alone
model = AutoPeftModelForCausalLM.from_pretrained("THIS/expert_0", adapter_name="expert_0")
model.load_adapter("THIS/expert_1", "expert_1")  # ...; then model.set_adapter(choose(text))"""
"""THIS stands for the repository or folder that the card lies in."""
ADAPTERS = ("peft", "experts")


def card(run: str | Path, source: Path, to: str, licence: str, difference: float, notes: list[str]) -> str:
    """A model card: metadata for hubs, the export, then data, metrics, method and recipe of the run."""
    description = checkpoint.read_description(source)
    base = description["model"]
    head = [
        "---",
        f"base_model: {shown_path(base['name_or_path'])}",
        f"library_name: {'peft' if to in ADAPTERS else 'transformers'}",
        f"license: {licence}",
        "pipeline_tag: text-generation",
        f"tags: [headgate{', lora' if to in ADAPTERS else ''}]",
        "---",
        "",
        "## Export",
        "",
        f"- kind: {to}",
        f"- base model: {shown_path(base['name_or_path'])}, revision {base.get('revision') or 'not pinned'}",
        f"- methods in training: {', '.join(description['methods']) or 'none'}",
        f"- verified: reloaded without Headgate, largest logit difference {difference:.2e} of the largest logit",
        *(f"- note: {note}" for note in notes),
        "",
        "## Load",
        "",
        "```python",
        LINES[to],
        "```",
        "",
    ]
    directory = RunDirectory(Path(run))
    if directory.recipe_file.exists() and directory.result_file.exists():
        body = model_card(directory.recipe(), directory.result()).split("---", 2)[2].strip()
        return "\n".join([*head, body, ""])
    versions = json.dumps(environment()["versions"], indent=1)
    return "\n".join([*head, "## Versions", "", "```json", versions, "```", ""])
