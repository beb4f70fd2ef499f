"""A run over a stream of skills: every skill is evaluated before the stream and after each of its segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch.utils.data import ConcatDataset, Subset
from transformers import TrainerCallback

from headgate.evaluation.continual import continual_result
from headgate.experiments.recipe import Recipe
from headgate.experiments.records import Figures
from headgate.methods.stage import Stage, schedule_stages
from headgate.training.order import StreamOrder

if TYPE_CHECKING:
    import datasets
    from transformers import TrainerControl, TrainerState, TrainingArguments

JOINT = "joint"


def segment_ends(stages: Sequence[Stage]) -> list[tuple[str, int]]:
    """(skill, optimizer step at its end) of every segment."""
    scheduled = schedule_stages(stages, sum(stage.steps or 0 for stage in stages))
    return [(segment.stage.options["skill"], segment.stop) for segment in scheduled]


def as_one_stage(
    recipe: Recipe, train: Mapping[str, datasets.Dataset], stages: Sequence[Stage]
) -> tuple[dict[str, Subset[object]], list[Stage]]:
    """The rows that the stages would have shown, as one data set and one stage: joint multi-task training."""
    training, steps = recipe.training, sum(stage.steps or 0 for stage in stages)
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    views, start = {}, 0
    for name, rows in train.items():
        views[name] = range(start, start + len(rows))
        start += len(rows)
    order = StreamOrder(schedule_stages(stages, steps), views, per_step, recipe.seed)
    one = Stage(
        name=JOINT,
        steps=steps,
        train=stages[0].train,
        data=JOINT,
        options={"labelled": False, "skill": JOINT},
    )
    return {JOINT: Subset(ConcatDataset(list(train.values())), list(order))}, [one]


class SegmentEnds(TrainerCallback):
    """Evaluates after the last step of every segment, whatever ``eval_every`` says."""

    def __init__(self, segments: Sequence[tuple[str, int]]) -> None:
        self.steps = {step for _, step in segments}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl | None:
        control.should_evaluate |= state.global_step in self.steps
        return control


def continual(recipe: Recipe, history: Sequence[Figures], segments: Sequence[tuple[str, int]]) -> Figures:
    """The ``continual`` entry of a run's result, from its log history."""
    skills = list(dict.fromkeys(skill for skill, _ in segments))
    joint = recipe.data.stream_order == "joint"
    if recipe.steps_given == 0:  # the base model: nothing was trained, so it stays what it was
        history = [{**row, "step": step} for row in history for step in (0, *(end for _, end in segments))]
    return continual_result(history, skills, segments, joint=joint, watched=list(recipe.data.watch))
