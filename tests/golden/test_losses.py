"""Twenty steps of every method and every pair, loss by loss: a change of form changes no number.

    python -m tests.golden.test_losses        writes losses.json anew, for a change that is meant to move losses

The figures hold to 1e-4 on other processors, which sum in another order.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path

import pytest

from headgate.testing.case import Case, losses_of
from headgate.testing.laws_of_pairs import PARTNERS

FILE = Path(__file__).parent / "losses.json"
METHODS = ("schema_bank", "layer_routing", "lora_experts", "backward_gate")
CASES = ["+".join(names) for size in (1, 2) for names in itertools.combinations(METHODS, size)]
BESIDE = {("layer_routing", "layer_routing+lora_experts"): {"engine": "masked", "train_engine": "masked"}}
"""What a pair asks of a method: experts read the gates of all tokens, so no engine may leave some out."""
QUIET = {"training.max_steps": 20, "training.eval_every": 1000, "training.save_every": 1000}


def measured(case: str, folder: Path) -> list[float]:
    """Every logged loss of a run of twenty steps; a gate may reject windows, which log none."""
    first, *others = case.split("+")
    options = {name: {**PARTNERS[name], **BESIDE.get((name, case), {})} for name in (first, *others)}
    run = Case(first, options[first], folder, others={name: options[name] for name in others})
    return losses_of(run.trained(QUIET))


@pytest.mark.parametrize("case", CASES)
def test_losses_are_on_record(case: str, tmp_path: Path) -> None:
    recorded = json.loads(FILE.read_text())[case]
    assert len(recorded) >= (8 if "backward_gate" in case else 20)
    assert measured(case, tmp_path) == pytest.approx(recorded, rel=1e-4)


def test_every_case_is_on_record_and_no_other() -> None:
    assert list(json.loads(FILE.read_text())) == CASES


if __name__ == "__main__":
    wanted = sys.argv[1:] or CASES
    with tempfile.TemporaryDirectory() as scratch:
        new = {case: measured(case, Path(scratch) / case) for case in wanted}
    old = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.write_text(
        json.dumps({case: (old | new)[case] for case in CASES if case in old | new}, indent=1) + "\n"
    )
