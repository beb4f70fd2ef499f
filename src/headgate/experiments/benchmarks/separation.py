"""Does the gate learn from what is new? Every rule on synthetic sketch streams whose truth is known, no model.

A stream has skills, each a direction of its own. What is left to learn of a skill is the length of its sketch; it
shrinks each time the gate learns from it, and noise of a fixed length stays: once a skill is exhausted its sketch is
noise, which points anywhere and so looks new to a *normalised* novelty. ``frozen`` streams do not shrink (a model that is
not trained); ``bursts`` brings the new skills in clusters; ``drift`` lets every length fall over the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from headgate.experiments.benchmarks.frame import Report, Say, at_least, at_most
from headgate.experiments.records import Content
from headgate.methods.backward_gate import BackwardGateConfig, Gate
from headgate.modules.head_sketch import Evidence

SIZE, BURN_IN, STEPS, TOKENS = 64, 40, 600, 64
COMMON, RARE = 12, 24
"""Skills that make up the repeats, mastered from the start; skills that are new, a few batches each."""
SHARE = 0.12
"""Of the batches that are new."""
RULES: dict[str, Content] = {
    "original": {"preset": "original"},
    "novelty, beta 10": {"beta": 10.0},
    "novelty": {},
    "novelty, quantile": {"rule": "quantile"},
    "sketch_norm, quantile": {"score": "sketch_norm", "rule": "quantile"},
    "energy, quantile": {"score": "energy", "rule": "quantile"},
    "energy, adaptive": {"score": "energy", "rule": "quantile", "dose": "adaptive"},
    "energy, adaptive, floor": {"score": "energy", "rule": "quantile", "dose": "adaptive", "floor": 0.05},
    "oracle, adaptive": {"score": "oracle", "column": "new", "rule": "quantile", "dose": "adaptive"},
}
KINDS = ("frozen", "live", "bursts", "drift")


@dataclass
class Outcome:
    """What a gate did after its burn-in, ``[n]`` each."""

    new: Tensor
    score: Tensor
    accepted: Tensor

    @property
    def auroc(self) -> float:
        """Chance that a new batch scores above a repeat, over neighbours: scores compare within 64 batches."""
        won, pairs = 0.0, 0
        for start in range(0, len(self.new), 64):
            new, score = self.new[start : start + 64].bool(), self.score[start : start + 64]
            count = int(new.sum()) * int((~new).sum())
            if count:
                won += float(mannwhitneyu(score[new].numpy(), score[~new].numpy()).statistic)
                pairs += count
        return won / max(1, pairs)

    def share(self, new: bool) -> float:
        """Accepted share of the new batches, or of the repeats."""
        return float(self.accepted[self.new.bool() == new].float().mean())


def stream(kind: str, seed: int) -> Iterator[tuple[int, bool]]:
    """(skill, new?) of every batch; the rare skills come one after another."""
    rng = np.random.default_rng(seed)
    rare, burst = 0, 0
    while True:
        if kind == "bursts":
            # clusters of 20 on average: longer than the top tenth of any window of 64
            burst = burst - 1 if burst else (20 if rng.random() < SHARE / 20 / (1 - SHARE) else 0)
            new = burst > 0
        else:
            new = rng.random() < SHARE
        rare += new
        yield (COMMON + rare // 4 % RARE, True) if new else (int(rng.integers(COMMON)), False)


def gated(kind: str, options: Content, seed: int = 0, steps: int = STEPS) -> Outcome:
    """Run a gate over a stream. Learning from a batch takes a quarter of what is left of its skill."""
    config = BackwardGateConfig(**{"m": SIZE, "k": 16, "window": 64, "target_acceptance": SHARE, **options})
    gate = Gate(config, 4, 5, seed=seed, burn_in=BURN_IN)
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(COMMON + RARE, SIZE, generator=g), dim=1)
    left = torch.ones(COMMON + RARE)
    left[:COMMON] = 1.0 if kind == "frozen" else 0.05
    zero = torch.zeros(())
    truths, scores, decisions = [], [], []
    for step, (skill, new) in zip(range(BURN_IN + steps), stream(kind, seed), strict=False):
        fade = 0.998**step if kind == "drift" else 1.0
        noise = 0.15 * torch.randn(SIZE, generator=g) / SIZE**0.5
        z = fade * TOKENS * (left[skill] * directions[skill] + noise)
        score = gate.score(
            Evidence(z, torch.tensor(float(TOKENS)), torch.tensor(1.0), zero, zero), truth=float(new)
        )
        accepted = gate.accept(score, optimizer_step=step)
        if accepted:
            gate.update(score)
            if kind != "frozen":
                left[skill] = max(0.05, float(left[skill]) * 0.75)
        if step >= BURN_IN:
            truths.append(new)
            scores.append(score.corrected)
            decisions.append(accepted)
    return Outcome(torch.tensor(truths), torch.tensor(scores), torch.tensor(decisions))


def run(*, quick: bool, say: Say) -> Report:
    """Separation and dose of every rule on every stream, over seeds."""
    report = Report("separation")
    seeds = range(2 if quick else 5)
    say(f"{'':>26}" + "".join(f"{kind:>26}" for kind in KINDS))
    say(f"{'accepts of':>26}" + f"{'AUROC   new  repeats':>26}" * len(KINDS))
    for name, options in RULES.items():
        cells = []
        for kind in KINDS:
            found = [gated(kind, options, seed) for seed in seeds]
            figures = {
                "auroc": float(np.mean([o.auroc for o in found])),
                "new": float(np.mean([o.share(True) for o in found])),
                "repeats": float(np.mean([o.share(False) for o in found])),
                "acceptance": float(np.mean([float(o.accepted.float().mean()) for o in found])),
            }
            report.arms[f"{name}, {kind}"] = {"rule": name, "kind": kind, **figures}
            cells.append(f"{figures['auroc']:.2f}  {figures['new']:>4.0%}  {figures['repeats']:>6.0%}")
        say(f"{name:>26}" + "".join(f"{cell:>26}" for cell in cells))
    arms = report.arms
    for kind in KINDS[1:]:
        report.checks.append(
            at_least(
                f"new batches that energy, adaptive accepts, {kind}",
                arms[f"energy, adaptive, {kind}"]["new"],
                0.9,
            )
        )
        repeats = arms[f"energy, adaptive, {kind}"]["repeats"]
        report.checks.append(at_most(f"repeats that energy, adaptive accepts, {kind}", repeats, 0.25))
    return report
