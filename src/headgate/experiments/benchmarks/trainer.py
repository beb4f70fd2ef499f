"""HeadgateTrainer without methods against transformers.Trainer + PEFT: the price of the house itself."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from headgate.data.collation import Collator
from headgate.experiments.benchmarks.frame import Check, Report, Say, at_most, paired_ratio, spread
from headgate.experiments.run import quiet
from headgate.models.load import load_model
from headgate.training.trainer import HeadgateTrainer

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

STEPS = 50


class _StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def _train(
    kind: type[Trainer], rows: Dataset, folder: str, steps: int, logging_steps: int
) -> tuple[list[float], list[float]]:
    """(losses, seconds per step) of a fresh, seeded run of ``kind``."""
    model, tokenizer = load_model("random:llama", lora={"dropout": 0.0}, seed=1, device="cpu")
    times = _StepTimes()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=logging_steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[times],
    )
    quiet(trainer)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], times.seconds


def run(*, quick: bool, say: Say) -> Report:
    """Losses over 50 steps (bitwise), and median step-time ratio over interleaved pairs of runs."""
    pairs = 6 if quick else 20
    stream = torch.Generator().manual_seed(0)
    ids = [
        torch.randint(3, 1000, (int(n),), generator=stream).tolist()
        for n in torch.randint(96, 160, (256,), generator=stream)
    ]
    rows = Dataset.from_list([{"input_ids": row, "labels": row, "length": len(row)} for row in ids])
    report = Report("trainer")
    medians: dict[str, list[float]] = {"transformers": [], "headgate": []}
    losses: dict[str, list[float]] = {}
    kinds: dict[str, type[Trainer]] = {"transformers": Trainer, "headgate": HeadgateTrainer}
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(pairs + 1):
            steps = STEPS if pair == 0 else 20
            for name in list(kinds) if pair % 2 == 0 else reversed(list(kinds)):
                found, seconds = _train(
                    kinds[name], rows, str(Path(folder) / name), steps, 1 if pair == 0 else 10
                )
                if pair == 0:
                    losses[name] = found
                else:
                    medians[name].append(spread(seconds[2:])["median_s"])
            if pair:
                say(f"pair {pair}/{pairs}: ratio {medians['headgate'][-1] / medians['transformers'][-1]:.4f}")
    same = losses["transformers"] == losses["headgate"]
    report.arms = {name: spread(values) for name, values in medians.items()}
    report.ratios = {"headgate/transformers": paired_ratio(medians["headgate"], medians["transformers"])}
    report.checks = [
        Check("losses identical over 50 steps", float(same), "== 1", same),
        at_most("median step time, headgate / transformers", report.ratios["headgate/transformers"], 1.02),
    ]
    return report
