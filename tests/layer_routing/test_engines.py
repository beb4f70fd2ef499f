"""Two engines, one function: masked and sparse agree in logits and gradients, whatever is open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headgate.errors import ModelError
from headgate.methods.layer_routing import LayerRouting

from .conftest import FAMILIES, Forced, attach, batch_of, model_of

ROUTED = 3  # of 4 blocks


def gates_of(kind: str, rows: int, length: int, units: int = 1) -> Tensor:
    stream = torch.Generator().manual_seed(11)
    count = ROUTED * units
    shapes = {"batch": (1, 1), "sample": (rows, 1), "token": (rows, length)}
    if kind == "open":
        return torch.ones(rows, length, count)
    if kind == "closed":
        return torch.zeros(rows, length, count)
    if kind == "one":
        gates = torch.zeros(rows, length, count)
        gates[-1, length // 2] = 1.0
        return gates
    if kind == "prefix":
        gates = (
            (torch.rand((rows, 1, count), generator=stream) < 0.5).float().expand(rows, length, count).clone()
        )
        gates[:, :3] = 1.0
        return gates
    if kind == "scaled":
        drawn = torch.rand((rows, length, count), generator=stream)
        return drawn * (drawn > 0.5)
    return (torch.rand((*shapes[kind], count), generator=stream) < 0.5).float()


def run(method: Forced, model, batch, engine: str, gates: Tensor):
    """Logits at real tokens, gradients of the adapter and of the gates."""
    method.execution.engine = engine
    method.gates = gates.clone().requires_grad_()
    model.zero_grad()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    logits = model(**batch, use_cache=False).logits[real]
    logits.square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), found, method.gates.grad


@pytest.mark.parametrize("kind", ["batch", "sample", "token", "prefix", "one", "open", "closed", "scaled"])
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_sparse_is_masked(kind: str, side: str) -> None:
    agree("llama", kind, side)


@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize("kind", ["token", "prefix"])
def test_sparse_is_masked_in_every_family(family: str, kind: str) -> None:
    agree(family, kind, "right")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_sparse_is_masked_with_gates_for_attention_and_mlp(family: str) -> None:
    agree(family, "token", "right", units="attention_mlp")
    agree(family, "closed", "none", units="attention_mlp")


def agree(
    family: str, kind: str, side: str, units: str = "block", kv: str = "full", attention: str = "auto"
) -> None:
    """Sparse = masked: logits, adapter gradients, and the gradients of open gates."""
    model, _, anatomy = model_of(family, attention=attention)
    batch = batch_of(padded=side != "none", left=side == "left")
    method = attach(Forced(keep=1, units=units, kv=kv), anatomy)
    gates = gates_of(kind, *batch["input_ids"].shape, 2 if units == "attention_mlp" else 1)
    logits, grads, gate_grad = run(method, model, batch, "masked", gates)
    logits_s, grads_s, gate_grad_s = run(method, model, batch, "sparse", gates)
    torch.testing.assert_close(logits_s, logits, atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        ours = grads_s.get(name, torch.zeros_like(grad))
        torch.testing.assert_close(ours, grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    if (
        gate_grad_s is not None
    ):  # a closed gate has no gradient in the sparse engine; an open one has the same
        opened = gates != 0
        torch.testing.assert_close(gate_grad_s[opened], gate_grad[opened], atol=1e-5, rtol=1e-4)
    if kind not in ("open", "closed"):
        method.set_routing("removed")
        assert not torch.allclose(model(**batch).logits[0, -3:], logits[-3:], atol=1e-3)


def test_masked_gate_gradient_is_exact() -> None:
    """dL/dg = <dL/dy, F(x) - x>, at closed gates too: a finite difference in g agrees."""
    model, _, anatomy = model_of("llama")
    batch = batch_of(padded=False)
    method = attach(Forced(keep=1), anatomy)
    gates = gates_of("token", 3, 9)
    _, _, grad = run(method, model, batch, "masked", gates)
    for place in ((0, 2, 0), (1, 4, 1), (2, 8, 2)):
        losses = []
        for move in (-1e-2, 1e-2):
            moved = gates.clone()
            moved[place] += move
            method.gates = moved
            with torch.no_grad():
                losses.append(model(**batch, use_cache=False).logits.double().square().mean())
        slope = float(losses[1] - losses[0]) / 2e-2
        assert float(grad[place]) == pytest.approx(slope, rel=0.03, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_open_and_detached_are_bitwise_the_model(family: str) -> None:
    model, _, anatomy = model_of(family)
    batch = batch_of()
    with torch.no_grad():
        plain = model(**batch).logits
        for units in ("block", "attention_mlp"):
            method = attach(Forced(keep=1, units=units), anatomy)
            method.gates = gates_of("open", 3, 9, method.config.gates_per_block)
            for engine in ("sparse", "masked"):
                method.execution.engine = engine
                assert torch.equal(model(**batch).logits, plain)
            method.gates = gates_of("token", 3, 9, method.config.gates_per_block)
            assert not torch.equal(model(**batch).logits, plain)
            method.detach()
            assert torch.equal(model(**batch).logits, plain)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["batch", "sample", "token"])
@pytest.mark.parametrize("units", ["block", "attention_mlp"])
def test_cached_steps_are_the_recompute(family: str, kind: str, units: str) -> None:
    cached_is_recompute(family, kind, units)


def cached_is_recompute(family: str, kind: str, units: str, kv: str = "full", **shape: Any) -> Any:
    """Steps with a cache equal one forward without; returns the cache."""
    model, _, anatomy = model_of(family, **shape)
    ids = batch_of(2, 8, padded=False)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    method = attach(Forced(keep=1, units=units, kv=kv), anatomy)
    method.gates = gates_of(kind, 2, 8, method.config.gates_per_block)
    with torch.no_grad():
        for engine in ("sparse", "masked"):
            method.execution.engine = engine
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            cache, pieces = None, []
            for start, stop in ((0, 4), (4, 5), (5, 6), (6, 8)):
                out = model(
                    input_ids=ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = out.past_key_values
                pieces.append(out.logits)
            assert [cache.get_seq_length(layer) for layer in range(4)] == [8] * 4
            torch.testing.assert_close(
                torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=1e-5
            )
    return cache


@pytest.mark.parametrize("engine", ["masked", "sparse"])
@pytest.mark.parametrize("units", ["block", "attention_mlp"])
def test_activation_checkpointing_changes_nothing(engine: str, units: str) -> None:
    checkpointed_is_plain(engine, units)


def checkpointed_is_plain(engine: str, units: str, kv: str = "full") -> None:
    model, _, anatomy = model_of("llama")
    batch = batch_of()
    method = attach(Forced(keep=1, units=units, train_engine=engine, kv=kv), anatomy)
    gates = gates_of("token", 3, 9, method.config.gates_per_block)
    model.train()
    logits, grads, gate_grad = run(method, model, batch, engine, gates)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    logits_c, grads_c, gate_grad_c = run(method, model, batch, engine, gates)
    assert torch.equal(logits, logits_c)
    assert all(torch.equal(grads[name], grads_c[name]) for name in grads)
    torch.testing.assert_close(gate_grad, gate_grad_c)


def test_closed_blocks_do_not_run() -> None:
    """The blocks' own products are not executed for closed gates: counted FLOPs fall as the gates do."""
    from torch.utils.flop_counter import FlopCounterMode

    model, _, anatomy = model_of("llama")
    ids = batch_of(4, 64, padded=False)["input_ids"]
    method = attach(Forced(keep=1), anatomy)

    def flops(gates: Tensor) -> int:
        method.gates = gates
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids, use_cache=False)
        return counter.get_total_flops()

    full = flops(torch.ones(1, 1, 3))
    none = flops(torch.zeros(1, 1, 3))
    block = (full - none) / 3
    assert flops(torch.tensor([1.0, 0, 1]).view(1, 1, 3)) == pytest.approx(full - block)
    half = torch.ones(4, 1, 3)
    half[:2] = 0
    assert flops(half) == pytest.approx(full - 1.5 * block)
    token = torch.ones(4, 64, 3)
    token[:, ::2] = 0
    saved = (full - flops(token)) / (3 * block)
    assert 0.5 * (1 - method.shares.keys_values) - 0.08 < saved < 0.5


def test_the_executed_share_is_what_the_counter_counts() -> None:
    """Per token, with every block open in part, and with one that is closed to every token and makes no keys."""
    from torch.utils.flop_counter import FlopCounterMode

    model, _, anatomy = model_of("llama")
    ids = batch_of(1, 64, padded=False)["input_ids"]
    method = attach(Forced(keep=1, policy="gumbel", granularity="token", kd=False), anatomy)

    def flops(gates: Tensor) -> int:
        method.gates = gates
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids, use_cache=False)
        return counter.get_total_flops()

    full, none = flops(torch.ones(1, 1, 3)), flops(torch.zeros(1, 1, 3))
    token = torch.ones(1, 64, 3)
    token[:, ::2] = 0  # the last token is open: a row ends there
    for closed in ([], [1], [0, 2]):
        gates = token.clone()
        gates[..., closed] = 0
        rates = gates.mean((0, 1))
        # of the routable blocks; attention's products grow with the open queries alone
        executed = (
            float(method.shares.executed(rates, method.config, "sparse")) - method.shares.always
        ) / 0.75
        assert (flops(gates) - none) / (full - none) == pytest.approx(executed, abs=0.02), closed


def test_unknown_families_are_refused_by_name() -> None:
    model, _, anatomy = model_of("phi3", lora=False)
    with pytest.raises(ModelError, match=r"no sparse engine for architecture 'phi3'.*engine: masked"):
        LayerRouting(kd=False).attach(anatomy)
    method = attach(Forced(keep=1, engine="masked", kd=False), anatomy)
    method.gates = gates_of("token", 3, 9)
    plain = model(**batch_of()).logits
    method.gates = torch.ones(3, 9, 3)
    assert torch.isfinite(plain).all() and not torch.equal(model(**batch_of()).logits, plain)
