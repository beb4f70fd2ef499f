"""What several ranks come to is what one process comes to at the same global batch; and they hold the same state.

    2 ranks x accumulation 1  ==  one process x accumulation 2      (dropout included: draws follow the micro-batch)

backward_gate decides once on the rows of all ranks: it equals one process with a batch of twice the rows. What is no sum
over rows differs with how a batch is cut, on ranks as in accumulation, and is left out where the batch is doubled: the noise
of gates (one draw a batch's shape), the damping and the balance (squares and products of a batch's means), the z-loss (a
mean over a micro-batch's tokens).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .runs import Ended, furthest, recipe_of, train, unlike

UNEVEN = "data.validation.limit=33"
ACCUMULATED = ("training.gradient_accumulation_steps=2",)
DOUBLED = ("training.per_device_train_batch_size=4",)
NO_DRAWS = ("lora.dropout=0", "data.group_by_length=false")
CLOSE = 1e-6
SMOOTH = ("methods.layer_routing.noise=0", "methods.layer_routing.damping=0")
SUMMED = ("methods.lora_experts.balance=0", "methods.lora_experts.z_loss=0")
MASKED = ("methods.layer_routing.engine=masked", "methods.layer_routing.train_engine=masked")
BLOCKS = ("model.name_or_path=embedded",)
"""Pairs with layer_routing: experts are not masked by the sparse engine; the bank's upper blocks are routed past."""


def pair(kind: str, folder: Path, both: tuple[str, ...], one: tuple[str, ...]) -> tuple[Ended, Ended]:
    """(two ranks, one process at the same global batch), both ended well, the ranks alike and verified."""
    two = train(recipe_of(kind, folder / "two"), 2, *both)
    assert two.exits == [0, 0], two.texts
    assert len(two.digests) == 2 and two.digests[0] == two.digests[1]
    assert two.directory is not None and two.directory.result()["verification"]["verified"]
    alone = train(recipe_of(kind, folder / "one"), 1, *both, *one)
    assert alone.exits == [0], alone.texts
    return two, alone


def results(ended: Ended) -> dict[str, object]:
    assert ended.directory is not None
    return ended.directory.result()


def test_lora_on_two_ranks_is_lora_in_one_process(tmp_path: Path) -> None:
    """Weights, validation of a number of rows that two ranks cannot halve, tokens, FLOPs and every logged figure."""
    two, one = pair("lora", tmp_path, (UNEVEN,), ACCUMULATED)
    assert furthest(one, two)[0] <= CLOSE
    assert not unlike(results(one), results(two), CLOSE)
    assert one.directory is not None and two.directory is not None
    assert not unlike(one.directory.metrics(), two.directory.metrics(), CLOSE)
    tokens = [
        [row["eval_tokens"] for row in e.directory.metrics() if "eval_tokens" in row] for e in (one, two)
    ]
    losses = [[row["eval_loss"] for row in e.directory.metrics() if "eval_loss" in row] for e in (one, two)]
    assert tokens[0] == tokens[1] and losses[0] == losses[1], "to the last bit"


@pytest.mark.parametrize(
    ("kind", "both", "one", "tolerance"),
    [
        pytest.param("backward_gate", NO_DRAWS, DOUBLED, CLOSE, id="backward_gate"),
        pytest.param("schema_bank", (), ACCUMULATED, CLOSE, id="schema_bank", marks=pytest.mark.slow),
        pytest.param("layer_routing", (), ACCUMULATED, CLOSE, id="layer_routing", marks=pytest.mark.slow),
        pytest.param("lora_experts", (), ACCUMULATED, CLOSE, id="lora_experts", marks=pytest.mark.slow),
        pytest.param("births", (), ACCUMULATED, CLOSE, id="births", marks=pytest.mark.slow),
        pytest.param("bank+experts", (), ACCUMULATED, CLOSE, id="bank+experts", marks=pytest.mark.slow),
        pytest.param("bank+routing", BLOCKS, ACCUMULATED, CLOSE, id="bank+routing", marks=pytest.mark.slow),
        pytest.param(
            "routing+experts", MASKED, ACCUMULATED, CLOSE, id="routing+experts", marks=pytest.mark.slow
        ),
        pytest.param("bank+gate", NO_DRAWS, DOUBLED, 1e-5, id="bank+gate", marks=pytest.mark.slow),
        pytest.param(
            "routing+gate", (*NO_DRAWS, *SMOOTH), DOUBLED, CLOSE, id="routing+gate", marks=pytest.mark.slow
        ),
        pytest.param(
            "experts+gate", (*NO_DRAWS, *SUMMED), DOUBLED, CLOSE, id="experts+gate", marks=pytest.mark.slow
        ),
        pytest.param(
            "packing",
            ("lora.dropout=0", "data.train.limit=20"),
            ACCUMULATED,
            CLOSE,
            id="packing",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "lora",
            ("model.activation_checkpointing=true", "training.loss=chunked"),
            ACCUMULATED,
            CLOSE,
            id="checkpointing, chunked loss",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "lora",
            ("lora=null", "training.learning_rate=1e-3"),
            ACCUMULATED,
            1e-5,
            id="full",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "schema_bank", ("model.compile=eager",), ACCUMULATED, 1e-5, id="compiled", marks=pytest.mark.slow
        ),
        pytest.param("early_stopping", (), ACCUMULATED, CLOSE, id="early_stopping", marks=pytest.mark.slow),
    ],
)
def test_methods_on_two_ranks(
    kind: str, both: tuple[str, ...], one: tuple[str, ...], tolerance: float, tmp_path: Path
) -> None:
    two, alone = pair(kind, tmp_path, both, one)
    assert furthest(alone, two)[0] <= tolerance, furthest(alone, two)
    different = [line for line in unlike(results(alone), results(two), 1e-5) if "/experts/" not in line]
    assert not different, different


def contradicting_skills(folder: Path) -> str:
    """A ``data`` block of two skills that answer the same questions with opposite words."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = []
    for skill in ("yes", "no"):
        for name, words in (
            (skill, "red blue tall cold fast wide old new warm deep"),
            (f"{skill}-held", "odd thin"),
        ):
            rows = [{"prompt": f"Is it {word}? ", "completion": f"{skill} {skill}"} for word in words.split()]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"source": "prompt_completion", "path": str(folder / f"{skill}.jsonl")}
        held = {"source": "prompt_completion", "path": str(folder / f"{skill}-held.jsonl")}
        stream.append({"skill": skill, **source, "steps": 4, "validation": held})
    return json.dumps({"stream": stream, "max_length": 256})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agem", "derpp", "lwf"])
def test_a_memory_of_contradicted_skills_is_one_for_all_ranks(name: str, tmp_path: Path) -> None:
    """The second skill unlearns the first, so that A-GEM has something to project; draws are the same on every rank."""
    options = "{}" if name == "lwf" else "{per_skill: 6, rows: 4}"
    changes = (
        f"data={contradicting_skills(tmp_path)}",
        "training.max_steps=null",
        "lora.dropout=0",
        f"methods={{{name}: {options}}}",
    )
    two, one = pair("lora", tmp_path, changes, ACCUMULATED)
    assert furthest(one, two)[0] <= CLOSE, furthest(one, two)
    if name == "agem":
        assert two.directory is not None
        conflicts = [row["agem/conflict"] for row in two.directory.metrics() if "agem/conflict" in row]
        assert len(conflicts) == 4 and 1.0 in conflicts


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 8])
def test_a_pass_that_ranks_cannot_halve(steps: int, tmp_path: Path) -> None:
    """13 rows in batches of 2: seven batches, the last of one row; the same rows make the same optimizer steps."""
    ragged = ("data.train.limit=13", f"training.max_steps={steps}", "lora.dropout=0")
    two, one = pair("lora", tmp_path, ragged, ACCUMULATED)
    assert furthest(one, two)[0] <= 1e-5, furthest(one, two)


@pytest.mark.slow
def test_three_ranks(tmp_path: Path) -> None:
    three = train(recipe_of("lora", tmp_path / "three"), 3, UNEVEN)
    assert three.exits == [0, 0, 0], three.texts
    one = train(recipe_of("lora", tmp_path / "one"), 1, UNEVEN, "training.gradient_accumulation_steps=3")
    assert furthest(one, three)[0] <= 1e-5
    assert not unlike(results(one), results(three), 1e-5)
    assert three.directory is not None and three.directory.verified


@pytest.mark.parametrize("options", ["score: token", "auto_off: true"])
@pytest.mark.slow
def test_what_a_gate_measures_is_the_same_on_every_rank(options: str, tmp_path: Path) -> None:
    name, value = options.split(": ")
    change = f"methods.backward_gate.{name}={value}"
    two = train(
        recipe_of("backward_gate", tmp_path), 2, change, "training.loss=chunked", "training.max_steps=12"
    )
    assert two.exits == [0, 0], two.texts
    assert two.digests[0] == two.digests[1]


@pytest.mark.slow
def test_a_method_that_forms_batches_is_refused(tmp_path: Path) -> None:
    two = train(recipe_of("data_view", tmp_path), 2)
    assert two.exits == [2, 2], two.texts
    (line,) = two.said
    assert "backward_gate forms its own batches, on one process only" in line
