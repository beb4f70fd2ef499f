"""A router against the mixture of two fixed masks that executes what the router executes, seed by seed.

    python scripts/equal_flops.py benchmarks/results/layer_routing_50_masks.comparison.json gumbel_token static_best static_37

At equal depth a token router executes more than a mask: its closed blocks still make keys and values for later tokens.
With share(m) the FLOPs of a mask as a share of full depth, a text sent to mask b with probability w and to mask a otherwise costs
share(a) + w (share(b) - share(a)) and has the mean loss (1 - w) loss(a) + w loss(b): the line that routing must be below.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from headgate.experiments.statistics import paired_t


class Point(NamedTuple):
    """One run: executed FLOPs as a share of full depth, and test loss."""

    share: float
    loss: float


def points(comparison: dict[str, Any], arm: str) -> list[Point]:
    """One per seed. Raises SystemExit for an arm that is not there or was not evaluated with its depth."""
    if arm not in comparison["arms"]:
        raise SystemExit(f"there is no arm {arm!r}: choose from {', '.join(comparison['arms'])}")
    values, found = comparison["arms"][arm]["values"], []
    for value, metrics in zip(values, comparison["arms"][arm]["metrics"], strict=True):
        shares = [task["executed_share"] for task in metrics.values() if "executed_share" in task]
        if len(shares) != 1:
            raise SystemExit(f"{arm}: needs one evaluation that says what was executed, has {len(shares)}")
        found.append(Point(shares[0], value))
    return found


def mixture(at: float, a: Point, b: Point) -> float:
    """The loss of the mixture of two masks at this share of the FLOPs. Raises SystemExit outside the two."""
    weight = (at - a.share) / (b.share - a.share)
    if not 0 <= weight <= 1:
        raise SystemExit(
            f"the router executes {at:.3f} of full depth, the masks {a.share:.3f} and {b.share:.3f}: take its neighbours"
        )
    return (1 - weight) * a.loss + weight * b.loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path)
    parser.add_argument("router", help="arm of the router")
    parser.add_argument("masks", nargs=2, help="arms of the masks on both sides of it")
    arguments = parser.parse_args()
    comparison = json.loads(arguments.comparison.read_text())
    router, a, b = (points(comparison, arm) for arm in (arguments.router, *arguments.masks))
    margins = [r.loss - mixture(r.share, one, other) for r, one, other in zip(router, a, b, strict=True)]
    interval = paired_t(margins)
    if interval is None:
        raise SystemExit(f"{len(margins)} seeds of margin {margins[0]:+.3f} have no interval: run more")
    share = sum(point.share for point in router) / len(router)
    print(f"{arguments.router} executes {share:.3f} of full depth")
    print(
        f"less the mixture of {' and '.join(arguments.masks)} there: {interval.mean:+.3f} "
        f"[{interval.low:+.3f}, {interval.high:+.3f}], p {interval.p:.2g}, {len(margins)} seeds: "
        + ", ".join(f"{margin:+.3f}" for margin in margins)
    )


if __name__ == "__main__":
    main()
