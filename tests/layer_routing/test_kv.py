"""What skipped tokens leave in keys and values: one function for both engines, caches and an independent reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from headgate.errors import ConfigError, ModelError
from headgate.methods.layer_routing import LayerRouting
from headgate.models.anatomy import Anatomy, describe
from headgate.models.load import load_model

from .conftest import FAMILIES, Forced, attach, batch_of, model_of
from .test_engines import ROUTED, agree, cached_is_recompute, checkpointed_is_plain, gates_of

SKIPPED = ["drop", "reuse"]


def reference(anatomy: Anatomy, ids: Tensor, gates: Tensor, kv: str) -> Tensor:
    """Llama's blocks written out, one query at a time: which keys it sees, and whose they are. ``[B, T, H]``."""
    x = anatomy.embedding(ids)
    backbone: Any = anatomy.backbone
    cos, sin = backbone.rotary_emb(x, torch.arange(ids.shape[1]).unsqueeze(0))
    key = value = torch.zeros(0)
    for number, block in enumerate(anatomy.blocks):
        layer: Any = block
        opened = torch.ones(ids.shape) if number == 0 else gates[..., number - 1]
        shape = (*ids.shape, -1, anatomy.head_dim)
        n = layer.input_layernorm(x)
        attention = layer.self_attn
        query, own_key, own_value = (
            part(n).view(shape).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, own_key = apply_rotary_pos_emb(query, own_key, cos, sin)
        is_open = opened[:, None, :, None] != 0
        if kv == "reuse" and number:
            key, value = torch.where(is_open, own_key, key), torch.where(is_open, own_value, value)
        else:
            key, value = own_key, own_value
        groups = anatomy.num_heads // anatomy.num_kv_heads
        out = torch.zeros_like(x)
        for row in range(ids.shape[0]):
            for place in range(ids.shape[1]):
                seen = [j for j in range(place + 1) if kv == "reuse" or opened[row, j] != 0 or j == place]
                k = key[row, :, seen].repeat_interleave(groups, 0)
                v = value[row, :, seen].repeat_interleave(groups, 0)
                scores = (query[row, :, place].unsqueeze(1) * k).sum(-1) / anatomy.head_dim**0.5
                mixed = (scores.softmax(-1).unsqueeze(-1) * v).sum(1)
                out[row, place] = attention.o_proj(mixed.flatten())
        after = x + out
        after = after + layer.mlp(layer.post_attention_layernorm(after))
        x = opened.unsqueeze(-1) * after + (1 - opened.unsqueeze(-1)) * x
    return anatomy.final_norm(x)


@pytest.mark.parametrize("kv", SKIPPED)
def test_both_engines_are_the_formula(kv: str) -> None:
    model, _, anatomy = model_of("llama")
    ids = batch_of(2, 7, padded=False)["input_ids"]
    method = attach(Forced(keep=1, kv=kv), anatomy)
    for kind in ("token", "scaled"):
        method.gates = gates_of(kind, 2, 7)
        with torch.no_grad():
            expected = anatomy.head(reference(anatomy, ids, method.gates, kv))
            for engine in ("masked", "sparse"):
                method.execution.engine = engine
                found = model(input_ids=ids, use_cache=False).logits
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            method.detach()
            full = attach(Forced(keep=1), anatomy)
            full.gates = method.gates
            assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3), "kv changed nothing"
            full.detach()
            method.attach(anatomy)


@pytest.mark.parametrize("kind", ["sample", "token", "prefix", "one", "closed", "scaled"])
@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("kv", SKIPPED)
def test_sparse_is_masked(kind: str, side: str, kv: str) -> None:
    agree("llama", kind, side, kv=kv)


@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize("kv", SKIPPED)
def test_sparse_is_masked_in_every_family(family: str, kv: str) -> None:
    agree(family, "token", "right", kv=kv)
    agree(family, "prefix", "none", kv=kv)


@pytest.mark.parametrize("kv", SKIPPED)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sparse_is_masked_with_other_attention_and_two_gates(kv: str, attention: str) -> None:
    agree("llama", "token", "none", kv=kv, attention=attention)
    agree("gemma3", "token", "left", units="attention_mlp", kv=kv, attention=attention)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv", SKIPPED)
def test_all_open_is_bitwise_the_model(family: str, kv: str) -> None:
    model, _, anatomy = model_of(family)
    batch = batch_of()
    with torch.no_grad():
        plain = model(**batch).logits
        method = attach(Forced(keep=1, kv=kv), anatomy)
        method.gates = gates_of("open", 3, 9)
        for engine in ("sparse", "masked"):
            method.execution.engine = engine
            assert torch.equal(model(**batch).logits, plain)
        method.gates = gates_of("token", 3, 9)
        assert not torch.equal(model(**batch).logits, plain)
        method.detach()
        assert torch.equal(model(**batch).logits, plain)
    left = {
        name
        for module in model.modules()
        for name in vars(module)
        if name in ("forward", "_can_checkpoint_with_cache")
    }
    assert not left


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv", SKIPPED)
@pytest.mark.parametrize("kind", ["sample", "token"])
def test_cached_steps_are_the_recompute(family: str, kv: str, kind: str) -> None:
    cached_is_recompute(family, kind, "block", kv)


@pytest.mark.parametrize("engine", ["masked", "sparse"])
@pytest.mark.parametrize("kv", SKIPPED)
@pytest.mark.parametrize("units", ["block", "attention_mlp"])
def test_activation_checkpointing_changes_nothing(engine: str, kv: str, units: str) -> None:
    checkpointed_is_plain(engine, units, kv)


def test_a_sliding_window_forgets_closed_tokens_like_open_ones() -> None:
    """Once the cache of a sliding layer is shorter than the text, gates and keys still belong together."""
    for kv in SKIPPED:
        cache = cached_is_recompute("mistral", "token", "block", kv, sliding_window=4)
        assert [layer.keys.shape[2] for layer in cache.layers] == [3] * 4


def test_skipped_tokens_make_no_keys_and_values() -> None:
    """Counted FLOPs: exactly the two projections of every closed token fall away against ``kv: full``."""
    from torch.utils.flop_counter import FlopCounterMode

    model, _, anatomy = model_of("llama", lora=False)
    ids, counted = batch_of(4, 16, padded=False)["input_ids"], {}
    for kv in ("full", "drop", "reuse"):
        method = attach(Forced(keep=1, kd=False, kv=kv), anatomy)
        method.gates = torch.ones(4, 16, ROUTED)
        method.gates[:, ::2] = 0
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids, use_cache=True)
        counted[kv] = counter.get_total_flops()
        method.detach()
    closed = 4 * 8 * ROUTED
    made = closed * 2 * anatomy.hidden_size * 2 * anatomy.num_kv_heads * anatomy.head_dim
    assert counted["full"] - counted["reuse"] == counted["full"] - counted["drop"] == made


@pytest.mark.parametrize("kv", SKIPPED)
@pytest.mark.parametrize("policy", ["dense", "truncate", "static", "stochastic_depth"])
def test_policies_that_close_whole_blocks_are_refused(kv: str, policy: str) -> None:
    with pytest.raises(ConfigError, match=rf"kv: {kv} is about tokens.*{policy}"):
        LayerRouting(policy=policy, kv=kv)


def test_what_cannot_work_is_refused_by_name() -> None:
    model, _, anatomy = model_of("gpt_neox", lora=False)
    with pytest.raises(ModelError, match="no kv: reuse for architecture 'gpt_neox'"):
        LayerRouting(kd=False, engine="masked", kv="reuse").attach(anatomy)
    method = attach(Forced(keep=1, kd=False, engine="masked", kv="drop"), anatomy)
    method.gates = gates_of("token", 3, 9)
    assert torch.isfinite(model(**batch_of()).logits).all()
    model, _, anatomy = model_of("llama")
    method = attach(Forced(keep=1, kv="drop"), anatomy)
    method.gates = gates_of("token", 2, 8)
    ids = batch_of(2, 8, padded=False)["input_ids"]
    method.set_routing("removed")
    cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    method.set_routing("on")
    with pytest.raises(ModelError, match="knows the gates of 0 of the 4 tokens"):
        model(input_ids=ids[:, 4:5], past_key_values=cache, use_cache=True)
    with pytest.raises(ModelError, match="dynamic cache"):
        options = {"max_new_tokens": 3, "pad_token_id": 0, "cache_implementation": "static"}
        model.generate(input_ids=ids[:, :4], **options)


def test_phi3_reuses_in_the_masked_engine() -> None:
    """An architecture without a sparse engine: attention's own call of the cache is enough."""
    model, _ = load_model("random:phi3", seed=1, device="cpu")
    anatomy = describe(model)
    method = attach(Forced(keep=1, kd=False, engine="masked", kv="reuse"), anatomy)
    method.gates = gates_of("token", 3, 9)
    reused = model(**batch_of()).logits
    method.detach()
    full = attach(Forced(keep=1, kd=False, engine="masked"), anatomy)
    full.gates = method.gates
    assert not torch.equal(model(**batch_of()).logits, reused)
