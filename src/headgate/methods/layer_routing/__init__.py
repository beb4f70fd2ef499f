"""Layer routing: which transformer blocks run, for a batch, a document or a token.

While a LoRA adapter trains, a small router reads the hidden state that enters the first routable block and opens
or closes a gate for every later block. A closed block is not run at inference: compute is saved, and a budget says
how much. The controls (random gates, a fixed mask, truncation, stochastic depth) say what the routing is worth.

    y = g F(x) + (1 - g) x                                   masked and sparse alike
    y = g F(x) + (1 - g) (x + up gelu(down norm x))          with a patch
    g = 1[z + logistic noise > 0], gradient of sigmoid((z + noise) / tau)          gumbel, exit
    L = (1 - w) CE + w T^2 KL(base || routed) + lambda (u - t) + rho / 2 (u - t)^2, lambda += eta (u - t)
    REINFORCE: -(baseline - cost) log p(g), cost = CE + price

Implemented: nine policies, two engines that compute the same function, cached generation with live routes, three
budgets, distillation from the model with its adapter off or from a saved run, calibration of the threshold,
stochastic-depth scaling, three choices of what skipped tokens leave in keys and values, low-rank patches on
skipped paths, a first forward to read.

Deviations: a per-document route is read off the document's first tokens, which run at full depth, so that it never
sees the future (the seed pooled all positions, padding and later tokens included); the budget is a damped
Lagrangian instead of a penalty (`budget: penalty | target` are the seed's); REINFORCE pools the batch in training
and each document at inference; `kv: drop` keeps a rectangular cache, zeros where tokens skipped, not a ragged one.

Cost: the router is below 1% of a forward from width 512 on; keys and values of skipped tokens are made (2-4% of a
block) unless `kv` says otherwise; `features: prepass` doubles the forward; training with the masked engine costs as
much as training without routing, plus a teacher's forward.
"""

from typing import TYPE_CHECKING

from headgate.methods.layer_routing.config import LayerRoutingConfig

if TYPE_CHECKING:
    from headgate.methods.layer_routing.method import LayerRouting as LayerRouting

__all__ = ["LayerRouting", "LayerRoutingConfig"]


def __getattr__(name: str) -> object:
    """The method when it is asked for: its settings are checked without torch."""
    if name == "LayerRouting":
        from headgate.methods.layer_routing.method import LayerRouting

        return LayerRouting
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
