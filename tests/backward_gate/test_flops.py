"""The FLOPs that a gated run is charged with are those that PyTorch counts: stopped forwards, pools and all."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from headgate.methods.backward_gate import BackwardGate
from tests.training.conftest import make_rows

GATE = {"m": 64, "k": 8, "window": 16, "ema_rate": 0.05, "burn_in": 2, "diagnostic_every": 0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_layer": 0},
        {"granularity": "sequence", "pool_factor": 2, "target_acceptance": 0.4},
        {"forward": "double"},
    ],
    ids=["plain", "score_layer", "sequence", "double"],
)
def test_a_gated_run_is_charged_with_what_it_computed(make_trainer, options) -> None:
    """Against LoRA in the same harness: what neither counts (adapters, norms, attention's mask) cancels."""
    found = {}
    for name, methods in (("lora", []), ("gated", [BackwardGate(**GATE, **options)])):
        trainer = make_trainer(
            name,
            methods=methods,
            loss="chunked",
            data=make_rows(60),
            arguments={"gradient_accumulation_steps": 1, "max_steps": 16},
        )
        with FlopCounterMode(display=False) as counter:
            trainer.train()
        found[name] = float(trainer.flops), counter.get_total_flops()
    charged, counted = (found["gated"][i] / found["lora"][i] for i in (0, 1))
    assert charged == pytest.approx(counted, rel=0.05), found
