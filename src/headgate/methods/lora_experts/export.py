"""Experts elsewhere: each as a plain PEFT adapter, and a fixed mixture of them by exact concatenation.

Gates that depend on the token cannot be merged into one set of weights. What can be served without Headgate is one
expert per request (PEFT's ``adapter_names``, vLLM's multi-LoRA), or a mixture whose weights are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor

from headgate.methods.lora_experts.forward import MIXTURE

if TYPE_CHECKING:
    from headgate.methods.lora_experts.method import LoraExperts

NOT_MERGEABLE = (
    "the gates of lora_experts depend on the token, so no single set of weights computes what the model does: use "
    "`--to experts`, which writes every expert and a fixed mixture as plain PEFT adapters, each with its measured distance"
)


def mixtures(method: LoraExperts) -> dict[str, str]:
    """Fixed gates worth trying, as routings: the shares of training, equal ones, and all experts added up."""
    if len(method.roster) < 2:
        return {}
    shares, count = usage_weights(method), len(method.roster)
    return {
        "mixture by usage in training": _routing(shares),
        "mixture in equal shares": _routing(dict.fromkeys(shares, 1 / count)),
        "sum of the experts": _routing(dict.fromkeys(shares, 1.0)),
    }


def _routing(weights: Mapping[int, float]) -> str:
    return MIXTURE + ",".join(f"{number}={weight!r}" for number, weight in weights.items())


def export_experts(method: LoraExperts, folder: Path, mixture: str | None) -> dict[str, str]:
    """Write ``expert_<i>/`` for each expert and, where one is given, ``mixture/``; returns each one's routing.

    ``mixture`` is a routing with fixed gates; the rank of what is written is the sum of its experts'.
    """
    written: dict[str, str] = {}
    for info in method.roster:
        name = f"expert_{info.number}"
        factors = {
            site: (bank.expert(info.name).down, bank.expert(info.name).up)
            for site in method.banks
            if (bank := method.bank(site))
        }
        _save(method, folder / name, factors, info.rank, info.alpha)
        written[name] = f"expert:{info.number}"
    if mixture is not None:
        weights = method.fixed_weights(mixture)
        rank = sum(method.roster.info(number).rank for number in weights)
        _save(method, folder / "mixture", concatenated(method, weights), rank, float(rank))
        written["mixture"] = mixture
    return written


def usage_weights(method: LoraExperts) -> dict[int, float]:
    """Share of all tokens dispatched in training that each expert served, summing to 1; equal before any."""
    numbers = [info.number for info in method.roster]
    return dict(zip(numbers, method.roster.served_shares(numbers), strict=True))


def concatenated(method: LoraExperts, weights: Mapping[int, float]) -> dict[str, tuple[Tensor, Tensor]]:
    """sum_i w_i s_i B_i A_i per site, exactly: A = [A_i], B = [w_i s_i B_i], alpha = rank."""
    factors = {}
    for site in method.banks:
        members = [(i, method.bank(site).expert(i.name)) for i in method.roster if i.number in weights]
        down = torch.cat([expert.down for _, expert in members])
        up = torch.cat([expert.up * (weights[info.number] * info.scale) for info, expert in members])
        factors[site] = down, up
    return factors


def _save(
    method: LoraExperts, folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], rank: int, alpha: float
) -> None:
    anatomy = method._anatomy
    assert anatomy is not None, "experts are exported from an attached method"
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
