"""A tiny adapted model, tokenised rows, and a trainer factory; toy methods that vote and add losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer

from headgate.config import StrictConfig
from headgate.data.collation import Collator
from headgate.experiments.run import quiet
from headgate.methods.base import Method
from headgate.methods.step import Step
from headgate.models.load import load_model
from headgate.training.trainer import HeadgateTrainer

from .arguments import arguments_in


def make_rows(count: int = 64, seed: int = 0) -> Dataset:
    stream = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 1000, (12 + i % 7,), generator=stream).tolist() for i in range(count)]
    return Dataset.from_list(
        [
            {"input_ids": row, "labels": row, "length": len(row), "example_id": str(i)}
            for i, row in enumerate(ids)
        ]
    )


@pytest.fixture(scope="session")
def rows() -> Dataset:
    return make_rows()


class Toy(Method):
    """Votes by a fixed pattern over micro-batches; owns one parameter that scales a block's output."""

    name = "toy"
    telemetry_names = ("gate/accept",)

    class Config(StrictConfig):
        pattern: str = "1"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def attach(self, anatomy: Any) -> None:
        from headgate.models.surgery import on_block_output

        self.handles.append(on_block_output(anatomy.blocks[-1], lambda hidden: hidden * self.scale))

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        return {"scale": [self.scale]}

    def vote(self, step: Step) -> Tensor | None:
        if step.phase != "forward":
            return None
        pattern = self.config.pattern
        place = step.global_step * step.window_size + step.window_index  # the same on every rank
        return torch.tensor(pattern[place % len(pattern)] == "1")

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"toy": 0.01 * (self.scale - 1.5).square().sum()}

    def on_step_end(self, step: Step) -> dict[str, Tensor]:
        if step.accepted:
            self.seen += 1
        return {"gate/accept": torch.tensor(float(step.accepted))}


@pytest.fixture
def make_trainer(rows: Dataset, tmp_path: Path) -> Callable[..., Any]:
    def make(
        folder: str = "run",
        *,
        kind: type[Trainer] = HeadgateTrainer,
        lora_dropout: float = 0.0,
        data: Any = None,
        **options: Any,
    ) -> Any:
        arguments = {
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 5,
            "seed": 3,
            "warmup_steps": 0.1,
            **options.pop("arguments", {}),
        }
        model, tokenizer = load_model("random:llama", lora={"dropout": lora_dropout}, seed=1, device="cpu")
        trainer = kind(
            model=model,
            args=arguments_in(
                tmp_path / folder,
                **arguments,
            ),
            train_dataset=rows if data is None else data,
            data_collator=Collator(tokenizer.pad_token_id),
            **options,
        )
        quiet(trainer)
        return trainer

    return make


def trained(trainer: Any) -> dict[str, Tensor]:
    """Copies of everything trainable, by name."""
    own = dict(trainer.methods.named_parameters()) if hasattr(trainer, "methods") else {}
    model = {n: p for n, p in trainer.model.named_parameters() if "lora" in n}
    return {name: p.detach().clone() for name, p in {**model, **own}.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
