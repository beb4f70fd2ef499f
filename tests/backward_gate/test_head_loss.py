"""The chunked head loss equals plain cross-entropy: loss, every gradient, every option."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from headgate.errors import ConfigError
from headgate.modules.fused_head import chunked_head_loss
from headgate.modules.head_sketch import HeadSketcher


def reference(
    h, w, labels, *, bias=None, softcap=None, label_smoothing=0.0, reduction="mean", num_items=None
):
    logits = (h @ w.T).float() if bias is None else (h @ w.T).float() + bias.float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        labels[:, 1:].flatten(),
        label_smoothing=label_smoothing,
        reduction="sum" if num_items is not None else reduction,
    )
    return loss if num_items is None else loss / num_items


def problem(b, t, hidden, v, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(b, t, hidden, generator=g, dtype=dtype).requires_grad_()
    w = (torch.randn(v, hidden, generator=g, dtype=dtype) / hidden**0.5).requires_grad_()
    bias = torch.randn(v, generator=g, dtype=dtype).requires_grad_()
    labels = torch.randint(v, (b, t), generator=g)
    labels[torch.rand(b, t, generator=g) < 0.3] = -100
    labels[0, -1] = 0
    return h, w, bias, labels


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(2, 9),
    st.integers(1, 17),
    st.integers(2, 31),
    st.sampled_from([None, 5.0]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from(["forward", "recompute"]),
    st.sampled_from([("mean", None), ("sum", None), ("mean", 17)]),
    st.booleans(),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_equals_cross_entropy_and_its_gradients(
    b, t, hidden, v, cap, smooth, mode, how, use_bias, rows, seed
):
    h, w, bias, labels = problem(b, t, hidden, v, seed)
    bias = bias if use_bias else None
    options = dict(bias=bias, softcap=cap, label_smoothing=smooth, reduction=how[0], num_items=how[1])
    expected = reference(h, w, labels, **options)
    found = chunked_head_loss(h, w, labels, gradients=mode, rows_per_chunk=rows, **options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    inputs = (h, w, bias) if use_bias else (h, w)
    for mine, theirs in zip(gradients(3 * found, *inputs), gradients(3 * expected, *inputs), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_half_precision_computes_the_softmax_in_fp32(mode):
    h, w, _, labels = problem(2, 8, 32, 50, 0, torch.bfloat16)
    found = chunked_head_loss(h, w, labels, gradients=mode)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference(h, w, labels), atol=1e-5, rtol=1e-5)
    dh, dw = gradients(found, h, w)
    assert dh.dtype == dw.dtype == torch.bfloat16
    exact = [x.detach().float().requires_grad_() for x in (h, w)]
    for mine, theirs in zip((dh, dw), gradients(reference(*exact, labels), *exact), strict=True):
        assert F.cosine_similarity(mine.float().flatten(), theirs.flatten(), dim=0) > 0.999


def test_autocast_uses_its_dtype_for_the_products():
    h, w, _, labels = problem(2, 8, 16, 30, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_head_loss(h, w, labels)
    torch.testing.assert_close(found, reference(h.bfloat16(), w.bfloat16(), labels), atol=1e-5, rtol=1e-5)
    assert gradients(found, w)[0].dtype == torch.float32


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    h, w, _, labels = problem(2, 5, 4, 7, 0)
    w = w.detach()
    chunked_head_loss(h, w, labels).backward()
    assert w.grad is None and h.grad is not None


def test_the_upstream_gradient_and_a_second_backward_are_respected():
    h, w, _, labels = problem(2, 5, 4, 7, 0)
    for mode in ("forward", "recompute"):
        loss = chunked_head_loss(h, w, labels, gradients=mode)
        first = torch.autograd.grad(loss, h, torch.tensor(1.0), retain_graph=True)[0]
        second = torch.autograd.grad(loss, h, torch.tensor(-2.5))[0]
        torch.testing.assert_close(second, -2.5 * first)


def test_no_label_at_all_is_zero_with_zero_gradients():
    h, w, _, labels = problem(2, 5, 4, 7, 0)
    loss = chunked_head_loss(h, w, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and (h.grad == 0).all() and (w.grad == 0).all()


def test_without_grad_mode_nothing_is_kept():
    h, w, _, labels = problem(2, 5, 4, 7, 0)
    with torch.no_grad():
        assert not chunked_head_loss(h, w, labels).requires_grad


def test_bad_smoothing_is_refused():
    h, w, _, labels = problem(1, 3, 2, 4, 0)
    with pytest.raises(ConfigError, match="label_smoothing=1"):
        chunked_head_loss(h, w, labels, label_smoothing=1.0)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_observers_see_the_exact_error_and_change_nothing(softcap):
    h, w, bias, labels = problem(2, 7, 6, 9, 1)
    seen = []

    def observe(chunk):
        seen.append(
            (chunk.hidden_CH.clone(), chunk.error_CV.clone(), chunk.backprop().clone(), chunk.row_C.clone())
        )

    options = dict(bias=bias, softcap=softcap, reduction="sum")
    watched = chunked_head_loss(
        h, w, labels, observers=(observe,), rows_per_chunk=3, gradients="recompute", **options
    )
    expected = reference(h, w, labels, **options)
    dh, dw = gradients(expected, h, w)
    hidden, error, back, row = (torch.cat(parts) for parts in zip(*seen, strict=True))
    torch.testing.assert_close(error.T @ hidden, dw, atol=1e-5, rtol=1e-4)
    keep = labels[:, 1:] != -100
    torch.testing.assert_close(back, dh[:, :-1][keep], atol=1e-5, rtol=1e-4)
    assert torch.equal(row, keep.nonzero()[:, 0])
    bare = chunked_head_loss(h, w, labels, rows_per_chunk=3, gradients="recompute", **options)
    assert torch.equal(watched, bare)
    assert torch.equal(gradients(watched, h)[0], gradients(bare, h)[0])


def test_the_sketch_does_not_depend_on_chunks_or_on_the_way_in():
    h, w, _, labels = problem(3, 9, 8, 21, 2)
    sketcher = HeadSketcher(8, 21, 64, seed=1, wants_entropy=True, wants_error=True)
    found = []
    for rows in (2, 5, 1000):
        sketcher.begin()
        chunked_head_loss(h, w, labels, observers=(sketcher.observe,), rows_per_chunk=rows)
        found.append(sketcher.end().packed())
    sketcher.begin()
    sketcher.observe_logits(h.detach(), (h @ w.T).detach(), labels)
    found.append(sketcher.end().packed())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)


def test_per_sequence_evidence_is_that_of_each_sequence_alone():
    h, w, _, labels = problem(3, 9, 8, 21, 2)
    sketcher = HeadSketcher(8, 21, 64, seed=1)
    sketcher.begin(groups=3)
    chunked_head_loss(h, w, labels, observers=(sketcher.observe,), rows_per_chunk=4)
    together = sketcher.end()
    for b in range(3):
        sketcher.begin()
        chunked_head_loss(h[b : b + 1], w, labels[b : b + 1], observers=(sketcher.observe,))
        alone = sketcher.end()
        torch.testing.assert_close(together.sketch[b], alone.sketch, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.loss[b], alone.loss)
        assert together.tokens[b] == alone.tokens


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_token_weights_multiply_gradients_and_not_the_loss(mode):
    h, w, _, labels = problem(2, 7, 6, 9, 1)
    n = int((labels[:, 1:] != -100).sum())
    weight = torch.tensor([0.0, 2.0, 0.5])[torch.arange(n) % 3]
    place = iter(range(0, n, 4))

    def observe(chunk):
        start = next(place)
        return weight[start : start + 4]

    found = chunked_head_loss(
        h, w, labels, observers=(observe,), rows_per_chunk=4, gradients=mode, reduction="sum"
    )
    keep = labels[:, 1:] != -100
    each = F.cross_entropy((h @ w.T)[:, :-1][keep], labels[:, 1:][keep], reduction="none")
    torch.testing.assert_close(found, each.sum())
    for mine, theirs in zip(gradients(found, h, w), gradients((weight * each).sum(), h, w), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_logits_of_the_whole_batch_never_exist():
    """The largest tensor alive is a chunk: far below [B * T, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    Largest.elements = max(Largest.elements, tensor.numel())
            return out

    vocabulary, hidden = 20_000, 8
    h, w, _, labels = problem(2, 300, hidden, vocabulary, 0)
    w = w.detach()
    sketcher = HeadSketcher(hidden, vocabulary, 256)
    with Largest():
        chunked_head_loss(
            h, w, labels, observers=(sketcher.observe,), gradients="recompute", rows_per_chunk=16
        ).backward()
    assert Largest.elements <= max(16 * vocabulary, w.numel())
    assert 2 * 299 * vocabulary > 20 * Largest.elements
