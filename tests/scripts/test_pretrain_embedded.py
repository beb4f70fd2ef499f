"""The pretraining script: stopped and started it ends where it would have ended, at any size, in files a repository takes."""

from __future__ import annotations

import argparse
import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from headgate.models.load import EMBEDDED

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("pretrain_embedded")


def settings(work: Path, **changes: Any) -> argparse.Namespace:
    """Three steps of 512 tokens, with the shipped tokenizer."""
    (work / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, work / "tokenizer" / name)
    given = dict(
        work=str(work), size=None, device="cpu", workers=0, tokens=1536, batch_tokens=512, lr=4e-3, seed=1, threads=1,
        log_every=1, save_every=1,
    )  # fmt: skip
    return argparse.Namespace(**given | changes)


def ended(work: Path) -> dict[str, torch.Tensor]:
    return load_file(work / "checkpoint.safetensors")


@pytest.mark.slow
def test_stopped_and_started_is_undisturbed(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches made ahead by another process are the same batches."""
    script.train(settings(tmp_path / "whole"))
    save = script.save

    def stop_after(work: Path, step: int, *rest: Any) -> None:
        save(work, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "save", stop_after)
    with pytest.raises(KeyboardInterrupt):
        script.train(settings(tmp_path / "stopped"))
    monkeypatch.setattr(script, "save", save)
    script.train(settings(tmp_path / "stopped", workers=1))
    whole, stopped = ended(tmp_path / "whole"), ended(tmp_path / "stopped")
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_folder_keeps_its_size(script: Any, tmp_path: Path) -> None:
    assert script.size_of(tmp_path, "30m") == "30m" == script.size_of(tmp_path)
    with pytest.raises(SystemExit, match="begun with --size 30m, not 10m: give another --work"):
        script.size_of(tmp_path, "10m")


def test_a_folder_from_before_there_were_sizes_is_the_smallest(script: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").touch()
    assert script.size_of(tmp_path) == "1.5m"


@pytest.mark.parametrize("size", ["1.5m", "10m", "30m", "100m"])
def test_a_size_is_what_it_says(script: Any, size: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(script.model_config(size))
    parameters = sum(p.numel() for p in model.parameters())
    assert 0.8 < parameters / (float(size[:-1]) * 1e6) < 1.2, parameters


def test_thirty_million_leave_in_files_of_at_most_16_megabytes(script: Any, tmp_path: Path) -> None:
    LlamaForCausalLM(script.model_config("30m")).to(torch.bfloat16).save_pretrained(
        tmp_path, max_shard_size="16MB"
    )
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) <= 16_000_000
    assert 'max_shard_size="16MB"' in (SCRIPTS / "export_embedded.py").read_text()
