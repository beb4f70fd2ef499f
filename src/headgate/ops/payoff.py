"""Can gating pay? What an accepted micro-batch must be worth, and what it is worth.

Costs are relative to an ungated micro-batch, one forward and one backward of rho forwards. ``a`` is the acceptance.
"""

from __future__ import annotations


def relative_cost(a: float, rho: float, scored: float = 1.0, again: bool = False) -> float:
    """``(s + (1 - s) a + rho a) / (1 + rho)``: the time of a gated micro-batch by that of an ungated one.

    Args:
        scored: share s of the forward that every offered micro-batch runs to be scored (1: a gate after the whole
            forward; a quarter: ``score_layer`` at a quarter of the depth).
        again: what is accepted runs its forward once more (a pool of sequences): ``(s + (1 + rho) a) / (1 + rho)``.
    """
    rest = a if again else (1 - scored) * a
    return (scored + rest + rho * a) / (1 + rho)


def required_worth(a: float, cost: float) -> float:
    """What an accepted micro-batch must be worth, in average ones, for the gate to break even: ``cost / a``.

    With the whole forward scored it is ``(1 + rho a) / ((1 + rho) a)``.
    """
    return cost / a


def oracle_worth(a: float, fresh: float, w: float) -> float:
    """Worth of what an oracle accepts where a share ``fresh`` is worth 1 and the rest w: the fresh ones first."""
    taken = min(a, fresh)
    return (taken + (a - taken) * w) / a / (fresh + (1 - fresh) * w)


def break_even(a: float, cost: float) -> float:
    """The worth w of a repeat below which an oracle wins that accepts exactly the fresh share a; below 0: it never does."""
    return (a / cost - a) / (1 - a)


def advantage(worth: float, a: float, cost: float) -> float:
    """Learning per unit of time, gated by ungated: above 1 the gate pays.

    ``worth`` is that of an accepted micro-batch in average ones. With a = 1 it is read per *offered* micro-batch.
    """
    return worth / required_worth(a, cost)
