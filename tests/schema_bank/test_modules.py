"""The shared modules: routers in fp32, a bank of one is LoRA, experts are slices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headgate.modules.bank import LowRankBank
from headgate.modules.routers import AttributeRouter, LinearRouter, MLPRouter, linear_of_norm
from headgate.ops.gating import Gates, softmax_gates


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_fp32_and_autocast_changes_none(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, generator=stream()).to(dtype)
    for router in (
        LinearRouter(8, 4, bias=True, norm=True, generator=stream()),
        AttributeRouter(8, 4, generator=stream()),
        MLPRouter(8, [4, 2], 4, generator=stream()),
    ):
        plain = router(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(router(x), plain)
        assert plain.dtype == torch.float32 and plain.shape == (2, 3, 4)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_the_norm_taken_out_of_the_product_is_the_norm_before_it(scale: float) -> None:
    """Values and every gradient in float64; also of a zero vector, where only eps keeps the norm finite."""
    norm, linear = nn.RMSNorm(8, eps=1e-6).double(), nn.Linear(8, 4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8, generator=stream(1)))
    x = (scale * torch.randn(2, 3, 8, generator=stream(), dtype=torch.float64)).requires_grad_(True)
    inputs = [x, norm.weight, linear.weight, linear.bias]
    found, wanted = linear_of_norm(norm, x, linear.weight, linear.bias), linear(norm(x))
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn(2, 3, 4, generator=stream(2), dtype=torch.float64)
    mine, theirs = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for out in (found, wanted))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_an_mlp_router_starts_at_its_bias_for_every_input_and_learns() -> None:
    router = MLPRouter(8, [4, 2], 3, init_bias=2.2, generator=stream())
    z = router(torch.randn(2, 5, 8, generator=stream()))
    assert torch.equal(z, torch.full_like(z, 2.2))
    z.square().sum().backward()
    assert router.layers[-1].weight.grad.abs().max() > 0


def test_a_bank_of_one_with_gate_alpha_over_r_is_lora() -> None:
    bank = LowRankBank(1, 8, 6, 2, generator=stream())
    x = torch.randn(2, 3, 8, generator=stream(1))
    gates = Gates(torch.full((1, 1, 1), 16 / 2), torch.zeros(1, 1, 1))
    a, b = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)
    a.weight.data, b.weight.data = bank.down.data.clone(), bank.up.data.T.clone()
    torch.testing.assert_close(bank(x, gates), b(a(x)) * 16 / 2)


def test_experts_of_mixed_rank_are_slices_of_the_bank() -> None:
    bank = LowRankBank(3, 8, 6, [1, 3, 2], generator=stream())
    x = torch.randn(2, 3, 8, generator=stream(1))
    gates = softmax_gates(torch.randn(2, 3, 3, generator=stream(2)))
    rows = [bank.rows(e) for e in range(3)]
    parts = [gates.weight[..., e : e + 1] * (x @ bank.down[r].T @ bank.up[r]) for e, r in enumerate(rows)]
    torch.testing.assert_close(bank(x, gates), sum(parts))
    with pytest.raises(ValueError, match="2 ranks for 3 experts"):
        LowRankBank(3, 8, 6, [1, 2])


def test_the_same_generator_gives_the_same_bank() -> None:
    one, two = (LowRankBank(2, 8, 8, 4, generator=stream(3)) for _ in range(2))
    assert torch.equal(one.down, two.down) and torch.equal(one.up, two.up)
