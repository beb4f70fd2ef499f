"""The model of a recipe before it is loaded: from its config.json where that says all, else built without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headgate.experiments.recipe import Recipe
from headgate.methods.names import METHODS
from headgate.models.families import FAMILIES
from headgate.models.outline import outline
from headgate.models.places import EMBEDDED
from headgate.models.shapes import SHAPES
from headgate.models.targets import is_plain, parameters_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headgate.models.anatomy import Anatomy


@dataclass(frozen=True)
class Outlined:
    """What a plan says of a model, and the anatomy that methods are asked about, where one was built."""

    parameters: int
    trainable: int
    hidden_size: int
    num_blocks: int
    vocab_size: int
    context_length: int | None
    running: int = 0
    """Parameters that a rank of a sharded base holds whole: two blocks, the embedding and the head."""
    anatomy: Anatomy | None = None


def outlined(recipe: Recipe) -> Outlined | None:
    """The model and the adapter of a recipe, checked; None where its config cannot be read from here.

    Raises ModelError or ConfigError for an adapter that does not fit, whichever way the model was looked at.
    """
    plain = outline(recipe.model) if _names_suffice(recipe) else None
    if plain is None:
        return _built(recipe)
    trainable = plain.parameters
    if recipe.lora is not None:
        trainable = parameters_of(plain, FAMILIES["llama"].linears, recipe.lora)
    return Outlined(
        plain.parameters,
        trainable,
        plain.hidden_size,
        plain.num_blocks,
        plain.vocab_size,
        plain.context_length,
    )


def _names_suffice(recipe: Recipe) -> bool:
    """Whether no method has to be asked about the model, and nothing but names is asked of it."""
    if recipe.model.parallel is not None or (recipe.lora is not None and not is_plain(recipe.lora)):
        return False
    if recipe.lora is None:
        return not recipe.methods
    return not any(hasattr(METHODS.get(name), "check_model") for name in recipe.methods)


def built(recipe: Recipe) -> PreTrainedModel | None:
    """The model on the meta device (shapes, no weights), or None where its config cannot be read from here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name = recipe.model.name_or_path
    try:
        if name.startswith("random:") and name.removeprefix("random:") in SHAPES:
            config = AutoConfig.for_model(**SHAPES[name.removeprefix("random:")])
        else:
            path = str(EMBEDDED) if name == "embedded" else name.removeprefix("random:")
            config = AutoConfig.from_pretrained(path, revision=recipe.model.revision)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
            return model
    except (OSError, ValueError):
        return None


def context_length(recipe: Recipe) -> int | None:
    """Positions that the model was made for, or None where its config cannot be read from here or does not say."""
    plain = outline(recipe.model)
    if plain is not None:
        return plain.context_length
    model = built(recipe)
    return None if model is None else getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _built(recipe: Recipe) -> Outlined | None:
    from headgate.models.anatomy import describe

    model = built(recipe)
    if model is None:
        return None
    total = sum(p.numel() for p in model.parameters())
    trainable = _trainable(recipe, model)
    anatomy = describe(model)
    ends = sum(p.numel() for m in {anatomy.embedding, anatomy.head} for p in m.parameters())
    return Outlined(
        total,
        trainable,
        anatomy.hidden_size,
        anatomy.num_blocks,
        anatomy.vocab_size,
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        2 * sum(p.numel() for p in anatomy.blocks[0].parameters()) + ends,
        anatomy,
    )


def _trainable(recipe: Recipe, model: PreTrainedModel) -> int:
    """Trainable parameters of the adapter, counted on the meta device."""
    import torch

    from headgate.methods.registry import build_stack
    from headgate.models.adapters import add_adapter
    from headgate.models.anatomy import describe

    if recipe.lora is None:
        adapters = build_stack(recipe.methods, recipe.seed).adapters()
        adapters.attach(describe(model))
        trained = list(adapters.parameters())
        adapters.detach()
        return sum(p.numel() for p in trained or model.parameters())
    with torch.device("meta"):
        adapted = add_adapter(model, recipe.lora)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)
