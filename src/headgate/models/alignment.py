"""Where weights lie in memory must not show in what they compute."""

from __future__ import annotations

import itertools

import torch
from torch import nn

BYTES = 64
"""torch allocates at multiples of this; a tensor mapped from a safetensors file lies wherever the header ends."""


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Copy parameters and buffers on the CPU that do not lie at a multiple of 64 bytes; values stay.

    Matrix products choose their kernels by address, and these differ in the last bit: a model loaded twice from files
    with other headers would not give the same logits.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % BYTES:
            tensor.data = tensor.data.clone()
