"""Does the threshold hold the acceptance asked for? The gate on synthetic sketch streams, no model.

``isotropic``: sketches of no direction; ``collapsed``: one direction shared by all, which drives raw novelty to 0;
``drifting``: a slowly turning direction whose noise fades and bursts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headgate.experiments.benchmarks.frame import Report, Say, at_most
from headgate.methods.backward_gate import BackwardGateConfig, Gate
from headgate.modules.head_sketch import Evidence

KINDS = ("isotropic", "collapsed", "drifting")
TARGETS = (0.08, 0.15, 0.3, 0.4, 0.5, 0.7)
SIZE, BURN_IN, STEPS = 32, 100, 2000


def sketches(kind: str, size: int, seed: int) -> Iterator[Tensor]:
    """An endless stream of sketches ``[size]``."""
    g = torch.Generator().manual_seed(seed)
    t = 0
    centre = torch.randn(size, generator=g)
    while True:
        z = torch.randn(size, generator=g)
        if kind == "collapsed":
            z = 30 * centre + 1e-2 * z
        if kind == "drifting":
            centre = centre + 0.05 * torch.randn(size, generator=g)
            z = centre * (1 + t / 300) + z * torch.rand((), generator=g) * (1 if t % 400 < 200 else 3)
        t += 1
        yield z


def gated(kind: str, target: float, seed: int = 0, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Decisions and thresholds ``[steps]`` of a gate after its burn-in."""
    config = BackwardGateConfig(target_acceptance=target, m=SIZE, k=6, window=128)
    gate = Gate(config, 4, 5, seed=seed, burn_in=BURN_IN)
    stream, decisions, thresholds = sketches(kind, SIZE, seed), [], []
    for step in range(BURN_IN + steps):
        zero = torch.zeros(())
        score = gate.score(Evidence(next(stream), torch.tensor(64.0), torch.tensor(64.0), zero, zero))
        accepted = gate.accept(score, optimizer_step=step)
        if accepted:
            gate.update(score)
        if step >= BURN_IN:
            decisions.append(float(accepted))
            thresholds.append(float(gate.window.threshold))
    return torch.tensor(decisions), torch.tensor(thresholds)


def run(*, quick: bool, say: Say) -> Report:
    """Realised acceptance and the threshold's path, by stream and target."""
    report = Report("controller")
    for kind in KINDS:
        worst = 0.0
        for target in TARGETS[2:3] if quick else TARGETS:
            found = [gated(kind, target, seed) for seed in range(1 if quick else 3)]
            realised = [float(decisions.mean()) for decisions, _ in found]
            worst = max(worst, *(abs(value - target) for value in realised))
            thresholds = found[0][1]
            report.arms[f"{kind}, {target:g}"] = {
                "kind": kind,
                "target": target,
                "realised": realised,
                "threshold": [round(float(value), 4) for value in thresholds[::20]],
                "threshold_sd_settled": float(thresholds[STEPS // 4 :].std()),
            }
            say(f"{kind}: target {target:.2f}, realised " + ", ".join(f"{value:.3f}" for value in realised))
        report.checks.append(at_most(f"|realised - target| over {STEPS} steps, {kind}", worst, 0.02))
    return report
