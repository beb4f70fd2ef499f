"""Experts elsewhere: each as a plain PEFT adapter, and a fixed mixture of them by exact concatenation.

Gates that depend on the token cannot be merged into one set of weights. What can be served without Headgate is one
expert per request (PEFT's ``adapter_names``, vLLM's multi-LoRA), or a mixture whose weights are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor

from headgate.methods.lora_experts.experts import ExpertSet
from headgate.methods.lora_experts.routes import MIXTURE, ONE, fixed_weights
from headgate.models.anatomy import Anatomy

NOT_MERGEABLE = (
    "the gates of lora_experts depend on the token, so no single set of weights computes what the model does: use "
    "`--to experts`, which writes every expert and a fixed mixture as plain PEFT adapters, each with its measured distance"
)


def mixtures(experts: ExpertSet) -> dict[str, str]:
    """Fixed gates worth trying, as routings: the shares of training, equal ones, and all experts added up."""
    if len(experts.roster) < 2:
        return {}
    shares, count = usage_weights(experts), len(experts.roster)
    return {
        "mixture by usage in training": _routing(shares),
        "mixture in equal shares": _routing(dict.fromkeys(shares, 1 / count)),
        "sum of the experts": _routing(dict.fromkeys(shares, 1.0)),
    }


def _routing(weights: Mapping[int, float]) -> str:
    return MIXTURE + ",".join(f"{number}={weight!r}" for number, weight in weights.items())


def export_experts(experts: ExpertSet, anatomy: Anatomy, folder: Path, mixture: str | None) -> dict[str, str]:
    """Write ``expert_<i>/`` for each expert and, where one is given, ``mixture/``; returns each one's routing.

    ``mixture`` is a routing with fixed gates; the rank of what is written is the sum of its experts'.
    """
    written: dict[str, str] = {}
    for info in experts.roster:
        name, parts = f"expert_{info.number}", experts.parts(info.number)
        factors = {site: (part.down, part.up) for site, part in zip(experts.banks, parts, strict=True)}
        _save(anatomy, folder / name, factors, info.rank, info.alpha)
        written[name] = f"{ONE}{info.number}"
    if mixture is not None:
        weights = fixed_weights(mixture, experts)
        rank = sum(experts.roster.info(number).rank for number in weights)
        _save(anatomy, folder / "mixture", concatenated(experts, weights), rank, float(rank))
        written["mixture"] = mixture
    return written


def usage_weights(experts: ExpertSet) -> dict[int, float]:
    """Share of all tokens dispatched in training that each expert served, summing to 1; equal before any."""
    numbers = [info.number for info in experts.roster]
    return dict(zip(numbers, experts.roster.served_shares(numbers), strict=True))


def concatenated(experts: ExpertSet, weights: Mapping[int, float]) -> dict[str, tuple[Tensor, Tensor]]:
    """sum_i w_i s_i B_i A_i per site, exactly: A = [A_i], B = [w_i s_i B_i], alpha = rank."""
    factors = {}
    for site in experts.banks:
        members = [(i, experts.bank(site).expert(i.name)) for i in experts.roster if i.number in weights]
        down = torch.cat([expert.down for _, expert in members])
        up = torch.cat([expert.up * (weights[info.number] * info.scale) for info, expert in members])
        factors[site] = down, up
    return factors


def _save(
    anatomy: Anatomy, folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], rank: int, alpha: float
) -> None:
    family = anatomy.family
    paths = {site: f"{family.backbone}.{family.blocks}.{site.replace('/', '.')}" for site in factors}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=list(paths.values()),
        fan_in_fan_out=any(
            type(getattr(m, "base_layer", m)).__name__ == "Conv1D" for m in anatomy.blocks[0].modules()
        ),
        task_type="CAUSAL_LM",
        base_model_name_or_path=getattr(anatomy.model.config, "_name_or_path", None) or None,
        inference_mode=True,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    state = {}
    for site, (down, up) in factors.items():
        state[f"base_model.model.{paths[site]}.lora_A.weight"] = down.detach().cpu().contiguous().clone()
        state[f"base_model.model.{paths[site]}.lora_B.weight"] = up.detach().T.cpu().contiguous().clone()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
