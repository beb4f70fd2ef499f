"""PrototypeRouter: experts are told apart by what their skills' features look like, in closed form.

    z_p = (mu_p - c)^T S^-1 (f - c) - (mu_p - c)^T S^-1 (mu_p - c) / 2        c: mean of the mu_p
    z_i = max of z_p over the skills p that expert i serves

Linear discriminant analysis with streamed statistics (Hayes & Kanan 2020, "Lifelong Machine Learning with Deep
Streaming LDA", sections 3.1-3.2): a mean and a scatter per skill, one covariance for all,
S = W / n + shrinkage tr(W / n) / F I.

Cost: F^2 numbers a skill.

Legend: B batch, T tokens, F features, N experts asked for, P skills (prototypes), M feature rows given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.modules.closed_form_router import ClosedFormRouter

SHRINKAGE = 1e-2


class PrototypeRouter(ClosedFormRouter):
    """Buffers: ``mean``, ``count`` and ``scatter`` of every skill's rows; ``weight`` and ``bias``, which follow from them.

    Equation: lora_experts (closed-form router): z_p = (mu_p - c)^T S^-1 (f - c) - (mu_p - c)^T S^-1 (mu_p - c) / 2
    Proved by: tests/lora_experts/test_elsewhere.py::test_the_closed_form_router_is_linear_discriminant_analysis
    """

    mean: Tensor
    count: Tensor
    scatter: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, features: int) -> None:
        self.features = features
        super().__init__()

    def zeros(self, skills: int) -> dict[str, Tensor]:
        width = self.features
        return {
            "mean": torch.zeros(skills, width),
            "count": torch.zeros(skills),
            "scatter": torch.zeros(skills, width, width),
            "weight": torch.zeros(skills, width),
            "bias": torch.zeros(skills),
        }

    @torch.no_grad()
    def learn(self, name: str, features_MF: Tensor, /, *, new: bool = False) -> None:
        """Enter rows of an expert's latest skill, or of a new one: exact streaming mean and scatter, then the weights."""
        place = self.place_of(name, new=new)
        rows_MF = features_MF.to(self.mean)
        mean_F, count = self.mean[place], self.count[place]
        new_F = rows_MF.mean(0)
        centred_MF, step_F, total = rows_MF - new_F, new_F - mean_F, count + len(rows_MF)
        spread = torch.outer(step_F, step_F) * (count * len(rows_MF) / total)
        self.scatter[place] += centred_MF.T @ centred_MF + spread
        mean_F += step_F * (len(rows_MF) / total)
        count.copy_(total)
        self.changed()

    def changed(self) -> None:
        if not self.owners:
            return
        covariance = sum(self.scatter.unbind(), torch.zeros_like(self.scatter[0])) / self.count.sum()
        covariance = covariance + torch.eye(self.features, device=covariance.device) * (
            SHRINKAGE * covariance.diagonal().mean()
        )
        centre_F = self.mean.mean(0)
        self.weight = torch.linalg.solve(covariance, (self.mean - centre_F).T).T.contiguous()
        self.bias = torch.stack(
            [-w_F @ (mean_F + centre_F) / 2 for w_F, mean_F in zip(self.weight, self.mean, strict=True)]
        )

    def forward(self, features_BTF: Tensor, names: Sequence[str]) -> Tensor:
        """``[B, T, N]`` fp32 logits."""
        skills, experts = self.served(names, features_BTF.device)
        with torch.autocast(features_BTF.device.type, enabled=False):
            z_BTP = F.linear(features_BTF.float(), self.weight, self.bias)
        z_BTN = z_BTP.new_full((*z_BTP.shape[:-1], len(names)), -torch.inf)
        own_BTS = z_BTP.index_select(-1, skills)
        z_BTN = z_BTN.scatter_reduce(-1, experts.expand_as(own_BTS), own_BTS, "amax")
        return z_BTN.masked_fill(z_BTN == -torch.inf, 0.0)
