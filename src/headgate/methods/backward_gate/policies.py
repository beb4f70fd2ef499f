"""What each ``score`` setting measures, and how a measurement becomes a probability.

All of them share the window, the controller, the draws and the telemetry, so that an ablation changes this
one thing. ``tau`` is the controller's threshold; where a rule has a natural acceptance share instead, that
share is ``1 - tau``.

| score              | measures (more = accept)            | probability                       | source |
|---|---|---|---|
| novelty            | 1 - ||W^T z||^2                     | sigmoid(beta (rank - tau))        | SLoRA |
| energy             | log(||z||/tokens sqrt(novelty))     | the same                          | ours: the part outside W, not normalised |
| sketch_norm        | log(||z||/tokens)                   | the same                          | control: energy without the subspace |
| oracle             | share of rows that ``column`` says are new | the same                   | the bound of any gate |
| permuted_novelty   | another batch's novelty             | the same                          | control |
| random             | nothing                             | 1 - tau, or exact replay          | control |
| entropy            | mean predictive entropy             | as novelty                        | |
| consensus          | cos(z, running mean)                | as novelty                        | aligned batches, the opposite hypothesis |
| novelty_loss_floor | novelty                             | as novelty, 0 below the floor     | SLoRA, ablation 4 |
| loss               | mean loss                           | rank^(1/(1 - tau) - 1)            | Selective Backprop, arXiv 1910.00762 |
| loss_floor         | mean loss                           | 1 above the floor                 | SLoRA, ablation 3 |
| grad_norm_bound    | root mean ||e_t||^2                 | min(1, (1 - tau) g / mean g)      | Katharopoulos and Fleuret, arXiv 1803.00942 |
| infobatch          | mean loss                           | 1 - r below the running mean      | InfoBatch, arXiv 2303.04947 |
| token              | nothing                             | 1 (tokens are drawn at the head)  | control |

``rule: quantile`` replaces the third column by "in the top share of the window".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headgate.methods.backward_gate.config import BackwardGateConfig
from headgate.modules.score_window import ScoreWindow
from headgate.ops.control import (
    acceptance_probability,
    outstanding_share,
    quantile_probability,
    share_above_floor,
    threshold_bounds,
    with_floor,
)

SKETCHING = frozenset(
    {"novelty", "energy", "sketch_norm", "permuted_novelty", "novelty_loss_floor", "consensus"}
)
LOGARITHMIC = frozenset({"energy", "sketch_norm"})
"""Scores kept as logarithms: their dependence on the number of tokens is a power law."""
SHARES = frozenset({"random", "loss", "grad_norm_bound"})
FREE_RUNNING = frozenset({"infobatch", "token"})
"""Scores whose acceptance follows from their own rule; no threshold is moved for them."""
FLOOR_SHARE = 0.1
"""Without ``loss_floor``, novelty_loss_floor refuses the tenth of the window with the lowest loss."""


@dataclass(frozen=True)
class Measured:
    """The numbers of one micro-batch that policies read: means over its tokens, on the CPU.

    ``sketch_norm`` is ||z|| per token; ``truth`` the share of its rows that are new, where a column says so.
    """

    novelty: float
    alignment: float
    tokens: float
    loss: float
    entropy: float
    error_norm: float
    sketch_norm: float
    truth: float


def raw_score(kind: str, seen: Measured) -> float:
    """The measurement of the table above; 0 where there is none."""
    if kind in ("novelty", "permuted_novelty", "novelty_loss_floor"):
        return seen.novelty
    if kind in LOGARITHMIC:
        outside = seen.novelty if kind == "energy" else 1.0
        return math.log(max(seen.sketch_norm * math.sqrt(outside), 1e-30))
    if kind == "oracle":
        return seen.truth
    if kind in ("loss", "loss_floor", "infobatch"):
        return seen.loss
    return {"entropy": seen.entropy, "consensus": seen.alignment, "grad_norm_bound": seen.error_norm}.get(
        kind, 0.0
    )


def make_window(config: BackwardGateConfig) -> ScoreWindow:
    """The window with its controller started at the threshold that meets the target on uniform ranks."""
    threshold: float | None = None
    bounds = threshold_bounds(config.beta)
    if config.score in SHARES or config.score in FREE_RUNNING:
        threshold, bounds = 1 - config.target_acceptance, (-2.0, 0.999)
    elif config.score == "loss_floor":
        threshold, bounds = 1 - config.target_acceptance, (-0.1, 1.1)
    return ScoreWindow(
        config.window,
        target=config.target_acceptance,
        rate=config.ema_rate,
        beta=config.beta,
        threshold=threshold,
        bounds=bounds,
    )


def probability(
    config: BackwardGateConfig,
    window: ScoreWindow,
    score: float,
    seen: Measured,
    progress: float,
    corrected: float = 0.0,
) -> float:
    """The probability of accepting, given the calibrated score and the share of the run that is done.

    ``corrected`` is the score before its rank was taken: what ``rule: quantile`` compares with the window.
    """
    if config.target_acceptance == 1.0 and config.score not in FREE_RUNNING:
        return 1.0
    if config.rule == "quantile":
        p = quantile_probability(
            torch.tensor(corrected, dtype=torch.float64), window.full, _share(config, window, corrected)
        )
    else:
        p = _sigmoid_or_control(config, window, score, seen, progress)
    return with_floor(p, config.floor)


def _share(config: BackwardGateConfig, window: ScoreWindow, corrected: float) -> float:
    """The share of the window that ``rule: quantile`` takes, the floor left out."""
    fixed = share_above_floor(config.target_acceptance, config.floor)
    if config.dose == "fixed":
        return fixed
    values = torch.cat([window.full, torch.tensor([corrected], dtype=window.full.dtype)])
    if config.score in LOGARITHMIC:
        values = torch.exp(values - values.max())
    # Where no score stands out the target says how much to learn; one below the floor leaves that to the floor.
    return outstanding_share(values) or max(0.0, fixed)


def _sigmoid_or_control(
    config: BackwardGateConfig, window: ScoreWindow, score: float, seen: Measured, progress: float
) -> float:
    kind, tau = config.score, float(window.threshold)
    share = min(1.0, max(1e-3, 1 - tau))
    if kind == "token":
        return 1.0
    if kind == "random":
        return share
    if kind == "loss":
        return float(score ** (1 / share - 1))
    if kind == "loss_floor":
        return float(seen.loss > config.loss_floor) if config.loss_floor is not None else float(score > tau)
    if kind == "grad_norm_bound":
        mean = float(window.full.mean()) if window.count else seen.error_norm
        unprofitable = config.profitability and not pays(
            window.full, config.target_acceptance, config.cost_ratio
        )
        return 1.0 if unprofitable else min(1.0, (1 - tau) * seen.error_norm / max(mean, 1e-12))
    if kind == "infobatch":
        mean = float(window.full.mean()) if window.count else seen.loss
        return 1 - config.prune if seen.loss < mean and progress < config.anneal else 1.0
    p = float(acceptance_probability(torch.tensor(score, dtype=torch.float64), window.threshold, config.beta))
    return p if kind != "novelty_loss_floor" or _above_floor(config, window, seen) else 0.0


def weight(config: BackwardGateConfig, p: float) -> float:
    """The factor on an accepted loss. InfoBatch rescales by its rule; others only with ``reweight: ipw``.

    Equation: backward_gate (step 4): w = min(w_max, 1 / P(accept)), with reweight ipw
    Proved by: tests/backward_gate/test_drop_in.py::test_inverse_probability_weights_are_those_of_the_decision
    Proved by: tests/backward_gate/test_method.py::test_inverse_probability_weights_are_unbiased_over_every_pattern
    """
    if config.weighted:
        return min(config.max_weight, 1 / max(p, 1e-6))
    return 1.0


def pays(norms_W: Tensor, acceptance: float, cost_ratio: float) -> bool:
    """Whether importance sampling by these norms reduces variance by more than it costs.

    Katharopoulos and Fleuret, eq. 26: ``1/tau = sqrt(1 - ||g - u||^2 / sum g^2)`` with g the normalised
    norms and u uniform, tau the growth of the batch that would reduce variance as much. Deviation: their
    cost of a presampled batch becomes ours, ``(1 + rho a) / a`` per accepted batch against ``1 + rho``.

    Equation: backward_gate (profitability): 1 / sqrt(1 - ||g - u||^2 / ||g||^2) > (1 + rho a) / (a (1 + rho))
    Proved by: tests/backward_gate/test_equations.py::test_importance_sampling_pays_from_the_break_even_on
    Proved by: tests/backward_gate/test_drop_in.py::test_importance_sampling_pays_only_when_norms_are_uneven
    """
    if norms_W.numel() < 2 or float(norms_W.sum()) <= 0:
        return False
    g = norms_W / norms_W.sum()
    gain = (1 - (g - 1 / g.numel()).square().sum() / g.square().sum()).clamp(min=1e-12).rsqrt()
    return float(gain) > (1 + cost_ratio * acceptance) / (acceptance * (1 + cost_ratio))


def replay_probability(accepted: int, offered: int, total_accepted: int, total_offered: int) -> float:
    """Selection sampling (Knuth, Algorithm S): accepts exactly ``total_accepted`` of ``total_offered``."""
    left = total_offered - offered
    return min(1.0, max(0.0, (total_accepted - accepted) / left)) if left > 0 else 0.0


def _above_floor(config: BackwardGateConfig, window: ScoreWindow, seen: Measured) -> bool:
    if config.loss_floor is not None:
        return seen.loss > config.loss_floor
    return window.loss_rank(seen.loss) > FLOOR_SHARE
