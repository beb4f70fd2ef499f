"""What a route is made of, by hand: documents, prefixes, masks, and the price of entropy."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from headgate.methods.context import Context, Places
from headgate.methods.layer_routing import phases
from headgate.methods.layer_routing.budget import Budget
from headgate.methods.layer_routing.config import LayerRoutingConfig
from headgate.methods.layer_routing.figures import telemetry
from headgate.methods.layer_routing.kv import without_closed
from headgate.methods.layer_routing.opened import HostGates
from headgate.methods.layer_routing.policies import _spread, route_losses
from headgate.methods.layer_routing.route import Route
from headgate.methods.layer_routing.shares import Shares
from headgate.modules.layer_router import LayerRouter
from headgate.ops.layer_gates import hashed_uniform


def test_a_packed_document_of_one_token_is_padding_and_one_of_two_is_not() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0]])
    context = Context.read({"input_ids": torch.arange(7)[None], "position_ids": positions})
    assert context.valid.tolist() == [[True] * 5 + [False] * 2]
    assert context.document.tolist() == [[0, 0, 0, 1, 1, 2, 3]]
    assert context.offset.tolist() == positions.tolist()


def test_documents_of_different_rows_never_share_a_number() -> None:
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    context = Context.read({"input_ids": torch.ones(2, 4, dtype=torch.long), "position_ids": positions})
    assert context.valid.all()
    assert context.document.tolist() == [[0, 0, 1, 1], [4, 4, 4, 4]] and context.num_documents == 8


def test_the_prefix_runs_at_full_depth_and_is_not_the_routes_to_decide() -> None:
    valid = torch.tensor([[True, True, True, False]])
    places = Places(valid, torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None])
    context = Context(places, None, 1, 1, None)
    weight, free = _spread(torch.tensor([[0.0, 0.25]]), context, 2)
    assert weight.tolist() == [[[1.0, 1.0], [1.0, 1.0], [0.0, 0.25], [0.0, 0.25]]]
    assert free.tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("boolean", [True, False])
def test_a_closed_token_is_seen_by_itself_only(boolean: bool) -> None:
    """Causal, closed columns shut, the diagonal open: 0 or True where seen, the lowest number or False elsewhere."""
    opened = torch.tensor([[True, False, True]])
    x = torch.zeros(1, 3, 4)
    seen = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
    mask = without_closed(None, opened, x, boolean=boolean)[0, 0]
    wanted = seen if boolean else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    assert torch.equal(mask, wanted)
    # a mask of the model's own keeps what it shut; a query of padding still sees itself
    own = torch.zeros(1, 1, 3, 3) if not boolean else torch.ones(1, 1, 3, 3, dtype=torch.bool)
    own[..., 0] = torch.finfo(torch.float32).min if not boolean else False
    found = without_closed(own, opened, x, boolean=boolean)[0, 0]
    shut = torch.tensor([[True, False, True], [False, True, True], [False, False, True]])
    assert torch.equal(found == 0 if not boolean else found, shut)


def test_one_new_token_of_a_cache_sees_itself_and_open_keys_only() -> None:
    opened = torch.tensor([[True, False, True, False]])
    mask = without_closed(None, opened, torch.zeros(1, 1, 4), boolean=True)
    assert mask.tolist() == [[[[True, False, True, True]]]]


def test_an_entropy_bonus_lowers_the_loss_of_undecided_gates() -> None:
    """-bonus times the mean binary entropy in nats: ln 2 a gate at logit 0, and its gradient pulls logits towards 0."""
    config = LayerRoutingConfig(policy="gumbel", granularity="token", entropy_bonus=0.1)
    context = SimpleNamespace(valid=torch.ones(1, 2, dtype=torch.bool))
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    undecided = route_losses(config, Route(torch.ones(1, 2, 3), context, logits))["routing_entropy"]
    assert float(undecided) == pytest.approx(-0.1 * math.log(2))
    logits = torch.tensor([[[2.0, -1.0, 0.5], [0.1, 3.0, -2.0]]], requires_grad=True)
    p = torch.sigmoid(logits)
    by_hand = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    found = route_losses(config, Route(torch.ones(1, 2, 3), context, logits))["routing_entropy"]
    torch.testing.assert_close(found, -0.1 * by_hand)
    (gradient,) = torch.autograd.grad(found, logits)
    assert bool((gradient.sign() == logits.sign()).all())


def test_the_entropy_that_is_logged_is_a_share_of_the_most_there_can_be() -> None:
    """1 where every gate is undecided, 0 where all are decided, in between by hand in bits."""
    valid = torch.ones(1, 2, dtype=torch.bool)
    places = Places(valid, torch.zeros(1, 2, dtype=torch.long), torch.arange(2)[None])
    context = Context(places, None, 1, 1, None)

    def logged(logits: torch.Tensor) -> float:
        return float(telemetry(Route((logits > 0).float(), context, logits))["routing/entropy"])

    assert logged(torch.zeros(1, 2, 3)) == pytest.approx(1.0)
    assert logged(torch.full((1, 2, 3), 40.0)) == pytest.approx(0.0, abs=1e-6)
    quarter = torch.full((1, 2, 3), math.log(1 / 3))  # p = 1/4
    assert logged(quarter) == pytest.approx(0.25 * 2 + 0.75 * math.log2(4 / 3))


@pytest.mark.parametrize("target", [0.5, 0.75, 1.0])
def test_gates_open_at_their_share_make_the_target_of_the_whole_depth(target: float) -> None:
    """Two of six blocks always run; the others share the rest alike."""
    shares = Shares(torch.full((4,), 1 / 6), 2 / 6, 0.03, 0.0, 6)
    assert float(shares.used_at(torch.full((4,), shares.of_gates(target)))) == pytest.approx(target)


def test_the_draw_is_splitmix64() -> None:
    """Steele, Lea and Flood (2014): a golden-ratio sequence, two rounds of shift, xor and multiply, a last shift and xor."""
    mask = 2**64 - 1
    for key, seed in ((0, 0), (1, 5), (123_456_789, 987_654_321)):
        drawn = hashed_uniform(torch.tensor([key]), 3, seed)[0]
        for index in range(3):
            z = (key * 0x2545F4914F6CDD1D + (index + 1) * 0x9E3779B97F4A7C15 + seed) & mask
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
            z ^= z >> 31
            assert float(drawn[index]) == (z % 2**24) / 2**24


def test_a_threshold_counts_what_runs_whatever_it_is() -> None:
    """3/4 of 6 blocks for 16 tokens are 72; 32 run without a gate, 16 of a prefix of four: 24 of the 48 others are left."""
    budget = Budget(LayerRoutingConfig(policy="gumbel", target_utilization=0.75))
    context = Context.read({"input_ids": torch.ones(1, 16, dtype=torch.long)})
    logits = torch.zeros(1, 16, 4)
    logits[0, 4:] = torch.arange(48.0).view(12, 4)
    route = Route(torch.ones(1, 16, 4), context, logits=logits, routed=context.offset >= 4)
    step = SimpleNamespace(sum_across_ranks=lambda summed: summed)
    budget.observe(route, step, Shares(torch.full((4,), 1 / 6), 2 / 6, 0.03, 0.0, 6))
    budget.update(step)
    assert float(budget.threshold) == 23.5


def test_the_temperature_falls_with_the_epochs_to_its_floor_and_is_the_first_before_any() -> None:
    budget = Budget(LayerRoutingConfig(temperature=2.0, temperature_decay=0.5, temperature_floor=0.3))
    assert budget.temperature(None) == 2.0
    found = [budget.temperature(SimpleNamespace(epoch=epoch)) for epoch in (0.0, 1.0, 2.0, 3.0)]
    assert found == [2.0, 1.0, 0.5, 0.3]


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_host_knows_of_every_block_whether_it_runs(tokens: int) -> None:
    gates = HostGates(torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.0]).expand(2, tokens, 6))
    assert [gates.kind(g, g + 1) for g in range(6)] == ["open", "closed", "full", "open", "open", "closed"]
    assert [gates.kind(g, g + 2) for g in range(5)] == ["mixed", "mixed", "mixed", "open", "mixed"]


@pytest.mark.parametrize(("policy", "engine"), [("gumbel", "masked"), ("exit", "masked"), ("topk", "sparse")])
def test_gates_that_learn_while_closed_run_masked_unless_told_otherwise(policy: str, engine: str) -> None:
    assert LayerRoutingConfig(policy=policy).train_engine_for() == engine
    assert LayerRoutingConfig(policy=policy, train_engine="masked").train_engine_for() == "masked"


def test_a_stage_of_ours_is_a_phase_and_others_are_none() -> None:
    ours, other = (SimpleNamespace(options=options) for options in ({phases.KEY: phases.TRIAL}, {}))
    assert [phases.phase_of(stage) for stage in (ours, other, None)] == [phases.TRIAL, None, None]


def test_a_router_narrows_to_a_half_and_a_quarter() -> None:
    found = [tuple(layer.weight.shape) for layer in LayerRouter(8, 3).layers if isinstance(layer, nn.Linear)]
    assert found == [(4, 8), (2, 4), (3, 2)]


@pytest.mark.parametrize(("used", "said"), [(0.0, False), (0.1015625, True)])
def test_a_budget_is_met_up_to_a_twentieth(used: float, said: bool) -> None:
    budget = Budget(LayerRoutingConfig(policy="gumbel", target_utilization=0.05))
    budget.updates += 1
    budget.utilization.fill_(used)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        budget.warn_if_unmet()
    assert bool(heard) is said
