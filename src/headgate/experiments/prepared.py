"""Everything a run needs in memory before its first step; whatever is wrong with a recipe is found here."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import set_seed

from headgate.data.checks import check_data
from headgate.data.preparation import PreparedDataset, prepare
from headgate.data.problem_texts import Texts
from headgate.data.sources import load_data, load_rows
from headgate.data.streams import load_stream
from headgate.errors import ConfigError
from headgate.evaluation.abilities import remember_abilities
from headgate.evaluation.checks import check_task
from headgate.experiments.continual import as_one_stage, segment_ends
from headgate.experiments.preflight import check_recipe
from headgate.experiments.recipe import Recipe
from headgate.methods.compose import MethodStack
from headgate.methods.registry import build_stack
from headgate.methods.stage import Stage, schedule_stages
from headgate.models.anatomy import describe
from headgate.models.devices import choose_device
from headgate.models.load import load_base, prepare_model
from headgate.training import checkpoint, processes
from headgate.training.order import IN_ORDER, endless_order
from headgate.training.precision import check_machine

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from headgate.data.report import DataReport
    from headgate.data.streams import SkillData


@dataclass
class Prepared:
    """Everything in memory that a run needs before its first step."""

    recipe: Recipe
    model: Any
    tokenizer: Any
    methods: MethodStack
    train: Any
    validation: Any
    stages: list[Stage] | None
    reports: dict[str, DataReport] = field(default_factory=dict)
    segments: list[tuple[str, int]] = field(default_factory=list)
    """Of a stream: (skill, optimizer step at its end) in order; empty without one."""
    micro_batches: int = 1
    """Of one optimizer step, over all ranks: the global batch is so many times ``per_device_train_batch_size``."""

    def release_model(self) -> None:
        """Let the model and the methods on it go, and the device memory they held."""
        self.model, self.methods = None, MethodStack()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def prepare_run(recipe: Recipe, micro_batches: int | None = None) -> Prepared:
    """Load and check everything; whatever is wrong is found here, before any long work.

    ``micro_batches``: of one optimizer step, over all ranks; None takes the recipe's accumulation on every rank.
    """
    if micro_batches is None:
        micro_batches = recipe.training.gradient_accumulation_steps * processes.world_size()
    if recipe.training.deterministic:
        checkpoint.deterministic(True)
    set_seed(recipe.seed)
    check_recipe(recipe)
    check_machine(recipe.training.precision, recipe.training.optimizer, choose_device(recipe.model.device))
    methods = build_stack(recipe.methods, recipe.seed)
    methods.data.check_replay(recipe.data.replay is not None)
    check_data(recipe.data, recipe.model.name_or_path, recipe.model.revision)
    for task in recipe.evaluation:
        check_task(task)
    base, tokenizer = load_base(recipe.model, seed=recipe.seed)
    methods.check_model(describe(base))
    train, validation, stages, reports, segments = _data(
        as_one_process(recipe, micro_batches), base, tokenizer, methods
    )
    model = prepare_model(base, recipe.model, recipe.lora, seed=recipe.seed)
    remember_abilities(recipe.evaluation, model, tokenizer)
    return Prepared(
        recipe, model, tokenizer, methods, train, validation, stages, reports, segments, micro_batches
    )


def as_one_process(recipe: Recipe, micro_batches: int) -> Recipe:
    """The recipe under which one process reads the rows that all ranks read together."""
    training = recipe.training.model_copy(update={"gradient_accumulation_steps": micro_batches})
    return recipe.model_copy(update={"training": training})


def _data(recipe: Recipe, model: Any, tokenizer: Any, methods: MethodStack) -> Any:
    """Tokenised training and validation data, stages, what preparation did, and a stream's segments."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    makers: dict[str, Callable[[Mapping[str, object]], object]] = {}

    def embed(texts: Sequence[str]) -> torch.Tensor:
        return pooled_embeddings(model, tokenizer, texts)

    def training(rows: datasets.Dataset, skill: str | None = None) -> PreparedDataset:
        columns = {**makers, **({} if skill is None else {"skill": lambda _row: skill})}
        return prepare(rows, tokenizer, recipe.data, context_length=context, columns=columns)

    def held_out(rows: datasets.Dataset) -> PreparedDataset:
        return prepare(rows, tokenizer, recipe.data, context_length=context, packing=False)

    if recipe.data.stream:
        segments = load_stream(recipe.data.stream, recipe.training.max_steps, recipe.data.overlap)
        makers.update(methods.data.column_makers(embed, Texts([segment.train for segment in segments])))
        made = {s.name: training(s.train, s.skill) for s in segments}
        held = {s.skill: held_out(s.validation) for s in segments}
        held |= {name: held_out(load_rows(source)) for name, source in recipe.data.watch.items()}
        reports = {f"train {name}": part.report for name, part in made.items()}
        stages = stream_stages(recipe, segments, methods)
        ends = segment_ends(stages)
        parts: dict[str, datasets.Dataset] = {n: p.dataset for n, p in made.items()}
        if recipe.data.stream_order == "joint":
            parts, stages = as_one_stage(recipe, parts, stages)
        return parts, {n: p.dataset for n, p in held.items()}, stages, reports, ends
    train_rows, validation_rows = load_data(recipe.data)
    makers.update(methods.data.column_makers(embed, Texts([train_rows])))
    reports, validation = {}, None
    if validation_rows is not None:
        part = held_out(validation_rows)
        validation, reports["validation"] = part.dataset, part.report
    train, stages = _transformed(recipe, train_rows, training, methods)
    if isinstance(train, dict):
        reports |= {f"train {name}": part.report for name, part in train.items()}
        return {name: part.dataset for name, part in train.items()}, validation, stages, reports, []
    reports["train"] = train.report
    return train.dataset, validation, stages, reports, []


def stream_stages(recipe: Recipe, segments: Sequence[SkillData], methods: MethodStack) -> list[Stage]:
    """One stage a segment: everything trains, from that segment's data."""
    rates = methods.group_learning_rates(recipe.training.learning_rate)
    if recipe.lora is not None or not methods.brings_adapter:
        rates["lora"] = recipe.training.learning_rate
    return [
        Stage(
            name=s.name,
            steps=s.steps,
            train=rates,
            data=s.name,
            options={"labelled": s.labelled, "skill": s.skill},
        )
        for s in segments
    ]


def _transformed(
    recipe: Recipe, rows: datasets.Dataset, prepare_rows: Callable[[object], object], methods: MethodStack
) -> Any:
    """Training data and stages; a method that rewrites the rows of its stages gives every stage its own data.

    What a method writes into a row may depend on when the row is read (a tag that fades), so the rows of such a stage
    are laid out here in the order in which it reads them: one copy for each time that a row is read.
    """
    stages = recipe.training.stages or methods.stages(recipe.training.learning_rate)
    changes = {stage.name: methods.data.row_changes(stage) for stage in stages}
    if not any(changes.values()):
        return prepare_rows(rows), recipe.training.stages
    if recipe.steps_given is None:
        raise ConfigError(
            "a method that rewrites rows by stage needs training.max_steps: epochs have no fixed end"
        )
    per_step = recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps
    made, ordered = {}, []
    for scheduled in schedule_stages(stages, recipe.steps_given):
        stage, count = scheduled.stage, scheduled.steps * per_step
        if not changes[stage.name]:
            made[stage.name] = prepare_rows(rows)
            ordered.append(stage.model_copy(update={"data": stage.name}))
            continue
        reading = [
            rows[i] for i in itertools.islice(endless_order(recipe.seed, stage.name, len(rows)), count)
        ]
        for change in changes[stage.name]:
            reading = [change(row, place, place / count) for place, row in enumerate(reading)]
        made[stage.name] = prepare_rows(reading)
        options = {**stage.options, IN_ORDER: True}
        ordered.append(stage.model_copy(update={"data": stage.name, "options": options}))
    return made, ordered


@torch.no_grad()
def pooled_embeddings(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 64
) -> torch.Tensor:
    """Masked mean of the base model's final hidden states, ``[n, H]`` fp32."""
    pooled = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]), return_tensors="pt", padding=True, truncation=True
        )
        batch = {k: v.to(next(model.parameters()).device) for k, v in batch.items() if k != "token_type_ids"}
        hidden = model(**batch, output_hidden_states=True).hidden_states[-1].float()
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(pooled)
