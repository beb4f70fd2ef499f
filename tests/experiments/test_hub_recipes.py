"""Recipes that name a model of the hub: each runs two steps on a random model of the same family, on stand-in data.

The data have the columns and kinds that the named data sets have; what the recipe says about methods, losses,
packing and stages is left as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import load_recipe, recipe_from
from headgate.experiments.run import run

ROOT = Path(__file__).parents[2]
FAMILIES = {
    "Qwen/Qwen2-0.5B": "random:qwen2",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "random:llama",
    "TinyLlama/TinyLlama_v1.1": "random:llama",
    "google/gemma-3-270m": "random:gemma3",
    "google/gemma-3-1b-pt": "random:gemma3",
    "google/gemma-2-9b": "random:gemma2",
    "Qwen/Qwen2.5-1.5B": "random:qwen2",
    "Qwen/Qwen2.5-3B": "random:qwen2",
    "mistralai/Mistral-7B-v0.3": "random:mistral",
    "meta-llama/Llama-3.1-70B": "random:llama",
}


def hub_recipes() -> list[Path]:
    found = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if "accelerate" not in p.parts)
    return [p for p in found if load_recipe(p).model.name_or_path in FAMILIES]


def rows_of(source: str, split: str, count: int) -> list[dict[str, Any]]:
    """Rows with the columns of the data set that the source reads, different ones for every split."""
    name = [f"{split} {number}" for number in range(count)]
    if source == "gsm8k":
        return [{"question": f"What is {n}?", "answer": f"It is {n}.\n#### {i}"} for i, n in enumerate(name)]
    if source == "codealpaca":
        return [{"instruction": f"Print {n}", "input": "", "output": f"print('{n}')"} for n in name]
    if source == "mbpp":
        return [
            {"task_id": 601 + i, "text": f"Return {n}.", "code": "def f():\n    return 1", "test_list": ["assert f() == 1"]}
            for i, n in enumerate(name)
        ]  # fmt: skip
    if source == "text":
        return [{"text": f"A page about {n}, and then some more of it."} for n in name]
    turns = [{"role": "user", "content": "Say {}"}, {"role": "assistant", "content": "{} it is."}]
    return [{"messages": [{**t, "content": t["content"].format(n)} for t in turns]} for n in name]


def localised(content: dict[str, Any], folder: Path, split: str) -> dict[str, Any]:
    """The same source, read from a file here."""
    source = content["source"]
    if source in ("wordmath", "prompt_completion"):
        return {**content, "path": str(ROOT / content["path"])} if content.get("path") else content
    kind = source if source in ("gsm8k", "codealpaca", "mbpp", "text") else "messages"
    file = folder / f"{kind}-{split}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind, split, 48)))
    return {
        **content,
        "path": str(file),
        "name": None,
        "split": "test" if split == "test" else "train",
        "limit": None,
    }


def small(recipe: Recipe, folder: Path) -> Recipe:
    content = recipe.model_dump(mode="json")
    content["output_dir"] = str(folder / "runs")
    content["model"] |= {"name_or_path": FAMILIES[recipe.model.name_or_path], "dtype": "float32", "device": "cpu"}  # fmt: skip
    content["model"] |= {"load_in_4bit": False, "parallel": None}  # on two ranks: tests/ranks/test_sharded.py
    content["report_to"] = ["jsonl"]
    data, training = content["data"], content["training"]
    for split in ("train", "validation"):
        if data.get(split):
            data[split] = localised(data[split], folder, split)
    for place, skill in enumerate(data["stream"] or []):
        data["stream"][place] = localised(skill, folder, f"train {place}") | {"steps": 2}
    for name, watched in data["watch"].items():
        data["watch"][name] = localised(watched, folder, "watched")
    data["max_length"] = min(data["max_length"], 256)
    steps = 16 if "schema_bank" in content["methods"] else 4
    training |= {
        "max_steps": None if data["stream"] else steps,
        "epochs": None,
        "gradient_accumulation_steps": 1,
        "precision": "auto" if training["precision"] == "bf16" else training["precision"],
    }
    training |= {"per_device_train_batch_size": 2, "eval_every": 2, "save_every": 1.0}
    if recipe.steps_given == 0:
        training["max_steps"] = 0
    content["evaluation"] = [
        {**localised(task, folder, "test"), "limit": 4}
        | ({"max_new_tokens": 8} if task["task"] != "perplexity" else {"lengths": [64]})
        for task in content["evaluation"]
    ]
    if "backward_gate" in content["methods"]:
        content["methods"]["backward_gate"] |= {"burn_in": 1}
    content["compare"] = content["sweep"] = None
    return recipe_from(content)


@pytest.mark.slow
@pytest.mark.parametrize("path", hub_recipes(), ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_a_hub_recipe_runs_on_its_family(path: Path, tmp_path: Path) -> None:
    recipe = small(load_recipe(path), tmp_path)
    result = run(recipe).result()
    assert result["training"]["steps"] == (recipe.training.max_steps or len(recipe.data.stream or []) * 2)
    assert set(result["evaluation"]) == {task.key for task in recipe.evaluation}
