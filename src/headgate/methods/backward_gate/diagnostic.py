"""Does the proxy say what it claims? Its novelty against that of the true adapter gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from headgate.methods.backward_gate.gate import Gate, Score
from headgate.methods.step import Step
from headgate.modules.fixed_precision import FixedPrecision
from headgate.ops import calibration, sketch, subspace

RECENT = 32
PAIRS = 64


class ProxyDiagnostic(FixedPrecision):
    """Rank correlation, over the last 64 looks, of head-sketch novelty and adapter-gradient novelty.

    Both novelties are taken against the same earlier looks: the share of a unit vector outside the span of the
    last 32. The gradient is count-sketched to M numbers through cheap multiplicative hashing, so no table as
    long as the adapter is kept. A look costs one pass over the adapter's gradients.
    """

    stays_on_cpu = frozenset({"looks"})
    proxy_RM: Tensor
    true_RM: Tensor
    pairs_2P: Tensor
    looks: Tensor

    def __init__(self, sketch_size: int) -> None:
        super().__init__()
        self.recent = min(RECENT, sketch_size // 4)
        self.register_buffer("proxy_RM", torch.zeros(self.recent, sketch_size))
        self.register_buffer("true_RM", torch.zeros(self.recent, sketch_size))
        self.register_buffer("pairs_2P", torch.zeros(2, PAIRS))
        self.register_buffer("looks", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def look(self, proxy_M: Tensor, gradients: Iterable[Tensor]) -> None:
        """Compare one accepted micro-batch: its unit sketch and the gradient it left."""
        size = proxy_M.numel()
        flat = torch.cat([g.detach().reshape(-1).float() for g in gradients]).to(proxy_M.device)
        index = torch.arange(flat.numel(), device=flat.device)
        bucket = ((index + 1) * 2654435761 % (1 << 32) >> 12) % size
        sign = (((index + 1) * 2246822519 % (1 << 32) >> 31) * 2 - 1).to(torch.int8)
        true_M = subspace.unit(sketch.count_sketch(flat[None], bucket, sign, size)[0])
        place = int(self.looks)
        if place >= self.recent:
            slot = (place - self.recent) % PAIRS
            self.pairs_2P[0, slot] = self._novelty(proxy_M, self.proxy_RM)
            self.pairs_2P[1, slot] = self._novelty(true_M, self.true_RM)
        self.proxy_RM[place % self.recent] = proxy_M
        self.true_RM[place % self.recent] = true_M
        self.looks += 1

    @staticmethod
    def _novelty(unit_M: Tensor, past_RM: Tensor) -> Tensor:
        return subspace.gradient_novelty(unit_M, subspace.top_directions(past_RM, past_RM.shape[0]))

    @property
    def count(self) -> int:
        """Pairs that the correlation is over."""
        return max(0, min(PAIRS, int(self.looks) - self.recent))

    def correlation(self) -> float:
        """Spearman's rho; nan with fewer than 8 pairs."""
        if self.count < 8:
            return math.nan
        return float(calibration.rank_correlation(*self.pairs_2P[:, : self.count]))


def look(diagnostic: ProxyDiagnostic, model: nn.Module, step: Step, gate: Gate, score: Score) -> None:
    """Every ``diagnostic_every`` accepted micro-batches, at the start of a window: later its gradient is a sum that others
    have part in."""
    if not step.is_window_start or int(gate.accepted) % gate.config.diagnostic_every:
        return
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    if gradients:
        diagnostic.look(score.unit_centered, gradients)
