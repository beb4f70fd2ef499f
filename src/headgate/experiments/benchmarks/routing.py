"""Layer routing: executed against ideal speed-up, the router's share of a forward, decoding, cache bytes.

The shape is one where blocks dominate (hidden 512, 8 blocks, no large vocabulary). Ideal = full time divided by
time times executed share: 1 means that every FLOP left out is time left out. Gates are given, so that 25% and 50%
of all blocks are skipped exactly; the router's own cost is measured apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

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
from headgate.methods.context import Context
from headgate.methods.layer_routing import LayerRouting
from headgate.methods.layer_routing.route import Route
from headgate.models.anatomy import describe
from headgate.training.accounting import forward_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headgate.models.anatomy import Anatomy

BLOCKS, WIDTH = 8, 512
TARGETS = {"batch": 0.95, "sample": 0.90, "token": 0.80}
GPU_TARGETS = {"batch": 0.97, "sample": 0.93, "token": 0.88}


class GivenGates(LayerRouting):
    """The engine with gates from outside, ``[B|1, T|1, G]``; the last position's at a cached step."""

    gates: Tensor | None = None

    def decide(self, hidden: Tensor, context: Context, training: bool) -> Route | None:
        if self.gates is None:
            return None
        gates = self.gates
        if gates.shape[1] > 1:
            gates = gates[:, -1:] if hidden.shape[1] == 1 else gates[:, : hidden.shape[1]]
        return Route(gates, context)


def _model(device: str) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device).eval()


def gates_for(granularity: str, skipped: float, rows: int, length: int, device: str) -> Tensor:
    """Gates that leave out ``skipped`` of all blocks exactly: the same number per block, spread over the batch."""
    count = BLOCKS - 1
    closed = round(skipped * BLOCKS)
    gates = torch.ones(*{"batch": (1, 1), "sample": (rows, 1), "token": (rows, length)}[granularity], count)
    if granularity == "batch":
        gates[..., torch.linspace(0, count - 1, closed).round().long()] = 0.0
        return gates.to(device)
    units = gates.view(-1, count)
    for index in range(len(units)):
        units[index, (torch.arange(closed) * count // closed + index) % count] = 0.0
    return gates.to(device)


def _timed(report: Report, name: str, full: Callable[[], object], arms: Mapping[str, tuple[Callable[[], object], float]],
           rounds: int) -> dict[str, float]:  # fmt: skip
    """Realised speed-up over ideal of every arm against ``full``; arms carry their executed share."""
    seconds = interleaved({"full": full, **{key: work for key, (work, _) in arms.items()}}, rounds=rounds)
    found = {}
    report.arms[f"{name}/full"] = spread(seconds["full"])
    for key, (_, share) in arms.items():
        speedup = paired_ratio(seconds["full"], seconds[key])
        found[key] = speedup * share
        report.arms[f"{name}/{key}"] = {**spread(seconds[key]), "executed_share": share}
        report.ratios[f"{name}/{key} realised speed-up"] = speedup
        report.ideal[f"{name}/{key} ideal speed-up"] = 1 / share
    return found


def executed(method: LayerRouting, gates: Tensor, rows: int, length: int) -> float:
    """Share of the model's FLOPs (head included) that runs under these gates."""
    used = method.shares.always + float(gates.mean((0, 1)).sum()) / BLOCKS
    if gates.shape[1] > 1:
        used += (1 - used) * method.shares.keys_values
    anatomy = method.execution.anatomy
    assert anatomy is not None
    pairs = rows * length * (length + 1) / 2
    full = float(forward_flops(anatomy, rows * length, pairs))
    return float(forward_flops(anatomy, rows * length, pairs, used)) / full


def run(*, quick: bool, say: Say) -> Report:
    """Prefill, training step and decoding at 25% and 50% skip; router cost; cache bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, length, rounds = (4, 96, 5) if quick else (8, 128, 15)
    report, model = Report("routing"), _model(device)
    anatomy = describe(model)
    method = GivenGates(keep=1, kd=False, engine="sparse", train_engine="sparse")
    method.attach(anatomy)
    method.to(device).eval()
    ids = torch.randint(3, 500, (rows, length), device=device)

    def forward(gates: Tensor | None) -> object:
        method.gates = gates
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False)

    def train(gates: Tensor | None) -> None:
        method.gates = gates
        model(input_ids=ids, labels=ids).loss.backward()

    cases = {
        f"{granularity} {skipped:.0%}": gates_for(granularity, skipped, rows, length, device)
        for granularity in TARGETS
        for skipped in (0.25, 0.5)
    }
    for phase, work in (("prefill", forward), ("training", train)):
        model.train(phase == "training")
        arms = {
            key: (partial(work, gates), executed(method, gates, rows, length)) for key, gates in cases.items()
        }
        found = _timed(report, phase, partial(work, None), arms, rounds)
        model.zero_grad(set_to_none=True)
        for key, value in found.items():
            say(f"{phase} {key}: realised / ideal {value:.3f}")
            target = (GPU_TARGETS if device == "cuda" else TARGETS)[key.split()[0]]
            report.checks.append(at_least(f"{phase} {key}, realised / ideal", value, target))
    model.eval()
    _decoding(report, model, method, device, 8 if quick else 24, 3 if quick else 9, say)
    _router_cost(report, model, anatomy, ids, 5 if quick else 15, say)
    _grid(report, model, method, device, quick, say)
    method.detach()
    _keys_values(report, model, anatomy, ids, rounds, say)
    if device == "cpu":
        report.checks.append(
            not_measured("the same at 8B shapes on a GPU", ">= .97, .93, .88", "no GPU here")
        )
    return report


def _decoding(
    report: Report, model: nn.Module, method: GivenGates, device: str, steps: int, rounds: int, say: Say
) -> None:
    """Batch 1, token by token after a short prompt; keys and values of skipped blocks are written."""
    prompt = torch.randint(3, 500, (1, 16), device=device)
    sizes: dict[str, int] = {}

    def decode(gates: Tensor | None, name: str) -> None:
        method.gates = gates
        with torch.no_grad():
            out = model(input_ids=prompt, use_cache=True)
            cache = out.past_key_values
            for _ in range(steps):
                token = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
        sizes[name] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    arms = {}
    for skipped in (0.25, 0.5):
        gates = gates_for("sample", skipped, 1, 1, device)
        share = executed(method, gates, 1, 16 + steps)
        share += (1 - share) * method.shares.keys_values
        arms[f"batch 1 {skipped:.0%}"] = (partial(decode, gates, "routed"), share)
    found = _timed(report, "decode", lambda: decode(None, "full"), arms, rounds)
    for key, value in found.items():
        say(f"decode {key}: realised / ideal {value:.3f}")
        report.checks.append(at_least(f"decode {key}, realised / ideal", value, 0.90))
    report.ratios["cache bytes, routed / full"] = sizes["routed"] / sizes["full"]


def _keys_values(
    report: Report, model: nn.Module, anatomy: Anatomy, ids: Tensor, rounds: int, say: Say
) -> None:
    """Prefill into a cache at 50% skip per token, by what skipped tokens leave there; and the cache's bytes."""
    gates = gates_for("token", 0.5, ids.shape[0], ids.shape[1], str(ids.device))
    seconds: dict[str, list[float]] = {"full": [], "drop": [], "reuse": []}
    sizes = {}
    for _ in range(rounds):
        for kv, found in seconds.items():
            method = GivenGates(keep=1, kd=False, engine="sparse", kv=kv)
            method.attach(anatomy)
            method.to(ids.device).eval()
            method.gates = gates

            def prefill(kv: str = kv) -> None:
                with torch.no_grad():
                    cache = model(input_ids=ids, use_cache=True).past_key_values
                sizes[kv] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

            found += interleaved({kv: prefill}, rounds=1)[kv]
            method.detach()
    for kv, found in seconds.items():
        ratio = paired_ratio(found, seconds["full"])
        report.arms[f"prefill token 50%, kv {kv}"] = {**spread(found), "cache_bytes": sizes[kv]}
        report.ratios[f"prefill token 50%, kv {kv} / full"] = ratio
        say(f"kv {kv}: {ratio:.3f} of the time of kv full, cache {sizes[kv] / 2**20:.2f} MiB")


def _router_cost(
    report: Report, model: nn.Module, anatomy: Anatomy, ids: Tensor, rounds: int, say: Say
) -> None:
    """The router alone against a forward at full depth."""
    router = LayerRouting(keep=1, kd=False)
    router._build(anatomy.hidden_size, anatomy.num_blocks)
    assert router.router is not None
    network = router.router.to(ids.device)
    pooled = torch.randn(1, len(ids), anatomy.hidden_size, device=ids.device)
    every = torch.randn(*ids.shape, anatomy.hidden_size, device=ids.device)

    def without_grad(work: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(work)

    seconds = interleaved(
        {
            "forward": without_grad(lambda: model(input_ids=ids, use_cache=False)),
            "per document": without_grad(lambda: network(pooled)),
            "per token": without_grad(lambda: network(every)),
        },
        rounds=rounds,
    )
    for name in ("per document", "per token"):
        share = paired_ratio(seconds[name], seconds["forward"])
        report.ratios[f"router {name} / forward"] = share
        say(f"router {name}: {share:.2%} of a forward")
        report.checks.append(at_most(f"router {name}, share of a forward", share, 0.01))


def _grid(report: Report, model: nn.Module, method: GivenGates, device: str, quick: bool, say: Say) -> None:
    """Tokens a second over batch sizes and active blocks, and the skip rate from which routing pays."""
    length = 64
    for rows in (1, 4) if quick else (1, 4, 16):
        ids = torch.randint(3, 500, (rows, length), device=device)
        arms: dict[str, Callable[[], object]] = {}
        for active in (BLOCKS, BLOCKS - 2, BLOCKS // 2, 2):
            gates = gates_for("batch", 1 - active / BLOCKS, rows, length, device)
            arms[str(active)] = partial(_forward, model, method, gates, ids)
        arms["unrouted"] = partial(_forward, model, method, None, ids)
        seconds = interleaved(arms, rounds=3 if quick else 7)
        for label, values in seconds.items():
            median = spread(values)
            report.arms[f"grid batch {rows}, active {label}"] = {
                **median,
                "tokens_per_second": rows * length / median["median_s"],
            }
        overhead = paired_ratio(seconds[str(BLOCKS)], seconds["unrouted"]) - 1
        per_block = (1 - paired_ratio(seconds["2"], seconds[str(BLOCKS)])) / (1 - 2 / BLOCKS)
        report.ratios[f"break-even skip rate, batch {rows}"] = max(0.0, overhead / per_block)
        say(f"batch {rows}: routing pays from a skip rate of {max(0.0, overhead / per_block):.1%}")


def _forward(model: nn.Module, method: GivenGates, gates: Tensor | None, ids: Tensor) -> None:
    method.gates = gates
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
