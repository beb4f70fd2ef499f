"""What a choice among masks would gain: the arithmetic, the masks, and the command on real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from headgate.cli.main import command_line
from headgate.methods.layer_routing.oracle import choice, masked_losses, masks_of, token_losses

from .conftest import batch_of
from .test_budget import routed

RECIPE = """
name: oracle
model: {{name_or_path: "random:llama"}}
lora: {{r: 2}}
data: {{train: {{source: wordmath, limit: 40}}, validation: {{source: wordmath, split: validation, limit: 8}}, max_length: 96}}
training: {{max_steps: 2, per_device_train_batch_size: 4}}
evaluation: []
methods: {{layer_routing: {{policy: static, keep: 1, skip: [{block}]}}}}
"""


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_finer_choices_gain_more(masks: int, documents: int, seed: int) -> None:
    """token <= document <= single, whatever the losses; with one mask all are equal."""
    stream = torch.Generator().manual_seed(seed)
    loss = torch.rand(masks, documents * 20, generator=stream)
    document, place = torch.arange(documents).repeat_interleave(20), torch.arange(20).repeat(documents)
    gains = choice(loss, document, place)
    assert gains.token <= gains.document + 1e-6 and gains.document <= gains.single + 1e-6
    if masks == 1:
        assert gains.token == pytest.approx(gains.single) and gains.prefix == pytest.approx(
            gains.single_after
        )


def test_each_choice_by_hand() -> None:
    """Two documents of three tokens, each with a mask of its own that its first token already shows."""
    loss = torch.tensor([[1.0, 1.0, 1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 1.0, 1.0, 1.0]])
    document, place = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    gains = choice(loss, document, place, prefix=1)
    assert (gains.single, gains.best) == (1.5, 0)
    assert gains.document == 1.0 and gains.token == pytest.approx(5 / 6)
    assert (gains.prefix, gains.single_after) == (1.0, 1.25)


def test_masks_are_all_of_a_depth_or_a_seeded_draw() -> None:
    every = masks_of(5, 2, 2)
    assert len(every) == 10 and len({tuple(mask.tolist()) for mask in every}) == 10
    assert all(float(mask.sum()) == 6 and torch.equal(mask[::2], mask[1::2]) for mask in every)
    drawn = masks_of(18, 6, 1)
    assert len(drawn) == 64 and all(float(mask.sum()) == 12 for mask in drawn)
    assert all(torch.equal(a, b) for a, b in zip(drawn, masks_of(18, 6, 1), strict=True))


def test_losses_are_the_models_own_under_each_mask() -> None:
    """Their mean is the loss that the model reports, and nothing of a mask is left behind."""
    model, _, method = routed(target_utilization=0.75)
    batch = batch_of(4, 12)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    before = token_losses(model, [batch]).loss
    masks, losses = masked_losses(method, model, [batch])
    assert len(masks) == 3
    for mask, one in zip(masks, losses, strict=True):
        expected = method.execution.loss([{**batch, "labels": labels}], mask)
        assert float(one.loss.mean()) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(token_losses(model, [batch]).loss, before)


def test_the_command(tmp_path: Path) -> None:
    """Of one run: all masks of its depth. Of two: the two trained masks, each as it is served."""
    runs: list[Any] = []
    for block in (1, 2):
        recipe = tmp_path / f"{block}.yaml"
        recipe.write_text(RECIPE.format(block=block))
        result = CliRunner().invoke(
            command_line("train"), ["train", str(recipe), "--set", f"output_dir={tmp_path / str(block)}"]
        )
        assert result.exit_code == 0, result.output
        runs += [str(file.parent) for file in (tmp_path / str(block)).rglob("result.json")]
    assert len(runs) == 2
    alone = CliRunner().invoke(command_line("inspect"), ["inspect", runs[0], "--oracle", "--limit", "8"])
    assert alone.exit_code == 0 and "against the best single mask" in alone.output, alone.output
    gains = json.loads((Path(runs[0]) / "inspect" / "oracle.json").read_text())
    assert len(gains["masks"]) == 3 and all(mask["depth"] == pytest.approx(0.75) for mask in gains["masks"])
    both = CliRunner().invoke(command_line("inspect"), ["inspect", *runs, "--oracle", "--limit", "8"])
    assert both.exit_code == 0, both.output
    gains = json.loads((Path(runs[0]) / "inspect" / "oracle.json").read_text())
    assert [mask["name"] for mask in gains["masks"]] == runs
    assert gains["token"] <= gains["document"] <= gains["single"]
    refused = CliRunner().invoke(command_line("inspect"), ["inspect", *runs])
    assert "several with --oracle" in str(refused.exception)
