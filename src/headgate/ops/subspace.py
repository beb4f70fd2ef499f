"""The subspace of accepted sketches: Frequent Directions, the bisector basis, and novelty against them.

Shapes: M sketch size, K directions kept, L sketch rows (the buffer has 2L), R rows of a buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_novelty(z_M: Tensor, basis_MK: Tensor) -> Tensor:
    """Share of a unit sketch outside the accepted subspace: ``1 - ||W^T z||^2``, in [0, 1].

    SLoRA, step 5. An isotropic z scores 1 - K/M, not 1; see ``ops.calibration``. Unused columns of the
    basis are zero and take no part.

    Equation: backward_gate (step 2): novelty = 1 - ||W^T z / |z| ||^2
    Proved by: tests/backward_gate/test_subspace.py::test_novelty_lies_between_0_and_1_and_is_blind_to_sign
    Proved by: tests/backward_gate/test_subspace.py::test_isotropic_novelty_is_one_minus_k_over_m
    """
    return (1 - (z_M @ basis_MK).square().sum(-1)).clamp(0, 1)


def unit(z_M: Tensor) -> Tensor:
    """``z / ||z||`` along the last axis; a zero vector stays zero."""
    norm = torch.linalg.vector_norm(z_M, dim=-1, keepdim=True)
    return z_M / norm.clamp(min=torch.finfo(z_M.dtype).tiny)


def shrink(buffer_RM: Tensor, rows: int) -> Tensor:
    """Frequent Directions' shrink: at most ``rows - 1`` nonzero rows remain, largest first.

    ``B = U S V^T  ->  sqrt(max(S^2 - s_L^2, 0)) V^T`` (Liberty 2013; Ghashami et al. 2016, Alg. 2.1 with a
    buffer of 2L rows). Every stream A then obeys ``||A^T A - B^T B||_2 <= ||A - A_k||_F^2 / (L - k)``.

    Equation: backward_gate (step 2): B = U S V^T -> sqrt(max(S^2 - s_l^2, 0)) V^T, Frequent Directions
    Proved by: tests/backward_gate/test_subspace.py::test_libertys_bound
    Proved by: tests/backward_gate/test_subspace.py::test_the_module_is_the_sketch_it_says
    """
    _, s, v = torch.linalg.svd(buffer_RM, full_matrices=False)
    delta = s[rows - 1].square() if s.numel() >= rows else s.new_zeros(())
    out = torch.zeros_like(buffer_RM)
    out[: s.numel()] = (s.square() - delta).clamp(min=0).sqrt()[:, None] * v
    return out


def top_directions(buffer_RM: Tensor, count: int) -> Tensor:
    """Orthonormal ``[M, K]`` leading right singular vectors of a buffer; columns of no weight are zero.

    Through the R x R Gram matrix in float64: R is small, and a rank-deficient buffer needs the head room.
    """
    double_RM = buffer_RM.double()
    weight_R, u_RR = torch.linalg.eigh(double_RM @ double_RM.T)
    weight_R, u_RR = weight_R.flip(0)[:count], u_RR.flip(1)[:, :count]
    kept = weight_R > weight_R[:1].clamp(min=0) * 1e-10
    v_MK = double_RM.T @ (u_RR * torch.where(kept, weight_R.clamp(min=1e-300).rsqrt(), 0.0))
    basis_MK = buffer_RM.new_zeros(buffer_RM.shape[1], count)
    basis_MK[:, : v_MK.shape[1]] = v_MK.to(buffer_RM.dtype)
    return basis_MK


def residual_direction(z_M: Tensor, basis_MK: Tensor) -> tuple[Tensor, Tensor]:
    """``(r, ||r||)`` with r the unit part of z outside the basis (Gram-Schmidt, twice for accuracy)."""
    r_M = z_M - basis_MK @ (z_M @ basis_MK)
    r_M = r_M - basis_MK @ (r_M @ basis_MK)
    return unit(r_M), torch.linalg.vector_norm(r_M)


def bisector_update(z_M: Tensor, basis_MK: Tensor) -> Tensor:
    """Turn the direction of the basis nearest to a unit z half-way towards z, in O(MK).

    The rank-K truncation of the SVD of ``[W, z]`` in closed form. Its singular values are 1 (K - 1 times)
    and sqrt(1 +- |c|), c = W^T z: the smallest goes, and of ``u = W c / |c|`` and z the bisector stays:
    ``W' = W + (b - u) (c/|c|)^T``. It tracks what came last, every direction at equal weight; it is not
    Frequent Directions. For z orthogonal to W (c = 0) the first column is the one that turns.

    Equation: backward_gate (step 2): W' = W + (b - u) (c / |c|)^T, with basis bisector
    Proved by: tests/backward_gate/test_subspace.py::test_the_bisector_is_the_truncated_svd
    """
    c_K = z_M @ basis_MK
    size = torch.linalg.vector_norm(c_K)
    first_K = torch.zeros_like(c_K)
    first_K[0] = 1
    c_K = torch.where(size > 1e-6, c_K / size.clamp(min=1e-6), first_K)
    u_M = basis_MK @ c_K
    b_M = unit(u_M + z_M)
    return basis_MK + torch.outer(b_M - u_M, c_K)


def orthonormalize(basis_MK: Tensor) -> Tensor:
    """The nearest orthonormal basis of the same span, zero columns left zero (polar factor).

    Rounding is all that an update leaves to correct, so ``W (W^T W)^(-1/2)`` moves no column visibly.
    """
    used_K = basis_MK.square().sum(0) > 0.25
    gram_KK = basis_MK.T.double() @ basis_MK.double() + torch.diag((~used_K).double())
    weight_K, q_KK = torch.linalg.eigh(gram_KK)
    root_KK = (q_KK * weight_K.clamp(min=1e-12).rsqrt()) @ q_KK.T
    return (basis_MK.double() @ root_KK).to(basis_MK.dtype) * used_K
