"""Laws of the routed low-rank transform: every route equals the loop over experts, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headgate.ops import grouped_low_rank as G
from headgate.ops import low_rank as L

RANKS = st.one_of(
    st.tuples(st.integers(1, 6), st.integers(1, 4)).map(lambda pair: [pair[1]] * pair[0]),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
)


def loop(x: Tensor, down: Tensor, up: Tensor, gates: Tensor, ranks: list[int]) -> Tensor:
    """The equation, one expert and one token at a time."""
    gates = gates.expand(*x.shape[:-1], len(ranks))
    rows = []
    for token, gate in zip(x.reshape(-1, x.shape[-1]), gates.reshape(-1, len(ranks)), strict=True):
        y, start = torch.zeros(up.shape[1], dtype=x.dtype), 0
        for expert, rank in enumerate(ranks):
            part = slice(start, start + rank)
            y = y + gate[expert] * (up[part].T @ (down[part] @ token))
            start += rank
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


def problem(ranks: list[int], batch: int, tokens: int, gate_shape: str, seed: int) -> list[Tensor]:
    stream = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream, dtype=torch.float64)

    width = {"batch": (1, 1), "sample": (batch, 1), "token": (batch, tokens)}[gate_shape]
    total = sum(ranks)
    return [draw(batch, tokens, 5), draw(total, 5), draw(total, 3), draw(*width, len(ranks)).abs()]


def gradients(function, tensors: list[Tensor]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


@settings(max_examples=25, deadline=None)
@given(
    RANKS,
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from(["batch", "sample", "token"]),
    st.integers(0, 9),
)
def test_two_products_equal_the_loop(
    ranks: list[int], batch: int, tokens: int, shape: str, seed: int
) -> None:
    tensors = problem(ranks, batch, tokens, shape, seed)
    wanted = gradients(lambda *t: loop(*t, ranks), tensors)
    for route in (L.routed_low_rank, L.routed_low_rank_recomputed, L.low_rank_bank):
        for got, want in zip(gradients(lambda *t, f=route: f(*t, ranks), tensors), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(RANKS, st.integers(1, 3), st.integers(1, 5), st.integers(0, 9), st.data())
def test_grouped_equals_the_loop_where_gates_are_chosen(
    ranks: list[int], batch: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(ranks)))
    x, down, up, gates = problem(ranks, batch, tokens, "token", seed)
    chosen = gates.topk(k, dim=-1).indices
    mask = torch.zeros_like(gates).scatter(-1, chosen, 1.0)
    wanted = gradients(lambda x, d, u, g: loop(x, d, u, g * mask, ranks), [x, down, up, gates])
    found = gradients(
        lambda x, d, u, g: L.routed_low_rank_grouped(x, d, u, g * mask, chosen, ranks), [x, down, up, gates]
    )
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    gathered = L.routed_low_rank_gathered(x, down, up, gates * mask, chosen, ranks)
    torch.testing.assert_close(gathered, loop(x, down, up, gates * mask, ranks), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ranks", [[2, 2, 2], [3, 1, 2]])
@pytest.mark.parametrize("everywhere", [0, 1, 2])
def test_frozen_experts_and_one_that_every_token_chose(ranks: list[int], everywhere: int) -> None:
    """Only the live expert's factors enter the graph; values and gradients are the loop's, wherever the expert of all
    tokens stands."""
    x, down, up, gates = problem(ranks, 2, 4, "token", 3)
    other = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).unsqueeze(-1)
    others = [e for e in range(3) if e != everywhere]
    chosen = torch.cat(
        [torch.tensor(others)[other], torch.full_like(other, everywhere)], dim=-1
    )  # one expert of the others serves no token of the second row
    mask = torch.zeros_like(gates).scatter(-1, chosen, 1.0)
    wanted = gradients(lambda x, d, u, g: loop(x, d, u, g * mask, ranks), [x, down, up, gates])
    downs, ups = ([t.clone() for t in side.split(ranks)] for side in (down, up))
    live = [downs[everywhere].requires_grad_(), ups[everywhere].requires_grad_()]
    leaves = [x.clone().requires_grad_(), gates.clone().requires_grad_()]
    paid = leaves[1].gather(-1, chosen)
    y = G.grouped_experts(leaves[0], list(zip(downs, ups, strict=True)), paid, chosen)
    assert len(y.grad_fn.next_functions[0][0].next_functions) == 4, (
        "input, gates and one expert's two factors"
    )
    push = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    found = torch.autograd.grad((y * push).sum(), [*leaves, *live])
    own = [wanted[2].split(ranks)[everywhere], wanted[3].split(ranks)[everywhere]]
    for got, want in zip([y, *found], [wanted[0], wanted[1], wanted[4], *own], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [L.CHUNK_TOKENS - 1, L.CHUNK_TOKENS, 2 * L.CHUNK_TOKENS + 1])
def test_chunks_join_without_a_seam(tokens: int) -> None:
    tensors = problem([2, 3], 1, tokens, "token", 0)
    wanted = gradients(lambda *t: L.routed_low_rank(*t, [2, 3]), tensors)
    for got, want in zip(gradients(lambda *t: L.routed_low_rank_recomputed(*t, [2, 3]), tensors), wanted):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_input_changes_no_other_gradient(frozen: int) -> None:
    ranks = [2, 2, 2]
    tensors = problem(ranks, 2, 4, "token", 1)
    chosen = tensors[3].topk(3, dim=-1).indices
    wanted = gradients(lambda *t: L.routed_low_rank(*t, ranks), tensors)[1:]
    routes = [
        lambda *t: L.routed_low_rank_recomputed(*t, ranks),
        lambda *t: L.routed_low_rank_grouped(*t, chosen, ranks),
    ]
    for route in routes:
        leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
        y = route(*leaves)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        for i, (leaf, want) in enumerate(zip(leaves, wanted, strict=True)):
            if i == frozen:
                assert leaf.grad is None
            else:
                torch.testing.assert_close(leaf.grad, want, rtol=1e-10, atol=1e-10)


def test_autocast_computes_in_its_own_type_and_keeps_fp32_gradients() -> None:
    x, down, up, gates = (t.float() for t in problem([2, 2], 1, 4, "token", 0))
    down.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = L.low_rank_bank(x, down, up, gates, [2, 2], gates.topk(1).indices)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert down.grad is not None and down.grad.dtype == torch.float32


def test_the_grouped_route_is_taken_where_it_was_measured_faster() -> None:
    assert G.grouped_is_faster(4096, [16] * 32, 2, 2 * 896)
    assert G.grouped_is_faster(2048, [16] * 32, 2, 2 * 128)
    assert not G.grouped_is_faster(4096, [8] * 8, 4, 2 * 896)
    assert not G.grouped_is_faster(8, [16] * 32, 2, 2 * 896)


def test_the_gathered_route_is_taken_where_it_was_measured_faster() -> None:
    assert L.gathered_is_faster(1, [16] * 64, 2) and L.gathered_is_faster(4, [16] * 64, 2)
    assert not L.gathered_is_faster(32, [16] * 64, 2)
    assert not L.gathered_is_faster(1, [16] * 16, 2)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_orthonormal_rows_cost_nothing_and_scales_agree(count: int, rank: int, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, rank, 7, generator=stream, dtype=torch.float64)
    exact = torch.linalg.qr(rows.mT).Q.mT
    assert L.orthonormality(exact, "frobenius") < 1e-20
    by_hand = sum((v @ v.T - torch.eye(rank, dtype=v.dtype)).norm().square() for v in rows)
    torch.testing.assert_close(L.orthonormality(rows, "frobenius"), by_hand)
    torch.testing.assert_close(L.orthonormality(rows, "sum"), by_hand / rank**2)
    torch.testing.assert_close(L.orthonormality(rows, "mean"), by_hand / rank**2 / count)


def test_a_large_bank_keeps_its_inputs_alone_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = torch.Generator().manual_seed(0)
    x, down, up = (torch.randn(n, m, generator=stream) for n, m in ((5, 4), (6, 4), (6, 3)))
    gates = torch.rand(5, 3, generator=stream)
    found = {}
    for name, most in (("small", 1 << 20), ("large", 0)):
        monkeypatch.setattr(L, "KEEP_BYTES", most)
        leaves = [t.clone().requires_grad_() for t in (x, down, up, gates)]
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = L.low_rank_bank(*leaves, [1, 2, 3])
        inputs = {leaf.data_ptr() for leaf in leaves}
        found[name] = [t for t in kept if t.data_ptr() not in inputs]
        y.sum().backward()
    assert found["small"] and not found["large"]
