"""Layer routing as it is used: a trained router, through ``generate``, against full depth and a static mask.

Router, bookkeeping and the loop of ``generate`` are all in the time. Tokens a second and (on a GPU) peak memory, by batch
and length of the prompt. Ideal: the time of the plain model with only the rows in every block that the routes of this very
text opened there, measured (``rows_ideal``); beside it, what FLOPs alone would promise. The text is made by a fixed rule, so
that a few dozen steps teach the router something; half of the depth is calibrated. On a CPU with one thread
(OMP_NUM_THREADS=1) seconds are those of the processor, which neighbours on a shared machine do not take.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from headgate.data.collation import Collator
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
from headgate.experiments.benchmarks.routing import BLOCKS, _model
from headgate.experiments.benchmarks.rows_ideal import plain_arms, saved
from headgate.experiments.run import quiet
from headgate.methods.layer_routing import LayerRouting
from headgate.methods.layer_routing.route import Route
from headgate.models.anatomy import describe
from headgate.training.accounting import forward_flops
from headgate.training.trainer import HeadgateTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEPTH = 0.5
TARGETS = {("sample", 1): 0.90, ("token", 1): 0.90, ("sample", 8): 0.90, ("token", 8): 0.85}
"""Realised over ideal on a CPU, by granularity and batch."""


def texts(rows: int, length: int, seed: int) -> Tensor:
    """``[rows, length]``: every token follows from the one before by a rule of its row, with some noise."""
    stream = torch.Generator().manual_seed(seed)
    step = torch.randint(1, 7, (rows, 1), generator=stream)
    start = torch.randint(3, 500, (rows, 1), generator=stream)
    exact = (start + step * torch.arange(length)) % 490 + 3
    noise = torch.rand(rows, length, generator=stream) < 0.1
    return torch.where(noise, torch.randint(3, 500, (rows, length), generator=stream), exact)


def trained(model: PreTrainedModel, granularity: str, steps: int) -> LayerRouting:
    """A router that has learned on the text, attached, its threshold set to half of the depth."""
    method = LayerRouting(
        policy="gumbel", granularity=granularity, keep=1, kd=False, target_utilization=DEPTH, router_lr=1e-2
    )
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in texts(8 * steps, 64, 1)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=3,
        )
        trainer = HeadgateTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=Collator(0), methods=[method]
        )
        quiet(trainer)
        trainer.train()
    model.eval()
    method.eval()
    device = next(model.parameters()).device
    method.calibrate([{"input_ids": texts(8, 128, 2).to(device)}], DEPTH)
    return method


def run(*, quick: bool, say: Say) -> Report:
    """Every batch and prompt length, per document and per token."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report("routing_trained")
    batches, prompts = ((1,), (64,)) if quick else ((1, 8, 16), (64, 1024))
    new, rounds = (8, 3) if quick else (32, 7)
    for granularity in ("sample", "token"):
        model = _model(device)
        method = trained(model, granularity, 10 if quick else 60)
        for batch in batches:
            for prompt in prompts:
                _measure(report, model, method, granularity, (batch, prompt, new), rounds, say)
        method.detach()
    if device == "cpu":
        report.checks.append(
            not_measured("peak memory", "reported", "a CPU process has one peak for all arms")
        )
    return report


def _measure(
    report: Report, model: Any, method: LayerRouting, granularity: str, shape: tuple[int, int, int], rounds: int,
    say: Say,
) -> None:  # fmt: skip
    batch, prompt, new = shape
    ids = texts(batch, prompt, 5).to(next(model.parameters()).device)
    closed = torch.linspace(0, BLOCKS - 2, round((1 - DEPTH) * BLOCKS)).round().long()
    mask = torch.ones(len(method.blocks)).index_fill(0, closed, 0.0)
    peaks: dict[str, int] = {}

    def generate(
        name: str, routing: str, under: Tensor | None = None, tokens: int = new
    ) -> Callable[[], object]:
        def work() -> None:
            method.set_routing(routing)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            with torch.no_grad(), method.execution.under(under):
                model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
            if torch.cuda.is_available():
                peaks[name] = torch.cuda.max_memory_allocated()

        return work

    share, opened = _executed(model, method, generate("routed", "on"), (batch, prompt, new))
    method.set_routing("removed")
    arms = {
        "full": generate("full", "removed"),
        "routed": generate("routed", "on"),
        "static": generate("static", "on", mask.to(ids.device)),
        "open": generate("open", "on", torch.ones_like(mask).to(ids.device)),
    }
    plain = plain_arms(model, ids)
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    seconds = interleaved({**arms, **plain}, rounds=rounds, warmup=1, clock=clock)
    name = f"{granularity}, batch {batch}, prompt {prompt}"
    for arm in arms:
        times_of = spread(seconds[arm])
        told: dict[str, object] = {**times_of, "tokens_per_second": batch * new / times_of["median_s"]}
        if arm in peaks:
            told["peak_bytes"] = peaks[arm]
        report.arms[f"{name}/{arm}"] = told
    left_out, times = saved(seconds, opened, (batch, prompt), BLOCKS, method.shares.keys_values)
    report.arms[f"{name}/a block's step"] = {
        f"{rows} rows, s": found for rows, found in zip(times.tokens, times.seconds, strict=True)
    }
    full = statistics.median(seconds["full"])
    ideal = full / (full - left_out)
    speedup = paired_ratio(seconds["full"], seconds["routed"])
    report.ratios[f"{name}, routed"] = speedup
    report.ratios[f"{name}, static mask"] = paired_ratio(seconds["full"], seconds["static"])
    report.ideal[f"{name}, routed"] = ideal
    report.ideal[f"{name}, routed, by FLOPs alone"] = 1 / share
    say(
        f"{name}: x{speedup:.2f} of full depth, {speedup / ideal:.2f} of ideal (x{ideal:.2f}; by FLOPs alone "
        f"x{1 / share:.2f}), static mask x{report.ratios[f'{name}, static mask']:.2f}"
    )
    if (granularity, batch) in TARGETS:
        target = TARGETS[granularity, batch]
        report.checks.append(at_least(f"{name}, realised / measured ideal", speedup / ideal, target))
        if prompt == 64:
            report.checks.append(at_least(f"{name}, realised / ideal", speedup * share, target))
    if batch == 1:
        price = paired_ratio(seconds["open"], seconds["full"]) - 1
        report.checks.append(at_most(f"{name}, bookkeeping of a token", price, 0.01))


def _executed(
    model: nn.Module, method: LayerRouting, work: Callable[[], object], shape: tuple[int, int, int]
) -> tuple[float, list[list[int]]]:
    """Share of FLOPs that the routes of this text execute, and how many tokens they open, by forward and block."""
    routes: list[tuple[float, int]] = []
    opened: list[list[int]] = []

    def see(route: Route) -> None:
        valid = route.context.valid
        routes.append((float(method.shares.used(route)), int(valid.sum())))
        opened.append((route.weight != 0).expand(*valid.shape, -1).sum((0, 1)).tolist())

    before, method.execution.observe = method.execution.observe, see
    try:
        work()
    finally:
        method.execution.observe = before
    used = sum(part * count for part, count in routes) / sum(count for _, count in routes)
    used += (1 - used) * method.shares.keys_values
    batch, prompt, new = shape
    tokens, length = batch * (prompt + new), prompt + new
    pairs = batch * length * (length + 1) / 2
    anatomy = describe(model)
    executed, full = forward_flops(anatomy, tokens, pairs, used), forward_flops(anatomy, tokens, pairs)
    return float(executed) / float(full), opened
