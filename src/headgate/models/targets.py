"""Which linears of a model a LoRA sits on, checked by names and sizes alone."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

from headgate.errors import ConfigError, ModelError
from headgate.models.config import LoraConfig
from headgate.models.outline import Outline


def target_modules(
    names: Collection[str], linears: Sequence[str], targets: list[str] | str
) -> list[str] | str:
    """The targets as PEFT wants them; ``auto`` is the family's ``linears``. Raises ModelError for one that matches nothing."""
    if targets == "auto":
        return list(linears)
    if isinstance(targets, str):
        return targets  # PEFT's own words: "all-linear", or a regular expression
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
            close = difflib.get_close_matches(target, leaves, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the model has {', '.join(leaves)}"
            raise ModelError(f"lora.target_modules: {target!r} matches nothing: {hint}")
    return targets


def check_rank(sizes: Mapping[str, tuple[int, int]], targets: list[str] | str, rank: int) -> None:
    """A rank above the widest target's own can be no choice: refused before tensors of it are made."""
    widths = [
        min(size)
        for name, size in sizes.items()
        if isinstance(targets, str) or name.rsplit(".", 1)[-1] in {t.rsplit(".", 1)[-1] for t in targets}
    ]
    if widths and rank > max(widths):
        raise ConfigError(
            f"lora.r={rank} exceeds {max(widths)}, the full rank of the largest weight that it would adapt: lower it"
        )


def blocks_of(layers: str | list[int], num_blocks: int) -> list[int] | None:
    """``all``, ``last_n`` or a list of block indices, as PEFT wants them."""
    if layers == "all":
        return None
    if isinstance(layers, str):
        if not layers.startswith("last_") or not layers[5:].isdigit():
            raise ModelError(f"lora.layers={layers!r}: give all, last_<n>, or a list of block numbers")
        count = int(layers[5:])
        if not 1 <= count <= num_blocks:
            raise ModelError(f"lora.layers={layers!r}, but the model has {num_blocks} blocks")
        return list(range(num_blocks - count, num_blocks))
    outside = [layer for layer in layers if not 0 <= layer < num_blocks]
    if outside:
        raise ModelError(
            f"lora.layers: {outside} outside the model's {num_blocks} blocks (0..{num_blocks - 1})"
        )
    return list(layers)


def is_plain(lora: LoraConfig) -> bool:
    """Whether names alone say what PEFT would make of the block: linears of a block by their last name, and no DoRA."""
    targets = lora.target_modules
    return (
        lora.peft_type.lower() == "lora"
        and not lora.use_dora
        and lora.layers != []
        and (targets == "auto" or (isinstance(targets, list) and targets != []))
        and not any("." in target or target == "lm_head" for target in targets)
    )


def parameters_of(outline: Outline, linears: Sequence[str], lora: LoraConfig) -> int:
    """Trainable parameters of a plain LoRA on a model. Raises what ``add_adapter`` raises, in its words."""
    targets = target_modules(outline.linears, linears, lora.target_modules)
    check_rank(outline.linears, targets, lora.r)
    blocks = blocks_of(lora.layers, outline.num_blocks)
    chosen = [name for name in outline.linears if name.rsplit(".", 1)[-1] in targets]
    if blocks is not None:
        chosen = [name for name in chosen if int(name.split(".")[2]) in blocks]
    return sum(lora.r * sum(outline.linears[name]) for name in chosen)
