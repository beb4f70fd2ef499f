"""A number of a result by its dotted path, and whether a recipe's runs will have it: asked before any of them starts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headgate.errors import ConfigError
from headgate.evaluation import continual

if TYPE_CHECKING:  # a report reads metrics without a recipe's models
    from headgate.evaluation.config import EvalTask
    from headgate.experiments.recipe import Recipe

LOWER_IS_BETTER = ("loss", "perplexity", "seconds", "flops")
TRAINED = (
    "steps",
    "epochs",
    "train_loss",
    "trained_tokens",
    "seconds",
    "flops",
    "memory_peak",
    "trainable_parameters",
    "parameters",
)
"""Figures of ``result.json: training`` that every run has which trains."""
UNTRAINED = ("steps", "trained_tokens", "flops", "seconds")
ITEMS = ("accuracy", "low", "high", "items", "truncated_rate", "eos_rate", "prompts_truncated", "seconds")
"""Figures of every task with right and wrong answers."""


@dataclass(frozen=True)
class Metric:
    """A number of ``result.json``: ``evaluation.<task>.<name>``, ``training.<name>``, ``continual.<name>`` (of the
    loss) or ``continual.accuracy.<name>``."""

    path: tuple[str, ...]

    @property
    def name(self) -> str:
        return ".".join(self.path[1:])

    @property
    def higher_is_better(self) -> bool:
        if self.path[0] == "continual":
            return continual.higher_is_better(self.path[-1], *self.path[1:-1])
        return not any(word in self.path[-1] for word in LOWER_IS_BETTER)

    def read(self, result: Mapping[str, object], where: str) -> float:
        node: Any = result
        for part in self.path:
            if not isinstance(node, Mapping) or part not in node:
                raise ConfigError(f"{where} has no metric {'.'.join(self.path)}: evaluate every arm alike")
            node = node[part]
        if node is None:
            raise ConfigError(
                f"{where} has no value for {'.'.join(self.path)}: it has no meaning there (of a joint run only the average has)"
            )
        return float(node)


def chosen_metric(recipe: Recipe) -> Metric:
    """What the verdict is about: ``compare.metric`` (an evaluation's key, or a dotted path into the result),
    else the first evaluation's accuracy or loss, else validation loss. Raises ConfigError for an unknown one.
    """
    assert recipe.compare is not None
    tasks = {
        task.key: Metric(("evaluation", task.key, "loss" if task.task == "perplexity" else "accuracy"))
        for task in recipe.evaluation
    }
    asked = recipe.compare.metric
    if asked is None:
        return next(iter(tasks.values()), Metric(("training", "eval_loss")))
    if asked in tasks:
        return tasks[asked]
    path = tuple(asked.split("."))
    if path[0] == "continual" and (
        path[-1] not in continual.FIGURES or path[1:-1] not in ((), ("accuracy",))
    ):
        raise ConfigError(
            f"compare.metric={asked!r}: of a stream there are continual.<name> and continual.accuracy.<name>, with "
            f"{', '.join(continual.FIGURES)}"
        )
    if len(path) < 2 or path[0] not in ("evaluation", "training", "continual"):
        close = difflib.get_close_matches(asked, tasks, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"compare.metric={asked!r}: {hint}name an evaluation ({', '.join(tasks) or 'there is none'}) or a path such as "
            "training.eval_loss"
        )
    return Metric(path)


def chosen_baseline(recipe: Recipe) -> str:
    """The arm that the others are measured against: ``compare.baseline``, else ``lora``, else the first."""
    assert recipe.compare is not None
    arms = recipe.compare.arms
    name = recipe.compare.baseline or ("lora" if "lora" in arms else next(iter(arms)))
    if name not in arms:
        close = difflib.get_close_matches(name, arms, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(arms)}"
        raise ConfigError(f"compare.baseline: there is no arm {name!r}: {hint}")
    return name


def validation_losses(recipe: Recipe) -> list[str]:
    """``eval_loss``, or of a stream ``eval_<skill>_loss``: what the validations of a run log; [] where there are none."""
    data = recipe.data
    if data.stream:
        return [f"eval_{name}_loss" for name in dict.fromkeys([*(s.skill for s in data.stream), *data.watch])]
    return ["eval_loss"] if data.validation is not None else []


def check_metric(metric: Metric, where: str, arms: Mapping[str, Recipe]) -> None:
    """Whether every arm's result will hold the metric. Raises ConfigError naming ``where``, the metric and the arm.

    A figure that is not one of every run's is taken for a method's: each arm must then have a method to report it.
    """
    for arm, recipe in arms.items():
        place = f"{where}={'.'.join(metric.path)}"
        known = _figures(metric, recipe, place, arm)
        if known is None or metric.path[-1] in known or (metric.path[2:3] and metric.path[2] in known):
            continue
        close = difflib.get_close_matches(metric.path[-1], known, n=1, cutoff=0.8)
        if close or not recipe.methods:
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known) or 'none'}"
            raise ConfigError(f"{place}: arm {arm!r} will have no such figure: {hint}")


def _figures(metric: Metric, recipe: Recipe, place: str, arm: str) -> list[str] | None:
    """Names that may end the path in this arm's result; None where they cannot be known before it has run."""
    kind = metric.path[0]
    if kind == "continual":
        if not recipe.data.stream:
            raise ConfigError(f"{place}: arm {arm!r} trains on no stream: list skills under data.stream")
        return list(continual.FIGURES)
    if kind == "training":
        if recipe.steps_given == 0 and metric.path[1] not in UNTRAINED:
            raise ConfigError(
                f"{place}: arm {arm!r} trains nothing, so it has no such figure: compare on an evaluation, as in "
                "{task: perplexity, label: held_out, split: validation}"
            )
        return [*TRAINED, *validation_losses(recipe)]
    tasks = {task.key: task for task in recipe.evaluation}
    if metric.path[1] not in tasks:
        close = difflib.get_close_matches(metric.path[1], tasks, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(tasks) or 'none'}"
        raise ConfigError(f"{place}: arm {arm!r} has no evaluation {metric.path[1]!r}: {hint}")
    return _task_figures(tasks[metric.path[1]])


def _task_figures(task: EvalTask) -> list[str] | None:
    from headgate.evaluation.checks import KNOWN

    if task.task not in KNOWN:
        return None  # the harness's tasks name their own
    if task.task == "perplexity":
        return ["loss", "perplexity", "items", "seconds", *(str(length) for length in task.lengths)]
    more = (
        [f"pass@{k}" for k in sorted({1, *task.k})]
        if task.samples_per_item > 1 or task.allow_code_execution
        else []
    )
    more += ["loss", "loss_by_register", "delta"] if task.task == "abilities" else []
    more += ["accuracy_norm"] if task.mode == "likelihood" else ["scorers"]
    return [*ITEMS, "by_family", *more]
