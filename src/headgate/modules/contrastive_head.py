"""A projection head trained to tell skills from each other and from a mix: a distance that is learned.

DyLoRA-MoE plan, 5.2; SimCLR's head and loss (Chen et al. 2020, section 2.1), with two means over disjoint halves of a
document set as the two views of a skill.

Shapes: N samples of one skill, M views, H width, P projected width, D samples of all skills.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headgate.modules.fixed_precision import FixedPrecision
from headgate.modules.structure import Structure
from headgate.ops.novelty import nt_xent
from headgate.ops.randomness import generator


class ContrastiveHead(nn.Module):
    """``[..., H] -> [..., P]`` of unit length: linear, ReLU, linear. P = 128."""

    def __init__(self, width: int, projected: int = 128, *, seed: int = 0) -> None:
        super().__init__()
        self.first = nn.utils.skip_init(
            nn.Linear, width, width
        )  # its own start: the global stream stays as it is
        self.second = nn.utils.skip_init(nn.Linear, width, projected)
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


class SkillContrast(FixedPrecision):
    """A head and the samples that it is trained on: every skill of a library, and the mix.

    The mix is what the bare model writes by itself, so the first skill already has something to differ from. The
    head is trained anew, from the same start, whenever a skill enters.

    Args:
        width: H. steps: of training at every new skill. seed: of the start and of the views.
    """

    MIX = -1
    MOST_PER_VIEW, PAIRS = 16, 16
    samples_DH: Tensor
    owner_D: Tensor

    def __init__(self, width: int, steps: int, *, seed: int = 0) -> None:
        super().__init__()
        self.width, self.steps, self.seed = width, steps, seed
        self.head = ContrastiveHead(width, seed=seed).requires_grad_(False)
        self._allocate(0)

    def _allocate(self, count: int) -> None:
        device = self.head.first.weight.device
        self.register_buffer("samples_DH", torch.zeros(count, self.width, device=device))
        self.register_buffer("owner_D", torch.zeros(count, dtype=torch.long, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SkillContrast:
        super()._apply(fn, recurse=False)
        for parameter in self.head.parameters():
            parameter.data = parameter.data.to(self.samples_DH.device)
        return self

    def of(self, owner: int) -> Tensor:
        """``[N, H]``: the centred samples of one skill."""
        return self.samples_DH[self.owner_D == owner]

    def add(self, owner: int, centred_NH: Tensor) -> None:
        self.samples_DH = torch.cat([self.samples_DH, centred_NH.to(self.samples_DH)])
        self.owner_D = torch.cat([self.owner_D, torch.full((len(centred_NH),), owner).to(self.owner_D)])

    def remove(self, owner: int) -> None:
        kept = self.owner_D != owner
        self.samples_DH, self.owner_D = self.samples_DH[kept], self.owner_D[kept]

    def train_anew(self) -> None:
        """Raises ValueError while there is one skill and no mix, or a skill of fewer than two samples."""
        skills = [self.of(owner) for owner in self.owner_D.unique().tolist()]
        size = min(self.MOST_PER_VIEW, min(map(len, skills)) // 2)
        fresh = ContrastiveHead(self.width, seed=self.seed)
        self.head.load_state_dict(fresh.state_dict())
        with torch.enable_grad():
            self.head.requires_grad_(True)
            train_head(
                self.head, skills, steps=self.steps, pairs=self.PAIRS, size=max(size, 1), seed=self.seed
            )
            self.head.requires_grad_(False)

    @torch.no_grad()
    def similarities(self, first_xH: Tensor, second_KH: Tensor) -> Tensor:
        """``[..., K]`` cosines between projections of centred means."""
        return self.head(first_xH) @ self.head(second_KH).mT

    def structure(self) -> Structure:
        return {"samples": len(self.owner_D)}

    def restore(self, structure: Structure) -> None:
        """Room for the saved samples, before a strict load."""
        self._allocate(structure["samples"])
