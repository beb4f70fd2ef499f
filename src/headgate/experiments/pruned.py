"""``--to pruned``: a fixed mask of blocks becomes a smaller model of the base's own class, without the closed blocks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headgate.errors import ConfigError
from headgate.evaluation.perplexity import perplexity
from headgate.experiments.best_mixture import validation_rows
from headgate.experiments.run_directory import RunDirectory
from headgate.methods.compose import MethodStack
from headgate.methods.layer_routing.method import LayerRouting
from headgate.methods.layer_routing.route import Route
from headgate.models.anatomy import Anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

FIXED = ("static", "truncate")


def mask_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, methods: MethodStack, run: str | Path
) -> tuple[LayerRouting, Tensor, list[str]]:
    """(the method, gates ``[G]`` to prune by, notes with losses).

    A fixed policy, or a run that serves its fallback mask, is pruned as it is. A router is pruned to the mask that most
    tokens of the validation rows take; the notes say what share that is and what it costs. Raises ConfigError for a run
    that cannot be pruned.
    """
    method = methods.by_name["layer_routing"] if "layer_routing" in methods.names else None
    others = [name for name in methods.names if name in ("lora_experts", "schema_bank")]
    if not isinstance(method, LayerRouting) or method.config.policy == "dense":
        raise ConfigError(
            "--to pruned removes the blocks that layer_routing closes, and this run routes none"
        )
    config = method.config
    if config.patch is not None:
        raise ConfigError(
            "--to pruned: a closed block leaves its patch, which no ordinary model has: use --to transformers"
        )
    if config.policy == "stochastic_depth":
        raise ConfigError("--to pruned: stochastic_depth closes no block at inference: use --to merged")
    notes = [f"{name} is not part of this export: use --to transformers to keep it" for name in others]
    if config.policy in FIXED:
        return method, method.fixed.detach().clone(), notes
    if method.fallback is not None and bool(method.fallback.active):
        return method, method.fallback.mask.detach().clone(), notes
    return method, *_most_used(model, tokenizer, method, run, notes)


def _most_used(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    method: LayerRouting,
    run: str | Path,
    notes: list[str],
) -> tuple[Tensor, list[str]]:
    directory = RunDirectory(Path(run))
    rows = validation_rows(directory.recipe()) if directory.recipe_file.exists() else {}
    if not rows:
        raise ConfigError(
            "--to pruned: which mask the router takes most is counted on validation rows, and this run has none: give a "
            "run directory whose recipe has data.validation"
        )
    recipe, masks, routed = directory.recipe(), Counter[tuple[int, ...]](), method.execution

    def count(route: Route) -> None:
        free = route.free if route.free is not None else route.context.valid
        gates = (route.weight != 0).int().expand(*free.shape, -1)[free]
        masks.update(map(tuple, gates.tolist()))

    def loss(routing: str, mask: Tensor | None) -> float:
        total = tokens = 0.0
        method.set_routing(routing)
        with routed.under(mask):
            for part in rows.values():
                found, _ = perplexity(
                    model, tokenizer, part, length=recipe.data.max_length, loss_on=recipe.data.loss_on
                )
                total, tokens = total + found["loss"] * found["tokens"], tokens + found["tokens"]
        method.set_routing("on")
        return total / tokens

    before, routed.observe = routed.observe, count
    try:
        as_routed = loss("on", None)
    finally:
        routed.observe = before
    (best, times), total = masks.most_common(1)[0], masks.total()
    mask = torch.tensor(best, dtype=torch.float32)
    notes += [
        f"the mask is that of {times / total:.1%} of the routed validation tokens ({len(masks)} masks in all)",
        f"validation loss: {loss('on', mask.to(method.fixed.device)):.4f} pruned, {as_routed:.4f} routed, "
        f"{loss('removed', None):.4f} at full depth",
    ]
    return mask, notes


def closed_blocks(method: LayerRouting, mask: Tensor) -> list[int]:
    """Numbers of the blocks without a single open gate. Raises ConfigError for a mask that closes none, or half a block."""
    units = method.config.gates_per_block
    gates = mask.view(-1, units)
    half = [method.blocks.start + i for i, row in enumerate(gates.tolist()) if len(set(row)) > 1]
    if half:
        raise ConfigError(
            f"--to pruned: of blocks {half} only attention or only the MLP is closed, which no ordinary model has: use "
            "--to transformers"
        )
    closed = [method.blocks.start + i for i, row in enumerate(gates.tolist()) if not row[0]]
    if not closed:
        raise ConfigError("--to pruned: the mask closes no block: use --to merged")
    return closed


def prune(anatomy: Anatomy, closed: list[int]) -> None:
    """Take the blocks out of the model, in place: the others are renumbered, in the config too."""
    kept = [number for number in range(anatomy.num_blocks) if number not in closed]
    layers = nn.ModuleList(anatomy.blocks[number] for number in kept)
    for number, block in enumerate(layers):
        part: Any
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
    parent, _, name = anatomy.family.blocks.rpartition(".")
    setattr(anatomy.backbone.get_submodule(parent), name, layers)
    config = anatomy.model.config.get_text_config()
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == anatomy.num_blocks:
            setattr(config, key, [value[number] for number in kept])
    config.num_hidden_layers = len(kept)
