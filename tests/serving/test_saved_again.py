"""A loaded export saved by `save_pretrained`: the copy is as whole as what it was loaded from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import headgate.serving  # noqa: F401  # the installed class, registered

from .conftest import elsewhere, exported, routed
from .test_generating import GREEDY

PROMPT = [[5, 6, 7, 8, 9, 10]]
SAVE = "import sys; from transformers import AutoModelForCausalLM as M; M.from_pretrained({!r}, trust_remote_code=True).save_pretrained({!r})"
PRINT = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({!r}, trust_remote_code=True)
print(model.generate(torch.tensor({!r}), **{!r})[0].tolist())
"""


@pytest.mark.parametrize("by", ["the installed class", "remote code"])
def test_a_copy_loads_where_headgate_is_missing(by: str, tmp_path: Path) -> None:
    """The folder that it came from is gone by then."""
    model, tokenizer, _ = routed(granularity="sample", prefix_tokens=4)
    folder, copy = exported(model, tokenizer, tmp_path / "out"), tmp_path / "copy"
    wanted = model.generate(torch.tensor(PROMPT), **GREEDY)[0].tolist()
    if by == "remote code":
        elsewhere(SAVE.format(str(folder), str(copy)), tmp_path)
    else:
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(copy)
    shutil.rmtree(folder)
    assert str(wanted) in elsewhere(PRINT.format(str(copy), PROMPT, GREEDY), tmp_path)
