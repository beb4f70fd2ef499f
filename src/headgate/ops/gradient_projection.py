"""A gradient that may not climb another loss.

Legend: P parameters, end to end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def projection_coefficient(gradient_P: Tensor, reference_P: Tensor) -> Tensor:
    """``c = min(0, g . r) / (r . r)``, 0 where r is: ``g - c r`` is the nearest gradient with a dot product of at least 0.

    A-GEM, equation 11 (Chaudhry et al. 2019), whose case distinction is the minimum: no number is read back.
    """
    along, length = gradient_P @ reference_P, reference_P @ reference_P
    return along.clamp(max=0) / length.clamp_min(torch.finfo(length.dtype).tiny)
