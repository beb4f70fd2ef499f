"""LISA: in every period a few blocks train, drawn at random; the others stand still and cost no weight gradients.

    every K optimizer steps:  train gamma of the L blocks, drawn uniformly without replacement, and freeze the rest

Pan et al. 2024, "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", arXiv
2403.17919, algorithm 1. Deviation: over an adapter, what is drawn are the blocks' adapters; with ``lora: null`` the embedding
and the head always train, as in the paper. AdamW leaves a tensor without a gradient as it is: moments and weight decay too.

Cost: none; it saves the weight gradients of the blocks that stand still.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from headgate import Method, Step
from headgate.config import StrictConfig
from headgate.models.anatomy import Anatomy
from headgate.ops.randomness import generator


class LisaConfig(StrictConfig):
    """``active``: gamma, the blocks that train at a time. ``period``: K, optimizer steps between two draws."""

    active: int = Field(default=2, ge=1)
    period: int = Field(default=5, ge=1)


class Lisa(Method):
    """Trains the adapters of a few randomly drawn blocks at a time."""

    name = "lisa"
    Config = LisaConfig
    attach_order = 60
    adapter_alone = True
    skips_blocks = True  # a tensor without a gradient is what it is for, not a mistake
    telemetry_names = ("lisa/<part>",)
    neutral: ClassVar[Mapping[str, Any]] = {"active": 10_000}
    citation = (
        "@article{pan2024lisa, title={LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model "
        "Fine-Tuning}, author={Pan, Rui and others}, journal={arXiv:2403.17919}, year={2024}}"
    )

    def __init__(self, config: LisaConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.blocks: list[list[nn.Parameter]] = []

    def attach(self, anatomy: Anatomy) -> None:
        """Note what trains in each block. A model that is loaded to be used has nothing that does."""
        self.blocks = [[p for p in block.parameters() if p.requires_grad] for block in anatomy.blocks]

    def detach(self) -> None:
        self.blocks = []

    @property
    def attached(self) -> bool:
        return bool(self.blocks)

    def drawn(self, global_step: int) -> list[int]:
        """The blocks that train in this optimizer step: a function of the seed and the period alone, so that a resumed run
        draws what the undisturbed one does."""
        stream = generator(self.seed, global_step // self.config.period, "lisa.blocks")
        return sorted(torch.randperm(len(self.blocks), generator=stream)[: self.config.active].tolist())

    def on_step_start(self, step: Step) -> None:
        if not step.is_window_start:
            return
        active = set(self.drawn(step.global_step))
        for index, parameters in enumerate(self.blocks):
            for parameter in parameters:
                parameter.requires_grad_(index in active)

    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        share = min(self.config.active, len(self.blocks)) / max(len(self.blocks), 1)
        return {"lisa/active_share": torch.tensor(share)}
