"""What a healthy gate looks like, checked while it runs."""

from __future__ import annotations

import torch

from headgate.methods.backward_gate import policies
from headgate.methods.backward_gate.gate import Gate

DECISIONS = 200
"""Decisions after the burn-in before the checks speak."""


def complaints(gate: Gate, proxy: tuple[float, int]) -> list[str]:
    """Sentences for the log, empty when all is well.

    Args:
        proxy: correlation and pairs of the diagnostic.
    """
    found = []
    config, window = gate.config, gate.window
    if config.score in policies.SKETCHING and config.score != "consensus" and window.count > 1:
        ceiling = 1 - config.k / config.m
        first = float(gate.early[0] / gate.early[1].clamp(min=1))
        if first < 0.5 * ceiling:
            found.append(
                f"novelty began at {first:.2f}, far below its ceiling 1 - k/m = {ceiling:.2f}: the batches share "
                "a direction (keep center: true) or k is too large"
            )
        low, high = torch.quantile(window.full, torch.tensor([0.25, 0.75], dtype=window.full.dtype))
        spread = float(high - low)
        if spread < 1e-4:
            found.append(
                f"the middle half of the last {window.count} scores spans {spread:.1e} only: the gate is behaving "
                "as a random one; raise m, or use score: random and save the sketch"
            )
        if int(gate.subspace.updates) > 2 * config.k and float(window.full.mean()) > first + 0.05:
            found.append(
                "novelty is not falling as the basis fills: the stream may be drifting; try fd_decay .99"
            )
    if config.score not in policies.FREE_RUNNING and config.replay is None and config.target_acceptance < 1:
        rate = float(window.average)
        if abs(rate - config.target_acceptance) > 0.15:
            found.append(
                f"acceptance is {rate:.2f}, not {config.target_acceptance:.2f}: raise ema_rate (now {config.ema_rate})"
            )
        if gate.acceptance_rate() > min(0.95, config.target_acceptance + 0.3):
            found.append(
                f"{gate.acceptance_rate():.0%} of the batches were accepted: most of the run was burn-in; shorten it"
            )
    if proxy[1] >= 32 and abs(proxy[0]) < 0.1:
        found.append(
            f"the rank correlation of head-sketch novelty with adapter-gradient novelty is {proxy[0]:.2f} over "
            f"{proxy[1]} batches: the gate is behaving as a random one (try signal: backprop)"
        )
    return found
