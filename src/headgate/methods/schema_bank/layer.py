"""One routed bank on one block: a pure function of the block's output, so that a recompute repeats it exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headgate.methods.schema_bank.config import Routing, SchemaBankConfig
from headgate.modules.bank import LowRankBank
from headgate.modules.routers import AttributeRouter, LinearRouter
from headgate.ops.gating import Gates, adaptive_top_k_gates, softmax_gates, top_k_gates, uniform_gates


class SchemaLayer(nn.Module):
    """h' = h + sum_s g_s (h U_s) V_s (eq. 2-5), or without the h (``replace``).

    ``load_average`` is an exponential average of the dispatched load per schema over accepted batches.
    """

    def __init__(self, config: SchemaBankConfig, hidden_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        count, std = config.num_schemas, config.init_std
        self.router: LinearRouter | None = None
        if config.router != "uniform":
            self.router = (
                AttributeRouter(hidden_size, count, config.attribute_dim, generator=generator)
                if config.attributes == "router"
                else LinearRouter(hidden_size, count, generator=generator)
            )
            self.router.requires_grad_(config.router == "trained")
        self.bank = LowRankBank(count, hidden_size, hidden_size, config.rank, std=std, generator=generator)
        self.bank.requires_grad_(config.bank == "trained")
        self.attributes: nn.Parameter | None = None
        self.attribute_score: nn.Parameter | None = None
        if config.attributes == "scalar":
            shape = (count, config.attribute_dim)
            trained = config.train_attributes
            self.attributes = nn.Parameter(
                torch.randn(shape, generator=generator) * std, requires_grad=trained
            )
            score = torch.randn(config.attribute_dim, generator=generator) * std
            self.attribute_score = nn.Parameter(score, requires_grad=trained)
        self.register_buffer("load_average", torch.full((count,), 1 / count))
        self.load_average: Tensor

    def router_parameters(self) -> list[nn.Parameter]:
        """What stage 1 trains."""
        return (
            list(self.router.parameters())
            if self.router is not None and self.config.router == "trained"
            else []
        )

    def bank_parameters(self) -> list[nn.Parameter]:
        """U and V, and the scalar attribute gate where it is trained."""
        own = list(self.bank.parameters()) if self.config.bank == "trained" else []
        if self.config.bank == "trained" and self.config.train_attributes:
            own += [p for p in (self.attributes, self.attribute_score) if p is not None]
        return own

    def gates(self, hidden: Tensor, routing: Routing = "on") -> Gates:
        """The gates of every token, fp32."""
        config = self.config
        if self.router is None:
            return uniform_gates(hidden.new_zeros((1, 1, config.num_schemas), dtype=torch.float32))
        logits = self.router(hidden)
        if routing == "dense" or config.gating == "dense":
            return softmax_gates(logits)
        renormalise = config.gating == "renormalised"
        if config.adaptive_mass is not None:
            return adaptive_top_k_gates(logits, config.top_k, config.adaptive_mass, renormalise)
        return top_k_gates(logits, config.top_k, renormalise)

    def forward(self, hidden: Tensor, routing: Routing = "on") -> tuple[Tensor, Gates | None]:
        """The block's new output and the gates that made it; ``removed`` gives the output back untouched.

        Equation: schema_bank (5): h' = h + sum over the top-k of g_s (h U_s) V_s
        Equation: schema_bank (6): h' = h + sum over all s of (h U_s) V_s, with routing all
        Proved by: tests/schema_bank/test_layer.py::test_layer_equals_the_paper_with_every_gradient
        Proved by: tests/schema_bank/test_layer.py::test_routings_of_evaluation
        """
        if routing == "removed":
            return hidden, None
        gates = self.gates(hidden, routing)
        if routing == "all":
            gates = Gates(torch.ones_like(gates.weight), gates.logits)
        delta = self.bank(hidden, gates)
        if self.attributes is not None and self.attribute_score is not None and routing != "all":
            gate_S = torch.sigmoid(self.attributes @ self.attribute_score)
            delta = delta * (0.9 + 0.2 * (gates.weight * gate_S).sum(-1, keepdim=True)).to(delta.dtype)
        delta = delta.to(hidden.dtype)
        return (hidden + delta if self.config.combine == "add" else delta), gates
