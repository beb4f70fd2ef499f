"""Patches on skipped paths: one function in both engines, exact with a cache, neutral at the start, paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headgate.errors import ConfigError
from headgate.methods.layer_routing import LayerRouting

from .conftest import Forced, attach, batch_of, model_of
from .test_engines import gates_of
from .test_training import POLICIES, logs_of, method_of, trainer_of

PATCH: dict[str, Any] = {"patch": {"rank": 4}}


def patched(family: str = "llama", **options: Any) -> tuple[Any, Forced]:
    """A model whose closed blocks leave something."""
    model, _, anatomy = model_of(family)
    method = Forced(keep=1, **PATCH, **options)
    attach(method, anatomy)
    stream = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for patch in method.patches:
            patch.up.copy_(torch.randn(patch.up.shape, generator=stream) * 0.2)
    return model, method


def grads_of(model: Any, method: Forced, batch: dict[str, Tensor], engine: str, gates: Tensor) -> Any:
    method.execution.engine, method.gates = engine, gates.clone().requires_grad_()
    model.zero_grad()
    method.zero_grad()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    logits = model(**batch, use_cache=False).logits[real]
    logits.square().mean().backward()
    owners = {**dict(model.named_parameters()), **{f"method.{n}": p for n, p in method.named_parameters()}}
    return logits.detach(), {n: p.grad.clone() for n, p in owners.items() if p.grad is not None}


@pytest.mark.parametrize("units", ["block", "attention_mlp"])
@pytest.mark.parametrize("kind", ["batch", "sample", "token", "prefix", "one", "open", "closed", "scaled"])
def test_sparse_is_masked(kind: str, units: str) -> None:
    """Logits and every gradient; gates open and closed, ragged, fractional."""
    model, method = patched(units=units)
    batch = batch_of()
    gates = gates_of(kind, *batch["input_ids"].shape, method.config.gates_per_block)
    logits, grads = grads_of(model, method, batch, "masked", gates)
    logits_s, grads_s = grads_of(model, method, batch, "sparse", gates)
    torch.testing.assert_close(logits_s, logits, atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        ours = grads_s.get(name, torch.zeros_like(grad))
        torch.testing.assert_close(ours, grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    if kind != "open":
        assert any(float(g.abs().sum()) > 0 for n, g in grads_s.items() if n.startswith("method.patches"))


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2"])
def test_sparse_is_masked_in_other_families(family: str) -> None:
    model, method = patched(family)
    batch = batch_of()
    gates = gates_of("token", *batch["input_ids"].shape)
    masked, _ = grads_of(model, method, batch, "masked", gates)
    sparse, _ = grads_of(model, method, batch, "sparse", gates)
    torch.testing.assert_close(sparse, masked, atol=1e-5, rtol=1e-5)


def test_a_closed_block_is_x_plus_patch() -> None:
    """The formula, by hand, at the last block; and the gate's gradient is <dL/dy, F(x) - x - P(x)>."""
    model, method = patched()
    ids = batch_of(2, 7, padded=False)["input_ids"]
    gates = torch.ones(2, 7, 3)
    gates[..., 2] = 0.0
    method.gates, method.execution.engine = gates, "sparse"
    with torch.no_grad():
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        patch: Any = method.patches[2]
        x = states[-2]
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)
        y = x + torch.nn.functional.gelu(normed @ patch.down.T) @ patch.up.T
        norm = method.execution.anatomy.final_norm  # type: ignore[union-attr]
        torch.testing.assert_close(states[-1], norm(y), atol=1e-5, rtol=1e-5)
    batch = batch_of()
    gates = gates_of("token", 3, 9)
    grads_of(model, method, batch, "masked", gates)
    slopes, place = method.gates.grad, (1, 4, 1)
    losses = []
    for move in (-1e-2, 1e-2):
        moved = gates.clone()
        moved[place] += move
        method.gates = moved
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            losses.append(model(**batch, use_cache=False).logits[real].double().square().mean())
    assert float(slopes[place]) == pytest.approx(float(losses[1] - losses[0]) / 2e-2, rel=0.03, abs=1e-5)


@pytest.mark.parametrize("kv", ["full", "drop", "reuse"])
@pytest.mark.parametrize("units", ["block", "attention_mlp"])
def test_cached_steps_are_the_recompute(units: str, kv: str) -> None:
    model, method = patched(units=units, kv=kv)
    ids = batch_of(2, 8, padded=False)["input_ids"]
    method.gates = gates_of("token", 2, 8, method.config.gates_per_block)
    with torch.no_grad():
        for engine in ("sparse", "masked"):
            method.execution.engine = engine
            whole = model(input_ids=ids, use_cache=False).logits
            cache, pieces = None, []
            for start, stop in ((0, 4), (4, 5), (5, 6), (6, 8)):
                out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                pieces.append(out.logits)
            torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)


def test_neutral_where_it_should_be() -> None:
    """At the start, with every gate open, with routing removed and once detached: the model without patches."""
    model, _, anatomy = model_of()
    batch = batch_of()
    gates = gates_of("token", 3, 9)
    with torch.no_grad():
        plain = model(**batch).logits
        bare = attach(Forced(keep=1), anatomy)
        bare.gates = gates
        routed = model(**batch).logits
        bare.detach()
        method = attach(Forced(keep=1, **PATCH), anatomy)
        method.gates = gates
        assert torch.equal(model(**batch).logits, routed)
        for patch in method.patches:
            patch.up.normal_()
        assert not torch.equal(model(**batch).logits, routed)
        method.set_routing("removed")
        assert torch.equal(model(**batch).logits, plain)
        method.set_routing("on")
        method.gates = gates_of("open", 3, 9)
        assert torch.equal(model(**batch).logits, plain)
        method.detach()
        assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("engine", ["masked", "sparse"])
def test_activation_checkpointing_changes_nothing(engine: str) -> None:
    model, method = patched(train_engine=engine)
    batch, gates = batch_of(), gates_of("token", 3, 9)
    model.train()
    logits, grads = grads_of(model, method, batch, engine, gates)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    logits_c, grads_c = grads_of(model, method, batch, engine, gates)
    assert torch.equal(logits, logits_c) and all(torch.equal(grads[n], grads_c[n]) for n in grads)


def test_flops_are_those_that_pytorch_counts() -> None:
    """Patches run for closed tokens only, and the executed share says what they cost."""
    model, method = patched()
    _, _, anatomy = model_of()
    ids = batch_of(4, 64, padded=False)["input_ids"]

    bare, _, bare_anatomy = model_of()
    plain = attach(Forced(keep=1), bare_anatomy)

    def added(gates: Tensor) -> int:
        """FLOPs with patches less those without."""
        counts = []
        for routed, owner in ((model, method), (bare, plain)):
            owner.gates = gates
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                routed(input_ids=ids, use_cache=False)
            counts.append(counter.get_total_flops())
        return counts[0] - counts[1]

    cost = 2 * 2 * ids.numel() * anatomy.hidden_size * 4  # two products of rank 4, two FLOPs a multiply-add
    token = torch.ones(4, 64, 3)
    token[:, ::4] = 0
    assert added(torch.ones(1, 1, 3)) == 0
    assert added(torch.zeros(1, 1, 3)) == 3 * cost
    assert added(token) == 3 * cost / 4
    rates, shares = torch.full((3,), 0.75), method.shares
    with_patch = shares.executed(rates, method.config, "sparse")
    without = plain.shares.executed(rates, plain.config, "sparse")
    assert float(with_patch - without) == pytest.approx(0.25 * 3 * shares.patch / 4, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "dense"])
def test_every_policy_trains_its_patches(tmp_path: Path, name: str) -> None:
    """The controls' too: a fixed mask, truncation and random gates get the same patch."""
    options = {"target_utilization": 0.6, "init_keep": 0.6, **POLICIES[name], **PATCH}
    trainer = trainer_of(tmp_path, options, seed=1)
    method = method_of(trainer)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in logs_of(trainer))
    moved = [float(patch.up.detach().abs().sum()) > 0 for patch in method.patches]
    closed = (method.fixed == 0).tolist() if name in ("truncate", "static") else [True] * len(moved)
    assert moved == closed, "a patch learns exactly where its block is closed"


def test_dense_has_no_use_for_a_patch() -> None:
    with pytest.raises(ConfigError, match="closes none"):
        LayerRouting(policy="dense", patch={"rank": 4})
