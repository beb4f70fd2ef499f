"""A projection head trained to tell a skill from a mix: a sharper distance than cosines of raw means.

DyLoRA-MoE plan, 5.2; SimCLR's head and loss (Chen et al. 2020, section 2.1), with two means over disjoint halves of a
document set as the two views of a skill.

Shapes: N samples of one skill, M views, H width, P projected width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headgate.ops.novelty import nt_xent
from headgate.ops.randomness import generator


class ContrastiveHead(nn.Module):
    """``[..., H] -> [..., P]`` of unit length: linear, ReLU, linear. P = 128."""

    def __init__(self, width: int, projected: int = 128, *, seed: int = 0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, projected)
        stream = generator(seed, 0, "contrastive_head.init")
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.normal_(0, layer.in_features**-0.5, generator=stream)
                layer.bias.zero_()

    def forward(self, means_xH: Tensor) -> Tensor:
        return nn.functional.normalize(self.second(torch.relu(self.first(means_xH))), dim=-1)


def views(skills: list[Tensor], pairs: int, size: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two views of ``pairs`` randomly chosen skills: ``[pairs, H]`` means over disjoint ``size`` samples each.

    Each entry of ``skills`` holds ``[N, H]`` sample embeddings, N >= 2 size; a skill stands in a batch once.
    """
    chosen = torch.randperm(len(skills), generator=stream)[:pairs].tolist()
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index in chosen:
        order = torch.randperm(len(skills[index]), generator=stream)
        for side, half in enumerate(halves):
            half.append(skills[index][order[side * size : (side + 1) * size]].mean(0))
    return torch.stack(halves[0]), torch.stack(halves[1])


def train_head(
    head: ContrastiveHead,
    skills: list[Tensor],
    *,
    steps: int = 200,
    pairs: int = 16,
    size: int = 16,
    temperature: float = 0.1,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Train in place; the loss of every step. Raises ValueError for fewer than two skills or too few samples."""
    short = [len(samples) for samples in skills if len(samples) < 2 * size]
    if len(skills) < 2 or short:
        raise ValueError(
            f"contrast needs two skills or more with {2 * size} samples each, got {len(skills)}"
            + (f", one of them with {short[0]}: lower size" if short else "")
        )
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate)
    losses = []
    for step in range(steps):
        first_MH, second_MH = views(skills, pairs, size, generator(seed, step, "contrastive_head.views"))
        loss = nt_xent(head(first_MH), head(second_MH), temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
