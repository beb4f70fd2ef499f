"""No right answer is scored wrong: every local data set's gold answers, and those of its neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest

from headgate.data.config import SourceConfig
from headgate.data.sources import load_rows
from headgate.evaluation.scorers import SCORERS, check_golds, suited, written

DATA = [
    ("wordmath", None, "test", "strict"),
    ("gsm8k", "gsm8k", "test", "strict"),
    ("math", "math/math_1500.jsonl", "train", "math"),
    ("arc_challenge", "arc_challenge", "train", "choice"),
    ("mmlu", "mmlu/dev", "validation", "choice"),
    ("alpaca", "boolq", "train", "text"),
    ("alpaca", "openbookqa", "train", "text"),
]


def shares(rows: list[dict], scorer: str) -> tuple[float, float, float]:
    """(golds matched, reference completions matched, neighbours' different golds matched)."""
    equal = SCORERS[scorer]
    options = [row.get("choices") or () for row in rows]
    gold = [equal(written(scorer, r["answer"]), r["answer"], o) for r, o in zip(rows, options)]
    reference = [equal(r["completion"], r["answer"], o) for r, o in zip(rows, options)]
    others = [
        equal(written(scorer, other["answer"]), row["answer"], o)
        for row, other, o in zip(rows, [*rows[1:], rows[0]], options)
        if row["answer"] != other["answer"]
    ]
    return sum(gold) / len(gold), sum(reference) / len(reference), sum(others) / len(others)


def measure(shared: Path, source: str, path: str | None, split: str, limit: int | None) -> tuple:
    config = SourceConfig(
        source=source, path=None if path is None else str(shared / "data" / path), split=split, limit=limit
    )
    rows = list(load_rows(config))
    scorer = suited(
        [row["answer"] for row in rows],
        [row["completion"] for row in rows],
        choices=rows[0].get("choices") is not None,
        rationale=True,
    )
    check_golds(
        scorer,
        [[row["answer"]] for row in rows],
        [row.get("choices") or () for row in rows],
        [row["example_id"] for row in rows],
    )
    return scorer, len(rows), *shares(rows, scorer)


@pytest.mark.shared
@pytest.mark.parametrize(("source", "path", "split", "scorer"), DATA)
def test_golds_are_matched_and_neighbours_are_not(shared, source, path, split, scorer) -> None:
    limit = 100 if scorer == "math" else None
    chosen, _, gold, reference, other = measure(shared, source, path, split, limit)
    assert chosen == scorer and gold == 1.0 and reference >= 0.996 and other <= 0.005


@pytest.mark.slow
@pytest.mark.shared
def test_golds_of_math_by_math_verify_alone(shared) -> None:
    rows = list(load_rows(SourceConfig(source="math", path=str(shared / "data/math/math_1500.jsonl"))))
    equal = SCORERS["math_verify"]
    matched = [equal(written("math_verify", row["answer"]), row["answer"], ()) for row in rows]
    assert sum(matched) / len(matched) >= 0.99


if __name__ == "__main__":
    for source, path, split, _ in DATA:
        scorer, rows, gold, reference, other = measure(Path("../shared").resolve(), source, path, split, None)
        print(f"{path or source:28} {scorer:8} {rows:5} golds {gold:.4f} references {reference:.4f} neighbours {other:.4f}")  # fmt: skip
