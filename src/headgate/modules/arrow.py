"""Arrow routing: finished LoRA experts tell by their own weights which tokens are theirs; nothing is trained.

    v_i = the direction that dW_i = B_i A_i stretches most (its top right singular vector)
    g   = softmax over the k largest |x . v_i|

Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs", section 3.2 (Arrow). Every
linear decides for itself, on its own input. PEFT's implementation finds v by power iteration; here it is exact.

Legend: B batch, T tokens, I inputs, O outputs, N experts, r one expert's rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headgate.modules.low_rank_expert import LowRankExpert
from headgate.ops.gating import Gates, at_least_fp32, top_k_gates


def direction(down_rI: Tensor, up_rO: Tensor) -> Tensor:
    """``[I]``: v of one expert. With A^T = Q R it is Q times the top eigenvector of R B^T B R^T, an r x r matrix.

    ``up`` is B^T. An expert that is still zero has no direction of its own: any unit vector in the span of A.

    Equation: lora_experts (Arrow): the top right singular vector of dW
    Proved by: tests/lora_experts/test_arrow.py::test_the_direction_is_the_top_right_singular_vector
    """
    q_Ir, r_rr = torch.linalg.qr(down_rI.double().mT)
    side_rO = r_rr @ up_rO.double()
    return (q_Ir @ torch.linalg.eigh(side_rO @ side_rO.mT).eigenvectors[:, -1]).to(down_rI.dtype)


class ArrowRouter:
    """Gates of one linear from its input. A direction is kept beside the factors that it was computed from, and
    computed again when they differ in any value."""

    def __init__(self) -> None:
        self._sources: list[tuple[Tensor, Tensor]] = []
        self._directions: list[Tensor] = []

    @torch.no_grad()
    def directions(self, experts: Sequence[LowRankExpert]) -> Tensor:
        """``[N, I]``."""
        del self._sources[len(experts) :], self._directions[len(experts) :]
        for place, expert in enumerate(experts):
            factors = (expert.down, expert.up)
            if place < len(self._sources) and all(map(_equal, factors, self._sources[place])):
                continue
            self._sources[place : place + 1] = [(expert.down.clone(), expert.up.clone())]
            self._directions[place : place + 1] = [direction(*factors)]
        return torch.stack(self._directions)

    def __call__(self, x_BTI: Tensor, experts: Sequence[LowRankExpert], k: int) -> Gates:
        """``[B, T, N]`` of which ``k`` are not zero."""
        directions_NI = at_least_fp32(self.directions(experts)).to(x_BTI.device)
        logits_BTN = (at_least_fp32(x_BTI) @ directions_NI.mT).abs()
        gates = top_k_gates(logits_BTN, min(k, len(directions_NI)))
        return gates._replace(
            weight=gates.weight / gates.weight.sum(-1, keepdim=True)
        )  # also of the best alone


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
