"""Gates at an exact budget: the highest logits open, as many as the budget pays for, with a gradient along the budget.

A price of depth has to be found while the gates move; here there is none. What a price would do, hold the soft depth while
the loss sorts the gates, the gradient's projection does at once, and nothing can wind up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headgate.ops.depth import threshold_for
from headgate.ops.gating import straight_through


def exact_gates(
    logit_N: Tensor, worth_N: Tensor, counted_N: Tensor, wanted: Tensor, temperature: float
) -> Tensor:
    """Hard gates ``[N]`` that are worth ``wanted`` in sum, as nearly as entries allow; gradient of s below.

    c = w s' / sum(w s') is how a threshold that keeps sum(w s) fixed follows the logits, so sum(w s) has no gradient: a
    price on depth, whatever it is, would change nothing. Entries that are not ``counted_N`` open by the same threshold
    and move nothing. ``wanted`` and ``worth_N`` in the same unit; without a counted entry every gate above 0 opens.

    Equation: layer_routing (budget exact): g = 1[z > theta], s = sigmoid((z - theta) / t), d theta = sum w s' dz / sum w s'
    Proved by: tests/ops/test_exact_budget.py::test_the_budget_is_spent
    Proved by: tests/ops/test_exact_budget.py::test_no_price_has_a_gradient
    """
    threshold = threshold_for(logit_N.detach(), worth_N, wanted, counted_N)
    threshold = torch.where(threshold.isnan(), torch.zeros_like(threshold), threshold)
    centred_N = logit_N - threshold
    soft_N = torch.sigmoid(centred_N.detach() / temperature)
    slope_N = worth_N * (soft_N * (1 - soft_N)).masked_fill(~counted_N, 0)
    share_N = slope_N / slope_N.sum().clamp(min=torch.finfo(slope_N.dtype).tiny)
    moved = (share_N * (logit_N - logit_N.detach())).sum()
    return straight_through(
        (centred_N > 0).to(logit_N.dtype), torch.sigmoid((centred_N - moved) / temperature)
    )
