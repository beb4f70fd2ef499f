"""A base spread over ranks (``model.parallel``) trains what one process trains, whatever its methods skip or stop.

    fsdp: 2 x accumulation 1  ==  one process x accumulation 2

Ranks that disagree about a block, a row or an expert are what can hang or, worse, mix weights (``test_sharding.py`` shows
it of one forward): here every method trains, is validated, evaluated and verified through the command line.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .runs import Ended, furthest, recipe_of, train, unlike
from .test_ranks import ACCUMULATED, BLOCKS, CLOSE, DOUBLED, MASKED, NO_DRAWS, SMOOTH, SUMMED, UNEVEN, results

FSDP2 = ("model.parallel={fsdp: 2}",)
REPLAYED = (
    "data.replay={ratio: 0.3, per_skill: 8}",
    "methods.lora_experts.kd_weight=0.5",
    "methods.lora_experts.kd_on=replayed",
)
"""Which rows distil differs between the ranks: some have none, and lend their weights to those that have."""
GENERATING = (
    "evaluation=[{task: exact_match, source: wordmath, limit: 3, max_new_tokens: 4}, {task: abilities}]",
)
STOCHASTIC = (
    "methods={layer_routing: {policy: stochastic_depth, granularity: batch, keep: 1, kd: false}}",
    "model.name_or_path=embedded",
)
PARTIAL = ("methods.backward_gate.score_layer=1",)


def pair(
    kind: str,
    folder: Path,
    both: tuple[str, ...],
    one: tuple[str, ...],
    sharded: tuple[str, ...] = FSDP2,
    ranks: int = 2,
) -> tuple[Ended, Ended]:
    """(the ranks of a sharded base, one process at the same global batch): ended well, the ranks alike, verified."""
    several = train(recipe_of(kind, folder / "several"), ranks, *both, *sharded)
    assert several.exits == [0] * ranks, several.texts
    assert len(several.digests) == ranks and all(digest == several.digests[0] for digest in several.digests)
    assert several.directory is not None and several.directory.result()["verification"]["verified"]
    alone = train(recipe_of(kind, folder / "one"), 1, *both, *one)
    assert alone.exits == [0], alone.texts
    return several, alone


def test_lora_over_a_sharded_base_is_lora_in_one_process(tmp_path: Path) -> None:
    """Weights, uneven validation, every figure, and generated answers, although the ranks run every forward together."""
    two, one = pair("lora", tmp_path, (UNEVEN, *GENERATING), ACCUMULATED)
    assert furthest(one, two)[0] <= CLOSE
    assert not unlike(results(one), results(two), CLOSE)
    assert one.directory is not None and two.directory is not None
    assert not unlike(one.directory.metrics(), two.directory.metrics(), CLOSE)


@pytest.mark.parametrize(
    ("kind", "both", "one", "tolerance"),
    [
        pytest.param("layer_routing", STOCHASTIC, ACCUMULATED, CLOSE, id="blocks of each rank its own"),
        pytest.param("layer_routing", (), ACCUMULATED, CLOSE, id="layer_routing", marks=pytest.mark.slow),
        pytest.param("schema_bank", (), ACCUMULATED, CLOSE, id="schema_bank", marks=pytest.mark.slow),
        pytest.param("lora_experts", (), ACCUMULATED, CLOSE, id="lora_experts", marks=pytest.mark.slow),
        pytest.param("births", (), ACCUMULATED, CLOSE, id="births", marks=pytest.mark.slow),
        pytest.param("backward_gate", NO_DRAWS, DOUBLED, CLOSE, id="backward_gate", marks=pytest.mark.slow),
        pytest.param(
            "backward_gate", (*NO_DRAWS, *PARTIAL), DOUBLED, CLOSE, id="stopped forwards", marks=pytest.mark.slow
        ),
        pytest.param("bank+experts", (), ACCUMULATED, CLOSE, id="bank+experts", marks=pytest.mark.slow),
        pytest.param("bank+routing", BLOCKS, ACCUMULATED, CLOSE, id="bank+routing", marks=pytest.mark.slow),
        pytest.param("routing+experts", MASKED, ACCUMULATED, CLOSE, id="routing+experts", marks=pytest.mark.slow),
        pytest.param("bank+gate", NO_DRAWS, DOUBLED, 1e-5, id="bank+gate", marks=pytest.mark.slow),
        pytest.param("routing+gate", (*NO_DRAWS, *SMOOTH), DOUBLED, CLOSE, id="routing+gate", marks=pytest.mark.slow),
        pytest.param("experts+gate", (*NO_DRAWS, *SUMMED), DOUBLED, CLOSE, id="experts+gate", marks=pytest.mark.slow),
        pytest.param("births", REPLAYED, ACCUMULATED, CLOSE, id="distilled rows of one rank", marks=pytest.mark.slow),
        pytest.param(
            "packing", ("lora.dropout=0", "data.train.limit=20"), ACCUMULATED, CLOSE, id="packing", marks=pytest.mark.slow
        ),
        pytest.param(
            "lora",
            ("model.activation_checkpointing=true", "training.loss=chunked"),
            ACCUMULATED,
            CLOSE,
            id="checkpointing, chunked loss",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_methods_over_a_sharded_base(
    kind: str, both: tuple[str, ...], one: tuple[str, ...], tolerance: float, tmp_path: Path
) -> None:
    two, alone = pair(kind, tmp_path, both, one)
    assert furthest(alone, two)[0] <= tolerance, furthest(alone, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sharded"),
    [("lora", "model.parallel={fsdp: 4}"), ("schema_bank", "model.parallel={fsdp: 2, replicate: 2}")],
)
def test_four_ranks(kind: str, sharded: str, tmp_path: Path) -> None:
    """In four shares, and in two shares of which each is there twice."""
    four, one = pair(
        kind, tmp_path, (UNEVEN,), ("training.gradient_accumulation_steps=4",), (sharded,), ranks=4
    )
    assert furthest(one, four)[0] <= CLOSE, furthest(one, four)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "schema_bank"])
def test_one_process_goes_on_where_a_sharded_base_stopped(kind: str, tmp_path: Path) -> None:
    recipe = recipe_of(kind, tmp_path / "stopped")
    stopped = train(recipe, 2, *FSDP2, at={1: (3, "SIGTERM")})
    assert stopped.exits == [130, 130], stopped.texts
    last = train(recipe, 1)
    assert last.exits == [0], last.texts
    assert "begun by 2 ranks, going on with one process: 2 micro-batches on each" in last.texts[0]
    wanted = train(recipe_of(kind, tmp_path / "wanted"), 2, *FSDP2)
    assert furthest(wanted, last)[0] <= CLOSE


@pytest.mark.slow
def test_killed_and_run_again(tmp_path: Path) -> None:
    recipe = recipe_of("lora_experts", tmp_path / "killed")
    killed = train(recipe, 2, *FSDP2, at={1: (5, "SIGKILL")})
    assert killed.exits == [1, -9], killed.texts
    last = train(recipe, 2, *FSDP2)
    assert last.exits == [0, 0], last.texts
    wanted = train(recipe_of("lora_experts", tmp_path / "wanted"), 2, *FSDP2)
    assert furthest(wanted, last)[0] == 0.0


def test_another_number_of_ranks_is_refused_before_any_work(tmp_path: Path) -> None:
    two = train(recipe_of("lora", tmp_path), 2, "model.parallel={fsdp: 3}")
    assert two.exits == [2, 2]
    (line,) = two.said
    assert "fsdp: 3} is for 3 ranks, and this is 2 ranks: headgate train --nproc 3" in line
