"""How many steps of one arm fit in another arm's time: measured in seconds, checked against executed FLOPs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from headgate.experiments.records import Figures

GAP = 0.15
"""Equal time is measured again where executed FLOPs say so much else."""


def measured_steps(
    trained: Callable[[str, int], Figures],
    name: str,
    other: str,
    seeds: Sequence[int],
    say: Callable[[str], None],
) -> Figures:
    """The calibration of the arm ``name`` on the arm ``other``.

    Both run twice, in turn and alone, at seeds outside the comparison's, so that a machine that other work slows down
    slows them alike. Where seconds and FLOPs disagree by more than ``GAP`` they run twice more: a pause of the
    machine hits one run, and the fastest of four is free of it. What disagrees still is said.

    Args:
        trained: (arm, seed) -> its ``training`` figures: steps, seconds, flops. seeds: four.
    """
    seconds: dict[str, list[float]] = {name: [], other: []}
    flops: dict[str, list[float]] = {name: [], other: []}
    steps = 0
    for place, seed in enumerate(seeds):
        if place == 2 and equal_steps(steps, seconds, flops, name, other)["gap"] <= GAP:
            break
        for arm in (other, name):
            done = trained(arm, seed)
            seconds[arm].append(done["seconds"])
            flops[arm].append(done["flops"])
            steps = done["steps"] if arm == name else steps
    found = equal_steps(steps, seconds, flops, name, other)
    if found["gap"] > GAP:
        say(
            f"{name}: {found['steps']} steps fit in the time of {other}, and {found['steps_by_flops']} in its FLOPs: "
            "forwards, backwards and optimizer steps do not cost here what they count; compare seconds and FLOPs of both arms"
        )
    return {"of": other, **found, "measured": seconds}


def equal_steps(
    own_steps: int,
    seconds: Mapping[str, Sequence[float]],
    flops: Mapping[str, Sequence[float]],
    name: str,
    other: str,
) -> Figures:
    """Steps of ``name`` that fit in the time of ``other``, of the fastest runs; beside it those that fit in its FLOPs.

    ``gap`` is the ratio of the two, less one.
    """
    by_time = min(seconds[other]) / min(seconds[name])
    by_flops = statistics.fmean(flops[other]) / statistics.fmean(flops[name])
    return {
        "seconds": min(seconds[other]),
        "steps": max(1, round(own_steps * by_time)),
        "steps_by_flops": max(1, round(own_steps * by_flops)),
        "gap": max(by_time, by_flops) / min(by_time, by_flops) - 1,
    }
