"""RouterSet: the rows by which experts are told apart, of one router for all sites or of one each.

Rows come and go with their experts. A learned router's row is drawn and trained; a closed-form one's is computed from
what skills look like.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.modules.bayes_router import BayesRouter
from headgate.modules.closed_form_router import ClosedFormRouter
from headgate.modules.expert_router import ExpertRouter
from headgate.modules.prototype_router import PrototypeRouter
from headgate.modules.structure import Structure
from headgate.ops.randomness import generator

SHARED = "shared"


class RouterSet(nn.Module):
    """``by_site``: routers by site, or one called ``shared``; none where gates need no router."""

    def __init__(self, config: LoraExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.by_site = nn.ModuleDict()

    def build(self, sites: Iterable[str], hidden_size: int) -> None:
        width = self.config.feature_width(hidden_size)
        if self.config.router == "prototype":
            self.by_site[SHARED] = PrototypeRouter(width)
        if self.config.router == "bayes":
            self.by_site[SHARED] = BayesRouter(self.config.base_prior)
        if self.config.router == "learned":
            for site in [SHARED] if self.config.router_sites == SHARED else sites:
                self.by_site[site] = ExpertRouter(width, directions=self.config.gate_projection)

    def __len__(self) -> int:
        return len(self.by_site)

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_site)

    def at(self, site: str = SHARED) -> ExpertRouter | ClosedFormRouter:
        router = self.by_site[site]
        assert isinstance(router, (ExpertRouter, ClosedFormRouter))
        return router

    @property
    def learned(self) -> list[ExpertRouter]:
        return [router for router in self.by_site.values() if isinstance(router, ExpertRouter)]

    @property
    def closed_form(self) -> ClosedFormRouter | None:
        """The router that is computed from what skills look like, where the settings ask for it."""
        routers = (router for router in self.by_site.values() if isinstance(router, ClosedFormRouter))
        return next(routers, None)

    def add(self, number: int, seed: int, device: torch.device) -> None:
        """A new expert's row at every learned router, from a stream of its own; a closed-form one meets its skill later."""
        for site, router in self.by_site.items():
            if isinstance(router, ExpertRouter):
                stream = generator(seed, number, f"lora_experts.router.{site}")
                row = torch.randn(router.features, generator=stream) * self.config.router_std
                router.add(str(number), row.to(device))

    def structure(self) -> Structure | None:
        return None if self.closed_form is None else self.closed_form.structure()

    def restore(self, structure: Structure | None, numbers: Sequence[int], device: torch.device) -> None:
        """Room for the saved rows."""
        if self.closed_form is not None and structure is not None:
            self.closed_form.restore(structure)
        for router in self.learned:
            for number in numbers:
                router.add(str(number), torch.zeros(router.features, device=device))

    def remove(self, number: int) -> None:
        for site in self:
            self.at(site).remove(str(number))

    @torch.no_grad()
    def combine(self, keep: int, gone: Sequence[int], weights: Sequence[float]) -> None:
        """A learned router's row of ``keep`` becomes the weighted mean of all; weights count by their share."""
        names, total = [str(number) for number in (keep, *gone)], sum(weights)
        for router in self.learned:
            rows = router.weight(names)
            mean = torch.stack([w / total * row for w, row in zip(weights, rows, strict=True)]).sum(0)
            router.replace(names[0], mean)

    def give(self, number: int, heir: int) -> None:
        """The closed-form router sends one expert's skills to another from now on."""
        if self.closed_form is not None:
            self.closed_form.give(str(number), str(heir))

    def protect(self, basis: Tensor) -> None:
        """No learned router changes any more along these feature directions ``[F, K]``."""
        for router in self.learned:
            router.protect(basis)
