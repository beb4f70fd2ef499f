"""What does each schema do? Pure functions from a trace of the gates to tables, and one figure.

A trace is taken with the routing as it is: the bank may be removed at evaluation and still be asked what it
would have chosen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headgate.methods.schema_bank.method import SchemaBank
from headgate.methods.schema_bank.reporting import DEAD_BELOW
from headgate.models.aside import look_aside
from headgate.ops.routing_losses import entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Trace:
    """One block's gates on real tokens: ``weight`` [M, S], and each token's id and example, both [M]."""

    weight: Tensor
    token: Tensor
    example: Tensor

    @property
    def num_schemas(self) -> int:
        return self.weight.shape[-1]

    def per_example(self) -> Tensor:
        """Mean gates of each example, [E, S]."""
        count = int(self.example.max()) + 1
        total = torch.zeros(count, self.num_schemas).index_add(0, self.example, self.weight)
        return total / torch.bincount(self.example, minlength=count).clamp(min=1).unsqueeze(-1)


@dataclass(frozen=True)
class SchemaReport:
    """One block. Loads are shares of the gate mass; entropies in nats; ``nmi`` of tag and dominant schema."""

    block: int
    load: list[float]
    dead: list[int]
    entropy_of_load: float
    mean_token_entropy: float
    top_tokens: list[list[tuple[str, float]]]
    top_examples: list[list[tuple[int, float]]]
    nmi: float | None
    alignment: float | None
    reuse: float | None
    tag_by_schema: list[list[float]] | None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def trace_routing(
    model: nn.Module, method: SchemaBank, batches: Iterable[Mapping[str, Tensor]]
) -> dict[int, Trace]:
    """Gates of every real token of the batches (``input_ids``, ``attention_mask``), per block with a bank."""
    tokens, examples, masks, seen = [], [], [], 0
    with look_aside(model), method.tracing() as kept:
        for batch in batches:
            ids = batch["input_ids"]
            mask = batch["attention_mask"].bool()
            model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False)
            number = torch.arange(len(ids), device=ids.device).unsqueeze(-1).expand_as(ids) + seen
            tokens.append(ids[mask].cpu())
            examples.append(number[mask].cpu())
            masks.append(mask)
            seen += len(ids)
    token, example = torch.cat(tokens), torch.cat(examples)
    traces = {}
    for key, weights in kept.items():
        rows = [w.expand(*m.shape, -1)[m].float().cpu() for w, m in zip(weights, masks, strict=True)]
        traces[int(key)] = Trace(torch.cat(rows), token, example)
    return traces


def schema_load(trace: Trace) -> Tensor:
    """Share of the gate mass of each schema, [S]."""
    mass = trace.weight.sum(0)
    return mass / mass.sum()


def dead_schemas(load: Tensor) -> list[int]:
    """Schemas with less than a hundredth of an equal share."""
    return (load < DEAD_BELOW / len(load)).nonzero().flatten().tolist()


def top_tokens(trace: Trace, decode: Callable[[int], str], count: int = 8) -> list[list[tuple[str, float]]]:
    """Per schema the tokens that lean to it most: their mean gate over the schema's mean gate (lift).

    Tokens seen fewer than three times say little and are left out.
    """
    size = int(trace.token.max()) + 1
    seen = torch.bincount(trace.token, minlength=size)
    mean = torch.zeros(size, trace.num_schemas).index_add(0, trace.token, trace.weight)
    mean = mean / seen.clamp(min=1).unsqueeze(-1)
    lift = mean / trace.weight.mean(0).clamp(min=1e-12)
    lift[seen < 3] = 0
    best = lift.topk(min(count, size), dim=0)
    return [
        [
            (decode(int(t)), float(v))
            for t, v in zip(best.indices[:, s], best.values[:, s], strict=True)
            if v > 0
        ]
        for s in range(trace.num_schemas)
    ]


def top_examples(trace: Trace, count: int = 3) -> list[list[tuple[int, float]]]:
    """Per schema the examples that use it most, with their mean gate."""
    use = trace.per_example()
    best = use.topk(min(count, len(use)), dim=0)
    return [
        [(int(e), float(v)) for e, v in zip(best.indices[:, s], best.values[:, s], strict=True) if v > 0]
        for s in range(trace.num_schemas)
    ]


def normalised_mutual_information(a: Sequence[int], b: Sequence[int]) -> float:
    """I(A; B) / mean(H(A), H(B)) in [0, 1]; 0 where both are constant."""
    n = len(a)

    def h(counts: Iterable[int]) -> float:
        return -sum(c / n * math.log(c / n) for c in counts)

    h_a, h_b = h(Counter(a).values()), h(Counter(b).values())
    joint = h(Counter(zip(a, b, strict=True)).values())
    return 2 * max(0.0, h_a + h_b - joint) / (h_a + h_b) if h_a + h_b > 0 else 0.0


def schema_reuse(first: Tensor, second: Tensor, k: int) -> float:
    """Mean |topk(a) & topk(b)| over paraphrase pairs of mean gates, [P, S] each; in [0, k].

    Equation: schema_bank (reuse): mean |topk(a) & topk(b)| over paraphrases a, b
    Proved by: tests/schema_bank/test_inspect.py::test_known_routing_is_described
    """
    a = torch.zeros_like(first, dtype=torch.bool).scatter(-1, first.topk(k, dim=-1).indices, True)
    b = torch.zeros_like(second, dtype=torch.bool).scatter(-1, second.topk(k, dim=-1).indices, True)
    return float((a & b).sum(-1).float().mean())


def tag_by_schema(use: Tensor, tags: Sequence[int], num_schemas: int) -> Tensor:
    """Mean gates of the examples of each tag, [tags, S]."""
    index = torch.as_tensor(tags)
    total = torch.zeros(num_schemas, use.shape[-1]).index_add(0, index, use)
    return total / torch.bincount(index, minlength=num_schemas).clamp(min=1).unsqueeze(-1)


def describe_schemas(
    traces: Mapping[int, Trace],
    decode: Callable[[int], str],
    k: int,
    *,
    tags: Sequence[int] | None = None,
    pairs: Sequence[tuple[int, int]] = (),
) -> list[SchemaReport]:
    """A report per block. ``tags`` gives one class per traced example, ``pairs`` the paraphrases among them."""
    reports = []
    for block, trace in traces.items():
        load, use = schema_load(trace), trace.per_example()
        dominant = use.argmax(-1).tolist()
        best = use.topk(k, dim=-1).indices.tolist()
        reports.append(
            SchemaReport(
                block=block,
                load=load.tolist(),
                dead=dead_schemas(load),
                entropy_of_load=float(entropy(load)),
                mean_token_entropy=float(entropy(trace.weight / trace.weight.sum(-1, keepdim=True)).mean()),
                top_tokens=top_tokens(trace, decode),
                top_examples=top_examples(trace),
                nmi=normalised_mutual_information(list(tags), dominant) if tags is not None else None,
                alignment=sum(t in b for t, b in zip(tags, best, strict=True)) / len(tags) if tags else None,
                reuse=schema_reuse(use[[a for a, _ in pairs]], use[[b for _, b in pairs]], k)
                if pairs
                else None,
                tag_by_schema=tag_by_schema(use, tags, trace.num_schemas).tolist()
                if tags is not None
                else None,
            )
        )
    return reports


def figure(reports: Sequence[SchemaReport]) -> Figure:
    """Loads as bars above, mean gates by tag as a heat map below; one column per block. A matplotlib Figure."""
    from matplotlib.figure import Figure

    with_tags = any(report.tag_by_schema for report in reports)
    fig = Figure(figsize=(5.2 * len(reports), 5.6 if with_tags else 2.6), layout="constrained")
    axes = fig.subplots(2 if with_tags else 1, len(reports), squeeze=False)
    for column, report in enumerate(reports):
        bars = axes[0][column]
        bars.bar(range(len(report.load)), report.load, color="#0072B2")
        bars.axhline(1 / len(report.load), color="#555555", linewidth=0.8, linestyle="--")
        told = f", NMI {report.nmi:.2f}" if report.nmi is not None else ""
        bars.set_title(f"block {report.block}: {len(report.dead)} dead{told}", fontsize=10)
        bars.set_xlabel("schema")
        bars.set_ylabel("share of gate mass")
        if with_tags and report.tag_by_schema:
            image = axes[1][column].imshow(report.tag_by_schema, aspect="auto", cmap="viridis", vmin=0)
            axes[1][column].set_xlabel("schema")
            axes[1][column].set_ylabel("tag")
            fig.colorbar(image, ax=axes[1][column], label="mean gate")
    return fig
