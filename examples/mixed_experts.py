"""Rows of one batch, each answered by its own expert: PEFT's ``adapter_names`` over what `--to experts` wrote.

    headgate export RUN --to experts --output experts
    python examples/mixed_experts.py BASE experts "Tom has three apples." "A farmer has six cows."

The chooser in the folder names the expert of each text. Needs transformers and PEFT; Headgate is not imported.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def chooser_in(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("chooser", folder / "chooser.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(base: str, folder: Path, texts: list[str]) -> None:
    chooser = chooser_in(folder)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    names = sorted(path.name for path in folder.glob("expert_*"))
    for name in names:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder / name), adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, str(folder / name), adapter_name=name)
    chosen = [chooser.choose(text) for text in texts]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        new = model.eval().generate(**batch, adapter_names=chosen, max_new_tokens=24, do_sample=False)
    for text, name, row in zip(texts, chosen, new, strict=True):
        print(
            f"[{name}] {text}{tokenizer.decode(row[batch['input_ids'].shape[1] :], skip_special_tokens=True)}"
        )


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
