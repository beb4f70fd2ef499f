"""PrototypeRouter: experts are told apart by what their skills' features look like, in closed form.

    z_i = (mu_i - c)^T S^-1 (f - c) - (mu_i - c)^T S^-1 (mu_i - c) / 2        c: mean of the mu_i

Linear discriminant analysis with streamed statistics (Hayes & Kanan 2020, "Lifelong Machine Learning with Deep
Streaming LDA", sections 3.1-3.2): one mean per expert and one covariance for all, S = W / n + shrinkage tr(W / n) / F I.
No gradient step touches it, so training a new skill cannot move the gates of an old one the way a learned router's
do when its old inputs are gone.

Legend: B batch, T tokens, F features, N experts asked for, K experts with statistics, M feature rows given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.modules.fixed_precision import FixedPrecision

SHRINKAGE = 1e-2


class PrototypeRouter(FixedPrecision):
    """The interface of ExpertRouter, without parameters. An expert without statistics stands at the centre: z = 0."""

    scatter: Tensor
    number: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.names: list[str] = []
        self.register_buffer("scatter", torch.zeros(features, features))
        self.register_buffer("number", torch.zeros(()))

    def add(self, name: str, row_F: Tensor) -> None:
        """Room for a new expert; ``row_F`` gives the device only."""
        self.names.append(name)
        self.register_buffer(f"mean_{name}", torch.zeros_like(row_F))
        self.register_buffer(f"count_{name}", torch.zeros((), device=row_F.device))
        self.register_buffer(f"weight_{name}", torch.zeros_like(row_F))
        self.register_buffer(f"bias_{name}", torch.zeros((), device=row_F.device))

    def remove(self, name: str) -> None:
        self.names.remove(name)
        again = bool(self.of("count", name) > 0) and any(self.of("count", n) > 0 for n in self.names)
        for what in ("mean", "count", "weight", "bias"):
            delattr(self, f"{what}_{name}")
        if again:
            self._solve()

    def of(self, what: str, name: str) -> Tensor:
        tensor: Tensor = self._buffers[f"{what}_{name}"]  # type: ignore[assignment]
        return tensor

    @torch.no_grad()
    def learn(self, name: str, features_MF: Tensor) -> None:
        """Enter rows of an expert's skill: exact streaming mean and within-class scatter, then the weights."""
        rows_MF = features_MF.float()
        mean_F, count = self.of("mean", name), self.of("count", name)
        new_F = rows_MF.mean(0)
        centred_MF = rows_MF - new_F
        step_F = new_F - mean_F
        total = count + len(rows_MF)
        self.scatter += centred_MF.T @ centred_MF + torch.outer(step_F, step_F) * (
            count * len(rows_MF) / total
        )
        self.number += len(rows_MF)
        mean_F += step_F * (len(rows_MF) / total)
        count.copy_(total)
        self._solve()

    @torch.no_grad()
    def absorb(self, name: str, others: Sequence[str]) -> None:
        """The statistics of ``others`` become those of ``name``; they themselves are to be removed."""
        names = [n for n in (name, *others) if self.of("count", n) > 0]
        if not names:
            return
        counts = torch.stack([self.of("count", n) for n in names])
        mean_F = sum(self.of("mean", n) * self.of("count", n) for n in names) / counts.sum()
        for n in names:
            shift_F = self.of("mean", n) - mean_F
            self.scatter += self.of("count", n) * torch.outer(shift_F, shift_F)
        self.of("mean", name).copy_(mean_F)
        self.of("count", name).copy_(counts.sum())
        for other in others:
            self.of("count", other).zero_()
        self._solve()

    def _solve(self) -> None:
        known = [name for name in self.names if self.of("count", name) > 0]
        covariance = self.scatter / self.number
        covariance = covariance + torch.eye(self.features, device=covariance.device) * (
            SHRINKAGE * covariance.diagonal().mean()
        )
        means_KF = torch.stack([self.of("mean", name) for name in known])
        centre_F = means_KF.mean(0)
        weight_KF = torch.linalg.solve(covariance, (means_KF - centre_F).T).T
        for name, weight_F, mean_F in zip(known, weight_KF, means_KF, strict=True):
            self.of("weight", name).copy_(weight_F)
            self.of("bias", name).copy_(-weight_F @ (mean_F + centre_F) / 2)

    def forward(self, features_BTF: Tensor, names: Sequence[str]) -> Tensor:
        """``[B, T, N]`` fp32 logits."""
        with torch.autocast(features_BTF.device.type, enabled=False):
            weight_NF = torch.stack([self.of("weight", name) for name in names])
            bias_N = torch.stack([self.of("bias", name) for name in names])
            return F.linear(features_BTF.float(), weight_NF, bias_N)
