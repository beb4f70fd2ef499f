"""Laws of skill embeddings, thresholds and intervals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headgate.ops import novelty as N


def draws(count: int, width: int = 16, spread: float = 0.4, centre: int = 0, seed: int = 0) -> torch.Tensor:
    """Samples of one synthetic skill: a unit centre plus Gaussian noise."""
    stream = torch.Generator().manual_seed(seed)
    mean = torch.zeros(width)
    mean[centre] = 1.0
    return mean + spread * torch.randn(count, width, generator=stream)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 5), st.integers(0, 99))
def test_padding_never_enters_an_embedding(rows: int, length: int, pad: int, seed: int) -> None:
    """Documents' means equal an explicit loop, whatever stands on the padding and however much there is."""
    stream = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length + pad, 3, generator=stream)
    documents = torch.randint(0, 3, (rows, length + pad), generator=stream)
    documents[:, length:] = -1
    hidden[:, length:] = float("nan")
    means, tokens = N.document_means(hidden, documents)
    expected = [
        hidden[b, documents[b] == d] for b in range(rows) for d in range(3) if bool((documents[b] == d).any())
    ]
    assert tokens.tolist() == [len(e) for e in expected]
    torch.testing.assert_close(means, torch.stack([e.mean(0) for e in expected]))


@given(st.permutations(range(12)))
def test_order_of_samples_does_not_matter(order: list[int]) -> None:
    means, tokens = draws(12), torch.arange(1, 13)
    torch.testing.assert_close(N.token_mean(means[order], tokens[order]), N.token_mean(means, tokens))


def test_the_skill_embedding_is_the_mean_over_tokens() -> None:
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0, 0, 0, 0, 0], [0, 0, -1, -1, -1], [0, -1, -1, -1, -1]])
    torch.testing.assert_close(
        N.token_mean(*N.document_means(hidden, documents)), hidden[documents >= 0].mean(0)
    )


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_threshold_falls_with_the_library_and_stays_between_its_bounds(
    k: int, base: float, delta: float
) -> None:
    lowest = base - 0.3
    found, later = (N.threshold_schedule(n, base, delta, lowest) for n in (k, k + 1))
    assert lowest <= later <= found <= base
    if base - delta * math.log1p(k) > lowest:
        assert found == pytest.approx(base - delta * math.log1p(k))


def test_interval_contains_the_value_and_narrows_with_samples() -> None:
    prototype, reference = draws(4000).mean(0)[None], torch.zeros(16)
    widths = []
    for count in (16, 64, 256):
        means, tokens = draws(count, seed=1), torch.ones(count)
        value = float(N.cosines(N.token_mean(means, tokens), prototype, reference))
        looks = N.bootstrap_means(means, tokens, 400, torch.Generator().manual_seed(2))
        low, high = N.interval(value, N.cosines(looks, prototype, reference)[:, 0], 0.95)
        assert low <= value <= high
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2]


def test_halves_are_disjoint_and_complete() -> None:
    means, tokens = torch.eye(9), torch.arange(1.0, 10.0)
    first, second = N.split_half_means(means, tokens, 20, torch.Generator().manual_seed(0))
    assert bool(((first > 0) != (second > 0)).all())
    assert (first > 0).sum(1).tolist() == [4] * 20


def test_calibrated_threshold_lies_above_the_most_similar_other_skill() -> None:
    within = torch.linspace(0.9, 1.0, 200)
    known = float(torch.quantile(within.double(), 0.02))
    alone, near, far = (N.calibrated_threshold(within, others, 0.02) for others in ([], [0.89], [0.1, -0.5]))
    assert 0.89 < near < known and alone < near
    assert far == alone  # a distant skill says nothing about the next one


def test_rescaled_similarity_predicts_looks_of_another_size() -> None:
    """1 - cos between looks of n1 and n2 samples grows as 1/n1 + 1/n2."""
    small = [draws(16, spread=0.3, seed=s).mean(0) for s in range(400)]
    large = [draws(64, spread=0.3, seed=1000 + s).mean(0) for s in range(400)]
    measured_small = N.paired_cosines(torch.stack(small[::2]), torch.stack(small[1::2]), torch.zeros(16))
    measured_large = N.paired_cosines(torch.stack(large[::2]), torch.stack(large[1::2]), torch.zeros(16))
    predicted = N.rescaled_similarity(measured_small, 16, (64, 64))
    assert float(1 - predicted.mean()) == pytest.approx(float(1 - measured_large.mean()), rel=0.15)
