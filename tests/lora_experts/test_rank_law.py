"""Laws of the rank law: an exact law is found again, a proposal follows from it, a sweep's folder is enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from headgate.cli.main import command_line
from headgate.errors import ConfigError
from headgate.methods.lora_experts.rank_law import fit_rank_law, next_rank

RANKS = [1, 2, 4, 8, 16]


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0.2, 2))
def test_an_exact_law_is_found_again(floor: float, scale: float, exponent: float) -> None:
    law = fit_rank_law(RANKS, [floor + scale * r**-exponent for r in RANKS])
    assert law.error < 1e-6
    for rank in (1, 3, 32, 256):
        assert law.loss(rank) == pytest.approx(floor + scale * rank**-exponent, rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.2, 2), st.floats(0.002, 0.1))
def test_the_proposal_is_the_first_rank_that_doubling_hardly_helps(exponent: float, gain: float) -> None:
    losses = [1 + r**-exponent for r in RANKS]
    proposal = next_rank(fit_rank_law(RANKS, losses), RANKS, gain)

    def gained(rank: int) -> float:
        return 1 - (1 + (2 * rank) ** -exponent) / (1 + rank**-exponent)

    enough = [rank for rank in RANKS if gained(rank) < gain * (1 - 1e-4)]
    short = [rank for rank in RANKS if gained(rank) > gain * (1 + 1e-4)]
    assert proposal.gain == pytest.approx(gained(proposal.rank), rel=1e-2)
    if proposal.tested:
        assert all(rank < proposal.rank for rank in short) and proposal.rank <= min(enough, default=16)
    else:
        assert proposal.rank == 32 and not enough


def test_a_loss_that_the_rank_does_not_move_needs_no_rank() -> None:
    law = fit_rank_law(RANKS, [0.5] * 5)
    assert law.loss(1) == pytest.approx(0.5) and next_rank(law, RANKS).rank == 1
    rising = fit_rank_law(RANKS, [0.5, 0.6, 0.7, 0.8, 0.9])
    assert rising.scale == 0 and rising.error > 0.1
    with pytest.raises(ConfigError, match="needs three ranks or more, got"):
        fit_rank_law([2, 2, 4], [1.0, 1.0, 0.9])


def test_inspect_reads_a_sweep(tmp_path: Path) -> None:
    def table(keys: list[str]) -> dict[str, object]:
        groups = [
            {
                "overrides": {keys[0]: r},
                "mean": {"evaluation.farm.loss": 0.2 + r**-0.5, "training.seconds": 1.0},
            }
            for r in RANKS
        ]
        return {"name": "ranks", "keys": keys, "groups": groups, "runs": [], "versions": []}

    (tmp_path / "sweep.json").write_text(json.dumps(table(["methods.lora_experts.r", "seed"])))
    shown = CliRunner().invoke(command_line("inspect"), ["inspect", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "L(r) = 0.2000 + 1.0000 r^-0.50" in shown.output and "try rank 32 next" in shown.output
    (tmp_path / "sweep.json").write_text(json.dumps(table(["training.learning_rate"])))
    shown = CliRunner().invoke(command_line("inspect"), ["inspect", str(tmp_path)])
    assert shown.exit_code != 0 and "needs exactly one of lora.r" in str(shown.exception or shown.output)


@pytest.mark.parametrize("exponent", [0.055, 3.9])
def test_a_law_near_the_ends_of_the_search_is_found_again(exponent: float) -> None:
    ranks = [1, 2, 4, 8, 16, 64]
    law = fit_rank_law(ranks, [0.5 + 2 * r**-exponent for r in ranks])
    assert law.exponent == pytest.approx(exponent, rel=1e-3) and law.error < 1e-6
