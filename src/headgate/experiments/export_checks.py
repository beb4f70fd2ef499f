"""How an export is verified: the same token ids through the live run and through what was written."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from headgate.models.config import ModelConfig
from headgate.models.load import load_base
from headgate.training import checkpoint

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def probe(vocabulary: int, length: int = 24) -> Tensor:
    """``[2, length]`` token ids, always the same, spread over the vocabulary."""
    positions = torch.arange(2 * length, dtype=torch.long).reshape(2, length)
    return (positions * 7919 + 11) % vocabulary


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """``[B, T, V]`` in fp32 on the CPU."""
    found: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()
    return found


def relative(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def reload_adapter(folder: Path, source: Path, device: str) -> peft.PeftModel:
    """The base as the run had it, and PEFT alone on top."""
    description = checkpoint.read_description(source)
    base, _ = load_base(ModelConfig(**{**description["model"], "device": device}), seed=description["seed"])
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()
