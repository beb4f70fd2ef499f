"""The paper's stage losses, its attributes, and the average that says which schemas are dead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from headgate.modules.routers import AttributeRouter
from headgate.ops.low_rank import orthonormality
from headgate.ops.routing_losses import expert_load, tag_cross_entropy, token_mean

from .test_method import attached, forward, make_step, rows


def losses_in(stage_options: dict[str, Any], **options: Any) -> tuple[dict[str, torch.Tensor], Any, Any]:
    model, method = attached(**options)
    model.train()
    step = make_step(model, rows([5, 9]))
    stage = step.scheduled.stage.model_copy(update={"options": stage_options})
    step.scheduled = replace(step.scheduled, stage=stage)
    method.on_step_start(step)
    forward(model, step.batch)
    return dict(method.losses(step)), method, step


def test_stage_losses_are_the_papers() -> None:
    """Eq. 10: lambda_tag times the mean over layers of the tag loss, alone; eq. 11 and 12: lambda_orth times L_orth, alone."""
    schedule = {"lambda_tag": 0.7, "tag_schedule": [1.0]}
    parts, method, step = losses_in({"tags": True}, **schedule)
    assert list(parts) == ["schema_tag"]
    everyone = torch.ones(2, dtype=torch.bool)
    per_layer = [
        tag_cross_entropy(token_mean(gates.logits, step.valid), step.batch["tags"], everyone)
        for gates in method._records.values()
    ]
    assert len(per_layer) == 2
    torch.testing.assert_close(parts["schema_tag"], 0.7 * (per_layer[0] + per_layer[1]) / 2)
    for reduction, combined in (("mean", torch.mean), ("frobenius", torch.sum)):
        parts, method, _ = losses_in({"orth": True}, lambda_orth=0.3, reduction=reduction)
        assert list(parts) == ["schema_orth"]
        of_layers = torch.stack(
            [
                orthonormality(
                    layer.bank.up.view(layer.bank.num_experts, -1, layer.bank.up.shape[-1]), reduction
                )
                for layer in method.layers.values()
            ]
        )
        torch.testing.assert_close(parts["schema_orth"], 0.3 * combined(of_layers))
    assert not losses_in({})[0], "a stage that asks for nothing adds nothing to the task's loss"


def test_attributes_enter_as_the_concatenation() -> None:
    """score_s = W_s . [h; a_s] with one row W_s of width H + A, written out schema by schema."""
    router = AttributeRouter(4, 3, 5, std=0.5, generator=torch.Generator().manual_seed(0))
    h = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    for s, score in enumerate(router(h).unbind(-1)):
        row = torch.cat([router.weight[s], router.attribute_weight[s]])
        both = torch.cat([h, router.attributes[s].expand(2, 6, 5)], dim=-1)
        torch.testing.assert_close(score, both @ row)


def test_the_load_average_moves_by_a_hundredth_of_the_way() -> None:
    model, method = attached()
    model.train()
    step = make_step(model, rows([5, 9]))
    method.on_step_start(step)
    forward(model, step.batch)
    loads = {
        key: expert_load((gates.weight > 0).expand(*step.valid.shape, -1), step.valid)
        for key, gates in method._records.items()
    }
    before = {key: layer.load_average.clone() for key, layer in method.layers.items()}
    method.on_step_end(step)
    for key, layer in method.layers.items():
        torch.testing.assert_close(layer.load_average, before[key] + 0.01 * (loads[key] - before[key]))
        assert not torch.equal(layer.load_average, before[key])
