"""Lossless depth on the embedded model: is it full depth's text, and where does drafting pay?

The model drafts with some blocks left out (the static mask that costs least on its own problems) and verifies at full depth.
By depth of the draft: prompts whose text is identical, share of drafted tokens kept, speed against plain decoding.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from headgate.data.config import SourceConfig
from headgate.data.sources import load_rows
from headgate.data.templates import prompt_ids
from headgate.experiments.benchmarks.frame import Check, Report, Say
from headgate.methods.layer_routing import LayerRouting
from headgate.models.anatomy import describe
from headgate.models.load import load_model
from headgate.serving.lossless import Drafting, lossless_decoding


def run(*, quick: bool, say: Say) -> Report:
    """200 prompts (``quick``: 12) at each depth, one at a time."""
    report = Report("lossless")
    prompts, new = (12, 24) if quick else (200, 64)
    model, tokenizer = load_model("embedded", device="auto")
    anatomy = describe(model)
    device = next(model.parameters()).device
    rows = load_rows(SourceConfig(split="test", limit=prompts))
    asked = [torch.tensor([prompt_ids({"prompt": row["prompt"]}, tokenizer)], device=device) for row in rows]
    options: dict[str, object] = {
        "max_new_tokens": new,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    sample = tokenizer(
        [row["prompt"] + row["completion"] for row in rows][:8], return_tensors="pt", padding=True
    )
    searched = {name: sample[name].to(device) for name in ("input_ids", "attention_mask")}
    searched["labels"] = searched["input_ids"].masked_fill(searched["attention_mask"] == 0, -100)
    for closed in (1, 2, 4):
        depth = 1 - closed / anatomy.num_blocks
        method = LayerRouting(policy="static", target_utilization=depth, keep=1)
        method.attach(anatomy)
        method.eval()
        method.fixed.copy_(method.choosing.zero_shot([searched]))
        _measure(report, model, method, asked, options, depth, say)
        method.detach()
    return report


def _measure(
    report: Report, model: Any, method: LayerRouting, asked: list[torch.Tensor], options: dict[str, object],
    depth: float, say: Say,
) -> None:  # fmt: skip
    drafting, equal, tokens = Drafting(), 0, 0
    plain = ahead = 0.0
    decode = partial(lossless_decoding, routing=method.execution)
    for ids in asked:
        method.set_routing("removed")
        start = time.perf_counter()
        wanted = model.generate(ids, **options)
        plain += time.perf_counter() - start
        method.set_routing("on")
        start = time.perf_counter()
        found = model.generate(ids, **options, custom_generate=decode, drafting=drafting)
        ahead += time.perf_counter() - start
        equal += int(torch.equal(found, wanted))
        tokens += wanted.shape[1] - ids.shape[1]
    kept = drafting.accepted / max(drafting.drafted, 1)
    name = f"draft at {depth:.0%} of the depth"
    report.arms[name] = {
        "prompts": len(asked),
        "identical": equal,
        "drafted": drafting.drafted,
        "kept_share": kept,
        "plain_tokens_per_second": tokens / plain,
        "lossless_tokens_per_second": tokens / ahead,
    }
    report.ratios[f"{name}, speed-up"] = plain / ahead
    report.checks.append(Check(f"{name}, identical texts", equal, f"== {len(asked)}", equal == len(asked)))
    say(
        f"{name}: {equal} of {len(asked)} identical, {kept:.0%} of drafts kept, x{plain / ahead:.2f} of plain decoding"
    )
