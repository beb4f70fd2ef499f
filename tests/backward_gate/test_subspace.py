"""Frequent Directions' bound, the bisector's closed form, novelty's range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.modules.accepted_subspace import AcceptedSubspace
from headgate.ops import subspace


def stream(kind: str, n: int, m: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randn(n, m, generator=g).double()
    if kind == "decaying":
        return (torch.randn(n, m, generator=g) * 0.7 ** torch.arange(m)).double()
    if (
        kind == "switching"
    ):  # each direction arrives in one burst, larger and larger: hard for a forgetful sketch
        return torch.stack([(1 + t / n) * torch.eye(m)[(t * m) // n] for t in range(n)]).double()
    return (torch.eye(m)[torch.arange(n) % m] + 1e-3 * torch.randn(n, m, generator=g)).double()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["random", "decaying", "switching", "cyclic"]),
    st.integers(20, 120),
    st.integers(6, 24),
    st.integers(2, 8),
    st.integers(0, 1000),
)
def test_libertys_bound(kind, n, m, ell, seed):
    a = stream(kind, n, m, seed)
    buffer, rows = torch.zeros(2 * ell, m, dtype=torch.float64), 0
    for row in a:
        if rows == 2 * ell:
            buffer, rows = subspace.shrink(buffer, ell), ell - 1
        buffer[rows] = row
        rows += 1
    difference = torch.linalg.matrix_norm(a.T @ a - buffer.T @ buffer, 2)
    singular = torch.linalg.svdvals(a).square()
    for k in range(ell):
        assert difference <= singular[k:].sum() / (ell - k) + 1e-6 * singular.sum()


def test_the_module_is_the_sketch_it_says(seed=0):
    module = AcceptedSubspace(24, 3, refresh=1)
    a = torch.nn.functional.normalize(stream("random", 90, 24, seed).float(), dim=1)
    for row in a:
        module.update(row)
    difference = torch.linalg.matrix_norm(a.T @ a - module.buffer_RM.T @ module.buffer_RM, 2)
    singular = torch.linalg.svdvals(a).square()
    assert difference <= singular[3:].sum() / (module.sketch_rows - 3) + 1e-3
    basis = module.basis_MK
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("basis", ["frequent_directions", "bisector"])
def test_basis_stays_orthonormal_and_finds_a_planted_subspace(basis):
    g = torch.Generator().manual_seed(2)
    planted = torch.linalg.qr(torch.randn(40, 4, generator=g))[0]
    module = AcceptedSubspace(40, 4, basis=basis, refresh=4, reorthonormalize_every=16)
    for _ in range(150):
        z = planted @ torch.randn(4, generator=g)
        module.update(subspace.unit(z))
    gram = module.basis_MK.T @ module.basis_MK
    torch.testing.assert_close(gram, torch.eye(4), atol=1e-4, rtol=0)
    inside = subspace.unit(planted @ torch.randn(4, generator=g))
    assert module.novelty(inside) < 1e-3
    outside = subspace.unit(torch.randn(40, generator=g) - 0)
    outside = subspace.unit(outside - planted @ (planted.T @ outside))
    assert module.novelty(outside) > 0.999


def test_frequent_directions_keeps_what_the_recency_tracker_forgets():
    """Frequent old directions survive a burst of noise in one and not in the other."""
    g = torch.Generator().manual_seed(0)
    kept = {}
    for basis in ("frequent_directions", "bisector"):
        module = AcceptedSubspace(64, 4, basis=basis)
        for t in range(100):
            module.update(torch.eye(64)[t % 4])
        for _ in range(24):
            module.update(subspace.unit(torch.randn(64, generator=g)))
        kept[basis] = float(torch.stack([1 - module.novelty(torch.eye(64)[i]) for i in range(4)]).mean())
    assert kept["frequent_directions"] > 0.95
    assert kept["bisector"] < 0.5


def test_decay_forgets():
    module = AcceptedSubspace(16, 2, decay=0.5, refresh=1)
    for t in range(40):
        module.update(torch.eye(16)[t % 2])
    for t in range(40):
        module.update(torch.eye(16)[8 + t % 2])
    assert module.novelty(torch.eye(16)[0]) > 0.99
    assert module.novelty(torch.eye(16)[8]) < 0.01


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 20), st.integers(1, 6), st.integers(0, 999))
def test_the_bisector_is_the_truncated_svd(m, k, seed):
    k = min(k, m - 1)
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]
    z = subspace.unit(torch.randn(m, generator=g, dtype=torch.float64))
    ours = subspace.bisector_update(z, basis)
    u = torch.linalg.svd(torch.cat([basis, z[:, None]], 1), full_matrices=False)[0][:, :k]
    torch.testing.assert_close(ours.T @ ours, torch.eye(k, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours @ ours.T, u @ u.T, atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 999))
def test_novelty_lies_between_0_and_1_and_is_blind_to_sign(m, k, seed):
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(m, min(k, m), generator=g))[0]
    z = subspace.unit(torch.randn(m, generator=g))
    value = subspace.gradient_novelty(z, basis)
    assert 0 <= value <= 1
    torch.testing.assert_close(value, subspace.gradient_novelty(-z, basis))
    assert subspace.gradient_novelty(basis[:, 0], basis) < 1e-5


def test_isotropic_novelty_is_one_minus_k_over_m():
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 16, generator=g))[0]
    z = subspace.unit(torch.randn(4000, 64, generator=g))
    assert abs(float(subspace.gradient_novelty(z, basis).mean()) - 0.75) < 0.01


def test_orthonormalize_mends_drift_and_leaves_unused_columns_zero():
    g = torch.Generator().manual_seed(0)
    basis = torch.zeros(20, 5)
    basis[:, :3] = torch.linalg.qr(torch.randn(20, 3, generator=g))[0]
    mended = subspace.orthonormalize(basis + 1e-3 * (basis != 0) * torch.randn(20, 5, generator=g))
    torch.testing.assert_close(mended[:, :3].T @ mended[:, :3], torch.eye(3), atol=1e-6, rtol=0)
    assert (mended[:, 3:] == 0).all()
    assert (mended - basis).abs().max() < 0.02
