"""Comparison folders made by the real writers (run directory, predictions, summary), without training anything."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from headgate.evaluation.continual import continual_result
from headgate.evaluation.predictions import prompt_hash, write_predictions
from headgate.experiments import run_directory
from headgate.experiments.compare import Comparison, seeded
from headgate.experiments.recipe import Recipe
from headgate.experiments.recipe_file import recipe_from
from headgate.experiments.report import write_report
from headgate.experiments.report.page import Written
from headgate.experiments.run_directory import RunDirectory
from headgate.experiments.summary import summarise
from headgate.files import write_atomically

TASK, ITEMS, STEPS = "exact_match_wordmath", 60, (10, 20, 30)
SKILL = {"base": 0.05, "lora": 0.5, "backward_gate": 0.5, "layer_routing": 0.2, "schema_bank": 0.8}
TELEMETRY: Mapping[str, Callable[[float], dict[str, Any]]] = {
    "backward_gate": lambda t: {
        "gate/acceptance_rate": 1 - 0.6 * t,
        "gate/accepted_steps": 30 * t * (1 - 0.6 * t),
        "gate/threshold": 0.5 - 0.1 * t,
        "gate/novelty": 1 - 0.3 * t,
        "gate/loss_all": 2 - t,
    },
    "layer_routing": lambda t: {
        "routing/utilization": 1 - 0.25 * t,
        "routing/executed": 1.0,
        "routing/blocks": [1.0, 1 - t, 1 - 0.5 * t],
        "routing/temperature": 1 - 0.5 * t,
        "routing/entropy": 0.5,
        "routing/adaptivity": 0.2 * t,
        "loss/routing_budget": 0.1,
    },
    "lora_experts": lambda t: {
        "experts/count": 1.0 + round(t),
        "routing_entropy": 0.3,
        "expert_usage_1": 1 - 0.4 * t,
        "expert_usage_1_dispatched": 1.0,
        "experts/maturity_1": t,
    },
    "schema_bank": lambda t: {
        "schema/7/entropy_normalised": 1 - t,
        "schema/7/entropy_of_mean_normalised": 0.9,
        "schema/7/entropy": 1.0,
        "schema/7/load": [0.5, 0.25, 0.25, 0.0],
    },
}


def recipe(folder: Path, seeds: list[int], arms: Mapping[str, Any] | None = None) -> Recipe:
    named = {name: {"methods": {name: {}}} if name in TELEMETRY else {} for name in SKILL}
    named["base"] = {"training": {"max_steps": 0}}
    return recipe_from(
        {
            "name": "made",
            "output_dir": str(folder),
            "model": {"name_or_path": "embedded"},
            "training": {"max_steps": max(STEPS)},
            "evaluation": [{"task": "exact_match", "source": "wordmath"}],
            "compare": {"seeds": seeds, "baseline": "lora", "arms": named if arms is None else arms},
        }
    )


def write_run(run: Recipe, skill: float) -> RunDirectory:
    """A complete run that gets a share ``skill`` of the items right, with telemetry of its methods."""
    directory = RunDirectory.of(run)
    directory.open(run)
    draw = random.Random(run.seed)
    if "backward_gate" in run.methods:
        skill += 0.05 * (-1) ** run.seed  # now better, now worse: no detectable difference
    trained = run.steps_given != 0
    rows = []
    for step in STEPS if trained else ():
        loss = 2.5 - skill * step / max(STEPS) + 0.05 * draw.random()
        spent = {"trained_tokens": 100.0 * step, "tokens_per_second": 50.0, "flops": 1e9 * step}
        parts = [TELEMETRY[name](step / max(STEPS)) for name in run.methods if name in TELEMETRY]
        stage = "router" if step == STEPS[0] else "joint"
        rows.append({"step": step, "loss": loss + 0.1, "stage": stage, **spent})
        for part in parts:
            rows[-1].update(part)
        rows.append({"step": step, "eval_loss": loss})
    directory.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    luck = random.Random(f"{run.seed} {sorted(run.methods)}").uniform(
        0, 0.06
    )  # differs from arm to arm: a spread
    items, right_ones = [], set(draw.sample(range(ITEMS), round((skill + luck) * ITEMS)))
    for index in range(ITEMS):
        right, prompt = index in right_ones, f"How many <b>apples</b> are {index} & {index}?"
        items.append(
            {
                "id": f"item.{index}",
                "prompt": prompt,
                "prompt_hash": prompt_hash(prompt),
                "gold": str(2 * index),
                "output": f"#### {2 * index if right else -1}",
                "correct": right,
            }
        )
    write_predictions(directory.predictions / f"{TASK}.jsonl", items)
    accuracy = sum(item["correct"] for item in items) / ITEMS
    training: dict[str, Any] = {"steps": 0, "trained_tokens": 0, "flops": 0, "seconds": 0.0}
    if trained:
        training = {
            "steps": max(STEPS),
            "trained_tokens": 3000.0,
            "flops": 3e10,
            "seconds": 60 + draw.random(),
            "memory_peak": 9e8,
            "train_loss": rows[-2]["loss"],
            "eval_loss": rows[-1]["eval_loss"],
        }
        if "backward_gate" in run.methods:
            training |= {"accepted": 12, "offered": 30}
        if "layer_routing" in run.methods:
            training |= {"routing_utilization": 0.75}
    result: dict[str, Any] = {"seed": run.seed, "training": training}
    if "lora_experts" in run.methods:
        decision = {
            "step": 10,
            "skill": "farm",
            "kind": "novel",
            "similarity": 0.25,
            "threshold": 0.6,
            "expert": 1,
        }
        training |= {"expert_decisions": [decision]}
        history = [
            {
                "step": step,
                "eval_farm_loss": 2.0 - 0.02 * step,
                "eval_shop_loss": 1.5 + 0.01 * step + 0.1 * run.seed,
                "eval_farm_accuracy": 0.5,
                "eval_shop_accuracy": 0.5,
            }
            for step in (0, 10, 20)
        ]
        result["continual"] = continual_result(history, ["farm", "shop"], [("farm", 10), ("shop", 20)])
    env = json.loads((directory.path / "env.json").read_text())
    evaluation = {TASK: {"accuracy": accuracy, "items": ITEMS}}
    directory.finish({**result, "evaluation": evaluation, "versions": env["versions"]})
    return directory


def make_comparison(
    folder: Path, seeds: list[int], *, arms: Mapping[str, Any] | None = None, finish: bool = True
) -> Path:
    """A comparison folder; unfinished, it holds its runs at the first seed only."""
    made = recipe(folder, seeds, arms)
    comparison = Comparison(made)
    runs: dict[str, dict[int, RunDirectory]] = {name: {} for name in comparison.arms}
    for name, arm in comparison.arms.items():
        for seed in seeds if finish else seeds[:1]:
            run = seeded(arm, seed, seeds[0])
            directory = RunDirectory.of(run)
            done = directory.status == "complete"
            runs[name][seed] = directory if done else write_run(run, SKILL.get(name, 0.5))
    comparison._note(runs)
    if finish:
        content = summarise(made, runs, comparison.state)
        write_atomically(comparison.folder / "comparison.json", json.dumps(content))
    return comparison.folder


@pytest.fixture(scope="session", autouse=True)
def one_environment() -> Any:
    """git and the processor are asked once, not for each of a hundred made runs."""
    found = run_directory.environment()
    patch = pytest.MonkeyPatch()
    patch.setattr(run_directory, "environment", lambda: found)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def written(compared: Path) -> Written:
    """Its report."""
    return write_report(compared)


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five arms, three seeds, complete."""
    return make_comparison(tmp_path_factory.mktemp("compared"), [1, 2, 3])
