"""HeadgateTrainer: transformers.Trainer with the methods, stages and checkpoints of Headgate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, has_length

from headgate.methods.stage import ScheduledStage
from headgate.models import private
from headgate.models.anatomy import Columns
from headgate.models.sharding import is_sharded
from headgate.training import processes
from headgate.training.mixin import MethodsMixin
from headgate.training.order import LengthGroupedOrder, Replay, StreamOrder
from headgate.training.shares import deal_validation, dealt, in_reading_order, in_step
from headgate.training.validation import added, validation_metrics, validation_order, validation_terms

if TYPE_CHECKING:
    import datasets


class HeadgateTrainer(MethodsMixin, Trainer):  # type: ignore[misc]  # FLOPs are no whole number; train takes more
    """A transformers.Trainer that routes and gates.

    ``train_dataset`` may be a mapping from skill names to data sets: stages then name the one they read, and
    ``replay`` mixes rows of earlier stages into each. Validation loss and accuracy (of the next token) are
    token-weighted and label-masked, so they do not depend on the batch size; ``eval_collator`` batches them where
    the methods' extra columns exist for training rows only. Several ranks deal the batches among themselves and add
    their terms in the order of one process: the same figures to the last bit.
    """

    def __init__(
        self,
        *args: object,
        train_dataset: object = None,
        eval_collator: Callable[[list[Columns]], Columns] | None = None,
        replay: Replay | None = None,
        **kwargs: Any,
    ) -> None:
        self.views: dict[str, range] = {}
        if isinstance(train_dataset, Mapping):
            start = 0
            for name, dataset in train_dataset.items():
                self.views[name] = range(start, start + len(dataset))
                start += len(dataset)
            train_dataset = _Concatenated(list(train_dataset.values()))
        self.eval_collator, self.replay = eval_collator, replay
        super().__init__(*args, train_dataset=train_dataset, **kwargs)

    def stage_dataset(self, scheduled: ScheduledStage) -> Any:
        """The part of the training data that a stage reads."""
        view = self.views.get(scheduled.stage.data) if scheduled.stage.data is not None else None
        return self.train_dataset if view is None else torch.utils.data.Subset(self.train_dataset, view)

    def get_eval_dataloader(self, eval_dataset: str | Dataset[object] | None = None) -> DataLoader[Columns]:
        training, self.data_collator = self.data_collator, self.eval_collator or self.data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        if self.views:
            scheduled = self.stages.plan(self.args.max_steps).scheduled
            return StreamOrder(scheduled, self.views, per_step, self.args.seed, self.replay)
        grouped = self.args.train_sampling_strategy == "group_by_length"
        mixture = getattr(dataset, "mixture", None)
        if mixture is not None:
            lengths = list(dataset[self.args.length_column_name]) if grouped else None
            return mixture.order(self.args.train_batch_size, self.args.seed, lengths)
        if grouped:
            column = self.args.length_column_name
            lengths = (
                dataset[column]
                if column in dataset.column_names
                else [len(row["input_ids"]) for row in dataset]
            )
            return LengthGroupedOrder(lengths, self.args.train_batch_size, self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: datasets.Dataset) -> Any:
        if eval_dataset is None or not has_length(eval_dataset):
            return None
        return validation_order(eval_dataset, self.args.length_column_name)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader[Columns],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if self.compute_metrics is not None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        whole = deal_validation(dataloader, whole=self.watches_validation)
        own, most = dealt(dataloader)
        rounds = most if is_sharded(self.anatomy.model) else own
        model = private.wrapped_for_evaluation(self, dataloader)
        model.eval()
        self.methods.eval()

        def forward(batch: Mapping[str, Tensor], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = self.compute_loss(model, batch, return_outputs=True, num_items_in_batch=tokens)
            assert isinstance(found, tuple)
            loss, outputs = found
            return loss, outputs["logits"]

        over_ranks, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:  # a batch's tokens are its own here, not a share of all ranks'
            batches = in_step((private.inputs_on_device(self, batch) for batch in dataloader), rounds)
            terms = list(validation_terms(forward, batches))[:own]
        finally:
            self.args.average_tokens_across_devices = over_ranks
        if not whole:
            terms = in_reading_order(processes.gather(terms))
        sums, rows = added(terms)
        metrics = validation_metrics(sums, metric_key_prefix)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)  # type: ignore[arg-type]  # transformers passes None itself


class _Concatenated(ConcatDataset):  # type: ignore[type-arg]
    """Data sets end to end; knows its column names so that the trainer can remove unused columns."""

    @property
    def column_names(self) -> list[str]:
        return list(self.datasets[0].column_names)  # type: ignore[attr-defined]
