"""Take a run elsewhere: a plain PEFT adapter, merged weights, or a method's experts; each verified by reloading it.

What serves elsewhere is the adapter alone. Routing and gating live in Headgate's methods: an export says how far
its logits are from the live model's, rather than leave it unsaid.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from headgate.errors import CheckpointError, ConfigError, ModelError
from headgate.experiments.best_mixture import best_mixture
from headgate.experiments.environment import environment
from headgate.experiments.model_card import model_card
from headgate.experiments.run_directory import RunDirectory
from headgate.files import write_atomically
from headgate.methods.compose import MethodStack, methods_of
from headgate.models.anatomy import unwrap
from headgate.models.config import ModelConfig
from headgate.models.load import load_base
from headgate.training import checkpoint
from headgate.training.saved import load, saved_folder

Kind = Literal["peft", "merged", "experts"]
KINDS: tuple[Kind, ...] = ("peft", "merged", "experts")
PORTABLE_NAME = re.compile(r"\.lora_[AB]\.weight$")
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Export:
    """What was written. ``difference``: largest logit difference between the reloaded export and the adapted model,
    relative to the largest logit; ``routed_difference``: between the adapted model and the one with its methods live.
    """

    kind: str
    folder: str
    files: list[str]
    difference: float
    routed_difference: float
    methods: list[str]
    notes: list[str]


def export(
    run: str | Path,
    folder: str | Path,
    to: Kind,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    licence: str = "other",
    device: str = "cpu",
    mixture: str | None = None,
) -> Export:
    """Write ``run`` (a run directory or a saved checkpoint) to ``folder`` and verify it by loading it again.

    ``mixture``: of ``experts``, the weights ``<number or skill>=<weight>,...`` of the fixed mixture, instead of the best
    one on the run's validation rows. Raises ConfigError for a kind that this run cannot be exported to, CheckpointError when the folder is not empty or
    the reloaded logits differ.
    """
    folder = Path(folder)
    if to not in KINDS:
        raise ConfigError(f"--to {to}: choose one of {', '.join(KINDS)}")
    if mixture is not None and to != "experts":
        raise ConfigError(f"--mixture belongs to --to experts, not to --to {to}: leave it out")
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty: choose another folder for the export")
    source = saved_folder(run)
    whole = (dtype is None) or hasattr(torch, dtype)
    if not whole or (dtype is not None and getattr(torch, dtype) not in TOLERANCE):
        raise ConfigError(f"--dtype {dtype}: choose float32, bfloat16 or float16")
    frozen_base = checkpoint.read_description(source).get("base_is_frozen", False)
    if to == "peft" and frozen_base:
        raise ConfigError(
            f"{run} has no PEFT adapter, its methods are what was trained: export it with --to experts"
        )
    if to == "peft" and not (source / "adapter_config.json").exists():
        raise ConfigError(f"{run} was fully fine-tuned and has no adapter: export it with --to merged")
    # An adapter trained on quantised weights is merged into the real ones.
    plain = {"load_in_4bit": False, "load_in_8bit": False} if to == "merged" else {}
    model, tokenizer = load(source, device=device, **plain)
    ids = probe(unwrap(model).config.get_text_config().vocab_size).to(next(model.parameters()).device)
    methods = methods_of(model)
    if to == "merged":
        methods.evaluation.check_mergeable()
    methods.evaluation.switch_on()
    routed = logits(model, ids)
    names = methods.names
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if to == "experts":
            return _experts(run, model, tokenizer, methods, folder, source, device, mixture)
        model.headgate_methods.detach()
        adapted = logits(model, ids)
        notes = _notes(names, relative(adapted, routed))
        if to == "peft":
            notes += save_adapter(model, folder)
            tokenizer.save_pretrained(folder)
            again = reload_adapter(folder, source, device)
        else:
            save_merged(model, tokenizer, folder, dtype, max_shard_size)
            again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
            again.to(ids.device)
            AutoTokenizer.from_pretrained(folder)
        difference = relative(logits(again, ids), adapted)
        limit = TOLERANCE[next(again.parameters()).dtype]
        if difference > limit:
            raise CheckpointError(
                f"the export to {folder} was reloaded and its logits differ by {difference:.2e} of the largest (allowed: "
                f"{limit:.0e}): it is not usable"
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    routed_difference = relative(adapted, routed)
    if to == "peft":
        trained_in = str(next(again.parameters()).dtype).removeprefix("torch.")
        notes.append(f'for equal logits load the base with dtype="{trained_in}", as it was here')
    (folder / "README.md").write_text(card(run, source, to, licence, difference, notes))
    files = sorted(path.name for path in folder.iterdir())
    done = Export(to, str(folder), files, difference, routed_difference, names, notes)
    write_atomically(folder / "headgate_export.json", json.dumps(asdict(done), indent=1))
    return done


def probe(vocabulary: int, length: int = 24) -> Tensor:
    """``[2, length]`` token ids, always the same, spread over the vocabulary."""
    positions = torch.arange(2 * length, dtype=torch.long).reshape(2, length)
    return (positions * 7919 + 11) % vocabulary


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """``[B, T, V]`` in fp32 on the CPU."""
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()


def relative(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def save_adapter(model: Any, folder: Path) -> list[str]:
    """Plain PEFT files; notes on what other servers would not take."""
    model.save_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        odd = sorted({name.rsplit(".", 2)[-2] for name in file.keys() if not PORTABLE_NAME.search(name)})  # noqa: SIM118
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template
    return (
        [f"vLLM and llama.cpp take lora_A and lora_B only; this adapter also has {', '.join(odd)}"]
        if odd
        else []
    )


def save_merged(model: Any, tokenizer: Any, folder: Path, dtype: str | None, max_shard_size: str) -> None:
    """The whole model with the adapter in its weights, as ``transformers`` saves one."""
    whole = model.merge_and_unload() if isinstance(model, peft.PeftModel) else model
    if dtype is not None:
        whole = whole.to(getattr(torch, dtype))
        whole.config.dtype = getattr(torch, dtype)
    try:
        whole.save_pretrained(folder, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConfigError(f"--max-shard-size {max_shard_size}: {error}") from error
    tokenizer.save_pretrained(folder)
    if not (folder / "generation_config.json").exists():
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(folder)


def reload_adapter(folder: Path, source: Path, device: str) -> Any:
    """The base as the run had it, and PEFT alone on top."""
    description = checkpoint.read_description(source)
    base, _ = load_base(ModelConfig(**{**description["model"], "device": device}), seed=description["seed"])
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def _experts(
    run: str | Path,
    model: Any,
    tokenizer: Any,
    methods: MethodStack,
    folder: Path,
    source: Path,
    device: str,
    mixture: str | None,
) -> Export:
    """Every expert, and the best fixed mixture, as plain PEFT adapters, each loaded again by PEFT alone and held
    against the live model with the same routing."""
    able = methods.evaluation.exporting_experts()
    if not able:
        raise ConfigError(
            f"no method of this run ({', '.join(methods.names) or 'none'}) keeps experts that can be exported: "
            "use --to peft or --to merged"
        )
    ids = probe(unwrap(model).config.get_text_config().vocab_size).to(next(model.parameters()).device)
    differences, notes = [0.0], []
    for name_of_method, method in able:
        place = folder if len(able) == 1 else folder / name_of_method
        best, measured = best_mixture(method, model, tokenizer, run, mixture)
        for name, routing in method.export_experts(place, best).items():
            again = reload_adapter(place / name, source, device)
            method.set_routing(routing)
            with model.disable_adapter() if isinstance(model, peft.PeftModel) else contextlib.nullcontext():
                differences.append(relative(logits(again, ids), logits(model, ids)))
            method.set_routing("on")
            if differences[-1] > TOLERANCE[next(again.parameters()).dtype]:
                raise CheckpointError(
                    f"{place / name} was reloaded in PEFT and its logits differ by {differences[-1]:.2e} of the largest from "
                    f"the live model's with routing {routing}: it is not usable"
                )
        notes += measured
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if not files:
        raise ModelError(f"{', '.join(name for name, _ in able)} has no expert yet: nothing to export")
    names = [name for name, _ in able]
    done = Export("experts", str(folder), files, max(differences), 0.0, names, notes)
    write_atomically(folder / "headgate_export.json", json.dumps(asdict(done), indent=1))
    return done


def _notes(names: list[str], difference: float) -> list[str]:
    if not names or difference == 0:
        return []
    return [
        f"the methods {', '.join(names)} are not part of this export: its logits differ by {difference:.2e} of the largest "
        "from the model's with routing on (compare `headgate eval RUN --routing on` and `--routing removed`)"
    ]


def card(run: str | Path, source: Path, to: Kind, licence: str, difference: float, notes: list[str]) -> str:
    """A model card: metadata for hubs, the export, then data, metrics, method and recipe of the run."""
    description = checkpoint.read_description(source)
    base = description["model"]
    head = [
        "---",
        f"base_model: {base['name_or_path']}",
        f"library_name: {'peft' if to == 'peft' else 'transformers'}",
        f"license: {licence}",
        "pipeline_tag: text-generation",
        f"tags: [headgate{', lora' if to == 'peft' else ''}]",
        "---",
        "",
        "## Export",
        "",
        f"- kind: {to}",
        f"- base model: {base['name_or_path']}, revision {base.get('revision') or 'not pinned'}",
        f"- methods in training: {', '.join(description['methods']) or 'none'}",
        f"- verified: reloaded without Headgate's methods, largest logit difference {difference:.2e} of the largest logit",
        *(f"- note: {note}" for note in notes),
        "",
    ]
    directory = RunDirectory(Path(run))
    if directory.recipe_file.exists() and directory.result_file.exists():
        body = model_card(directory.recipe(), directory.result()).split("---", 2)[2].strip()
        return "\n".join([*head, body, ""])
    versions = json.dumps(environment()["versions"], indent=1)
    return "\n".join([*head, "## Versions", "", "```json", versions, "```", ""])
