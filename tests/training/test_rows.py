"""Rows that cannot be trained on end in one line before the first step, whatever made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

import headgate as hg
from headgate.errors import ConfigError, DataError, ModelError

IDS = [[5, 6, 7, 8]] * 8


class Own(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor(IDS[index]), "labels": torch.tensor(IDS[index])}


def train(folder: Path, rows: Any, **arguments: Any) -> Any:
    model, tokenizer = hg.load_model("random:llama", lora=dict(r=2), device="cpu")
    args = TrainingArguments(
        str(folder),
        max_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **arguments,
    )
    trainer = hg.HeadgateTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    return trainer.train()


def test_a_data_set_of_ones_own_trains(tmp_path: Path) -> None:
    assert train(tmp_path, Own()).global_step == 1


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        (Dataset.from_dict({"input_ids": IDS}), {}, "no labels .*DataCollatorForLanguageModeling"),
        (Dataset.from_dict({"input_ids": [], "labels": []}), {}, "train_dataset is empty"),
        (Own(), {"train_sampling_strategy": "group_by_length"}, "train_dataset is a Own: use 'random'"),
    ],
)
def test_rows_that_cannot_be_trained_on(
    tmp_path: Path, rows: Any, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        train(tmp_path, rows, **arguments)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lra": {"r": 2}}, "load_model\\(lra=...\\): unknown option: did you mean 'lora'"),
        ({"lora": {"rr": 2}}, "lora.rr: unknown key: did you mean 'r'"),
        ({"lora": {"r": 100_000}}, "lora.r=100000 exceeds"),
        ({"dtype": "float3"}, "model.dtype: did you mean 'float32'"),
    ],
)
def test_load_model_names_the_option(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        hg.load_model("random:llama", **options)


def test_a_corrupt_adapter_is_named(tmp_path: Path) -> None:
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text('{"peft_type":')
    with pytest.raises(ModelError, match=r"adapter_config.json is damaged"):
        hg.load_model("random:llama", adapter=str(tmp_path))
    config.write_text('{"peft_type": "LORA", "r": 8}')
    weights.write_bytes(b"\x00\x01 cut short")
    with pytest.raises(ModelError, match=r"adapter_model.safetensors is damaged"):
        hg.load_model("random:llama", adapter=str(tmp_path))
