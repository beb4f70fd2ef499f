"""Whether a GPU is here, asked without torch where that is possible."""

from __future__ import annotations

import sys
from pathlib import Path

DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")
"""What a driver of CUDA or ROCm on Linux offers: without any of them torch finds no GPU, and need not be imported to look."""


def cuda_is_here() -> bool:
    """``torch.cuda.is_available()``, which is asked where there is a driver, or torch is imported already."""
    if "torch" not in sys.modules and sys.platform == "linux" and not any(Path(p).exists() for p in DRIVERS):
        return False
    import torch

    return torch.cuda.is_available()


def cuda_memory() -> int:
    """Bytes of the first GPU."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)
