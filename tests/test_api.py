"""The Python API as the README shows it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import headgate as hg
from headgate.data import Collator, DataConfig, SourceConfig, load_rows, prepare
from headgate.errors import CheckpointError


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **changes,
    )


def test_readme_lines(tmp_path: Path) -> None:
    model, tokenizer = hg.load_model("embedded", lora=dict(r=8, alpha=16), device="cpu")
    rows = prepare(load_rows(SourceConfig(limit=20)), tokenizer, DataConfig())
    trainer = hg.HeadgateTrainer(
        model=model,
        args=arguments(tmp_path / "out"),
        train_dataset=rows.dataset,
        data_collator=Collator(tokenizer.pad_token_id),
        methods=[hg.SchemaBank(num_schemas=4, tags="none")],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    again, _ = hg.load(tmp_path / "out", device="cpu")
    trainer.model.eval()
    trainer.methods.eval()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
    ours, theirs = again.headgate_methods.state_dict(), trainer.methods.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_users_own_peft_model_collator_and_trainer_subclass(tmp_path: Path) -> None:
    import peft

    base, tokenizer = hg.load_model("random:llama", device="cpu")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    rows = prepare(load_rows(SourceConfig(limit=8)), tokenizer, DataConfig()).dataset

    class Mine(hg.MethodsMixin, Trainer):
        pass

    trainer = Mine(
        model=model,
        args=arguments(tmp_path),
        train_dataset=rows,
        data_collator=Collator(tokenizer.pad_token_id),
    )
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


def test_full_fine_tuning(tmp_path: Path) -> None:
    model, tokenizer = hg.load_model("random:llama", device="cpu")
    rows = prepare(load_rows(SourceConfig(limit=8)), tokenizer, DataConfig()).dataset
    trainer = hg.HeadgateTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=rows,
        data_collator=Collator(tokenizer.pad_token_id),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "full"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(plain(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_loading_what_is_not_there_is_an_error_and_no_bare_base_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no saved Headgate model"):
        hg.load(tmp_path)


@pytest.mark.parametrize("name", ["SchemaBank", "LayerRouting", "LoraExperts", "BackwardGate"])
def test_a_method_shows_its_settings(name: str) -> None:
    """Completion, help and repr know the fields, their defaults, and what was changed."""
    kind = getattr(hg, name)
    shown = inspect.signature(kind).parameters
    fields = kind.Config.model_fields
    assert list(shown) == ["config", *fields]
    assert all(shown[field].default == getattr(kind.Config(), field) for field in fields)
    first = next(field for field in fields if shown[field].annotation is float)
    assert f"{first}=0.5" in repr(kind(**{first: 0.5})) and f"{first}=" not in repr(kind())


def test_dir_shows_the_public_names() -> None:
    assert set(hg.__all__) <= set(dir(hg))
