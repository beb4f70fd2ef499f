"""Laws of router supervision, balance and statistics: pads count for nothing, references agree."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headgate.ops import gating as G
from headgate.ops import routing_losses as R


def ragged(seed: int, experts: int = 5, batch: int = 3, tokens: int = 6) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=stream)
    z = torch.randn(batch, tokens, experts, generator=stream, dtype=torch.float64)
    return z, torch.arange(tokens) < lengths


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4))
def test_padding_changes_nothing(seed: int, extra: int) -> None:
    z, valid = ragged(seed)
    longer = torch.cat([z, torch.full((3, extra, 5), 1e9, dtype=z.dtype)], dim=1)
    longer[~torch.cat([valid, torch.zeros(3, extra, dtype=torch.bool)], dim=1)] = float("nan")
    mask = torch.cat([valid, torch.zeros(3, extra, dtype=torch.bool)], dim=1)
    for statistic in (
        lambda z, v: R.token_mean(z, v),
        lambda z, v: R.flat_mean(z, v),
        lambda z, v: torch.stack(R.routing_entropy(torch.softmax(z, -1), v)),
        lambda z, v: R.router_z_loss(z, v),
        lambda z, v: R.expert_load(torch.softmax(z, -1), v),
        lambda z, v: R.load_balance(torch.softmax(z, -1), torch.softmax(z, -1), v),
    ):
        torch.testing.assert_close(statistic(longer, mask), statistic(z, valid))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999))
def test_tag_loss_is_cross_entropy_of_the_mean_logits_of_kept_examples(seed: int) -> None:
    z, valid = ragged(seed)
    tags = torch.tensor([[1, 4], [2, -1], [-1, -1]])
    kept = torch.tensor([True, seed % 2 == 0, True])
    means = [z[i, valid[i]].mean(0) for i in range(3)]
    first = (F.cross_entropy(means[0], torch.tensor(1)) + F.cross_entropy(means[0], torch.tensor(4))) / 2
    second = F.cross_entropy(means[1], torch.tensor(2)) * (seed % 2 == 0)
    loss = R.tag_cross_entropy(R.token_mean(z, valid), tags, kept)
    torch.testing.assert_close(loss, (first + second) / 3)


def test_document_mean_is_the_mean_of_each_packed_document() -> None:
    z, _ = ragged(0, batch=2, tokens=5)
    segments = torch.tensor([[0, 0, 1, 1, -1], [2, 2, 2, 2, -1]])
    found = R.document_mean(z, segments, 3)
    for document, want in enumerate((z[0, :2], z[0, 2:4], z[1, :4])):
        torch.testing.assert_close(found[document], want.mean(0))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(2, 6))
def test_balance_is_one_when_balanced_and_grows_towards_n(seed: int, experts: int) -> None:
    valid = torch.ones(1, experts, dtype=torch.bool)
    even = torch.eye(experts, dtype=torch.float64).unsqueeze(0)
    torch.testing.assert_close(R.load_balance(even, even, valid), torch.tensor(1.0, dtype=torch.float64))
    one = torch.zeros_like(even)
    one[..., 0] = 1
    torch.testing.assert_close(R.load_balance(one, one, valid), torch.tensor(float(experts)).double())
    z, valid = ragged(seed, experts)
    gates = G.top_k_gates(z.requires_grad_(), 2)
    (gradient,) = torch.autograd.grad(R.load_balance(torch.softmax(z, -1), gates.weight, valid), z)
    assert (gradient[~valid] == 0).all()
    load = R.expert_load(gates.weight.detach() > 0, valid)
    balanced = bool(((load - 1 / experts).abs() < 1e-12).all())  # then there is nothing to push towards
    assert bool(gradient[valid].abs().max() > 1e-12) != balanced


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(2, 6))
def test_entropies_are_bounded_and_ordered(seed: int, experts: int) -> None:
    z, valid = ragged(seed, experts)
    h = R.routing_entropy(torch.softmax(z, -1), valid)
    assert 0 <= h.mean_of <= h.of_mean + 1e-12 <= math.log(experts) + 2e-12
    by_hand = torch.distributions.Categorical(logits=z[valid]).entropy().mean()
    torch.testing.assert_close(h.mean_of, by_hand)
    torch.testing.assert_close(h.of_mean_normalised, h.of_mean / math.log(experts))


def test_z_loss_is_the_mean_squared_logsumexp_of_real_tokens() -> None:
    """ST-MoE, equation 5, by a loop over tokens; logits that are sure of nothing but large cost all the same."""
    z, valid = ragged(3)
    by_hand = [math.log(sum(math.exp(v) for v in token)) ** 2 for token in z[valid].tolist()]
    wanted = torch.tensor(sum(by_hand) / len(by_hand), dtype=torch.float64)
    found = R.router_z_loss(z, valid)
    assert found.shape == ()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        R.router_z_loss(torch.full_like(z, 3.0), valid), torch.tensor((3 + math.log(5)) ** 2).double()
    )


def test_alignment_counts_examples_with_a_tag_among_the_best() -> None:
    means = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0.0, 0.0, 9.0]])
    tags = torch.tensor([[1, -1], [0, -1], [0, 2], [-1, -1]])
    torch.testing.assert_close(R.tag_alignment(means, tags, 2), torch.tensor(2 / 3))
    assert R.tag_alignment(means, torch.full((4, 1), -1), 2).isnan()


def test_reinforce_estimates_the_gradient_of_expected_reward() -> None:
    z = torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True)
    cost = torch.tensor([1.0, 3.0], dtype=torch.float64)
    p = torch.sigmoid(z)
    (exact,) = torch.autograd.grad(-(p * cost).sum(), z)
    many = z.expand(1, 200_000, 2)
    gates, log_prob = G.bernoulli_gates(many, torch.Generator().manual_seed(0))
    reward = (gates.weight * cost).sum(-1)
    (estimate,) = torch.autograd.grad(R.reinforce_loss(log_prob, reward - reward.mean()), z)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.02)
