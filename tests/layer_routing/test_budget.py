"""A budget means what it says: what sets the threshold, when state moves, what depth costs, what is reported."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from headgate.cli.main import command_line
from headgate.evaluation.config import EvalTask
from headgate.evaluation.tasks import run_task
from headgate.methods.compose import MethodStack
from headgate.methods.context import Context
from headgate.methods.layer_routing import LayerRouting, LayerRoutingConfig
from headgate.methods.layer_routing.budget import Budget
from headgate.methods.layer_routing.inspect import measure
from headgate.methods.layer_routing.route import Route
from headgate.methods.layer_routing.shares import Shares
from headgate.methods.schema_bank.config import SchemaBankConfig

from .conftest import attach, batch_of, model_of
from .test_held_out import evaluated
from .test_training import logs_of, method_of, trainer_of

TOKEN: dict[str, Any] = {"granularity": "token", "kd": False}


# -- what the threshold is set by ---------------------------------------------------------------------------
@pytest.mark.parametrize("calibrate_on", ["validation", "training"])
@pytest.mark.parametrize("budget", ["penalty", "target", "none"])
def test_only_a_lagrangian_sets_the_threshold(tmp_path: Path, budget: str, calibrate_on: str) -> None:
    """Under the other budgets a gate is open at p > .5: nothing steers depth to a target that nobody set."""
    trainer, _ = evaluated(tmp_path, **TOKEN, budget=budget, calibrate_on=calibrate_on)
    assert float(method_of(trainer).budget.threshold) == 0
    assert method_of(trainer).summary()["routing_utilization_eval"] > 0.9  # init_keep .9, four steps


def test_an_explicit_share_sets_it_under_any_budget(tmp_path: Path) -> None:
    trainer, _ = evaluated(tmp_path, **TOKEN, budget="penalty", calibrate_to=0.6)
    assert method_of(trainer).summary()["routing_utilization_eval"] == pytest.approx(0.6, abs=0.02)


def test_a_sweep_over_the_penalty_moves_depth(tmp_path: Path) -> None:
    """The frontier of exp3, exp5 and exp7 has more than one abscissa."""
    depths = []
    for weight in (0.0, 3.0):
        options = {**TOKEN, "budget": "penalty", "budget_weight": weight, "router_lr": 5e-2, "init_keep": 0.7}
        trainer = trainer_of(tmp_path / str(weight), options, max_steps=20, save_strategy="no")
        trainer.train()
        trainer.eval_dataset = trainer.train_dataset
        trainer.evaluate()
        depths.append(method_of(trainer).summary()["routing_utilization_eval"])
    assert depths[0] - depths[1] > 0.2


# -- when state moves ---------------------------------------------------------------------------------------
def test_state_moves_once_an_optimizer_step(tmp_path: Path) -> None:
    """Four micro-batches a step are one ascent by their mean: lambda = eta sum_t (u_t - target)."""
    options = {**TOKEN, "target_utilization": 0.5, "dual_step": 0.1}
    arguments = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = trainer_of(tmp_path, options, max_steps=6, save_strategy="no", **arguments)
    trainer.train()
    budget, rows = method_of(trainer).budget, logs_of(trainer)
    assert int(budget.updates) == 6
    ascent = sum(0.1 * (row["routing/utilization"] - 0.5) for row in rows)
    assert float(budget.dual) == pytest.approx(ascent, abs=1e-5)
    temperatures = [row["routing/temperature"] for row in rows]
    assert temperatures == sorted(temperatures, reverse=True)


def test_temperature_falls_within_an_epoch(tmp_path: Path) -> None:
    """.95 an epoch, continuously: six of an epoch's sixteen steps go 5/16 of the way."""
    trainer = trainer_of(tmp_path, TOKEN, max_steps=6, save_strategy="no")
    trainer.train()
    temperatures = [row["routing/temperature"] for row in logs_of(trainer)]
    assert temperatures == pytest.approx([0.95 ** (step / 16) for step in range(6)], rel=1e-5)


# -- what depth costs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("opened", [0, 7, 18])
def test_reinforce_pays_for_every_open_block(opened: int) -> None:
    """The seed's cost: CE + c times the number of open routable blocks, of 22 with 4 always open."""
    config = LayerRoutingConfig(policy="reinforce", budget="penalty", budget_weight=0.05)
    shares = Shares(torch.full((18,), 1 / 22), 4 / 22, 0.03, 0.0, 22)
    gates = (torch.arange(18) < opened).float().view(1, 1, 18)
    context = Context.read({"input_ids": torch.ones(2, 5, dtype=torch.long)})
    budget, log_prob = Budget(config), torch.tensor(-2.0)
    budget.updates += 1  # the baseline is 0, not the first cost
    step: Any = SimpleNamespace(task_loss=torch.tensor(3.0))
    losses = budget.losses(Route(gates, context, log_prob=log_prob), step, shares)
    assert float(losses["routing_policy"]) == pytest.approx((3.0 + 0.05 * opened) * -2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("target", "keep", "word"), [(0.5, 0.9, "raise dual_step"), (0.95, 0.3, "lower dual_step")]
)
def test_an_unmet_budget_is_said_on_both_sides(tmp_path: Path, target: float, keep: float, word: str) -> None:
    options = {**TOKEN, "target_utilization": target, "init_keep": keep, "dual_step": 0.0, "damping": 0.0}
    trainer = trainer_of(tmp_path, options, max_steps=3, save_strategy="no")
    trainer.train()
    with pytest.warns(UserWarning, match=f"asked for .*, not for target_utilization={target}.*{word}"):
        trainer.summary()


# -- what an evaluation reports -----------------------------------------------------------------------------
def routed(**options: Any) -> tuple[Any, Any, LayerRouting]:
    model, tokenizer, anatomy = model_of()
    method = LayerRouting(keep=1, **{**TOKEN, "init_keep": 0.5, **options})
    attach(method, anatomy)
    if method.router is not None:
        stream = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in method.router.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=stream))
    object.__setattr__(model, "headgate_methods", MethodStack([method]))
    return model, tokenizer, method


def test_every_evaluation_reports_its_depth() -> None:
    """Beside the score: what inspection measures on the same rows, 1 at full depth, and nothing left over."""
    model, tokenizer, method = routed()
    task = EvalTask(task="perplexity", source="wordmath", split="test", limit=8, lengths=[64], batch_size=8)
    metrics = run_task(model, tokenizer, task).metrics
    assert 0.3 < metrics["depth"] < 1 and math.isfinite(metrics["loss"])
    used = metrics["depth"]
    assert metrics["executed_share"] == pytest.approx(used + (1 - used) * method.shares.keys_values)
    assert run_task(model, tokenizer, task).metrics == metrics, "counts of one task are not those of the next"
    removed = run_task(model, tokenizer, task.model_copy(update={"routing": "removed"})).metrics
    assert (removed["depth"], removed["executed_share"]) == (1.0, 1.0)
    answers = EvalTask(task="exact_match", source="wordmath", split="test", limit=4, max_new_tokens=6)
    assert 0.3 < run_task(model, tokenizer, answers).metrics["depth"] < 1


def test_finished_rows_count_nowhere() -> None:
    """Generation fills a row that has ended with padding while the others go on; its mask calls that real."""
    model, _, method = routed()
    ids = batch_of(2, 6, padded=False)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    free = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
    end = int(free[0, 7])
    method.start_figures(padding=0)
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=end, **options)
    assert (made[0, 8:] == 0).all() and (made[1] != 0).all()
    assert method.record.current is not None
    tokens, _ = method.record.current.counts()
    assert (
        tokens == 12 + 2 + 5
    )  # the prompts; the first row's token and its end; all of the second's but the last


def test_depth_is_measured_as_inspection_does() -> None:
    model, _, method = routed()
    batch = batch_of(4, 12)
    method.start_figures(None)
    with torch.no_grad():
        model(**batch, use_cache=False)
    figures = method.evaluation_figures()
    assert figures["depth"] == pytest.approx(measure(method, [batch]).utilization, abs=1e-6)
    with torch.no_grad():
        model(**batch, use_cache=False)
    assert method.evaluation_figures() == {}, "nothing is counted outside an evaluation"


def test_help_names_every_way_to_route() -> None:
    printed = CliRunner().invoke(command_line("eval"), ["eval", "--help"], env={"COLUMNS": "200"}).output
    output = " ".join(re.sub("[│╭╮╰╯─]", " ", printed).split())  # however wide the terminal is
    for config in (LayerRoutingConfig, SchemaBankConfig):
        for name in get_args(config.model_fields["eval_routing"].annotation):
            assert name in output, name
    assert "all, dense (schema_bank)" in output and "shuffled (layer_routing" in output
