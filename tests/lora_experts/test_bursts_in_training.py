"""Laws of what a skill brings unannounced: a burst gets an expert inside the stage, and a resume repeats it bitwise."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from headgate.data.collation import Collator
from headgate.errors import ConfigError
from headgate.methods.documents import as_batch, document_ids, documents_in
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.stage import Stage

from .conftest import resumed, trainer_of

WORDS = {"adding": range(3, 6), "sorting": range(600, 603)}


def rows_of(skill: str, count: int, seed: int) -> list[dict[str, Any]]:
    draw, words = random.Random(seed), WORDS[skill]
    texts = [[draw.choice(words) for _ in range(14 + i % 5)] for i in range(count)]
    return [{"input_ids": text, "labels": text} for text in texts]


def stages_of(*steps: int) -> list[Stage]:
    """``adding``; then, unlabelled, a segment of it in which half of the documents are of another skill."""
    return [
        Stage(name=f"{i}", steps=n, train={}, data=f"{i}", options={"skill": "adding", "labelled": i == 0})
        for i, n in enumerate(steps)
    ]


OPTIONS: dict[str, Any] = {"r": 2, "alpha": 4, "new_r": 3, "new_alpha": 6, "maturity_steps": 2}
NOVELTY = {"policy": "novelty", "min_samples": 12, "min_tokens": 64, "cooldown": 0, "loss_ratio": 0.0}


def mixed_trainer(folder: Path, steps: tuple[int, ...] = (2, 20), **options: Any) -> Any:
    spawn = {**NOVELTY, **options.pop("spawn", {})}
    method = LoraExperts(**{**OPTIONS, "router": "prototype", "burst": 12, "spawn": spawn, **options})
    rows = {
        "0": Dataset.from_list(rows_of("adding", 64, 0)),
        "1": Dataset.from_list(rows_of("adding", 60, 1) + rows_of("sorting", 14, 2)),
    }
    return trainer_of(folder, method, stages=stages_of(*steps), rows=rows, save_steps=1)


class Batches(TrainerCallback):
    """The words of every batch that was trained on, by optimizer step."""

    def __init__(self, trainer: Any) -> None:
        self.ids: list[torch.Tensor] = []
        original = trainer.training_step

        def step(model: Any, inputs: Any, *more: Any) -> Any:
            self.ids.append(inputs["input_ids"][inputs["attention_mask"].bool()])
            return original(model, inputs, *more)

        trainer.training_step = step


def test_an_unlabelled_skill_mints_an_expert_inside_a_stage(tmp_path: Path) -> None:
    """Its documents wait, are trained together, and the closed-form router sends them to the new expert."""
    trainer = mixed_trainer(tmp_path)
    (method,) = trainer.methods
    batches = Batches(trainer)
    trainer.train()
    first, mixed, born, verdict = method.stream.decisions
    assert (first["kind"], mixed["kind"], born["kind"]) == ("known", "undecided", "novel")
    assert mixed["skill"] is None and mixed["expert"] == 1 and "burst of" in born["reason"]
    assert verdict["kind"] == "kept" and verdict["trial"] == 1
    assert born["stage"] == "1" and 2 < born["step"] < 22 and born["high"] < born["threshold"]
    assert [(i.born, i.skills) for i in method.experts.roster] == [
        (0, ["adding"]),
        (2, []),
        (born["step"], []),
    ]
    burst = torch.cat(batches.ids[born["step"] : born["step"] + 3])
    assert bool((burst >= 600).all()), "the burst takes the place of the next batches"
    assert method.watch.left == 0 and len(batches.ids) == 22
    assert all(
        bool((m.experts.bank(s).expert(n).up != 0).any())
        for m in [method]
        for s in m.experts.banks
        for n in "012"
    )
    trainer.model.eval()
    for skill, expert, share in (("adding", 0, 0.75), ("sorting", 2, 0.95)):
        batch = Collator(0)(rows_of(skill, 8, 9))
        features = method.routed.features_of([batch])
        gates = method.experts.routers.at()(features, ["0", "1", "2"])
        assert float((gates.argmax(-1) == expert).float().mean()) > share


def test_a_burst_is_resumed_bitwise(tmp_path: Path) -> None:
    """At the boundary between its finding and the birth, in its midst, and after it."""
    look = mixed_trainer(tmp_path / "look")
    look.train()
    (born,) = [d["step"] for d in look.methods.methods[0].stream.decisions if d["kind"] == "novel"]
    resumed(tmp_path, mixed_trainer, [born, born + 1, 21])


def test_guards_hold_for_a_burst(tmp_path: Path) -> None:
    """At the cap the documents are served by what there is; short of a burst, they wait on."""
    cases: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        ({"spawn": {"max_experts": 1}}, (2, 20)),
        ({"burst": 60}, (2, 20)),
    ]
    for number, (options, steps) in enumerate(cases):
        trainer = mixed_trainer(tmp_path / str(number), steps, **options)
        trainer.train()
        (method,) = trainer.methods
        kinds = [decision["kind"] for decision in method.stream.decisions]
        assert kinds == ["known", "undecided", "kept" if number else "merged"]
    waiting = method.watch.novel.documents[:, 0, 0]
    assert int((waiting >= 600).sum()) == 14, "every novel document waits"


def test_a_burst_must_be_possible(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"burst needs spawn\.policy: novelty"):
        LoraExperts(burst=4)
    trainer = mixed_trainer(tmp_path)
    (method,) = trainer.methods
    with pytest.raises(ConfigError, match="another method asks for tags"):
        method.watch.next_batch({"input_ids": torch.zeros(2, 3), "tags": [[], []]}, None)


def test_documents_come_out_of_a_batch_as_they_went_in() -> None:
    """Plain or packed, labels and all; the same text has the same id, another order has not."""
    texts = [[5, 6, 7, 8], [8, 7, 6], [5, 6, 7]]
    labels = [[-100, 6, 7, 8], [8, 7, -100], [5, 6, 7]]
    plain = Collator(0)([{"input_ids": t, "labels": y} for t, y in zip(texts, labels, strict=True)])
    packed = Collator(0)(
        [
            {
                "input_ids": texts[0] + texts[1],
                "labels": labels[0] + labels[1],
                "position_ids": [0, 1, 2, 3, 0, 1, 2],
                "segment_ids": [0] * 4 + [1] * 3,
            },
            {"input_ids": texts[2], "labels": labels[2], "position_ids": [0, 1, 2], "segment_ids": [0] * 3},
        ]
    )
    documents = documents_in(plain)
    assert torch.equal(documents, documents_in(packed))
    assert torch.equal(document_ids(documents)[:2], document_ids(documents[:2]))
    assert len(set(document_ids(documents).tolist())) == 3
    again = as_batch(documents, torch.device("cpu"))
    assert all(torch.equal(again[name], plain[name]) for name in again) and len(again) == 3
