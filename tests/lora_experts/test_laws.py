"""Laws of a forward with experts in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headgate.errors import ConfigError, ModelError
from headgate.methods.lora_experts import LoraExperts
from headgate.models.anatomy import describe
from headgate.models.load import load_model
from headgate.training.checkpoint import build_methods

from .conftest import FAMILIES, attached, batch_of, logits_of, louden, model_of

KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "per_site": {"router_sites": "per_site"},
    "sequence": {"granularity": "sequence", "prefix_tokens": 3},
    "block": {"features": "block 1"},
    "prepass": {"features": "prepass"},
    "top_1": {"top_1_after": 0},
    "uniform": {"router": "uniform"},
    "sum": {"router": "sum"},
    "prototype": {"router": "prototype"},
    "bayes": {"router": "bayes"},
    "bayes, by document": {"router": "bayes", "granularity": "sequence", "prefix_tokens": 3},
}


def grown(anatomy: Any, **options: Any) -> LoraExperts:
    """Four experts of two ranks, all mature, all loud."""
    method = attached(anatomy, experts=2, r=2, alpha=4, **options)
    for rank in (3, 1):
        method.experts.add(rank)
    method.experts.roster.age.fill_(1000)
    louden(method)
    return method


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_peft_lora(family: str) -> None:
    """Forward and gradients of N = 1, against PEFT with the same factors."""
    ours, anatomy = model_of(family)
    method = attached(anatomy, r=4, alpha=6)
    theirs, _ = load_model(
        f"random:{family}",
        lora={"r": 4, "alpha": 6, "dropout": 0.0, "target_modules": list(anatomy.family.linears)},
        seed=1,
        device="cpu",
    )
    theirs.eval()
    layers = {
        site: layer
        for number, block in enumerate(describe(theirs).blocks)
        for name, layer in describe(theirs).linears(block)
        if (site := f"{number}/{name.replace('.', '/')}") in method.experts.banks
    }
    assert layers.keys() == set(method.experts.banks)
    for site, layer in layers.items():
        expert = method.experts.bank(site).expert("0")
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(expert.down)
            layer.lora_B["default"].weight.copy_(expert.up.T)
    batch = batch_of()
    for model in (ours, theirs):
        model(**batch).logits.square().mean().backward()
    torch.testing.assert_close(logits_of(ours, **batch), logits_of(theirs, **batch), atol=1e-5, rtol=1e-5)
    for site, layer in layers.items():
        expert = method.experts.bank(site).expert("0")
        torch.testing.assert_close(
            expert.down.grad, layer.lora_A["default"].weight.grad, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            expert.up.grad.T, layer.lora_B["default"].weight.grad, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_detach_gives_the_base_back_and_birth_changes_nothing(kind: str) -> None:
    """Bitwise, at every phase: one expert, several mature (top-2, or top-1), one immature."""
    model, anatomy = model_of()
    batch = batch_of()
    base = logits_of(model, **batch)
    method = attached(anatomy, **KINDS[kind])
    for age in (0, 1000, 3):
        old = logits_of(model, **batch)
        method.experts.add(4, "test")
        assert torch.equal(logits_of(model, **batch), old), f"with {len(method.experts.roster)} experts"
        louden(method, seed=len(method.experts.roster))
        method.experts.roster.age.fill_(age)
    assert not torch.equal(logits_of(model, **batch), base)
    with method.routed.bypassed():
        assert torch.equal(logits_of(model, **batch), base)
    method.set_routing("removed")
    assert torch.equal(logits_of(model, **batch), base)
    method.detach()
    assert torch.equal(logits_of(model, **batch), base)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str, left: bool) -> None:
    model, anatomy = model_of()
    grown(anatomy, **KINDS[kind])
    batch = batch_of(left=left)
    together = logits_of(model, **batch)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = logits_of(model, input_ids=batch["input_ids"][row, mask][None])
        torch.testing.assert_close(together[row, mask], alone[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_independent(kind: str) -> None:
    model, anatomy = model_of()
    grown(anatomy, **KINDS[kind])
    parts = [batch_of(1, n, padded=False)["input_ids"] for n in (5, 2, 7)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    packed = logits_of(model, input_ids=torch.cat(parts, 1), position_ids=positions, use_cache=False)
    alone = torch.cat([logits_of(model, input_ids=part) for part in parts], 1)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_is_recomputing(kind: str) -> None:
    """Left padding, a prompt in two pieces, token by token; beams reorder what the cache knows."""
    model, anatomy = model_of()
    grown(anatomy, **KINDS[kind])
    batch = batch_of(length=10, left=True)
    whole = logits_of(model, **batch)
    pieces, cache = [], None
    for start, stop in ((0, 5), (5, 7), (7, 8), (8, 9), (9, 10)):
        with torch.no_grad():
            mask = batch["attention_mask"]
            out = model(
                input_ids=batch["input_ids"][:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=(mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:],
                past_key_values=cache,
                use_cache=True,
            )
        cache = out.past_key_values
        pieces.append(out.logits)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=3e-5, rtol=1e-4)
    options: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, num_beams=3, pad_token_id=0)
    with_cache = model.generate(**batch, **options)
    assert torch.equal(with_cache, model.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_never_uses_the_gates_of_another(kind: str) -> None:
    model, anatomy = model_of()
    grown(anatomy, **KINDS[kind])
    one, other = batch_of(2, 6, padded=False), batch_of(3, 6, padded=False)
    first = logits_of(model, **one)
    logits_of(model, **other)
    assert torch.equal(logits_of(model, **one), first)


def test_training_and_evaluation_mix_alike() -> None:
    """At every age: what a training forward computed at step t is what evaluation after step t computes."""
    model, anatomy = model_of()
    method = grown(anatomy, maturity_steps=3, temperature_half_life=2, top_1_after=2)
    method.experts.add(2)
    louden(method)
    batch = batch_of()
    for _ in range(8):
        model.train()
        during = model(**batch).logits.detach()
        model.eval()
        method.experts.roster.age += 1
        assert torch.equal(logits_of(model, **batch), during)


def test_phases_follow_the_youngest() -> None:
    """Two and the young one, then two, then one with its probability among all; the temperature falls."""
    model, anatomy = model_of()
    method = attached(anatomy, experts=3, maturity_steps=4, top_1_after=2, temperature_half_life=2)
    method.experts.roster.age.fill_(50)
    method.experts.add()
    louden(method)
    model.train()
    seen = []
    for _ in range(7):
        model(**batch_of())
        assert method.routed.running is not None and method.routed.running.phase is not None
        (mixture,) = method.routed.running.mixtures.values()
        weight = mixture.gates.weight
        kept = (weight > 0).sum(-1)
        seen.append((int(kept.min()), int(kept.max())))
        if kept.max() == 1:
            torch.testing.assert_close(weight.max(-1).values, mixture.probs.max(-1).values)
        else:
            torch.testing.assert_close(weight.sum(-1), torch.ones(weight.shape[:2]))
        expected = 0.5 + 1.5 * 2 ** (-(len(seen)) / 2)
        assert method.routed.running.phase.temperature == pytest.approx(expected)
        method.experts.roster.age += 1
    assert seen == [(3, 3)] * 3 + [(2, 2)] * 2 + [(1, 1)] * 2


def test_the_plans_dense_phase_keeps_every_gate_while_one_is_young() -> None:
    model, anatomy = model_of()
    method = attached(anatomy, experts=3, maturity_steps=4, dense_phase=True)
    method.experts.roster.age.fill_(50)
    method.experts.add()
    model.train()
    model(**batch_of())
    assert method.routed.running is not None
    (mixture,) = method.routed.running.mixtures.values()
    assert mixture.gates.chosen is None and mixture.gates.weight.shape[-1] == 4


def test_eviction_takes_everything_of_one_expert_and_nothing_of_another() -> None:
    """expert_1 and expert_10 never mix."""
    model, anatomy = model_of()
    method = attached(anatomy, experts=11, r=1, alpha=1)
    method.stream.library.add(1, torch.randn(4, anatomy.hidden_size), torch.ones(4))
    method.stream.library.add(10, torch.randn(4, anatomy.hidden_size), torch.ones(4))
    kept = {
        n: t.clone() for n, t in method.state_dict().items() if "experts.10." in n or n.endswith("rows.10")
    }
    assert len(kept) == 2 * 16 + 1
    batch = batch_of()
    method.set_routing("expert:10")
    before = logits_of(model, **batch)
    method.experts.evict(1)
    state = method.state_dict()
    assert not any(".experts.1." in n or n.endswith("rows.1") for n in state)
    assert all(torch.equal(state[n], t) for n, t in kept.items())
    assert method.stream.library.experts == [10] and len(method.experts.roster.age) == 10
    assert torch.equal(logits_of(model, **batch), before)
    with pytest.raises(ConfigError, match="there is no expert '1'"):
        method.set_routing("expert:1")
    with pytest.raises(ConfigError, match="trains"):
        method.experts.evict(method.experts.current)
    assert method.experts.add() == 11, "a number is never used twice"


def test_a_saved_method_is_built_again_strictly() -> None:
    model, anatomy = model_of()
    method = grown(anatomy, gate_projection=3)
    method.experts.widen(2)
    method.experts.freeze(1, ["0/self_attn/q_proj"])
    method.experts.roster.infos[2].skills.append("sorting")
    batch = batch_of()
    wanted = logits_of(model, **batch)
    structure, state = method.structure(), {n: t.clone() for n, t in method.state_dict().items()}
    method.detach()
    stack = build_methods({"methods": {"lora_experts": structure}})
    (again,) = stack
    assert isinstance(again, LoraExperts)
    again.load_state_dict(state, strict=True)
    again.attach(anatomy)
    again.eval()
    assert torch.equal(logits_of(model, **batch), wanted)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in method.named_parameters()}
    assert again.experts.number_of("sorting") == 2
    with pytest.raises(RuntimeError, match="experts"):
        again.load_state_dict({n: t for n, t in state.items() if "experts.1." not in n}, strict=True)
    again.detach()
    _, other_anatomy = model_of("gpt2")
    with pytest.raises(ModelError, match="made for another model"):
        again.attach(other_anatomy)


def test_it_stands_beside_a_peft_adapter() -> None:
    """The sum of both contributions, on the same linears."""
    model, anatomy = model_of(lora=True)
    batch = batch_of()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    with_adapter = logits_of(model, **batch)
    method = attached(anatomy, r=4)
    both = logits_of(model, **batch)
    assert not torch.equal(both, with_adapter)
    merged = model.merge_and_unload()
    method.detach()
    again = attached(describe(merged), r=4)
    torch.testing.assert_close(logits_of(merged, **batch), both, atol=1e-4, rtol=1e-4)
    assert len(again.experts.banks) == len(method.experts.banks)


def test_capacity_binds_in_training_only_and_drops_to_the_base() -> None:
    model, anatomy = model_of()
    method = grown(anatomy, capacity_factor=0.25)
    batch = batch_of()
    evaluated = logits_of(model, **batch)
    model.train()
    model(**batch)
    assert method.routed.running is not None
    (mixture,) = method.routed.running.mixtures.values()
    valid = batch["attention_mask"].bool()
    limit = -(-0.25 * 2 * int(valid.sum()) // 4)
    assert ((mixture.gates.weight > 0) & valid[..., None]).sum((0, 1)).max() <= limit
    assert mixture.dropped is not None and 0.5 < float(mixture.dropped) < 1
    model.eval()
    assert torch.equal(logits_of(model, **batch), evaluated)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"features": "block 9"}, "the model has 4 blocks"),
        ({"features": "blok 1"}, "choose embedding, prepass or 'block <k>'"),
        ({"temperature_min": 3.0}, "exceeds temperature_start"),
        ({"router": "sum", "gate_projection": 2}, "needs router: learned"),
        ({"freeze_after": 2, "freeze_first": ["up_proj"]}, "has no experts"),
        ({"spawn": {"policy": "alwys"}}, "did you mean 'always'"),
        ({"combine": "logits"}, "N key-value caches"),
        ({"burst": 4}, "needs spawn.policy: novelty"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], said: str) -> None:
    _, anatomy = model_of()
    with pytest.raises((ConfigError, ModelError), match=said):
        LoraExperts(**options).attach(anatomy)


def test_caps_are_errors_unless_eviction_makes_room() -> None:
    _, anatomy = model_of()
    method = attached(anatomy, spawn={"policy": "always", "max_experts": 2})
    method.experts.add()
    with pytest.raises(ConfigError, match="max_experts=2"):
        method.experts.add()
    method.detach()
    size = method.experts.size(8)
    tight = attached(anatomy, experts=2, max_parameters=2 * size, new_r=8, evict=True)
    tight.experts.roster.usage.copy_(torch.tensor([0.1, 0.9]))
    tight.experts.current = 1
    tight.experts.add()
    assert [info.number for info in tight.experts.roster] == [1, 2] and tight.experts.total_size() == 2 * size


def test_what_is_frozen_in_part_trains_the_rest() -> None:
    """The group holds exactly the factors that are Parameters: of none, some and all of an expert's linears frozen."""
    _, anatomy = model_of()
    method = attached(anatomy, experts=3, spawn={"policy": "always", "max_experts": 3}, freeze_others=False)
    experts = method.experts
    experts.freeze(1, experts.sites_named(["q_proj"]))
    experts.freeze(2)
    trained = method.parameter_groups()["experts"]
    assert {id(p) for p in trained} == {id(p) for p in experts.banks.parameters()}
    counts = [len(experts.live_factors(number)) for number in range(3)]
    assert counts[0] == 2 * len(experts.banks) > counts[1] > counts[2] == 0
