"""The plan of a run, from its recipe alone: no model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from headgate.experiments.model_outline import Outlined, outlined
from headgate.experiments.paths import with_paths
from headgate.experiments.recipe import Recipe
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.sweep import expand
from headgate.methods.stage import Stage, schedule_stages, whole_run
from headgate.models.drivers import cuda_is_here, cuda_memory


def plan(recipe: Recipe, aliases: Sequence[str] = (), ranks: int = 1) -> str:
    """Model, trainable parameters, methods, stages, steps, tokens, memory estimate, run directory.

    Without methods neither torch nor transformers is imported, where ``models.outline`` knows the model.
    """
    recipe = with_paths(recipe)
    training = recipe.training
    lines = [f"{recipe.name}  (seed {recipe.seed})"]
    model = outlined(recipe)
    if model is None:
        lines.append(f"  model      {recipe.model.name_or_path} (its shape is not known from here)")
    else:
        lines.append(
            f"  model      {recipe.model.name_or_path}: {model.parameters:,} parameters, adapter {model.trainable:,} "
            f"({model.trainable / model.parameters:.2%})"
        )
    for name in recipe.methods:
        lines.append(f"  method     {name}")
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
    stages = _stages(recipe, model, steps)
    if recipe.data.stream:
        for skill in recipe.data.stream:
            lines.append(f"  skill      {skill.skill}: {skill.source}, {skill.steps} steps")
    elif steps:
        for scheduled in schedule_stages(stages, steps):
            rates = ", ".join(f"{group} {rate:g}" for group, rate in scheduled.stage.train.items())
            lines.append(
                f"  stage      {scheduled.name}: steps {scheduled.start + 1}-{scheduled.stop}, {rates}"
            )
    if model is not None and steps != 0:
        lines.append(f"  memory     {_memory_line(recipe, model)}")
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


def _stages(recipe: Recipe, model: Outlined | None, steps: int | None) -> Sequence[Stage]:
    """The run's stages. Raises what the methods say against the model, the data or the length of the run."""
    training = recipe.training
    if not recipe.methods:
        return training.stages or whole_run(training.learning_rate)
    from headgate.methods.registry import build_stack

    methods = build_stack(recipe.methods, recipe.seed)
    methods.data.check_replay(recipe.data.replay is not None)
    if model is not None and model.anatomy is not None:
        methods.check_model(model.anatomy)
    stages = training.stages or methods.stages(training.learning_rate)
    if steps and not recipe.data.stream:
        schedule_stages(stages, steps)  # shares that do not add up are told first
        methods.check_run(steps)
    return stages


def _memory_line(recipe: Recipe, model: Outlined) -> str:
    """The estimate, and what to lower where this machine has less."""
    needed = _memory(recipe, model)
    on_gpu = recipe.model.device in ("auto", "cuda") and cuda_is_here()
    here = (cuda_memory() if on_gpu else psutil.virtual_memory().total) / 2**30
    if needed <= here:
        return f"about {needed:.1f} GiB"
    return (
        f"about {needed:,.1f} GiB, and this {'GPU' if on_gpu else 'machine'} has {here:.1f}: lower "
        "training.per_device_train_batch_size or data.max_length, or set model.activation_checkpointing"
    )


def _memory(recipe: Recipe, model: Outlined) -> float:
    """GiB on a rank: weights, adapter with AdamW's two moments and gradient, activations of one micro-batch.

    Of a base in N shares a rank holds one, and whole what runs: two blocks (one is gathered ahead), embeddings, head.
    """
    bytes_each = {"float32": 4, "auto": 2 if cuda_is_here() else 4}.get(recipe.model.dtype, 2)
    base = model.parameters * (0.55 if recipe.model.load_in_4bit else bytes_each)
    shares = recipe.model.parallel.fsdp if recipe.model.parallel is not None else 1
    if shares > 1:
        base = base / shares + model.running * bytes_each
    tokens = recipe.training.per_device_train_batch_size * min(
        recipe.data.max_length, model.context_length or recipe.data.max_length
    )
    per_token = 34 * model.hidden_size * model.num_blocks * bytes_each / 2
    if recipe.model.activation_checkpointing:
        per_token /= 8
    chunked = recipe.training.loss == "chunked" or (
        recipe.training.loss == "auto" and model.vocab_size >= 32_768
    )
    logits = 0 if chunked else tokens * model.vocab_size * 12
    return float(base + model.trainable * 16 + tokens * per_token + logits) / 2**30
