"""What a trainer writes and continues from: the methods beside the adapter, counters, the callbacks' own state."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ExportableState

from headgate.models import private
from headgate.training import checkpoint, processes, replicas
from headgate.training.checks import require_finite_state

if TYPE_CHECKING:
    from headgate.training.mixin import MethodsMixin


class Saver:
    """Checkpoints of one trainer.

    Attributes:
        folder: the checkpoint that this training continues from, or None.
    """

    def __init__(self, trainer: MethodsMixin) -> None:
        self._trainer = trainer
        self.folder: Path | None = None

    # -- written --------------------------------------------------------------------------------------
    def description(self) -> dict[str, object]:
        """What ``headgate.json`` holds besides the methods' structure. Collective."""
        trainer, run = self._trainer, self._trainer.run_state
        totals, world = run.totals(), processes.world_size()
        shares = processes.gather({"counters": run.own(), "telemetry": trainer.telemetry.state()})
        return {
            "model": trainer.base_model or {"name_or_path": private.name_or_path(trainer.anatomy.model)},
            "seed": trainer.args.seed,
            "base_is_frozen": trainer.base_is_frozen,
            "stage_index": trainer.curriculum.index if trainer.curriculum is not None else 0,
            "counters": {
                "micro_step": run.micro_step * world,
                "trained_tokens": totals.trained_tokens,
                "flops": totals.flops,
                "seconds": trainer.stopwatch.read(),
                "summed_loss": totals.summed_loss,
            },
            "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
            "ranks": shares,
        }

    def save_methods(self, folder: Path, description: dict[str, object]) -> None:
        """Methods and batches in hand, beside what the trainer has saved in ``folder``."""
        trainer = self._trainer
        (folder / "training_args.bin").unlink(missing_ok=True)
        checkpoint.save_methods(folder, trainer.methods, description)
        if trainer.batches is not None:
            trainer.batches.save(folder)

    def check(self) -> None:
        """What is saved is finite and, on every rank, the same."""
        trainer, step = self._trainer, self._trainer.state.global_step
        trainer.finite_watch.check()
        # each rank may keep figures of its own rows: one state is saved
        replicas.broadcast(list(trainer.methods.buffers()))
        replicas.require_equal(trainer.named_trainable, step)
        require_finite_state(trainer.named_trainable, trainer.optimizer, step)

    # -- continued from -------------------------------------------------------------------------------
    def begin(self, resume: bool | str | Path | None) -> str | None:
        """The checkpoint to continue from: ``True`` is the newest one that is whole, a folder must be whole."""
        if resume is True:
            newest = checkpoint.last_valid(self._trainer.args.output_dir, tell=_tell)
            resume = str(newest) if newest is not None else None
        elif resume:
            checkpoint.require_valid(resume)
        self.folder = Path(resume) if resume else None
        return str(resume) if resume else None

    def restore(self, folder: Path) -> int:
        """Methods, counters and telemetry as ``folder`` holds them; the index of the stage that the run stands in."""
        trainer = self._trainer
        description = checkpoint.restore_methods(folder, trainer.methods)
        shares = description.get("ranks") or [{"telemetry": description.get("telemetry", {})}]
        trainer.telemetry.restore(trainer.run_state.restore(description["counters"], shares))
        trainer.stopwatch.seconds = description["counters"]["seconds"]
        return int(description["stage_index"])

    def restore_callbacks(self) -> None:
        """Counters of early stopping and the like as the checkpoint holds them.

        Not through transformers' ``restore_callback_states_from_checkpoint``: that also restores the order to stop
        which an interrupted run saved, and makes the callbacks anew.
        """
        trainer = self._trainer
        for callback in trainer.callback_handler.callbacks:
            saved = trainer.state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(saved, dict):
                for name, value in saved.get("attributes", {}).items():
                    setattr(callback, name, value)

    @property
    def is_finished(self) -> bool:
        """Whether a resumed run stands where it ends: at its last step, or where early stopping ended it.

        A second ``train()`` of the same trainer begins anew, whatever its callbacks counted in the first.
        """
        trainer = self._trainer
        if self.folder is None:
            return False
        stopped = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in trainer.callback_handler.callbacks
        )
        return bool(trainer.state.global_step >= trainer.state.max_steps or stopped)


def _tell(message: str) -> None:
    warnings.warn(message, stacklevel=3)
