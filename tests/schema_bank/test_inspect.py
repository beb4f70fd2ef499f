"""Inspection: statistics of a known routing come out as known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from headgate.methods.schema_bank import SchemaBank
from headgate.methods.schema_bank import inspect as I
from headgate.models.anatomy import describe

from .conftest import SMALL, tiny
from .test_method import rows

# Four examples of three tokens; tokens 0-1 always choose schema 0, token 2 schema 1, schema 2 is never chosen.
TOKEN = torch.tensor([0, 1, 0, 1, 0, 1, 2, 2, 2, 2, 2, 2])
EXAMPLE = torch.arange(4).repeat_interleave(3)
TRACE = I.Trace(torch.eye(3)[(TOKEN == 2).long()], TOKEN, EXAMPLE)


def test_known_routing_is_described() -> None:
    (report,) = I.describe_schemas({3: TRACE}, str, 1, tags=[0, 0, 1, 1], pairs=[(0, 1), (0, 2)])
    assert report.load == [0.5, 0.5, 0.0] and report.dead == [2]
    assert report.nmi == pytest.approx(1.0) and report.alignment == 1.0 and report.reuse == 0.5
    assert {t for t, _ in report.top_tokens[0]} == {"0", "1"} and [t for t, _ in report.top_tokens[1]] == [
        "2"
    ]
    assert report.top_tokens[2] == [] and report.top_examples[2] == []
    assert {e for e, _ in report.top_examples[1]} == {2, 3}
    assert report.mean_token_entropy == 0 and report.entropy_of_load == pytest.approx(0.6931, abs=1e-4)
    assert report.tag_by_schema == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_mutual_information_agrees_with_scikit_learn() -> None:
    stream = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 4, (50,), generator=stream).tolist() for _ in range(2))
    b = [x if i % 2 else y for i, (x, y) in enumerate(zip(a, b))]
    assert I.normalised_mutual_information(a, b) == pytest.approx(normalized_mutual_info_score(a, b))
    assert I.normalised_mutual_information([1, 1], [2, 2]) == 0.0


def test_a_trace_follows_the_gates_of_real_tokens_whatever_the_batching() -> None:
    model, _ = tiny()
    method = SchemaBank(**SMALL, init_std=0.2)
    method.attach(describe(model))
    batch = rows([5, 9, 7])
    whole = I.trace_routing(model, method, [batch])
    apart = I.trace_routing(
        model, method, [{k: v[i : i + 1, :n] for k, v in batch.items()} for i, n in enumerate([5, 9, 7])]
    )
    assert list(whole) == [2, 3]
    for block, trace in whole.items():
        assert trace.weight.shape == (21, 6)
        assert torch.equal(trace.token, apart[block].token) and torch.equal(
            trace.example, apart[block].example
        )
        torch.testing.assert_close(trace.weight, apart[block].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_figure_is_drawn(kind: str, tmp_path: Path) -> None:
    reports = I.describe_schemas({2: TRACE, 3: TRACE}, str, 1, tags=[0, 0, 1, 1])
    I.figure(reports).savefig(tmp_path / f"schemas.{kind}")
    head = (tmp_path / f"schemas.{kind}").read_bytes()[:400]
    assert head.startswith(b"\x89PNG") if kind == "png" else b"<svg" in head or b"<?xml" in head
