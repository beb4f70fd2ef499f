"""Take a run elsewhere: a plain PEFT adapter, merged weights, or a method's experts; each verified by reloading it.

What serves elsewhere is the adapter alone. Routing and gating live in Headgate's methods: an export says how far
its logits are from the live model's, rather than leave it unsaid.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import peft
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from headgate.errors import CheckpointError, ConfigError
from headgate.experiments.export_card import card
from headgate.experiments.export_checks import TOLERANCE, logits, probe, relative, reload_adapter
from headgate.experiments.exported_experts import write_experts
from headgate.experiments.pruned import closed_blocks, mask_of, prune
from headgate.experiments.records import Figures
from headgate.experiments.served import load_written, save_served
from headgate.files import write_atomically
from headgate.methods.compose import methods_of
from headgate.models.anatomy import describe, unwrap
from headgate.training import checkpoint
from headgate.training.saved import load, saved_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Kind = Literal["transformers", "peft", "merged", "pruned", "experts"]
KINDS: tuple[Kind, ...] = ("transformers", "peft", "merged", "pruned", "experts")
WHOLE: tuple[Kind, ...] = ("merged", "pruned")
"""Kinds whose adapter goes into the weights."""
PORTABLE_NAME = re.compile(r"\.lora_[AB]\.weight$")


@dataclass(frozen=True)
class Export:
    """What was written. ``difference``: largest logit difference between the reloaded export and the adapted model,
    relative to the largest logit; ``routed_difference``: between the adapted model and the one with its methods live.
    ``figures``: what a kind measures besides (blocks removed, how often the chooser is right).
    """

    kind: str
    folder: str
    files: list[str]
    difference: float
    routed_difference: float
    methods: list[str]
    notes: list[str]
    figures: Figures = field(default_factory=dict)


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
    merge: bool = False,
) -> Export:
    """Write ``run`` (a run directory or a saved checkpoint) to ``folder`` and verify it by loading it again.

    ``mixture``: of ``experts``, the weights ``<number or skill>=<weight>,...`` of the fixed mixture, instead of the best
    one on the run's validation rows. ``merge``: of ``transformers``, the adapter goes into the weights. Raises ConfigError
    for a kind that this run cannot be exported to, CheckpointError when the folder is not empty or the reloaded logits
    differ.
    """
    folder = Path(folder)
    source = _check(run, folder, to, dtype, mixture, merge)
    # An adapter trained on quantised weights is merged into the real ones.
    plain = {} if to in ("peft", "experts") else {"load_in_4bit": False, "load_in_8bit": False}
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
            names, difference, notes, figures = write_experts(
                run, model, tokenizer, methods, folder, source, device, mixture
            )
            (folder / "README.md").write_text(card(run, source, to, licence, difference, notes))
            return _recorded(Export(to, str(folder), [], difference, 0.0, names, notes, figures), folder)
        figures = {}
        if to == "transformers":
            notes = save_served(model, tokenizer, folder, merge=merge, max_shard_size=max_shard_size)
            adapted, again = routed, load_written(folder).to(ids.device)
        elif to == "peft":
            methods.detach()
            adapted = logits(model, ids)
            notes = _notes(names, relative(adapted, routed)) + save_adapter(model, folder)
            tokenizer.save_pretrained(folder)
            again = reload_adapter(folder, source, device)
        else:
            notes, closed, adapted = [], [], routed
            if to == "pruned":
                method, mask, notes = mask_of(model, tokenizer, methods, run)
                closed = closed_blocks(method, mask)
                figures = {"removed_blocks": closed, "blocks": describe(model).num_blocks}
                methods.detach_all_but(method)
                with method.execution.under(mask.to(ids.device)):
                    adapted = logits(model, ids)
            methods.detach()
            if to == "merged":
                adapted = logits(model, ids)
                notes = _notes(names, relative(adapted, routed))
            save_merged(model, tokenizer, folder, dtype, max_shard_size, closed)
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
    if to == "peft":
        trained_in = str(next(again.parameters()).dtype).removeprefix("torch.")
        notes.append(f'for equal logits load the base with dtype="{trained_in}", as it was here')
    (folder / "README.md").write_text(card(run, source, to, licence, difference, notes))
    done = Export(to, str(folder), [], difference, relative(adapted, routed), names, notes, figures)
    return _recorded(done, folder)


def _check(
    run: str | Path, folder: Path, to: str, dtype: str | None, mixture: str | None, merge: bool
) -> Path:
    """The saved folder of the run. Raises for what cannot be exported so, before anything is loaded."""
    if to not in KINDS:
        raise ConfigError(f"--to {to}: choose one of {', '.join(KINDS)}")
    if mixture is not None and to != "experts":
        raise ConfigError(f"--mixture belongs to --to experts, not to --to {to}: leave it out")
    if merge and to != "transformers":
        raise ConfigError(f"--merge belongs to --to transformers, not to --to {to}: leave it out")
    if dtype is not None and to not in WHOLE:
        raise ConfigError(
            f"--dtype belongs to --to {' and --to '.join(WHOLE)}, not to --to {to}: leave it out"
        )
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty: choose another folder for the export")
    source = saved_folder(run)
    if dtype is not None and getattr(torch, dtype, None) not in TOLERANCE:
        raise ConfigError(f"--dtype {dtype}: choose float32, bfloat16 or float16")
    frozen_base = checkpoint.read_description(source).get("base_is_frozen", False)
    if to == "peft" and frozen_base:
        raise ConfigError(
            f"{run} has no PEFT adapter, its methods are what was trained: export it with --to experts"
        )
    if to == "peft" and not (source / "adapter_config.json").exists():
        raise ConfigError(f"{run} was fully fine-tuned and has no adapter: export it with --to merged")
    return source


def _recorded(done: Export, folder: Path) -> Export:
    """With the list of its files, and ``headgate_export.json`` beside them."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    done = Export(**{**vars(done), "files": files})
    write_atomically(folder / "headgate_export.json", json.dumps(asdict(done), indent=1))
    return done


def save_adapter(model: PreTrainedModel, folder: Path) -> list[str]:
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


def save_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    dtype: str | None,
    max_shard_size: str,
    without: Sequence[int] = (),
) -> None:
    """The whole model with the adapter in its weights, as ``transformers`` saves one; some blocks left out."""
    whole = model.merge_and_unload() if isinstance(model, peft.PeftModel) else model
    if without:
        prune(describe(whole), list(without))
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


def _notes(names: list[str], difference: float) -> list[str]:
    if not names or difference == 0:
        return []
    return [
        f"the methods {', '.join(names)} are not part of this export: its logits differ by {difference:.2e} of the largest "
        "from the model's with routing on (compare `headgate eval RUN --routing on` and `--routing removed`)"
    ]
