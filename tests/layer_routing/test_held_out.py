"""What a run's result says of its depth on validation data, and what is refused before any long work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from headgate.cli.main import command_line
from headgate.errors import ConfigError
from headgate.methods.layer_routing.inspect import measure

from ..training.conftest import make_rows
from .test_training import method_of, trainer_of


def evaluated(tmp_path: Path, **options: Any) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    trainer = trainer_of(tmp_path, {"kd": False, **options}, max_steps=4)
    trainer.train()
    trainer.eval_dataset = make_rows()
    for _ in range(2):  # the last validation counts, not their sum
        trainer.evaluate()
    return trainer, list(trainer.get_eval_dataloader())


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_the_result_is_what_inspection_measures(tmp_path: Path, granularity: str) -> None:
    """Utilization and adaptivity of the last validation, on real tokens, equal inspect.measure on the same batches."""
    trainer, batches = evaluated(tmp_path, granularity=granularity, target_utilization=0.6, init_keep=0.5)
    method = method_of(trainer)
    found, depth = method.summary(), measure(method, batches)
    assert found["routing_utilization_eval"] == pytest.approx(depth.utilization, abs=1e-5)
    assert found["routing_adaptivity_eval"] == pytest.approx(
        sum(depth.adaptivity) / len(depth.adaptivity), abs=1e-5
    )
    used = found["routing_utilization_eval"]
    made = method.shares.keys_values if granularity == "token" else 0.0
    assert found["routing_executed_eval"] == pytest.approx(used + (1 - used) * made)
    assert 0 <= found["routing_adaptivity_eval"] <= math.log(2)


@pytest.mark.parametrize("policy", ["gumbel", "exit", "topk"])
@pytest.mark.parametrize("target", [0.5, 0.75])
def test_the_budget_holds_on_validation_data_whatever_training_reached(
    tmp_path: Path, policy: str, target: float
) -> None:
    """Within two points, though four steps with no price of depth leave the gates where they began; and nothing but the
    threshold is touched."""
    asked = {
        "policy": policy,
        "target_utilization": target,
        "dual_step": 0.0,
        "granularity": "token",
        "keep": 1,
    }
    trainer, _ = evaluated(tmp_path / "a", **asked)
    assert method_of(trainer).summary()["routing_utilization_eval"] == pytest.approx(target, abs=0.02)
    running, _ = evaluated(tmp_path / "b", **asked, calibrate_on="training")
    ours, theirs = (method_of(t).state_dict() for t in (trainer, running))
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {"budget.threshold"}


def test_every_policy_that_routes_has_them_and_full_depth_reads_one(tmp_path: Path) -> None:
    trainer, _ = evaluated(tmp_path / "a", policy="truncate", target_utilization=0.5)
    assert method_of(trainer).summary()["routing_utilization_eval"] == pytest.approx(0.5)
    assert method_of(trainer).summary()["routing_adaptivity_eval"] == 0
    trainer, _ = evaluated(tmp_path / "b", engine="masked", features="prepass", granularity="token")
    assert method_of(trainer).summary()["routing_executed_eval"] == 2.0
    trainer, _ = evaluated(tmp_path / "c", policy="dense")
    assert "routing_utilization_eval" not in method_of(trainer).summary()


RECIPE = """
model: {{name_or_path: embedded}}
lora: {{r: 4}}
data: {{train: {{source: wordmath}}}}
training: {{max_steps: 4}}
methods: {{layer_routing: {options}}}
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{keep: 99}", "keep=99 and keep_last=0 leave none"),
        ("{keep: 7, target_utilization: 0.2}", "is below"),
        ("{policy: static, skip: [0]}", "block 0 is not routable"),
        ("{teacher: 'run:/nowhere'}", "the folder does not exist"),
    ],
)
def test_validate_knows_the_models_shape(tmp_path: Path, options: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(options=options))
    result = CliRunner().invoke(command_line("validate"), ["validate", str(recipe)])
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)
