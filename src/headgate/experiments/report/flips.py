"""Items that an arm and the baseline answered differently: counts a seed, and a few to read."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from headgate.errors import CheckpointError, DataError
from headgate.evaluation.paired import Pair, flips, pair
from headgate.evaluation.predictions import read_predictions
from headgate.experiments.report.content import Block, Example, Examples, Table, Text
from headgate.experiments.report.study import Arm, Run, Study
from headgate.experiments.statistics import mcnemar

SHOWN = 3
"""Examples of each direction and arm."""


def flip_blocks(study: Study) -> list[Block]:
    """A table of gained and lost items by arm and seed, and examples behind folds. Empty without right-or-wrong items."""
    if study.baseline is None or not study.runs:
        return []
    task = _task(study)
    if task is None:
        return [Text("No arm was evaluated on items that are right or wrong: nothing can flip.")]
    base, rows = study.arm(study.baseline), []
    blocks: list[Block] = []
    for arm in study.arms:
        if arm is base:
            continue
        found: dict[int, dict[str, list[Pair]]] = {}
        for seed in (s for s in study.seeds if s in arm.runs and s in base.runs):
            try:
                found[seed] = flips(_pairs(base.runs[seed], arm.runs[seed], task))
            except (CheckpointError, DataError) as error:
                blocks.append(Text(f"{arm.name}, seed {seed}: {error}", tone="warning"))
        if not found:
            continue
        gained, lost = ([len(turned[kind]) for turned in found.values()] for kind in ("gained", "lost"))
        net = f"{statistics.fmean(gained) - statistics.fmean(lost):+.1f}".replace("-", "−")
        p_values = [mcnemar([False] * g + [True] * n, [True] * g + [False] * n) for g, n in zip(gained, lost)]
        rows.append([arm.name, _list(gained), _list(lost), net, ", ".join(f"{p:.2g}" for p in p_values)])
        seed, turned = next(iter(found.items()))
        if any(turned.values()):
            blocks.append(_examples(base, arm, turned, seed))
    if not rows:
        return blocks
    caption = (
        f"{task}: items that only the arm (gained) or only {study.baseline} (lost) got right, by seed "
        f"({_list(study.seeds)}); exact McNemar p"
    )
    return [Table(caption, ["arm", "gained", "lost", "mean net", "McNemar p"], rows, (1, 2, 3, 4)), *blocks]


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _task(study: Study) -> str | None:
    """The metric's task if its items are right or wrong, else the first such task of any run."""
    tasks = [
        task
        for run in study.runs
        for task, found in ((run.result or {}).get("evaluation") or {}).items()
        if "accuracy" in found and (run.directory.predictions / f"{task}.jsonl").exists()
    ]
    own = study.metric.path[1] if study.metric is not None else None
    return own if own in tasks else next(iter(tasks), None)


def _pairs(base: Run, arm: Run, task: str) -> list[Pair]:
    one, two = (read_predictions(run.directory.predictions / f"{task}.jsonl") for run in (base, arm))
    return pair(one, two)


def _examples(base: Arm, arm: Arm, turned: dict[str, list[Pair]], seed: int) -> Examples:
    items = [
        Example(
            f"{kind}: {found.id}",
            found.prompt.strip(),
            found.gold or "",
            [(base.name, _output(found.a)), (arm.name, _output(found.b))],
        )
        for kind in ("gained", "lost")
        for found in turned[kind][:SHOWN]
    ]
    return Examples(f"What flipped in {arm.name} (seed {seed})", items)


def _output(item: dict[str, object]) -> str:
    return str(item.get("output") or "").strip() or "(empty)"
