"""The plan of a run, from its recipe alone: no model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headgate.experiments.paths import with_paths
from headgate.experiments.recipe import Recipe
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.sweep import expand
from headgate.methods.registry import build_stack
from headgate.methods.stage import schedule_stages
from headgate.models.anatomy import describe
from headgate.models.load import EMBEDDED
from headgate.models.shapes import SHAPES
from headgate.training import processes


def model_shape(recipe: Recipe) -> Any:
    """The model on the meta device (shapes, no weights), or None where its config cannot be read from here."""
    name = recipe.model.name_or_path
    try:
        if name.startswith("random:") and name.removeprefix("random:") in SHAPES:
            config = AutoConfig.for_model(**SHAPES[name.removeprefix("random:")])
        else:
            path = str(EMBEDDED) if name == "embedded" else name.removeprefix("random:")
            config = AutoConfig.from_pretrained(path, revision=recipe.model.revision)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError):
        return None


def lora_parameters(recipe: Recipe, model: Any) -> int | None:
    """Trainable parameters of the adapter, counted on the meta device."""
    from headgate.models.adapters import add_adapter

    if model is None:
        return None
    if recipe.lora is None:
        adapters = build_stack(recipe.methods, recipe.seed).adapters()
        adapters.attach(describe(model))
        trained = list(adapters.parameters())
        adapters.detach()
        return sum(p.numel() for p in trained or model.parameters())
    with torch.device("meta"):
        adapted = add_adapter(model, recipe.lora)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def plan(recipe: Recipe, aliases: Sequence[str] = ()) -> str:
    """Model, trainable parameters, methods, stages, steps, tokens, memory estimate, run directory."""
    recipe = with_paths(recipe)
    training = recipe.training
    lines = [f"{recipe.name}  (seed {recipe.seed})"]
    model = model_shape(recipe)
    trainable = None
    if model is None:
        lines.append(f"  model      {recipe.model.name_or_path} (its shape is not known from here)")
    else:
        total = sum(p.numel() for p in model.parameters())
        trainable = lora_parameters(recipe, model)
        share = f", adapter {trainable:,} ({trainable / total:.2%})" if trainable is not None else ""
        lines.append(f"  model      {recipe.model.name_or_path}: {total:,} parameters{share}")
    for name in recipe.methods:
        lines.append(f"  method     {name}")
    ranks = processes.world_size()
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * ranks
    if recipe.model.parallel is not None:
        parallel = recipe.model.parallel
        lines.append(
            f"  sharded    {parallel.told}: the base in {parallel.fsdp} shares, on {parallel.ranks} ranks (--nproc {parallel.ranks})"
        )
    if ranks > 1:
        lines.append(f"  ranks      {ranks}, {batch // ranks} examples a step on each")
    steps = recipe.steps_given
    if steps is None:
        lines.append(f"  steps      {training.epochs:g} epochs, {batch} examples a step")
    else:
        lines.append(
            f"  steps      {steps}, {batch} examples a step, at most {steps * batch * recipe.data.max_length:,} tokens"
        )
    methods = build_stack(recipe.methods, recipe.seed)
    methods.data.check_replay(recipe.data.replay is not None)
    if model is not None:
        methods.check_model(describe(model))
    stages = training.stages or methods.stages(training.learning_rate)
    if recipe.data.stream:
        for skill in recipe.data.stream:
            lines.append(f"  skill      {skill.skill}: {skill.source}, {skill.steps} steps")
    elif steps:
        for scheduled in schedule_stages(stages, steps):
            rates = ", ".join(f"{group} {rate:g}" for group, rate in scheduled.stage.train.items())
            lines.append(
                f"  stage      {scheduled.name}: steps {scheduled.start + 1}-{scheduled.stop}, {rates}"
            )
        methods.check_run(steps)
    if model is not None and steps != 0:
        lines.append(f"  memory     {_memory_line(recipe, model, trainable or 0)}")
    for task in recipe.evaluation:
        lines.append(
            f"  evaluate   {task.key} on {task.path or task.source}/{task.split}"
            + (f", {task.limit} items" if task.limit else "")
        )
    lines += [f"  alias      {alias}" for alias in aliases]
    if recipe.sweep is not None:
        lines.append(
            f"  sweep      {len(expand(recipe))} runs: `headgate sweep`; this is the plan of the recipe without it"
        )
    directory = RunDirectory.of(recipe)
    lines.append(f"  run        {directory.path} ({directory.status})")
    return "\n".join(lines)


def _memory_line(recipe: Recipe, model: Any, trainable: int) -> str:
    """The estimate, and what to lower where this machine has less."""
    needed = _memory(recipe, model, trainable)
    on_gpu = torch.cuda.is_available() and recipe.model.device in ("auto", "cuda")
    here = (
        torch.cuda.get_device_properties(0).total_memory if on_gpu else psutil.virtual_memory().total
    ) / 2**30
    if needed <= here:
        return f"about {needed:.1f} GiB"
    return (
        f"about {needed:,.1f} GiB, and this {'GPU' if on_gpu else 'machine'} has {here:.1f}: lower "
        "training.per_device_train_batch_size or data.max_length, or set model.activation_checkpointing"
    )


def _memory(recipe: Recipe, model: Any, trainable: int) -> float:
    """GiB on a rank: weights, adapter with AdamW's two moments and gradient, activations of one micro-batch.

    Of a base in N shares a rank holds one, and whole what runs: two blocks (one is gathered ahead), embeddings, head.
    """
    config = model.config.get_text_config()
    weights = sum(p.numel() for p in model.parameters())
    bytes_each = {"float32": 4, "auto": 2 if torch.cuda.is_available() else 4}.get(recipe.model.dtype, 2)
    base = weights * (0.55 if recipe.model.load_in_4bit else bytes_each)
    shares = recipe.model.parallel.fsdp if recipe.model.parallel is not None else 1
    if shares > 1:
        anatomy = describe(model)
        ends = sum(p.numel() for m in {anatomy.embedding, anatomy.head} for p in m.parameters())
        running = 2 * sum(p.numel() for p in anatomy.blocks[0].parameters()) + ends
        base = base / shares + running * bytes_each
    tokens = recipe.training.per_device_train_batch_size * min(
        recipe.data.max_length, getattr(config, "max_position_embeddings", None) or recipe.data.max_length
    )
    per_token = 34 * config.hidden_size * config.num_hidden_layers * bytes_each / 2
    if recipe.model.activation_checkpointing:
        per_token /= 8
    chunked = recipe.training.loss == "chunked" or (
        recipe.training.loss == "auto" and config.vocab_size >= 32_768
    )
    logits = 0 if chunked else tokens * config.vocab_size * 12
    return float(base + trainable * 16 + tokens * per_token + logits) / 2**30
