"""The routed layer against the paper's sum, its identity setting, its routings and its controls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headgate.methods.schema_bank.config import SchemaBankConfig
from headgate.methods.schema_bank.layer import SchemaLayer

H = 7


def layer(**options: Any) -> SchemaLayer:
    config = SchemaBankConfig(**{"num_schemas": 5, "rank": 2, "init_std": 0.5, **options})
    return SchemaLayer(config, H, torch.Generator().manual_seed(0)).double()


def hidden(tokens: int = 6) -> Tensor:
    return torch.randn(3, tokens, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def reference(module: SchemaLayer, h: Tensor) -> Tensor:
    """Equations 2-5, token by token and schema by schema."""
    config, out = module.config, torch.zeros_like(h)
    U = module.bank.down.view(config.num_schemas, config.rank, H).mT
    V = module.bank.up.view(config.num_schemas, config.rank, H)
    assert module.router is not None
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            p = torch.softmax(module.router(h[b, t]), dim=-1)
            best = sorted(range(config.num_schemas), key=lambda s: -float(p.detach()[s]))[: config.top_k]
            total = sum(p[s] for s in best) if config.gating == "renormalised" and config.top_k > 1 else 1.0
            out[b, t] = sum(p[s] / total * (h[b, t] @ U[s]) @ V[s] for s in best)
            if config.combine == "add":
                out[b, t] += h[b, t]
    return out


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("gating", ["renormalised", "raw"])
@pytest.mark.parametrize("combine", ["add", "replace"])
@pytest.mark.parametrize("attributes", ["off", "router"])
def test_layer_equals_the_paper_with_every_gradient(
    top_k: int, gating: str, combine: str, attributes: str
) -> None:
    module = layer(top_k=top_k, gating=gating, combine=combine, attributes=attributes)
    h = hidden().requires_grad_()
    leaves = [h, *module.parameters()]
    weights = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)
    found, wanted = module(h)[0], reference(module, h)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad((found * weights).sum(), leaves)
    want = torch.autograd.grad((wanted * weights).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("factor", ["down", "up"])
def test_a_zero_factor_is_the_identity_for_add_and_zero_for_replace(factor: str) -> None:
    for combine, wanted in (("add", hidden()), ("replace", torch.zeros_like(hidden()))):
        module = layer(combine=combine, attributes="scalar")
        torch.nn.init.zeros_(getattr(module.bank, factor))
        assert torch.equal(module(hidden())[0], wanted)


def test_routings_of_evaluation() -> None:
    module, h = layer(), hidden()
    U, V = module.bank.down.view(5, 2, H).mT, module.bank.up.view(5, 2, H)
    each = torch.einsum("bth,shr,srg->bstg", h, U, V)
    assert module.router is not None
    p = torch.softmax(module.router(h), -1)
    assert module(h, "removed")[0] is h
    torch.testing.assert_close(module(h, "all")[0], h + each.sum(1))
    torch.testing.assert_close(module(h, "dense")[0], h + torch.einsum("bts,bstg->btg", p, each))


def test_the_scalar_gate_scales_by_schema() -> None:
    module, plain = layer(attributes="scalar", combine="replace"), layer(combine="replace")
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "attribute" not in k})
    assert module.attributes is not None and module.attribute_score is not None
    output, gates = module(hidden())
    assert gates is not None
    open_s = torch.sigmoid(module.attributes @ module.attribute_score)
    factor = 0.9 + 0.2 * (gates.weight * open_s).sum(-1, keepdim=True)
    torch.testing.assert_close(output, plain(hidden())[0] * factor)


def test_uniform_gates_need_no_router() -> None:
    module = layer(router="uniform")
    assert module.router is None and not module.router_parameters()
    gates = module.gates(hidden())
    assert (gates.weight == 1 / 5).all()


def test_a_token_sees_only_itself() -> None:
    """Neither batch mates nor padding nor position change a token's output."""
    module, h = layer(), hidden()
    whole = module(h)[0]
    torch.testing.assert_close(module(h[1:2, 2:4])[0], whole[1:2, 2:4], rtol=1e-12, atol=1e-12)


def test_controls_freeze_what_they_name() -> None:
    assert not layer(bank="frozen").bank_parameters()
    assert not layer(router="frozen").router_parameters()
    assert not any(p.requires_grad for p in layer(bank="frozen").bank.parameters())
