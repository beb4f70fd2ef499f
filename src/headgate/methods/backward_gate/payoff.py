"""From measured rows to a verdict: what each form of the gate could gain on a stream, and which one to take.

Every row of a pool has a *gain*: how far its loss falls when the model goes on training on other rows of the stream.
What is mastered, and what cannot be learned, gains nothing; what is new gains. Two such continuations, on different
rows, give two gains: one ranks the rows, the other says what the ranking is worth, so chance cannot pass for worth.
The estimate is ours.

Shapes: N units that a gate decides on (rows, or whole micro-batches).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headgate.ops.control import outstanding_share
from headgate.ops.payoff import advantage, relative_cost, required_worth
from headgate.ops.randomness import generator

ACCEPTANCES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
RESAMPLES = 200
DOUBT = 0.1
"""A gate is said to pay where this share of the resamples, at most, says that it does not."""


@dataclass(frozen=True)
class Form:
    """A way to gate: what it decides on, and the share of the forward that a decision costs (see ops.payoff)."""

    name: str
    scored: float = 1.0
    again: bool = False

    def cost(self, a: float, rho: float) -> float:
        return relative_cost(a, rho, self.scored, self.again)


@dataclass(frozen=True)
class Verdict:
    """What a score gains in a form at its best acceptance. ``low``: the advantage that resampling leaves standing."""

    form: str
    score: str
    acceptance: float
    worth: float
    needed: float
    advantage: float
    low: float

    @property
    def pays(self) -> bool:
        return self.low > 1


def worth_of_top(score_N: Tensor, gain_N: Tensor, a: float) -> float:
    """Mean gain of the top ``a`` by score, in average gains, between 0 and 1/a.

    Where the average is not positive, all that is learned is in what is chosen: 1/a if that gains, else 0.
    """
    count = max(1, round(a * len(score_N)))
    top = float(gain_N[score_N.argsort(descending=True, stable=True)[:count]].mean())
    mean = float(gain_N.mean())
    if mean <= 0:
        return 1 / a if top > 0 else 0.0
    return min(1 / a, max(0.0, top / mean))


def best(
    form: Form, name: str, scores: tuple[Tensor, Tensor], gains: tuple[Tensor, Tensor], rho: float
) -> Verdict:
    """The verdict on one score in one form: the acceptance of the largest advantage, and how sure it is.

    Args:
        scores, gains: two of each; a score is set against the gain of its own place. A score that was not made
            from gains is given twice; the oracle's two are the *other* gains.
    """
    count = len(gains[0])
    usable = [a for a in ACCEPTANCES if a * count >= 3] or ACCEPTANCES[-1:]

    def gained(a: float, rows_N: Tensor) -> float:
        worth = [worth_of_top(s[rows_N], g[rows_N], a) for s, g in zip(scores, gains, strict=True)]
        return advantage(sum(worth) / 2, a, form.cost(a, rho))

    everything = torch.arange(count)
    a = max(usable, key=lambda a: gained(a, everything))
    stream = generator(0, 0, "backward_gate.payoff")
    drawn = [gained(a, torch.randint(count, (count,), generator=stream)) for _ in range(RESAMPLES)]
    needed = required_worth(a, form.cost(a, rho))
    found = gained(a, everything)
    return Verdict(form.name, name, a, found * needed, needed, found, sorted(drawn)[int(DOUBT * RESAMPLES)])


def repeats_worth(gain_N: Tensor) -> tuple[float, float]:
    """(share of rare units, w): the share whose gain stands out of the others', and the others' mean gain by theirs.

    Where none stands out there is one kind of unit: (0, 1).
    """
    share = outstanding_share(gain_N.double())
    if share == 0:
        return 0.0, 1.0
    order = gain_N.argsort(descending=True)
    count = round(share * len(gain_N))
    rare, common = float(gain_N[order[:count]].mean()), float(gain_N[order[count:]].mean())
    return share, min(1.0, max(0.0, common / rare)) if rare > 0 else 1.0


def auroc(score_N: Tensor, positive_N: Tensor) -> float:
    """Chance that a positive unit scores above another, ties half; nan where one side is empty."""
    high, low = score_N[positive_N], score_N[~positive_N]
    if not len(high) or not len(low):
        return math.nan
    above = (high[:, None] > low[None, :]).double() + 0.5 * (high[:, None] == low[None, :]).double()
    return float(above.mean())


def learns(gains: tuple[Tensor, Tensor], share: float = 0.1) -> bool:
    """Whether anything is learned at all: the best share by one gain has, by the other, a mean above twice its error."""
    tops = []
    for score, gain in (gains, gains[::-1]):
        top = gain[score.argsort(descending=True)[: max(3, round(share * len(score)))]]
        tops.append(float(top.mean()) - 2 * float(top.std()) / len(top) ** 0.5)
    return min(tops) > 0


def verdicts(
    forms: Mapping[Form, Mapping[str, Tensor]],
    gains: Mapping[Form, tuple[Tensor, Tensor]],
    rho: float,
) -> list[Verdict]:
    """Every score of every form, and an oracle for each, the most advantageous first."""
    found = []
    for form, scores in forms.items():
        one, two = gains[form]
        found.append(best(form, "oracle", (two, one), (one, two), rho))
        found += [best(form, name, (score, score), (one, two), rho) for name, score in scores.items()]
    return sorted(found, key=lambda verdict: -verdict.low)
