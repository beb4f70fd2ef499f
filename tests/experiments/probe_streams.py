"""Streams whose answer is known from how they are made; the probe was written before any of them was run."""

from __future__ import annotations

from typing import Any

MASTERED = ["crafts", "fruit", "pets", "party", "sweets", "collecting", "beach", "library"]
TARGETS = ["shopping", "travel", "cooking", "farm", "savings", "school", "sports", "building"]


def part(families: list[str], weight: float = 1.0, limit: int = 1500, **options: Any) -> dict[str, Any]:
    return {
        "source": "wordmath",
        "weight": weight,
        "limit": limit,
        "options": {"families": families, **options},
    }


def alone(families: list[str], limit: int = 1500, **options: Any) -> dict[str, Any]:
    source = part(families, limit=limit, **options)
    del source["weight"]
    return source


STREAMS: dict[str, tuple[dict[str, Any], bool]] = {
    # what is mastered can be skipped: an oracle at the share of the new needs no luck
    "rare skill, whole batches": (
        {"mix_by": "batch", "train": [part(MASTERED, 0.93), part(["school"], 0.07)]},
        True,
    ),
    "rare skill, rows": ({"train": [part(MASTERED, 0.92), part(["travel"], 0.08)]}, True),
    "boilerplate and a skill": (
        {"mix_by": "batch", "train": [part(["toys"], 0.9, 12), part(["sports"], 0.1)]},
        True,
    ),
    "two rare skills": (
        {"train": [part(MASTERED, 0.88), part(["savings"], 0.06), part(["building"], 0.06)]},
        True,
    ),
    "one mastered family, one new": (
        {"mix_by": "batch", "train": [part(["garden"], 0.85), part(["cooking"], 0.15)]},
        True,
    ),
    # rows of one kind: none is worth what a skipped forward costs
    "one new family": ({"train": alone(["shopping"])}, False),
    "eight new families": ({"train": alone(TARGETS)}, False),
    "retold problems": ({"train": alone(TARGETS, redundancy=0.7)}, False),
    # nothing to learn, or the same few rows for ever
    "all mastered": ({"train": alone(MASTERED)}, False),
    "24 rows for ever": ({"train": alone(["farm", "school"], limit=24)}, False),
    "five new families, unequal": (
        {"train": [part(["shopping"], 0.4), part(["travel"], 0.3), part(["farm", "school", "sports"], 0.3)]},
        False,
    ),
}
"""Name -> (the recipe's ``data`` block, whether gating can pay)."""


def recipe(data: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "probe-stream",
        "model": {"name_or_path": "embedded"},
        "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
        "data": {"validation": None, "max_length": 256, "group_by_length": False, **data},
        "training": {"max_steps": 160, "per_device_train_batch_size": 8, "learning_rate": 1.0e-2},
    }
