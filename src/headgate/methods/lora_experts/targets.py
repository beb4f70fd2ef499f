"""Which linears have experts, and what a site is called: ``3/self_attn/q_proj``, block and path within it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from headgate.errors import ModelError
from headgate.models.anatomy import Anatomy


def is_target(site: str, target: str) -> bool:
    """Whether ``3/self_attn/q_proj`` is the linear called ``q_proj`` or ``self_attn.q_proj``: whole names only."""
    return f"/{site}".endswith("/" + target.replace(".", "/"))


def target_linears(anatomy: Anatomy, targets: Sequence[str] | str, first: int) -> dict[str, nn.Module]:
    """Target linears by site, on the blocks from ``first`` on. Raises ModelError for a target that matches nothing."""
    if first >= anatomy.num_blocks:
        raise ModelError(
            f"features: block {first}, but the model has {anatomy.num_blocks} blocks (0..{anatomy.num_blocks - 1})"
        )
    wanted = list(anatomy.family.linears) if targets == "auto" else list(targets)
    everything = {
        f"{number}/{name.replace('.', '/')}": linear
        for number in range(first, anatomy.num_blocks)
        for name, linear in anatomy.linears(anatomy.blocks[number])
    }
    for target in wanted:
        if not any(is_target(site, target) for site in everything):
            leaves = sorted({site.rsplit("/", 1)[-1] for site in everything})
            close = difflib.get_close_matches(target, leaves, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the blocks have {', '.join(leaves)}"
            raise ModelError(f"lora_experts.target_modules: {target!r} matches nothing: {hint}")
    return {s: linear for s, linear in everything.items() if any(is_target(s, t) for t in wanted)}
