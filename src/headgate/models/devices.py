"""Where a model runs, and in which precision."""

from __future__ import annotations

import os
import warnings

import torch

from headgate.errors import ModelError


def choose_device(device: str) -> torch.device:
    """The device asked for; ``auto`` takes CUDA, then MPS, then the CPU. Raises ModelError if it is absent."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        raise ModelError(f"model.device={device} is not available on this machine: use auto or cpu")
    return torch.device(device, _own_gpu()) if device == "cuda" else torch.device(device)


def _own_gpu() -> int:
    """The GPU of this process: one a rank on each machine, whatever is current before the ranks have met."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    return int(torch.cuda.current_device())


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 on a GPU that has it, else float32. bf16 on a CPU without fast bf16 is adjusted."""
    if dtype == "auto":
        supported = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if supported else torch.float32
    chosen: torch.dtype = getattr(torch, dtype)
    if device.type == "cpu" and chosen is not torch.float32 and not cpu_has_fast(chosen):
        warnings.warn(
            f"model.dtype={dtype} is emulated on this CPU and runs many times slower than float32: "
            "using float32 instead",
            stacklevel=2,
        )
        return torch.float32
    return chosen


def cpu_has_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype`` in hardware."""
    return dtype is torch.bfloat16 and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )
