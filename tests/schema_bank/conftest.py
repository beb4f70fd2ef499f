"""A tiny adapted model, tagged rows and a trainer with a small bank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from headgate.data.collation import Collator
from headgate.methods.schema_bank import SchemaBank
from headgate.models.load import load_model
from headgate.training.trainer import HeadgateTrainer

from ..training.arguments import arguments_in

SMALL = {"num_schemas": 6, "rank": 3}


def tagged_rows(count: int = 48, seed: int = 0) -> Dataset:
    stream = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, 1000, (8 + i % 5,), generator=stream).tolist()
        rows.append({"input_ids": ids, "labels": ids, "length": len(ids), "tags": [ids[0] % 6]})
    return Dataset.from_list(rows)


def tiny(dropout: float = 0.0, lora: bool = True, **options: Any) -> Any:
    """A random Llama whose LoRA has a non-zero B, so that its adapter matters."""
    model, tokenizer = load_model(
        "random:llama", lora={"dropout": dropout} if lora else None, seed=1, device="cpu", **options
    )
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=stream) * 0.02)
    return model, tokenizer


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., HeadgateTrainer]:
    def make(folder: str = "run", method: Any = None, *, stop_at: int | None = None, **options: Any) -> Any:
        arguments = {
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 3,
            **options.pop("arguments", {}),
        }
        model, tokenizer = tiny(dropout=0.05)
        trainer = HeadgateTrainer(
            model=model,
            args=arguments_in(
                tmp_path / folder,
                **arguments,
            ),
            train_dataset=tagged_rows(),
            data_collator=Collator(tokenizer.pad_token_id, columns=["tags"]),
            methods=[method if method is not None else SchemaBank(**SMALL)],
            **options,
        )
        return trainer

    return make


def state_of(trainer: Any) -> dict[str, Tensor]:
    """Copies of every tensor of the model and the methods."""
    both = {
        **trainer.model.state_dict(),
        **{f"method.{n}": t for n, t in trainer.methods.state_dict().items()},
    }
    return {name: tensor.detach().clone() for name, tensor in both.items()}
