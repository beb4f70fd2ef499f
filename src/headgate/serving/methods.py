"""The methods as they are served: built from a description, attached to a model, deciding at inference only.

Each is the module tree that its state was saved from, and the same code in the forward; what trains is left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from headgate.errors import ConfigError, ModelError
from headgate.methods.context import Context
from headgate.methods.layer_routing.forward import RoutedForward as RoutedBlocks
from headgate.methods.layer_routing.policies import decide
from headgate.methods.layer_routing.route import Route, Situation, fixed_route
from headgate.methods.lora_experts.experts import ExpertSet
from headgate.methods.lora_experts.forward import RoutedForward as RoutedLinears
from headgate.methods.schema_bank.layer import SchemaLayer
from headgate.models.anatomy import Anatomy
from headgate.models.surgery import on_block_output
from headgate.modules.layer_router import LayerRouter
from headgate.modules.patch import Patch
from headgate.modules.prototype_router import PrototypeRouter


class Served(nn.Module, ABC):
    """A method inside an exported model, built from what ``config.json`` says of it."""

    @abstractmethod
    def attach(self, anatomy: Anatomy) -> None:
        """Install into the base model, for good."""

    @abstractmethod
    def set_routing(self, routing: str) -> None:
        """How it acts from now on. Raises ConfigError for a way that it does not have."""


class ServedRouting(Served):
    """layer_routing: the router (or the fixed gates), the threshold, the patches.

    ``fallback``: gates ``[G]`` of the mask that the run serves instead of its router, or None.
    """

    fixed: Tensor
    threshold: Tensor

    def __init__(self, told: Mapping[str, Any]) -> None:
        super().__init__()
        config = dict(told["config"])
        self.settings = SimpleNamespace(**config, train_engine_for=lambda: config["engine"])
        self.blocks = range(*told["blocks"])
        self.salt, self.share = told["salt"], told["share"]
        self.fallback: list[float] | None = told["fallback"]
        count, hidden = len(self.blocks) * config["gates_per_block"], told["hidden_size"]
        self.router = LayerRouter(hidden, count) if told["has_router"] else None
        ranks = [told["patch_rank"]] * count if told["patch_rank"] else []
        self.patches = nn.ModuleList(Patch(hidden, rank) for rank in ranks)
        self.register_buffer("fixed", torch.ones(count))
        self.register_buffer("threshold", torch.zeros(()))
        self.forward_pass = RoutedBlocks(self.settings, self.decide, self.observe)  # type: ignore[arg-type]
        self.last: Route | None = None

    def attach(self, anatomy: Anatomy) -> None:
        for _ in self.forward_pass.install(anatomy, self.blocks, list(self.patches)):
            pass

    def observe(self, route: Route) -> None:
        self.last = route

    def decide(self, hidden: Tensor, context: Context, training: bool) -> Route | None:
        """As LayerRouting decides at inference."""
        if self.fallback is not None:
            return fixed_route(torch.tensor(self.fallback, device=hidden.device), context)
        now = Situation(
            training=False,
            temperature=1.0,
            threshold=self.threshold,
            salt=self.salt,
            streams=torch.Generator,
            share=self.share,
            fixed=self.fixed,
        )
        return decide(self.settings, self.router, hidden, context, now)  # type: ignore[arg-type]

    def set_routing(self, routing: str) -> None:
        """``on``, or ``removed``: full depth."""
        if routing not in ("on", "removed"):
            raise ConfigError(f"routing {routing!r} of layer_routing is not one of on, removed")
        self.forward_pass.routing = routing


class ServedExperts(Served):
    """lora_experts: every expert at every linear, and the router that mixes them."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        super().__init__()
        config = dict(told["config"])
        width: int = told["feature_width"]
        settings: Any = SimpleNamespace(**config, feature_width=lambda hidden: width)
        self.experts = ExpertSet(settings)
        self.experts.build(told["structure"]["sites"], told["structure"]["hidden_size"], 0)
        self.experts.restore(told["structure"])
        for router in self.experts.routers.by_site.values():
            if isinstance(router, PrototypeRouter):  # what further skills would be learned from stays at home
                for name in ("mean", "count", "scatter"):
                    delattr(router, name)
        self.forward_pass = RoutedLinears(settings, self.experts)

    def attach(self, anatomy: Anatomy) -> None:
        linears = {
            f"{number}/{name.replace('.', '/')}": linear
            for number, block in enumerate(anatomy.blocks)
            for name, linear in anatomy.linears(block)
        }
        if missing := self.experts.sizes.keys() - linears.keys():
            raise ModelError(f"the model has no linears {sorted(missing)}, which the experts were trained on")
        self.forward_pass.attach(anatomy, {site: linears[site] for site in self.experts.sizes})

    def set_routing(self, routing: str) -> None:
        """``on``, ``removed``, ``arrow``, ``expert:<number or skill>``, ``mixture:<number or skill>=<weight>,...``."""
        self.forward_pass.set_route(routing)


class ServedSchemas(Served):
    """schema_bank kept at inference: its banks on the outputs of their blocks."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        super().__init__()
        settings: Any = SimpleNamespace(**told["config"])
        self.routing: str = told["routing"]
        self.layers = nn.ModuleDict(
            {
                str(block): SchemaLayer(settings, told["hidden_size"], None)  # type: ignore[arg-type]
                for block in told["blocks"]
            }
        )
        self._on = "on" if self.routing == "removed" else self.routing

    def attach(self, anatomy: Anatomy) -> None:
        for key, layer in self.layers.items():
            on_block_output(anatomy.blocks[int(key)], partial(self._through, layer))

    def _through(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        changed: Tensor = layer(hidden, self.routing)[0]
        return changed

    def set_routing(self, routing: str) -> None:
        """``on``: as it was exported; ``removed``: the adapter alone; ``all``, ``dense``."""
        if routing not in ("on", "removed", "all", "dense"):
            raise ConfigError(f"routing {routing!r} of schema_bank is not one of on, removed, all, dense")
        self.routing = self._on if routing == "on" else routing


SERVED: dict[str, type[Served]] = {
    "layer_routing": ServedRouting,
    "lora_experts": ServedExperts,
    "schema_bank": ServedSchemas,
}
"""In the order of attachment, innermost first."""
