"""What comes unannounced in a long segment is found where it is not too rare, and chance finds nothing."""

from __future__ import annotations

import pytest

from headgate.data.collation import Collator
from headgate.experiments.benchmarks.bursts import LEAST, Documents, segment
from headgate.experiments.benchmarks.novelty import prepared
from headgate.models.anatomy import describe
from headgate.models.load import load_model

COUNT = 300


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_another_skill_is_found_and_chance_is_not(share: float) -> None:
    model, tokenizer = load_model("embedded", lora=None)
    rows = [
        prepared({"source": "wordmath", "options": {"families": [family]}}, tokenizer, 0, documents=COUNT)
        for family in ("shopping", "farm")
    ]
    found = segment(
        describe(model),
        Collator(tokenizer.pad_token_id),
        *[Documents(part, 0) for part in rows],
        share,
        seed=0,
        documents=COUNT,
    )
    assert found["found"] == (share > 0)
    if share:
        assert LEAST <= found["arrived"] < 2 * LEAST and found["purity"] == 1.0
    else:
        assert found["documents"] == COUNT // 16 * 16


def test_documents_come_again_in_another_order_once_all_were_read() -> None:
    draw = Documents([{"n": n} for n in range(20)], 0)
    first, second = ([draw()["n"] for _ in range(20)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
