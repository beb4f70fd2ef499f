"""What a method is shown at a stage's start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from headgate.training.stages import Probe


@pytest.mark.parametrize(
    ("held", "shown"),
    [([1, 2, 3], [3, 2, 1]), (None, None), ({"farm": [1], "shop": [2]}, None)],
    ids=["one set", "none", "one set a skill"],
)
def test_the_whole_runs_validation_is_shown_where_there_is_one(held: object, shown: list[int] | None) -> None:
    trainer = SimpleNamespace(eval_dataset=held, validation_batches=lambda rows: reversed(rows))
    validation = Probe(trainer).validation
    assert (None if validation is None else list(validation)) == shown
