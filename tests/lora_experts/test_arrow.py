"""Laws of Arrow routing: PEFT's own layer gives the same, nothing is stale, and a cache changes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import nn

from headgate.errors import ConfigError
from headgate.modules.arrow import ArrowRouter, direction
from headgate.modules.low_rank_expert import LowRankExpert

from .conftest import attached, batch_of, logits_of, model_of

RANK, INPUTS, OUTPUTS = 3, 10, 8


def expert(seed: int) -> LowRankExpert:
    """With one strong direction, so that power iteration has converged as well."""
    stream = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(RANK, n, generator=stream) for n in (INPUTS, OUTPUTS))
    return LowRankExpert(down, up * torch.tensor([4.0, 1.0, 0.3])[:, None])


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_direction_is_the_top_right_singular_vector(rank: int) -> None:
    stream = torch.Generator().manual_seed(rank)
    down, up = (torch.randn(rank, n, generator=stream) for n in (INPUTS, OUTPUTS))
    top = torch.linalg.svd(up.double().mT @ down.double()).Vh[0].float()
    torch.testing.assert_close((direction(down, up) @ top).abs(), torch.tensor(1.0))


@pytest.mark.parametrize("k", [1, 2])
def test_gates_are_those_of_pefts_arrow_layer(k: int) -> None:
    experts = [expert(seed) for seed in range(4)]
    names = [f"task_{i}" for i in range(4)]
    config = SimpleNamespace(
        top_k=k, router_temperature=1.0, rng_seed=0, task_adapter_names=names, gks_adapter_names=[], use_gks=False
    )  # fmt: skip
    theirs = ArrowLoraLinearLayer(INPUTS, config)
    linears: tuple[dict[str, nn.Linear], dict[str, nn.Linear]] = ({}, {})
    for name, one in zip(names, experts, strict=True):
        for made, weight in zip(linears, (one.down, one.up.mT), strict=True):
            made[name] = nn.Linear(*reversed(weight.shape), bias=False)
            made[name].weight.data = weight.detach().clone()
    theirs.build_prototypes(*linears)
    x = torch.randn(2, 5, INPUTS, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        wanted = theirs(x, *linears, nn.Identity(), dict.fromkeys(names, 2.0))
        gates = ArrowRouter()(x, experts, k).weight
        each = torch.stack([2.0 * (x @ one.down.mT) @ one.up for one in experts], -2)
    torch.testing.assert_close((gates.unsqueeze(-1) * each).sum(-2), wanted, atol=1e-4, rtol=1e-4)
    assert int((gates != 0).sum(-1).max()) == k


def test_of_one_expert_it_is_that_expert_and_of_two_it_follows_the_weights() -> None:
    model, anatomy = model_of()
    batch = batch_of()
    method = attached(anatomy, experts=1)
    method.set_routing("expert:0")
    alone = logits_of(model, **batch)
    method.set_routing("arrow")
    torch.testing.assert_close(logits_of(model, **batch), alone)
    method.detach()
    method = attached(anatomy, experts=3)
    method.set_routing("arrow")
    before = logits_of(model, **batch)
    assert not torch.allclose(before, alone)
    with torch.no_grad():
        method.experts.banks["0/self_attn/q_proj"].expert("1").down.mul_(torch.linspace(-1, 1, 64))
    changed = logits_of(model, **batch)
    method.routed.arrows.clear()
    assert torch.equal(logits_of(model, **batch), changed) and not torch.equal(before, changed)
    with pytest.raises(ConfigError, match="is not one of on, removed, arrow"):
        method.set_routing("arow")
    method.detach()


def test_decoding_with_a_cache_equals_recomputing() -> None:
    model, anatomy = model_of()
    method = attached(anatomy, experts=3)
    method.set_routing("arrow")
    batch = batch_of(2, 6, left=True)
    with torch.no_grad():
        found = [
            model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=c) for c in (True, False)
        ]
    assert torch.equal(*found)
    method.detach()


def test_a_newborn_takes_no_part() -> None:
    model, anatomy = model_of()
    method = attached(anatomy, experts=2)
    method.set_routing("arrow")
    before = logits_of(model, **batch_of())
    method.experts.add(reason="test")
    assert torch.equal(logits_of(model, **batch_of()), before)
    method.detach()
