"""What a fixed mixture of experts costs: its loss on the run's own validation rows, beside the routed model's."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import peft

from headgate.data.sources import load_data
from headgate.data.streams import load_stream
from headgate.evaluation.perplexity import perplexity
from headgate.experiments.recipe import Recipe
from headgate.experiments.run_directory import RunDirectory
from headgate.methods.lora_experts.routes import MIXTURE

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from headgate.methods.protocols import ExportsExperts

ROWS = 64
"""Validation rows of each skill that a mixture is measured on."""


def best_mixture(
    method: ExportsExperts,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    run: str | Path,
    asked: str | None,
) -> tuple[str | None, list[str]]:
    """The routing of the mixture to export, or None where there is one expert only; and notes with the losses.

    The loss is the mean over skills of the loss per trained token. What is compared is what one adapter can serve:
    every expert alone, and mixtures with fixed gates. ``asked``: a mixture's weights, which are then taken whatever
    the loss. A folder without a recipe has no validation rows: the first mixture is taken, and the note says so.
    Raises ConfigError for weights that name no expert.
    """
    candidates = dict(method.mixtures())
    if asked is not None:
        candidates = {"the mixture asked for": MIXTURE + asked}
        method.set_routing(MIXTURE + asked)
        method.set_routing("on")
    first = next(iter(candidates.values()), None)
    directory = RunDirectory(Path(run))
    if not directory.recipe_file.exists():
        return first, [
            f"{run} has no recipe, so no validation rows: no loss was measured, the mixture is the first choice"
        ]
    recipe = directory.recipe()
    rows = validation_rows(recipe)
    if not rows:
        return first, [
            "the run has no validation rows: no loss was measured, the mixture is the first choice"
        ]
    singles = {f"expert {info.number} alone": f"expert:{info.number}" for info in method.experts.roster}
    found = {}
    for name, routing in {"routed": "on", **candidates, **singles}.items():
        method.set_routing(routing)
        adapted = model if isinstance(model, peft.PeftModel) and name != "routed" else None
        # an exported mixture has no adapter beside it
        with contextlib.nullcontext() if adapted is None else adapted.disable_adapter():
            found[name] = _mean_loss(model, tokenizer, rows, recipe)
    method.set_routing("on")
    notes = [f"validation loss, {name}: {loss:.4f}" for name, loss in found.items()]
    single = min((name for name in found if name != "routed"), key=found.__getitem__)
    notes.append(
        f"the best single merge is {single}: {found[single]:.4f}, where the routed model has {found['routed']:.4f} "
        f"({len(rows)} x {ROWS} validation rows at most)"
    )
    return min(candidates.items(), key=lambda item: found[item[0]])[1] if candidates else None, notes


def validation_rows(recipe: Recipe) -> dict[str, object]:
    """Up to ``ROWS`` validation rows by skill; under one name where there is no stream; none where there are none."""
    if recipe.data.stream:
        segments = load_stream(recipe.data.stream, recipe.training.max_steps, recipe.data.overlap)
        found = {segment.skill: segment.validation for segment in segments}
    else:
        found = {"validation": load_data(recipe.data)[1]}
    return {
        name: rows.select(range(min(ROWS, len(rows)))) for name, rows in found.items() if rows is not None
    }


def _mean_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: dict[str, object], recipe: Recipe
) -> float:
    losses = [
        perplexity(model, tokenizer, part, length=recipe.data.max_length, loss_on=recipe.data.loss_on)[0][
            "loss"
        ]
        for part in rows.values()
    ]
    return sum(losses) / len(losses)
