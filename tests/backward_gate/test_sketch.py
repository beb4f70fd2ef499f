"""TensorSketch: unbiased inner products, linearity, and agreement with the exact head gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.modules.head_sketch import HeadSketcher, top_errors
from headgate.ops import sketch


def tensor_sketch(h, e, m, seed):
    parts = []
    for x, name in ((h, "h"), (e, "e")):
        parts.append(sketch.count_sketch(x, *sketch.hash_tables(x.shape[1], m, seed, name), m))
    return sketch.from_spectrum(sketch.outer_spectrum(*parts), m)


@pytest.mark.parametrize("m", [8, 13])
def test_inner_products_are_unbiased_over_hash_seeds(m):
    g = torch.Generator().manual_seed(0)
    h, e, h2, e2 = (torch.randn(1, n, generator=g) for n in (6, 9, 6, 9))
    h2, e2 = h2 + h, e2 + e
    exact = float((h @ h2.T) * (e @ e2.T))
    found = torch.stack([tensor_sketch(h, e, m, s) @ tensor_sketch(h2, e2, m, s) for s in range(1500)])
    error = float(found.std() / math.sqrt(len(found)))
    assert abs(float(found.mean()) - exact) < 4 * error
    assert error < abs(exact)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(2, 40), st.integers(0, 99))
def test_a_batch_is_the_sum_of_its_tokens(tokens, m, seed):
    g = torch.Generator().manual_seed(seed)
    h, e = torch.randn(tokens, 5, generator=g), torch.randn(tokens, 11, generator=g)
    whole = tensor_sketch(h, e, m, 3)
    parts = sum(tensor_sketch(h[t : t + 1], e[t : t + 1], m, 3) for t in range(tokens))
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)


def test_the_convolution_is_the_count_sketch_of_the_outer_product():
    """Bucket (i, j) -> b_i + b_j mod m with sign s_i s_j, written out."""
    m, g = 7, torch.Generator().manual_seed(1)
    h, e = torch.randn(3, 4, generator=g), torch.randn(3, 5, generator=g)
    (bh, sh), (be, se) = sketch.hash_tables(4, m, 2, "h"), sketch.hash_tables(5, m, 2, "e")
    expected = torch.zeros(m)
    outer = h.T @ e
    for i in range(4):
        for j in range(5):
            expected[(bh[i] + be[j]) % m] += sh[i] * se[j] * outer[i, j]
    torch.testing.assert_close(tensor_sketch(h, e, m, 2), expected)


def test_cosines_follow_the_exact_head_gradient():
    g = torch.Generator().manual_seed(0)
    hidden, vocabulary, m = 24, 90, 1024
    topics_h, topics_e = torch.randn(5, hidden, generator=g), torch.randn(5, vocabulary, generator=g)
    exact, short = [], []
    for _ in range(24):
        mix = torch.softmax(3 * torch.randn(5, generator=g), 0)
        h = torch.randn(12, hidden, generator=g) + 3 * mix @ topics_h
        e = 0.5 * torch.randn(12, vocabulary, generator=g) + mix @ topics_e
        exact.append((h.T @ e).flatten())
        short.append(tensor_sketch(h, e, m, 0))
    cosine = [
        torch.nn.functional.normalize(torch.stack(x), dim=1)
        @ torch.nn.functional.normalize(torch.stack(x), dim=1).T
        for x in (exact, short)
    ]
    off = ~torch.eye(24, dtype=torch.bool)
    assert torch.corrcoef(torch.stack([c[off] for c in cosine]))[0, 1] >= 0.95


def test_folded_sketch_is_the_count_sketch():
    x = torch.randn(5, 33)
    bucket, sign = sketch.hash_tables(33, 8, 0, "x")
    folded = sketch.folded_count_sketch(x, sketch.signed_buckets(bucket, sign, 8), 8)
    torch.testing.assert_close(folded, sketch.count_sketch(x, bucket, sign, 8))


def test_grouped_spectra_sum_to_the_batch():
    a, b = torch.randn(9, 16), torch.randn(9, 16)
    group = torch.tensor([0, 0, 1, 2, 2, 2, 1, 0, 2])
    grouped = sketch.grouped_outer_spectrum(a, b, group, 3)
    torch.testing.assert_close(grouped.sum(0), sketch.outer_spectrum(a, b))
    torch.testing.assert_close(grouped[1], sketch.outer_spectrum(a[group == 1], b[group == 1]))


def test_top_errors_hold_the_gold_token_once_and_do_not_renormalise():
    logits, label = torch.randn(6, 20), torch.randint(20, (6,))
    error = torch.softmax(logits, -1) - torch.nn.functional.one_hot(label, 20)
    value, index = top_errors(error, label, 4)
    assert value.shape == (6, 5)
    assert all(len(set(row.tolist())) == 5 for row in index)
    assert ((index == label[:, None]).sum(1) == 1).all()
    torch.testing.assert_close(value, error.gather(1, index))


def test_top_k_of_the_whole_vocabulary_is_the_full_sketch():
    h, logits, labels = torch.randn(2, 5, 6), torch.randn(2, 5, 12), torch.randint(12, (2, 5))
    found = []
    for options in ({"error": "full"}, {"error": "topk", "error_top_k": 12}):
        sketcher = HeadSketcher(6, 12, 32, seed=4, **options)
        sketcher.observe_logits(h, logits, labels)
        found.append(sketcher.end().sketch)
    torch.testing.assert_close(*found)


def _original(h, logits, labels, k, m, seed, *, shift):
    """The seed's error vector: softmax over the K kept logits only, the gold token counted twice."""
    if shift:
        h, logits, labels = h[:, :-1], logits[:, :-1], labels[:, 1:]
    h, logits, labels = h.reshape(-1, h.shape[-1]), logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    top, index = logits.topk(k, -1)
    p = torch.softmax(top, -1)
    error = torch.zeros_like(logits).scatter_add_(1, index, p)
    error.scatter_add_(1, labels[:, None], torch.full((len(labels), 1), -2.0))
    tables_h, tables_e = (
        sketch.hash_tables(n, m, seed, f"backward_gate/{x}")
        for n, x in ((h.shape[1], "h"), (error.shape[1], "e"))
    )
    spectrum = sketch.outer_spectrum(
        sketch.count_sketch(h, *tables_h, m), sketch.count_sketch(error, *tables_e, m)
    )
    return sketch.from_spectrum(spectrum, m)


def test_the_originals_three_mistakes_point_elsewhere():
    """The exact head gradient agrees with our sketch and far less with the original's."""
    g = torch.Generator().manual_seed(5)
    h, weight = torch.randn(4, 12, 16, generator=g), torch.randn(40, 16, generator=g)
    logits = h @ weight.T
    labels = torch.roll(logits.argmax(-1), 1, dims=1)  # a model that is mostly right
    labels[torch.rand(4, 12, generator=g) < 0.1] = 7
    sketcher = HeadSketcher(16, 40, 2048, seed=7)
    sketcher.observe_logits(h, logits, labels)
    ours = sketcher.end().sketch
    w = weight.clone().requires_grad_()
    torch.nn.functional.cross_entropy(
        (h @ w.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    ).backward()
    exact = w.grad.T  # [H, V] = sum h (x) e
    tables_h, tables_e = sketcher.h_bucket, sketcher.e_bucket
    truth = torch.zeros(2048)
    signs = sketcher.h_sign[:, None] * sketcher.e_sign[None, :]
    truth.index_add_(0, ((tables_h[:, None] + tables_e[None, :]) % 2048).flatten(), (signs * exact).flatten())
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(ours, truth, dim=0) > 0.9999
    assert cosine(_original(h, logits, labels, 8, 2048, 7, shift=True), truth, dim=0) < 0.9
    assert abs(cosine(_original(h, logits, labels, 8, 2048, 7, shift=False), truth, dim=0)) < 0.5
