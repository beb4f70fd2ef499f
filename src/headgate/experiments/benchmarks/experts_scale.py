"""What do many experts cost? Training steps and a birth, from one expert to a thousand (``headgate bench experts --scale``).

Of each number of experts: a training step with all of them mature; the same with one more that is young (sparse, as by
default, and in the plan's dense phase); a birth with what it entails: the new factors and router rows, the optimizer's
new groups, and the first step, in which every bank packs its factors anew; and the joins of ``merge_above``.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from headgate.experiments.benchmarks.experts import RANK, TARGETS, TOP_K, Training, sliced
from headgate.experiments.benchmarks.frame import Report, Say, at_most, not_measured, spread, synchronize
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.lora_experts.inspect import likeness
from headgate.models.anatomy import describe

COUNTS = (1, 8, 64, 256, 1024)
BLOCKS, TOKENS, JOINS = 2, 512, 64
"""Joins are measured up to so many experts: N^2 products."""
GOAL = 1.25


def crowd(count: int, device: str, dense: bool) -> tuple[Any, LoraExperts]:
    """A model of width 1,024 with so many mature experts, one of which trains."""
    model = sliced(device, blocks=BLOCKS)
    method = LoraExperts(
        experts=count,
        r=RANK,
        new_r=RANK,
        alpha=2 * RANK,
        new_alpha=2 * RANK,
        target_modules=TARGETS,
        top_k=TOP_K,
        dense_phase=dense,
        spawn={"policy": "always", "max_experts": count + 8},
    )
    method.attach(describe(model))
    method.to(device)
    method.experts.train_only(0)
    return model, method


def seconds_of(step: Training, rounds: int) -> list[float]:
    taken = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        taken.append(time.perf_counter() - start)
    return taken


def measure(report: Report, count: int, device: str, rounds: int) -> dict[str, float]:
    """Median seconds of a step while all are mature, and with one young, sparse and dense; arms are added to the report."""
    medians: dict[str, float] = {}
    for dense in (False, True):
        model, method = crowd(count, device, dense)
        groups = [p for group in method.parameter_groups().values() for p in group]
        step = Training(model, groups, TOKENS, device)
        step()
        times = {"mature": seconds_of(step, rounds)} if not dense else {}
        start = time.perf_counter()
        number = method.experts.add()
        method.experts.train_only(number)
        groups = [p for group in method.parameter_groups().values() for p in group]
        step = Training(model, groups, TOKENS, device)
        step()
        birth = time.perf_counter() - start
        times["one young, dense phase" if dense else "one young"] = seconds_of(step, rounds)
        if not dense:
            report.arms[f"{count} experts, a birth and its first step"] = spread([birth])
        for name, taken in times.items():
            report.arms[f"{count} experts, {name}"] = spread(taken)
            medians[name] = statistics.median(taken)
        if not dense and count <= JOINS:
            start = time.perf_counter()
            likeness(method.experts)
            report.arms[f"{count} experts, cosines of all"] = spread([time.perf_counter() - start])
        method.detach()
    return medians


def run(*, quick: bool, say: Say) -> Report:
    """Steps and births by number of experts; the ratios are to a step of one expert."""
    report, device = Report("experts_scale"), "cuda" if torch.cuda.is_available() else "cpu"
    counts, rounds = (COUNTS[:3], 3) if quick else (COUNTS, 5)
    one = 0.0
    for count in counts:
        medians = measure(report, count, device, rounds)
        one = one or medians["mature"]
        for name, median in medians.items():
            report.ratios[f"{count} experts, {name} / one expert"] = median / one
        say(f"experts: {count}: " + ", ".join(f"{name} {s * 1e3:.0f} ms" for name, s in medians.items()))
        torch.cuda.empty_cache()
    for count in (64, 1024):
        label = f"training step: {count} experts and a young one, against one expert ({device})"
        ratio = report.ratios.get(f"{count} experts, one young / one expert")
        if ratio is None:
            report.checks.append(not_measured(label, f"<= {GOAL}", "left out by --quick"))
        else:
            report.checks.append(at_most(label, ratio, GOAL))
    return report
