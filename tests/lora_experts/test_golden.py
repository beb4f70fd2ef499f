"""Twenty steps of every kind of run, against losses on record: a change of form changes none of them.

Write the record anew with HEADGATE_RECORD=1, and only where a change of what is trained is meant; HEADGATE_EXACT=1 asks for
equality bit for bit, which holds on the machine that wrote the record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from headgate.methods.lora_experts import LoraExperts
from headgate.methods.stage import Stage

from ..training.conftest import make_rows
from .conftest import SMALL, stream_stages, trainer_of
from .test_bursts_in_training import mixed_trainer, rows_of

RECORD = Path(__file__).parent / "golden_losses.json"
SKILLS = ("adding", "sorting", "counting", "sorting")


def stream(skills: tuple[str, ...] = SKILLS, **options: Any) -> Callable[[Path], Any]:
    """Five steps for each of four segments; the second skill returns."""
    return lambda folder: trainer_of(
        folder, LoraExperts(**{**SMALL, **options}), stages=stream_stages(20 // len(skills), skills)
    )


def doubling(folder: Path) -> Any:
    method = LoraExperts(
        **SMALL,
        experts=2,
        double_after=4,
        double_gain=0.99,
        max_rank=4,
        freeze_after=4,
        freeze_first=["q_proj"],
    )
    evaluation = make_rows(8, seed=9)
    return trainer_of(
        folder, method, max_steps=20, eval_dataset=evaluation, eval_strategy="steps", eval_steps=2
    )


def replayed(folder: Path) -> Any:
    from headgate.training.order import Replay

    method = LoraExperts(**SMALL, router="prototype", kd_weight=1.0, kd_on="replayed")
    stages = stream_stages(10, ("adding", "sorting"))
    rows = {
        stage.name: make_rows(seed=i).add_column("skill", [stage.options["skill"]] * 64)
        for i, stage in enumerate(stages)
    }
    return trainer_of(folder, method, stages=stages, rows=rows, columns=["skill"], replay=Replay(0.5, 32))


def by_look(folder: Path) -> Any:
    """Skills told apart by what the bare model makes of them, without a label after the first."""
    order = ("adding", "sorting", "adding", "sorting")
    stages = [
        Stage(name=f"{i}", steps=5, train={}, data=f"{i}", options={"skill": skill, "labelled": i == 0})
        for i, skill in enumerate(order)
    ]
    rows = {f"{i}": Dataset.from_list(rows_of(skill, 32, i)) for i, skill in enumerate(order)}
    spawn = {"policy": "novelty", "min_samples": 12, "min_tokens": 64, "cooldown": 0, "loss_ratio": 0.0}
    return trainer_of(folder, LoraExperts(**SMALL, router="prototype", spawn=spawn), stages=stages, rows=rows)


RUNS: dict[str, Callable[[Path], Any]] = {
    "learned": stream(gate_projection=3, orthogonality=0.1, kd_weight=0.1),
    "learned, per site": stream(
        router_sites="per_site", features="block 1", entropy_token=0.1, capacity_factor=0.5
    ),
    "learned, by document": stream(granularity="sequence", prefix_tokens=4, freeze_others=False),
    "prepass": stream(features="prepass", top_1_after=1),
    "prototype": stream(router="prototype"),
    "bayes": stream(router="bayes"),
    "oracle": stream(router="oracle", spawn={"policy": "oracle"}),
    "sum": stream(router="sum", orthogonality=0.5),
    "eviction": stream(router="prototype", evict=True, spawn={"policy": "always", "max_experts": 2}),
    "doubled and frozen": doubling,
    "burst": lambda folder: mixed_trainer(folder, (2, 18)),
    "distilled on replay": replayed,
    "merged": stream(merge_above=1e-6, merge_replay=2),
    "merged, prototype": stream(router="prototype", merge_above=1e-6),
    "by look": by_look,
}


def losses(folder: Path, make: Callable[[Path], Any]) -> list[float]:
    trainer = make(folder)
    trace: list[float] = []
    original = trainer.training_step

    def step(*args: Any) -> Any:
        loss = original(*args)
        trace.append(float(loss))
        return loss

    trainer.training_step = step
    trainer.train()
    (method,) = trainer.methods
    experts = getattr(method, "experts", method)
    print(len(experts.roster), [(i.born, i.rank, len(i.frozen), i.skills) for i in experts.roster])
    return trace


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_on_record(name: str, tmp_path: Path) -> None:
    trace = losses(tmp_path, RUNS[name])
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("HEADGATE_RECORD"):
        record[name] = trace
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    assert len(trace) == 20
    wanted = record[name] if os.environ.get("HEADGATE_EXACT") else pytest.approx(record[name], rel=1e-4)
    assert trace == wanted
