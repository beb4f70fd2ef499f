"""PrototypeRouter: experts are told apart by what their skills' features look like, in closed form.

    z_p = (mu_p - c)^T S^-1 (f - c) - (mu_p - c)^T S^-1 (mu_p - c) / 2        c: mean of the mu_p
    z_i = max of z_p over the skills p that expert i serves

Linear discriminant analysis with streamed statistics (Hayes & Kanan 2020, "Lifelong Machine Learning with Deep
Streaming LDA", sections 3.1-3.2): a mean and a scatter per skill, one covariance for all,
S = W / n + shrinkage tr(W / n) / F I. No gradient step touches it, so training a new skill cannot move the gates of an old
one the way a learned router's do when its old inputs are gone. A skill that goes takes its scatter along: what is left is
the router that never met it.

Cost: F^2 numbers a skill.

Legend: B batch, T tokens, F features, N experts asked for, P skills (prototypes), M feature rows given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.modules.fixed_precision import FixedPrecision
from headgate.modules.structure import Structure

SHRINKAGE = 1e-2
BUFFERS = ("mean", "count", "scatter", "weight", "bias")


class PrototypeRouter(FixedPrecision):
    """The interface of ExpertRouter, without parameters. An expert without a skill stands at the centre: z = 0.

    Equation: lora_experts (closed-form router): z_p = (mu_p - c)^T S^-1 (f - c) - (mu_p - c)^T S^-1 (mu_p - c) / 2
    Proved by: tests/lora_experts/test_elsewhere.py::test_the_closed_form_router_is_linear_discriminant_analysis
    """

    mean: Tensor
    count: Tensor
    scatter: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.owners: list[str] = []
        self._allocate(0, None)

    def _allocate(self, skills: int, device: torch.device | None) -> None:
        width = self.features
        shapes = ((skills, width), (skills,), (skills, width, width), (skills, width), (skills,))
        for name, shape in zip(BUFFERS, shapes, strict=True):
            self.register_buffer(name, torch.zeros(shape, device=device))

    def add(self, name: str, row_F: Tensor) -> None:
        """A new expert has no skill yet, and stands at the centre."""

    def remove(self, name: str) -> None:
        """Forget an expert's skills, statistics and all."""
        if name in self.owners:
            kept = [place for place, owner in enumerate(self.owners) if owner != name]
            self._take(kept)

    def _take(self, places: Sequence[int]) -> None:
        for name in BUFFERS:
            setattr(self, name, getattr(self, name)[list(places)])
        self.owners = [self.owners[place] for place in places]
        self._solve()

    def give(self, name: str, heir: str) -> None:
        """The skills of one expert are another one's from now on."""
        self.owners = [heir if owner == name else owner for owner in self.owners]

    @torch.no_grad()
    def learn(self, name: str, features_MF: Tensor, *, new: bool = False) -> None:
        """Enter rows of an expert's latest skill, or of a new one: exact streaming mean and scatter, then the weights."""
        rows_MF = features_MF.float()
        if new or name not in self.owners:
            self.owners.append(name)
            for buffer in BUFFERS:
                old: Tensor = getattr(self, buffer).to(rows_MF.device)
                setattr(self, buffer, torch.cat([old, old.new_zeros(1, *old.shape[1:])]))
        place = len(self.owners) - 1 - self.owners[::-1].index(name)
        mean_F, count = self.mean[place], self.count[place]
        new_F = rows_MF.mean(0)
        centred_MF, step_F, total = rows_MF - new_F, new_F - mean_F, count + len(rows_MF)
        spread = torch.outer(step_F, step_F) * (count * len(rows_MF) / total)
        self.scatter[place] += centred_MF.T @ centred_MF + spread
        mean_F += step_F * (len(rows_MF) / total)
        count.copy_(total)
        self._solve()

    def _solve(self) -> None:
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
        place = {name: place for place, name in enumerate(names)}
        served = [(skill, place[owner]) for skill, owner in enumerate(self.owners) if owner in place]
        with torch.autocast(features_BTF.device.type, enabled=False):
            z_BTP = F.linear(features_BTF.float(), self.weight, self.bias)
        z_BTN = z_BTP.new_full((*z_BTP.shape[:-1], len(names)), -torch.inf)
        if served:
            skills, experts = (
                torch.tensor(column, device=z_BTP.device) for column in zip(*served, strict=True)
            )
            own_BTP = z_BTP.index_select(-1, skills)
            z_BTN = z_BTN.scatter_reduce(-1, experts.expand_as(own_BTP), own_BTP, "amax")
        return z_BTN.masked_fill(z_BTN == -torch.inf, 0.0)

    def structure(self) -> Structure:
        return {"owners": list(self.owners)}

    def restore(self, structure: Structure) -> None:
        """Room for the saved skills, before a strict load."""
        self.owners = list(structure["owners"])
        self._allocate(len(self.owners), self.mean.device)
