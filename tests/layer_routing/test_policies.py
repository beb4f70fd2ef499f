"""Who sees what: permutation, padding, packing, causality and caches, for every policy at inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headgate.errors import ConfigError, ModelError
from headgate.methods.layer_routing import LayerRouting

from .conftest import attach, batch_of, model_of

POLICIES: dict[str, dict[str, Any]] = {
    "stochastic_depth": {"policy": "stochastic_depth"},
    "truncate": {"policy": "truncate", "target_utilization": 0.5},
    "static": {"policy": "static", "skip": [2]},
    "random_token": {"policy": "random"},
    "random_sample": {"policy": "random", "granularity": "sample"},
    "gumbel_sample": {"policy": "gumbel"},
    "gumbel_token": {"policy": "gumbel", "granularity": "token"},
    "gumbel_units": {"policy": "gumbel", "granularity": "token", "units": "attention_mlp"},
    "embedding": {"policy": "gumbel", "features": "embedding"},
    "exit": {"policy": "exit"},
    "reinforce": {"policy": "reinforce"},
    "topk": {"policy": "topk"},
    "prepass_token": {"policy": "gumbel", "granularity": "token", "features": "prepass"},
    "prepass_sample": {"policy": "gumbel", "features": "prepass"},
    "drop_token": {"policy": "gumbel", "granularity": "token", "kv": "drop"},
    "drop_sample": {"policy": "gumbel", "kv": "drop"},
    "reuse_token": {"policy": "gumbel", "granularity": "token", "kv": "reuse"},
    "patch_token": {"policy": "gumbel", "granularity": "token", "patch": {"rank": 4}},
    "patch_sample": {"policy": "gumbel", "patch": {"rank": 4}, "units": "attention_mlp"},
    "reuse_exit": {"policy": "exit", "kv": "reuse", "units": "attention_mlp"},
}


def routed(name: str, family: str = "llama") -> tuple[Any, LayerRouting]:
    """A model with a router that distinguishes tokens: random weights, thresholds in the middle."""
    model, _, anatomy = model_of(family)
    method = LayerRouting(keep=1, prefix_tokens=3, **{"target_utilization": 0.6, **POLICIES[name]})
    method.seed = 3
    attach(method, anatomy)
    if method.router is not None:
        stream = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for patch in method.patches:
                patch.up.copy_(torch.randn(patch.up.shape, generator=stream) * 0.2)
            for parameter in method.router.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=stream))
            method.router.layers[-1].bias.zero_()
    return model, method


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


@pytest.mark.parametrize("name", POLICIES)
def test_rows_do_not_meet(name: str) -> None:
    """Permuting the batch permutes the output; padding and other rows change nothing."""
    model, method = routed(name)
    batch = batch_of(4, 12)
    whole, mask = logits(model, batch), batch["attention_mask"].bool()
    opened = method.route.weight.clone()
    if method.router is not None and name != "topk":
        assert 0 < float((opened != 0).float().mean()) < 1, "the case is trivial: all gates alike"
    order = torch.tensor([2, 0, 3, 1])
    permuted = logits(model, {k: v[order] for k, v in batch.items()})
    torch.testing.assert_close(permuted[mask[order]], whole[order][mask[order]], atol=1e-5, rtol=1e-5)
    for row in range(4):
        size = int(mask[row].sum())
        alone = logits(model, {"input_ids": batch["input_ids"][row : row + 1, :size]})
        torch.testing.assert_close(alone[0], whole[row, :size], atol=1e-5, rtol=1e-5)
        left = {
            "input_ids": torch.nn.functional.pad(batch["input_ids"][row : row + 1, :size], (3, 0), value=1),
            "attention_mask": torch.tensor([[0] * 3 + [1] * size]),
            "position_ids": torch.tensor([[0] * 3 + list(range(size))]),
        }
        torch.testing.assert_close(logits(model, left)[0, 3:], whole[row, :size], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_the_future_changes_nothing(name: str) -> None:
    model, _ = routed(name)
    ids = batch_of(2, 12, padded=False)["input_ids"]
    other = ids.clone()
    other[:, 7:] = ids[:, 7:].flip(1) + 1
    a, b = logits(model, {"input_ids": ids}), logits(model, {"input_ids": other})
    torch.testing.assert_close(a[:, :7], b[:, :7], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(a[:, 7:], b[:, 7:], atol=1e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_packed_documents_are_documents(name: str) -> None:
    model, _ = routed(name)
    ids = batch_of(1, 14, padded=False)["input_ids"]
    cut = 8
    positions = torch.tensor([[*range(cut), *range(14 - cut)]])
    packed = logits(model, {"input_ids": ids, "position_ids": positions})
    for piece, place in ((ids[:, :cut], slice(0, cut)), (ids[:, cut:], slice(cut, 14))):
        torch.testing.assert_close(
            packed[:, place], logits(model, {"input_ids": piece}), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("prompt", [1, 5])
def test_decoding_is_the_recompute(name: str, prompt: int) -> None:
    """Token by token with a cache equals one forward; a prompt shorter than the prefix too."""
    model, _ = routed(name)
    ids = batch_of(2, 9, padded=False)["input_ids"]
    whole = logits(model, {"input_ids": ids})
    cache, pieces = None, []
    with torch.no_grad():
        for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, 9))]:
            out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_generate_is_greedy_over_the_recompute(name: str) -> None:
    model, _ = routed(name)
    batch = batch_of(2, 6, left=True)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(**batch, **options)
    for row in range(2):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].unsqueeze(0)
        for token in made[row, 6:]:
            best = logits(model, {"input_ids": ids})[0, -1]
            assert best[token] >= best.max() - 1e-4
            ids = torch.cat([ids, token.view(1, 1)], 1)


BEAMS = ["gumbel_sample", "exit", "random_sample", "prepass_sample", "drop_token", "reuse_token"]


@pytest.mark.parametrize("name", BEAMS)
def test_beam_search_reorders_routes(name: str) -> None:
    """With a prompt shorter than the prefix beams may part before their route is fixed: scores stay exact."""
    model, _ = routed(name)
    ids = batch_of(2, 2, padded=False)["input_ids"]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        num_beams=4,
        pad_token_id=0,
        eos_token_id=None,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row in range(2):
        chain = logits(model, {"input_ids": out.sequences[row : row + 1]})[0].log_softmax(-1)
        exact = sum(float(chain[i - 1, out.sequences[row, i]]) for i in range(2, 8))
        assert float(out.sequences_scores[row]) == pytest.approx(exact, abs=1e-3)


def test_exit_is_monotone_and_random_holds_its_share() -> None:
    model, method = routed("exit")
    ids = batch_of(8, 32, padded=False)["input_ids"]
    logits(model, {"input_ids": ids})
    gates = method.route.weight
    assert (gates[..., 1:] <= gates[..., :-1]).all() and 0 < gates.mean() < 1
    model, method = routed("random_token")
    logits(model, {"input_ids": batch_of(16, 100, padded=False)["input_ids"]})
    assert float(method.shares.used(method.route)) == pytest.approx(0.6, abs=0.02)


def test_stochastic_depth_scales_by_survival() -> None:
    """x + (1 - p)(F(x) - x) at inference; unscaled it is the full model."""
    model, method = routed("stochastic_depth")
    ids = {"input_ids": batch_of(1, 5, padded=False)["input_ids"]}
    scaled = logits(model, ids)
    assert torch.equal(method.route.weight.flatten(), torch.full((3,), 0.5))
    method.set_routing("removed")
    full = logits(model, ids)
    assert not torch.allclose(scaled, full, atol=1e-3)
    method.detach()
    unscaled = attach(LayerRouting(policy="stochastic_depth", keep=1, scaling=False), model_of()[2])
    assert unscaled.config.kd is False
    linear = LayerRouting(policy="stochastic_depth", keep=1, schedule="linear", drop_rate=0.6)
    linear._build(64, 4)
    torch.testing.assert_close(linear.fixed, torch.tensor([0.0, 0.3, 0.6]))


def test_shuffled_keeps_utilization() -> None:
    model, method = routed("gumbel_token")
    batch = batch_of(4, 12)
    before = logits(model, batch)
    used = method.shares.used(method.route)
    method.set_routing("shuffled")
    after = logits(model, batch)
    assert float(method.shares.used(method.route)) == pytest.approx(float(used)) and not torch.allclose(
        before, after
    )
    with pytest.raises(ModelError, match="shuffled"):
        model.generate(input_ids=batch["input_ids"], max_new_tokens=3, pad_token_id=0)
    with pytest.raises(ConfigError, match="on, removed, shuffled"):
        method.set_routing("dense")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 4}, "leave none of the 4 blocks"),
        ({"keep": 3, "target_utilization": 0.5}, "always-run"),
        ({"policy": "static", "skip": [0], "keep": 1}, "not routable"),
        ({"policy": "exit", "granularity": "sample"}, "routes per token"),
        ({"policy": "gumbel", "skip": [1]}, "policy static"),
        ({"polic": "gumbel"}, "polic"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerRouting(**options)._build(64, 4)


def test_a_router_of_another_model_is_refused() -> None:
    method = LayerRouting(keep=1)
    method._build(32, 6)
    with pytest.raises(ModelError, match="6 blocks of width 32"):
        method.attach(model_of()[2])
