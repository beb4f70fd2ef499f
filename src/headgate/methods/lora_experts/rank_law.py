"""How the loss falls with the rank: L(r) = L_inf + a r^-b, fitted to a sweep; and the rank to try next.

The plan's "scaling law of r" (5.6). For a given b the rest is a linear least-squares problem, so b alone is searched.
Three unknowns: three ranks are fitted exactly and say nothing about the fit; four or more do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar, nnls

from headgate.errors import ConfigError

EXPONENTS = np.geomspace(0.05, 4.0, 200)
GAIN = 0.01


class RankLaw(NamedTuple):
    """``floor`` L_inf and ``scale`` a in the loss's unit, ``exponent`` b; ``error``: root mean square of the residuals."""

    floor: float
    scale: float
    exponent: float
    error: float

    def loss(self, rank: float) -> float:
        return float(self.floor + self.scale * rank**-self.exponent)


class Proposal(NamedTuple):
    """``tested``: whether the rank lies among those of the sweep. ``gain``: share of the loss that doubling it gains."""

    rank: int
    tested: bool
    gain: float


def fit_rank_law(ranks: Sequence[int], losses: Sequence[float]) -> RankLaw:
    """Least squares over L_inf >= 0, a >= 0 and b in [0.05, 4]. Raises ConfigError for fewer than three ranks.

    Equation: lora_experts (rank law 5.6): L(r) = L_inf + a r^-b
    Proved by: tests/lora_experts/test_rank_law.py::test_an_exact_law_is_found_again
    """
    if len(set(ranks)) < 3:
        raise ConfigError(
            f"a rank law has three unknowns and needs three ranks or more, got {sorted(set(ranks))}: sweep more of them"
        )
    r, y = np.asarray(ranks, dtype=float), np.asarray(losses, dtype=float)

    def solved(b: float) -> tuple[np.ndarray, float]:
        return nnls(np.stack([np.ones_like(r), r**-b], axis=1), y)

    best = int(np.argmin([solved(b)[1] for b in EXPONENTS]))
    around = EXPONENTS[max(best - 1, 0)], EXPONENTS[min(best + 1, len(EXPONENTS) - 1)]
    b = float(minimize_scalar(lambda b: solved(b)[1], bounds=around, options={"xatol": 1e-9}).x)
    (floor, scale), norm = solved(b)
    return RankLaw(float(floor), float(scale), b, norm / len(y) ** 0.5)


def next_rank(law: RankLaw, ranks: Sequence[int], gain: float = GAIN) -> Proposal:
    """The smallest tested rank of which doubling gains less than ``gain``; else twice the largest, to be tried next."""

    def doubled(rank: int) -> float:
        return 1 - law.loss(2 * rank) / law.loss(rank)

    for rank in sorted(set(ranks)):
        if doubled(rank) < gain:
            return Proposal(rank, True, doubled(rank))
    largest = 2 * max(ranks)
    return Proposal(largest, False, doubled(largest))
