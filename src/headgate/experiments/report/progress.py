"""How far runs are that still go on: complete runs, the share done, and the time left at the pace so far."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from headgate.experiments.records import Content, Figures
from headgate.experiments.report.content import Table
from headgate.experiments.report.study import Arm, Run, Study


@dataclass(frozen=True)
class Progress:
    """One arm. ``share`` of its work in [0, 1]; ``seconds_left`` of one process, None where nothing has told the pace yet."""

    arm: str
    complete: int
    running: int
    failed: int
    planned: int
    share: float
    seconds_left: float | None


def share_done(recipe: Content, last: Figures) -> float:
    """The share of a run's training that its last log says is done: by steps, by the stream's steps, or by epochs."""
    training = recipe.get("training") or {}
    stream = (recipe.get("data") or {}).get("stream") or []
    steps = training.get("max_steps") or sum(skill.get("steps") or 0 for skill in stream)
    if steps:
        return min(1.0, last.get("step", 0) / steps)
    epochs = training.get("epochs")
    return min(1.0, last.get("epoch", 0.0) / epochs) if epochs else 0.0


def progress(study: Study) -> list[Progress]:
    """One entry an arm, in order. An arm that has not begun takes the mean time of the others' runs."""
    seconds = {arm.name: [s for run in arm.distinct if (s := _whole(run)) is not None] for arm in study.arms}
    known = [s for each in seconds.values() for s in each]
    return [
        _arm(study, arm, statistics.fmean(seconds[arm.name] or known) if known else None)
        for arm in study.arms
    ]


def seconds_left(found: Sequence[Progress]) -> float | None:
    """Until the last run ends, with as many processes as run now; None while no run has logged anything."""
    if any(each.seconds_left is None for each in found):
        return None
    return sum(each.seconds_left or 0.0 for each in found) / max(1, sum(each.running for each in found))


def progress_table(study: Study) -> Table | None:
    """None where every planned run is complete."""
    found = progress(study)
    if not study.missing and all(run.result is not None for run in study.runs):
        return None
    left = seconds_left(found)
    rows = [
        [
            each.arm,
            f"{each.complete} of {each.planned}"
            + (f", {each.running} running" if each.running else "")
            + (f", {each.failed} failed" if each.failed else ""),
            f"{each.share:.0%}",
            duration(each.seconds_left),
        ]
        for each in found
    ]
    if (
        study.kind != "comparison" and study.missing
    ):  # of a sweep's runs that have not begun nothing else is known
        rows.append(["not begun", f"0 of {len(study.missing)}", "0%", "not known yet"])
        left = None
    whole = "" if left is None else f"; about {duration(left)} left in all"
    caption = (
        f"Runs so far, and the time left at the pace so far, evaluation included once a run has ended{whole}"
    )
    return Table(caption, ["arm", "complete runs", "done", "left, one process"], rows, [2, 3])


def duration(seconds: float | None) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds is None:
        return "not known yet"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _arm(study: Study, arm: Arm, each: float | None) -> Progress:
    runs = arm.distinct
    complete = sum(run.result is not None for run in runs)
    failed = sum(run.result is None and run.directory.status == "failed" for run in runs)
    # an arm without training has one run at every seed: as soon as that one exists, nothing else is to come
    planned = (
        len(runs) if study.kind != "comparison" or len(arm.runs) == len(study.seeds) else len(study.seeds)
    )
    shares = [1.0 if run.result is not None else _share(run) for run in runs]
    left = None if each is None else each * (planned - sum(shares))
    return Progress(
        arm.name,
        complete,
        len(runs) - complete - failed,
        failed,
        planned,
        sum(shares) / max(1, planned),
        left,
    )


def _share(run: Run) -> float:
    return share_done(run.recipe, run.rows[-1]) if run.rows else 0.0


def _whole(run: Run) -> float | None:
    """Seconds of the whole run: measured, or of one that goes on extrapolated from its training so far."""
    if run.result is not None:
        elapsed = run.result.get("elapsed_seconds")
        return None if elapsed is None else float(elapsed)
    share = _share(run)
    logged = next((row for row in reversed(run.rows) if row.get("tokens_per_second")), None)
    if not share or logged is None:
        return None
    return float(logged["trained_tokens"] / logged["tokens_per_second"] / share)
