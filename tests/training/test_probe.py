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


def test_ranks_are_shown_what_one_process_with_their_batch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rows a trial keeps, how many a look reads: all of it is counted in batches."""

    def shown(size: int, ranks: int) -> list[list[int]]:
        monkeypatch.setattr("headgate.training.processes.world_size", lambda: ranks)
        trainer = SimpleNamespace(
            args=SimpleNamespace(seed=5, per_device_train_batch_size=size),
            curriculum=SimpleNamespace(current=None),
            stage_dataset=lambda stage: list(range(19)),
            data_collator=lambda rows: rows,
            _prepare_inputs=lambda rows: rows,
        )
        return list(Probe(trainer))

    assert shown(2, 4) == shown(4, 2) == shown(8, 1)
    assert [len(rows) for rows in shown(4, 2)] == [8, 8, 3]
    assert sorted(row for rows in shown(4, 2) for row in rows) == list(range(19))
