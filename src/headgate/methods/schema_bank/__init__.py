"""SchemaBank: sparse routing as a training curriculum.

A bank of S routed low-rank transforms sits on the last blocks while a LoRA adapter trains; a router picks k of
them per token, first supervised by tags, then frozen, then free. At the end router and bank are removed: the
plain LoRA adapter is the product.

    p = softmax(W h)                                            (eq. 2)
    h' = h + sum_{s in top-k} g_s (h U_s) V_s                   (eq. 3-5)
    stage 1  router        L = LM + lambda_tag [tag kept] (-log p_t)      (eq. 8-10)
    stage 2  U, V, LoRA    L = LM + lambda_orth ||V V^T - I||^2           (eq. 7, 11)
    stage 3  all           L = LM + lambda_orth ||V V^T - I||^2           (eq. 12)

Implemented: all of it, the presets `default`, `paper` and `released`, four ways to route at evaluation, seven
tag sources and the controls (frozen bank, frozen router, uniform gates, permuted tags, other curricula).

Deviations: eq. 4 and eq. 7 are read with shapes that multiply (V V^T, not V^T V); p_t of eq. 8 is that of the
mean logits over an example's real tokens; top-1 keeps its unrenormalised probability, without which the router
would have no gradient; gates are renormalised for k >= 2 (`gating: raw` is the paper's).

Cost: per token and layer S*H (router) + 2*k*r*H multiply-adds where tokens are gathered by schema (CPU), and
2*S*r*H where all schemas share two products (GPU). Nothing at inference: the bank is gone.
"""

from typing import TYPE_CHECKING

from headgate.methods.schema_bank.config import SchemaBankConfig

if TYPE_CHECKING:
    from headgate.methods.schema_bank.method import SchemaBank as SchemaBank

__all__ = ["SchemaBank", "SchemaBankConfig"]


def __getattr__(name: str) -> object:
    """The method when it is asked for: its settings are checked without torch."""
    if name == "SchemaBank":
        from headgate.methods.schema_bank.method import SchemaBank

        return SchemaBank
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
