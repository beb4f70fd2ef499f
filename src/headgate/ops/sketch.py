"""Count sketch and TensorSketch: a short vector that keeps inner products of outer products.

Shapes: N tokens, D features of the sketched vector, M sketch size, F = M // 2 + 1 frequencies, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headgate.ops.randomness import generator


def hash_tables(size: int, sketch_size: int, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    """``(bucket_D, sign_D)``: a uniform bucket in [0, M) and a fair sign (int8) for every coordinate.

    Drawn on the CPU, so that every device and rank has the same tables.
    """
    stream = generator(seed, 0, purpose)
    bucket_D = torch.randint(sketch_size, (size,), generator=stream)
    sign_D = torch.randint(2, (size,), generator=stream).mul(2).sub(1).to(torch.int8)
    return bucket_D, sign_D


def count_sketch(x_ND: Tensor, bucket_D: Tensor, sign_D: Tensor, sketch_size: int) -> Tensor:
    """``s[b] = sum of sign[d] x[d] over bucket[d] = b``, per row: ``E <s(x), s(y)> = <x, y>``.

    Charikar, Chen, Farach-Colton 2002. Returns ``[N, M]`` fp32.

    Equation: backward_gate (step 1): s(x)[b] = sum over bucket(d) = b of sign(d) x_d
    Proved by: tests/backward_gate/test_sketch.py::test_inner_products_are_unbiased_over_hash_seeds
    """
    signed_ND = x_ND.float() * sign_D
    s_NM = signed_ND.new_zeros(x_ND.shape[0], sketch_size)
    return s_NM.index_add_(1, bucket_D, signed_ND)


def signed_buckets(bucket_D: Tensor, sign_D: Tensor, sketch_size: int) -> Tensor:
    """Buckets in [0, 2M): those of negative sign are the upper half. For ``folded_count_sketch``."""
    return bucket_D + sketch_size * (sign_D < 0)


def folded_count_sketch(x_ND: Tensor, signed_bucket_D: Tensor, sketch_size: int) -> Tensor:
    """``count_sketch`` without a signed copy of x: sum by bucket and sign, then subtract the negative half."""
    x_ND = x_ND.float()
    s_N2M = x_ND.new_zeros(x_ND.shape[0], 2 * sketch_size).index_add_(1, signed_bucket_D, x_ND)
    return s_N2M[:, :sketch_size] - s_N2M[:, sketch_size:]


def sparse_count_sketch(
    value_NK: Tensor, index_NK: Tensor, bucket_D: Tensor, sign_D: Tensor, sketch_size: int
) -> Tensor:
    """``count_sketch`` of rows given by K coordinates each; an index may not occur twice with one meaning."""
    s_NM = value_NK.new_zeros(value_NK.shape[0], sketch_size, dtype=torch.float32)
    return s_NM.scatter_add_(1, bucket_D[index_NK], value_NK.float() * sign_D[index_NK])


def outer_spectrum(left_NM: Tensor, right_NM: Tensor) -> Tensor:
    """``sum_n rfft(left_n) rfft(right_n)``, ``[F]`` complex: TensorSketches summed in the frequency domain.

    Pham and Pagh 2013: the sketch of ``x (x) y`` is the circular convolution of the count sketches of x and
    y. The transform is linear, so tokens are added here and one inverse transform serves the whole batch.

    Equation: backward_gate (step 1): z = irfft(sum_t rfft(s(h_t)) rfft(s(e_t)))
    Proved by: tests/backward_gate/test_sketch.py::test_the_convolution_is_the_count_sketch_of_the_outer_product
    Proved by: tests/backward_gate/test_sketch.py::test_a_batch_is_the_sum_of_its_tokens
    Proved by: tests/backward_gate/test_sketch.py::test_cosines_follow_the_exact_head_gradient
    """
    return (torch.fft.rfft(left_NM) * torch.fft.rfft(right_NM)).sum(0)


def grouped_outer_spectrum(left_NM: Tensor, right_NM: Tensor, group_N: Tensor, groups: int) -> Tensor:
    """``outer_spectrum`` per group of tokens: ``[G, F]`` complex (one sketch per sequence)."""
    product_NF = torch.view_as_real(torch.fft.rfft(left_NM) * torch.fft.rfft(right_NM))
    total = product_NF.new_zeros(groups, *product_NF.shape[1:]).index_add_(0, group_N, product_NF)
    return torch.view_as_complex(total)


def from_spectrum(spectrum_F: Tensor, sketch_size: int) -> Tensor:
    """The sketch ``z`` of a summed spectrum (last axis F -> M). Unbiased as it is: no 1/sqrt(M) factor."""
    return torch.fft.irfft(spectrum_F, n=sketch_size)
