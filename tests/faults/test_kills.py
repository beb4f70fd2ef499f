"""A run that is killed anywhere, or whose disk is full at any write, ends as if nothing had happened.

Weights, predictions, metrics and result are those of an undisturbed run but for times; no file is lost, none is left over.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from .runs import KINDS, attempt, differences, outcome, recipe_of

PAIRS = [kind for kind in KINDS if kind != "routing+experts"]
"""routing+experts is refused on purpose where blocks run on some tokens only; see docs/composition.md."""


def killed_and_run_again(kind: str, undisturbed: Any, folder: Path, points: list[int]) -> None:
    """A run killed at each of ``points`` in turn (counted from every start), then left alone, equals the undisturbed one."""
    wanted, _ = undisturbed(kind)
    recipe = recipe_of(kind, folder)
    for at in points:
        first = attempt(recipe, at=at)
        assert first["exit"] in (-9, 0), first  # 0: fewer events were left than ``at``
    last = attempt(recipe)
    assert last["exit"] == 0, last
    assert not (found := differences(wanted, outcome(recipe))), f"killed at {points}: {found}"


@pytest.mark.parametrize("kind", PAIRS)
def test_killed_once_and_resumed(kind: str, undisturbed: Any, tmp_path: Path) -> None:
    """Somewhere in the run: between files, inside a checkpoint, at a birth, in the last evaluation."""
    _, events = undisturbed(kind)
    at = random.Random(kind).randint(2, events)
    killed_and_run_again(kind, undisturbed, tmp_path, [at])


@pytest.mark.parametrize("share", [0.2, 0.45, 0.7, 0.9, 0.98])
def test_killed_in_every_part_of_a_run(share: float, undisturbed: Any, tmp_path: Path) -> None:
    _, events = undisturbed("lora")
    killed_and_run_again("lora", undisturbed, tmp_path, [max(2, int(share * events))])


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(12))
@pytest.mark.parametrize("kind", PAIRS)
def test_killed_again_and_again(kind: str, draw: int, undisturbed: Any, tmp_path: Path) -> None:
    """15 kinds x 12 draws, every third of them killed twice: 240 kills."""
    _, events = undisturbed(kind)
    stream = random.Random(f"{kind} {draw}")
    points = [stream.randint(2, events) for _ in range(2 if draw % 3 == 0 else 1)]
    killed_and_run_again(kind, undisturbed, tmp_path, points)


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(20))
def test_killed_at_random_times(draw: int, undisturbed: Any, tmp_path: Path) -> None:
    stream = random.Random(draw)
    kind = stream.choice(PAIRS)
    wanted, _ = undisturbed(kind)
    recipe = recipe_of(kind, tmp_path)
    attempt(recipe, after=stream.uniform(0.05, 2.0))
    assert attempt(recipe)["exit"] == 0
    assert not (found := differences(wanted, outcome(recipe))), found


def full_disk(at: int, undisturbed: Any, folder: Path) -> None:
    """The write fails with one line that says so; with room again the run ends as it should."""
    wanted, _ = undisturbed("lora")
    recipe = recipe_of("lora", folder)
    failed = attempt(recipe, at=at, fault="full")
    assert failed["exit"] in (0, 3), failed
    if failed["exit"] == 3:
        assert "No space left on device" in failed["error"], failed
    assert attempt(recipe)["exit"] == 0
    assert not (found := differences(wanted, outcome(recipe))), f"full at event {at}: {found}"


@pytest.mark.parametrize("share", [0.1, 0.4, 0.75, 0.95])
def test_a_full_disk_costs_no_run(share: float, undisturbed: Any, tmp_path: Path) -> None:
    full_disk(int(share * undisturbed("lora")[1]), undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("at", range(2, 190, 3))
def test_a_full_disk_at_any_write(at: int, undisturbed: Any, tmp_path: Path) -> None:
    full_disk(at, undisturbed, tmp_path)
