"""`headgate export` to each kind, from a run directory that was really trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import headgate as hg
from headgate.models.anatomy import describe

from ..cli.test_cli import here

IDS = torch.arange(2 * 20).reshape(2, 20) * 13 % 500 + 3


def test_transformers(by_token: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = here("export", by_token, "--to", "transformers", "--output", folder)
    assert done.returncode == 0, done.stderr
    assert "differ by 0.0e+00" in done.stdout
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card and "library_name: transformers" in card
    model, _ = hg.load(by_token, device="cpu")
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, again(input_ids=IDS).logits)
    written = set(json.loads((folder / "headgate_export.json").read_text())["files"])
    assert {
        "config.json",
        "model.safetensors",
        "modeling_headgate.py",
        "tokenizer.json",
        "README.md",
    } <= written


def test_a_fixed_mask_becomes_a_smaller_ordinary_model(with_mask: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = here("export", with_mask, "--to", "pruned", "--output", folder)
    assert done.returncode == 0, done.stderr
    model, _ = hg.load(with_mask, device="cpu")
    small = AutoModelForCausalLM.from_pretrained(folder)
    assert type(small) is type(describe(model).model), "the base's own class"
    assert small.config.num_hidden_layers == 2 and len(small.config.layer_types) == 2
    full = describe(model).model.config.layer_types
    assert small.config.layer_types == [full[0], full[3]]
    with torch.no_grad():
        torch.testing.assert_close(
            small(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-4, rtol=1e-4
        )
    tokens = small.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, model.generate(IDS, max_new_tokens=8, do_sample=False)), (
        "its cache has two layers"
    )
    assert json.loads((folder / "headgate_export.json").read_text())["figures"]["removed_blocks"] == [1, 2]


def test_a_router_is_pruned_to_the_mask_it_takes_most(by_token: Path, tmp_path: Path) -> None:
    done = here("export", by_token, "--to", "pruned", "--output", tmp_path / "out")
    if done.returncode:  # which mask wins is the router's; one that closes nothing is refused by name
        assert "closes no block" in done.stderr
        return
    assert "of the routed validation tokens" in done.stderr and "at full depth" in done.stderr


def test_what_cannot_be_pruned_is_named(experts: Path, tmp_path: Path) -> None:
    done = here("export", experts, "--to", "pruned", "--output", tmp_path / "out")
    assert done.returncode == 2 and "routes none" in done.stderr


def test_experts_for_a_server(experts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = here("export", experts, "--to", "experts", "--output", folder)
    assert done.returncode == 0, done.stderr
    told = json.loads((folder / "skills.json").read_text())
    assert {entry["skill"] for entry in told["skills"]} == {"sports", "farm"}
    figures = json.loads((folder / "headgate_export.json").read_text())["figures"]["chooser"]
    assert all(found["right"] >= 0.95 for found in figures.values()), figures
    assert "go to expert_" in done.stderr and "routed by token" in done.stderr

    def alone(*arguments: str) -> str:
        """Python without any package."""
        command = [sys.executable, "-I", "-S", str(folder / "chooser.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    import datasets  # noqa: F401

    from headgate.data.streams import load_stream
    from headgate.experiments.recipe_file import load_recipe

    loaded = load_recipe(experts / "recipe.yaml")
    for segment in load_stream(loaded.data.stream, loaded.training.max_steps):
        (adapter,) = [entry["adapter"] for entry in told["skills"] if entry["skill"] == segment.skill]
        assert alone(segment.validation[0]["prompt"]) == adapter
    modules = alone("--lora-modules").split()
    assert [module.split("=")[0] for module in modules] == told["adapters"]
    assert all((Path(module.split("=")[1]) / "adapter_config.json").exists() for module in modules)


def test_generate_routes_as_told(experts: Path) -> None:
    options = ("--prompt", "Tom has three apples.", "--max-new-tokens", 8, "--device", "cpu")
    said = {}
    for routing in ("on", "removed", "expert:farm", "expert:1", "mixture:farm=.5,sports=.5"):
        done = here("generate", experts, "--routing", routing, *options)
        assert done.returncode == 0, done.stderr
        said[routing] = done.stdout
    assert here("generate", experts, "--removed", *options).stdout == said["removed"]
    done = here("generate", experts, "--routing", "expert:cooking", *options)
    assert done.returncode == 2 and "there is no expert 'cooking'" in done.stderr
    done = here("generate", "random:llama", "--routing", "on", *options)
    assert done.returncode == 2 and "no routing" in done.stderr


def test_adapters_in_one_batch(experts: Path, tmp_path: Path) -> None:
    """PEFT's mixed batches: every row by its own expert, as if it were alone with it."""
    import peft

    folder = tmp_path / "out"
    assert here("export", experts, "--to", "experts", "--output", folder).returncode == 0
    names = json.loads((folder / "skills.json").read_text())["adapters"]
    model, _ = hg.load(experts, device="cpu", attach=False)
    mixed = peft.PeftModel.from_pretrained(model, str(folder / names[0]), adapter_name=names[0])
    for name in names[1:]:
        mixed.load_adapter(str(folder / name), adapter_name=name)
    mixed.eval()
    rows = IDS[:1].expand(len(names), -1)
    with torch.no_grad():
        together = mixed(input_ids=rows, adapter_names=names).logits
        live, _ = hg.load(experts, device="cpu")
        (method,) = live.headgate_methods
        for row, name in enumerate(names):
            method.set_routing(f"expert:{name.removeprefix('expert_')}")
            torch.testing.assert_close(together[row], live(input_ids=IDS[:1]).logits[0], atol=1e-5, rtol=1e-5)
    assert not torch.equal(together[0], together[1])
