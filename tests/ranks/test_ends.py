"""However one rank ends, all end, with one message; and the run goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .runs import Ended, furthest, recipe_of, train, unlike


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    made: dict[str, Ended] = {}

    def of(kind: str) -> Ended:
        if kind not in made:
            made[kind] = train(recipe_of(kind, tmp_path_factory.mktemp("undisturbed") / "run"), 2)
        return made[kind]

    return of


def goes_on(recipe: Path, wanted: Ended, ranks: int = 2) -> Ended:
    """Run again: the end is that of the undisturbed run, bitwise on as many ranks."""
    last = train(recipe, ranks)
    assert last.exits == [0] * ranks, last.texts
    assert wanted.directory is not None and last.directory is not None
    exact = 0.0 if ranks == 2 else 1e-6
    assert furthest(wanted, last)[0] <= exact
    assert not unlike(wanted.directory.result(), last.directory.result(), exact)
    assert not unlike(wanted.directory.metrics(), last.directory.metrics(), max(exact, 1e-12))
    assert last.directory.verified
    return last


@pytest.mark.parametrize(
    "rank", [1, pytest.param(0, marks=pytest.mark.slow)], ids=["told rank 1", "told rank 0"]
)
def test_a_signal_to_one_rank_saves_and_ends_all(
    rank: int, undisturbed: Callable[[str], Ended], tmp_path: Path
) -> None:
    """And one process alone goes on where two ranks stopped, with the same global batch."""
    recipe = recipe_of("lora", tmp_path)
    stopped = train(recipe, 2, at={rank: (3, "SIGTERM")})
    assert stopped.exits == [130, 130], stopped.texts
    (line,) = [line for text in stopped.texts for line in text.splitlines() if "stopped at step" in line]
    assert "stopped at step 3: saved in" in line and not stopped.said
    assert stopped.directory is not None and stopped.directory.status == "partial"
    last = goes_on(recipe, undisturbed("lora"), ranks=1)
    assert "begun by 2 ranks, going on with one process: 2 micro-batches on each" in last.texts[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["lora", "schema_bank", "layer_routing", "lora_experts", "births", "backward_gate"]
)
def test_killed_and_run_again(kind: str, undisturbed: Callable[[str], Ended], tmp_path: Path) -> None:
    recipe = recipe_of(kind, tmp_path)
    killed = train(recipe, 2, at={1: (5, "SIGKILL")})
    assert killed.exits == [1, -9], killed.texts
    (line,) = killed.said
    assert "another rank ended without saying why" in line
    goes_on(recipe, undisturbed(kind))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_rank_ends_all(
    rank: int, undisturbed: Callable[[str], Ended], tmp_path: Path
) -> None:
    recipe = recipe_of("lora", tmp_path)
    failed = train(recipe, 2, at={rank: (5, "error")})
    assert failed.exits == [1, 1], failed.texts
    assert failed.said == ["Traceback (most recent call last):"], failed.texts
    assert failed.directory is not None and failed.directory.status == "failed"
    assert "the machine went away" in (failed.directory.path / "failed.json").read_text()
    goes_on(recipe, undisturbed("lora"))


@pytest.mark.slow
def test_ranks_that_cannot_make_the_same_steps_are_refused(tmp_path: Path) -> None:
    recipe = recipe_of("lora", tmp_path)
    train(recipe, 2, at={1: (3, "SIGTERM")})
    three = train(recipe, 3)
    assert three.exits == [2, 2, 2]
    (line,) = three.said
    assert "optimizer steps of 2 micro-batches, which 3 ranks cannot share: go on with 2 ranks" in line


@pytest.mark.slow
def test_a_gate_goes_on_with_the_ranks_it_began_with(tmp_path: Path) -> None:
    recipe = recipe_of("backward_gate", tmp_path)
    train(recipe, 2, at={1: (3, "SIGTERM")})
    one = train(recipe, 1)
    assert one.exits == [2]
    assert (
        "backward_gate decides once on the rows of all ranks together, and this run began on 2" in one.said[0]
    )


@pytest.mark.slow
def test_one_process_then_two_ranks(tmp_path: Path) -> None:
    wanted = train(recipe_of("lora", tmp_path / "wanted"), 1, "training.gradient_accumulation_steps=2")
    recipe = recipe_of("lora", tmp_path / "run")
    train(recipe, 1, "training.gradient_accumulation_steps=2", at={0: (3, "SIGTERM")})
    last = train(recipe, 2, "training.gradient_accumulation_steps=2")
    assert last.exits == [0, 0], last.texts
    assert furthest(wanted, last)[0] <= 1e-6


def test_a_wrong_recipe_is_said_once(tmp_path: Path) -> None:
    two = train(recipe_of("lora", tmp_path), 2, "lora.target_modules=[nope]")
    assert two.exits == [2, 2]
    (line,) = two.said
    assert "'nope' matches nothing" in line
