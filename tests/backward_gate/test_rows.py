"""Rows, early: sequences chosen after a part of the depth, and the papers' baselines by example."""

from __future__ import annotations

import pytest
import torch

from headgate.errors import ConfigError
from headgate.methods.backward_gate import BackwardGate
from headgate.methods.backward_gate.evidence import at_block, of_sequences
from headgate.methods.backward_gate.truth import TRUTH
from headgate.methods.backward_gate.views import WEIGHT
from headgate.models.anatomy import describe
from headgate.models.load import load_model
from tests.training.conftest import make_rows

SMALL = {"m": 64, "k": 8, "window": 16}
ROWS = {"granularity": "sequence", "pool_factor": 2, "burn_in": 1}


def test_the_scoring_forward_stops_and_only_what_is_selected_goes_on(make_trainer) -> None:
    gate = BackwardGate(**SMALL, **ROWS, score_layer=0, rule="quantile", target_acceptance=0.25)
    trainer = make_trainer(
        methods=[gate], loss="chunked", data=make_rows(200), arguments={"gradient_accumulation_steps": 1}
    )
    ran = {0: [0, 0], -1: [0, 0]}
    for place, counts in ran.items():
        block = trainer.anatomy.blocks[place]
        block.register_forward_hook(
            lambda m, *_, c=counts: c.__setitem__(int(m.training), c[int(m.training)] + 1)
        )
    trainer.train()
    steps = trainer.state.global_step
    assert ran[0][1] == ran[-1][1] == steps, "every selected batch runs whole"
    assert ran[-1][0] == 0 < ran[0][0], "scoring stops after its block"
    assert int(gate.gate.offered) > 2 * int(gate.gate.accepted)


def test_early_evidence_of_a_row_is_that_of_its_block() -> None:
    model, _ = load_model("random:llama", lora={"dropout": 0.0}, seed=1, device="cpu")
    anatomy = describe(model)
    gate = BackwardGate(**SMALL, score_layer=1)
    gate.attach(anatomy)
    ids = torch.randint(3, 100, (3, 9))
    hidden: list[torch.Tensor] = []
    handle = anatomy.blocks[1].register_forward_hook(
        lambda _m, _a, out: hidden.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model.eval()(input_ids=ids)
    handle.remove()
    rows = of_sequences(gate.gate, anatomy, {"input_ids": ids, "labels": ids}, layer=1)
    for place in range(3):
        alone = at_block(gate.gate, anatomy, hidden[0][place : place + 1], ids[place : place + 1])
        torch.testing.assert_close(rows.sketch[place], alone.sketch, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rows.loss[place], alone.loss, rtol=1e-5, atol=1e-5)


def test_early_rows_are_charged_for_a_part_of_the_forward(make_trainer) -> None:
    """The same rows, scored at one of the blocks: fewer FLOPs than scored after all of them, more than not scored."""
    flops = {}
    for name, options in {"whole": {}, "early": {"score_layer": 0}}.items():
        gate = BackwardGate(
            **SMALL, **{**ROWS, "burn_in": 0}, score="random", target_acceptance=0.5, **options
        )
        trainer = make_trainer(
            name,
            methods=[gate],
            loss="chunked",
            data=make_rows(200),
            arguments={"gradient_accumulation_steps": 1},
        )
        trainer.train()
        flops[name] = trainer.totals().flops
    plain = make_trainer(
        "plain", loss="chunked", data=make_rows(200), arguments={"gradient_accumulation_steps": 1}
    )
    plain.train()
    assert plain.totals().flops < flops["early"] < flops["whole"]


def test_the_oracle_chooses_rows(make_trainer) -> None:
    gate = BackwardGate(
        **SMALL, **{**ROWS, "burn_in": 0}, score="oracle", column="kind", rule="quantile", dose="adaptive"
    )
    rows = [{**row, TRUTH: int(place % 8 == 3)} for place, row in enumerate(make_rows(400))]
    trainer = make_trainer(
        methods=[gate],
        loss="chunked",
        data=rows,
        arguments={"gradient_accumulation_steps": 1, "max_steps": 5},
    )
    inner, seen = trainer.data_collator, []
    trainer.data_collator = lambda batch: {**inner(batch), TRUTH: torch.tensor([row[TRUTH] for row in batch])}
    start = gate.on_step_start

    def watched(step):
        seen.append(float(step.batch[TRUTH].float().mean()))
        start(step)

    gate.on_step_start = watched
    trainer.train()
    assert sum(seen[2:]) / len(seen[2:]) > 0.8


def test_infobatch_by_example_weighs_each_row_it_keeps(make_trainer) -> None:
    """Rows below the running mean are kept with 1 - prune and then count 1 / (1 - prune); the others count 1."""
    gate = BackwardGate(**SMALL, **ROWS, score="infobatch", prune=0.5, anneal=1.0)
    trainer = make_trainer(
        methods=[gate], loss="chunked", data=make_rows(200), arguments={"gradient_accumulation_steps": 1}
    )
    weights, start = [], gate.on_step_start

    def watched(step):
        weights.extend(step.batch[WEIGHT].tolist())
        start(step)

    gate.on_step_start = watched
    trainer.train()
    assert set(weights) == {1.0, 2.0}
    assert abs(sum(weights) / int(gate.gate.offered) - 1) < 0.2, (
        "in expectation every row offered counts once"
    )


def test_weights_of_rows_need_the_chunked_loss(make_trainer) -> None:
    gate = BackwardGate(**SMALL, **ROWS, score="infobatch")
    with pytest.raises(ConfigError, match=r"set training\.loss: chunked"):
        make_trainer(methods=[gate], loss="plain", data=make_rows(200)).train()
