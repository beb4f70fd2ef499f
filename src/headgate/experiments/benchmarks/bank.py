"""The routed bank against the released einsum over an expanded [B, T, S, H], and against plain LoRA training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headgate.experiments.benchmarks.frame import (
    Report,
    Say,
    at_least,
    at_most,
    interleaved,
    not_measured,
    paired_ratio,
    spread,
)
from headgate.experiments.benchmarks.live_bytes import peak_bytes
from headgate.methods.schema_bank import SchemaBank
from headgate.models.anatomy import describe
from headgate.models.load import load_model
from headgate.ops.gating import Gates, top_k_gates
from headgate.ops.low_rank import low_rank_bank, routed_low_rank, routed_low_rank_recomputed

SHAPES = [
    (32, 16, 896, 4096),
    (32, 16, 896, 512),
    (32, 8, 896, 4096),
    (8, 16, 896, 4096),
    (32, 16, 128, 4096),
]
"""(S schemas, r rank, H width, tokens); the first is the target's."""
TOP_K = 2
CPU_BLOCKS = 4


def expanded(x: Tensor, down: Tensor, up: Tensor, gates: Tensor, count: int) -> Tensor:
    """The released block: every schema's output, then their gated sum."""
    rank, width = down.shape[0] // count, down.shape[1]
    inner = torch.einsum("bth,shr->btsr", x, down.view(count, rank, width).mT)
    each = torch.einsum("btsr,srh->btsh", inner, up.view(count, rank, width))
    return (gates.unsqueeze(-1) * each).sum(2)


def _problem(
    schemas: int, rank: int, width: int, tokens: int, device: str
) -> tuple[tuple[Tensor, ...], Gates, Tensor]:
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(8, tokens // 8, width, generator=stream).to(device)
    down, up = ((torch.randn(schemas * rank, width, generator=stream) * 0.02).to(device) for _ in range(2))
    gates = top_k_gates(torch.randn(8, tokens // 8, schemas, generator=stream).to(device), TOP_K)
    return (x, down, up), gates, torch.randn(x.shape, generator=stream).to(device)


def _routes(schemas: int, rank: int) -> dict[str, Callable[[object, Gates], Tensor]]:
    ranks = [rank] * schemas
    return {
        "expanded_einsum": lambda t, g: expanded(t[0], t[1], t[2], g.weight, schemas),
        "two_products": lambda t, g: routed_low_rank(t[0], t[1], t[2], g.weight, ranks),
        "recomputed": lambda t, g: routed_low_rank_recomputed(t[0], t[1], t[2], g.weight, ranks),
        "headgate": lambda t, g: low_rank_bank(t[0], t[1], t[2], g.weight, ranks, g.chosen),
    }


def _gradients(
    route: Callable[[object, Gates], Tensor], given: Sequence[Tensor], gates: Gates, grad: Tensor
) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in given]
    weight = gates.weight.detach().requires_grad_()
    output = route(leaves, gates._replace(weight=weight))
    found = torch.autograd.grad(output, [*leaves, weight], grad)
    chosen = torch.zeros_like(weight).scatter(-1, torch.as_tensor(gates.chosen), 1.0)
    return [output.detach(), *found[:-1], found[-1] * chosen]


def _bank(report: Report, shape: tuple[int, int, int, int], rounds: int, device: str, target: bool) -> None:
    leaves, gates, grad = _problem(*shape, device)
    routes = _routes(*shape[:2])
    work = {n: (lambda r=r: _gradients(r, leaves, gates, grad)) for n, r in routes.items()}
    label = "S{} r{} H{} T{}".format(*shape)
    seconds = interleaved(work, rounds=rounds, warmup=1)
    peaks = {name: peak_bytes(run, device) for name, run in work.items()}
    for name, taken in seconds.items():
        report.arms[f"{name} {label}"] = {**spread(taken), "peak_activation_bytes": peaks[name]}
    faster = paired_ratio(seconds["expanded_einsum"], seconds["headgate"])
    smaller = peaks["expanded_einsum"] / peaks["headgate"]
    report.ratios[f"speedup {label}"], report.ratios[f"memory {label}"] = faster, smaller
    if target:
        wanted = _gradients(routes["expanded_einsum"], leaves, gates, grad)
        found = _gradients(routes["headgate"], leaves, gates, grad)
        gap = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
        report.checks += [
            at_least(f"faster than the expanded einsum, {label}", faster, 4),
            at_least(f"faster than the expanded einsum (goal), {label}", faster, 10),
            at_least(f"less peak activation memory, {label}", smaller, 20),
            at_most("relative gap of output and gradients", gap, 1e-5),
        ]


class _Trainee:
    """A LoRA training step of a Qwen2-0.5B-shaped model, joint stage: with the bank, or without it."""

    def __init__(self, device: str, with_bank: bool, blocks: int | None = None) -> None:
        torch.manual_seed(0)
        model, _ = load_model("random:qwen2-0.5b", lora={"dropout": 0.0}, seed=0, device=device)
        self.model: Any = model.train()
        anatomy: Any = describe(self.model)
        if blocks is not None:  # the last ones: the banks weigh more than in the whole model
            del anatomy.backbone.layers[:-blocks]
            anatomy.model.config.num_hidden_layers = blocks
            for index, block in enumerate(anatomy.backbone.layers):
                block.self_attn.layer_idx = index
            anatomy = describe(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.method = SchemaBank() if with_bank else None
        if self.method is not None:
            self.method.attach(anatomy)
            self.method.to(device)
            trained += [p for group in self.method.parameter_groups().values() for p in group]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        rows, length = (2, 128) if device == "cpu" else (8, 512)
        self.ids = torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(0)).to(
            device
        )

    def __call__(self) -> None:
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        if self.method is not None:
            banks: Any = self.method.layers.values()
            loss = loss + 1e-2 * sum(layer.bank.orthonormality() for layer in banks)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _training(report: Report, rounds: int, device: str, blocks: int | None) -> None:
    arms = {"lora": _Trainee(device, False, blocks), "lora + bank": _Trainee(device, True, blocks)}
    seconds = interleaved(arms, rounds=rounds, warmup=1)
    model = "Qwen2-0.5B shape" if blocks is None else f"{blocks}-block slice of the Qwen2-0.5B shape"
    for name, taken in seconds.items():
        report.arms[f"training step, {name}, {model}"] = spread(taken)
    ratio = paired_ratio(seconds["lora + bank"], seconds["lora"])
    report.ratios[f"training step with bank / without, {model}"] = ratio
    report.checks.append(at_most(f"training step against plain LoRA ({model}, {device})", ratio, 1.03))


def run(*, quick: bool, say: Say) -> Report:
    """Times and peak memory of forward + backward by shape, then of a training step."""
    report, device = Report("bank"), "cuda" if torch.cuda.is_available() else "cpu"
    for index, shape in enumerate(SHAPES[:1] if quick else SHAPES):
        say("bank: {} schemas of rank {}, width {}, {} tokens".format(*shape))
        _bank(report, shape, 3 if quick else 7, device, target=index == 0)
    say("bank: a LoRA training step with and without it")
    if device == "cuda":
        _training(report, 9, device, None)
        return report
    _training(report, 3 if quick else 9, device, CPU_BLOCKS)
    if not quick:
        say("bank: the same with all 24 blocks")
        _training(report, 5, device, None)
    report.checks.append(not_measured("training step against plain LoRA, GPU", "<= 1.03", "no GPU here"))
    return report
