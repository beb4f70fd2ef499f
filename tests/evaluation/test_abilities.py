"""The fixed suite: the same before and after where nothing changed, and what got worse is named."""

from __future__ import annotations

from typing import Any

import torch

from headgate.evaluation.abilities import abilities_task, remember_abilities, suite
from headgate.evaluation.config import EvalTask


def test_the_suite_is_balanced() -> None:
    questions = suite()["questions"]
    assert len(questions) == 48 and {len(q["options"]) for q in questions} == {4}
    places = [q["answer"] for q in questions]
    assert all(5 <= places.count(place) <= 20 for place in range(4))
    assert len({q["question"] for q in questions}) == 48


def test_what_is_forgotten_is_named(tiny: tuple[Any, Any]) -> None:
    from headgate.models.load import load_model

    model, tokenizer = load_model("random:llama", device="cpu", seed=3, lora={"r": 4, "dropout": 0.0})
    task = EvalTask(task="abilities")
    assert task.key == "abilities"
    remember_abilities([task], model, tokenizer)
    metrics, items = abilities_task(model, tokenizer, task, None)
    assert len(items) == 48 and metrics["forgotten"] == []
    assert metrics["delta"]["loss"] == metrics["delta"]["accuracy"] == 0, (
        "an untrained adapter changes nothing"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    after, _ = abilities_task(model, tokenizer, task, None)
    worse = {name for name, change in after["delta"]["loss_by_register"].items() if change > 0.01}
    assert after["delta"]["loss"] != 0 and worse and worse <= set(after["forgotten"])
    assert after["before"] == metrics["before"]
