"""Pretrain the embedded model from scratch: seeded, resumable over several runs, two CPU cores are enough.

    python scripts/pretrain_embedded.py --work build/embedded --tokens 18000000
    python scripts/export_embedded.py --work build/embedded

A larger one, of real capacity for a laboratory, takes minutes on a GPU (``--device auto`` finds it):

    python scripts/pretrain_embedded.py --work build/30m --size 30m --tokens 300000000 --batch-tokens 65536 --lr 1.5e-3
    python scripts/export_embedded.py --work build/30m --out models/30m

A run keeps its size in ``--work/size.json``; its batches are the same on every device. Batches are made by ``--workers``
processes ahead of the device, which would wait for them otherwise.

It continues from the last complete checkpoint in ``--work``. The batch of step ``n`` is a pure function of
(seed, n), the schedule is warm-up, stable, decay (WSD), so a longer or shorter ``--tokens`` may be given when
continuing before the decay began. glibc's allocator returns large blocks to the kernel after every operation,
which costs page faults; the script restarts itself with tunables that keep them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ALLOCATOR = {
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}
if __name__ == "__main__" and any(os.environ.get(k) != v for k, v in ALLOCATOR.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from headgate.data import wordmath  # noqa: E402
from headgate.data.wordmath.pretraining import PRETRAINING, arithmetic_line, number_puzzle, statements, story  # noqa: E402
from headgate.data.wordmath.targets import TARGETS  # noqa: E402
from headgate.ops.randomness import derive_seed  # noqa: E402

VOCABULARY, CONTEXT = 1024, 512
SHORT, LONG_FROM = 256, 0.9  # rows of 256 are a third cheaper; the last tenth sees the whole context
MIXTURE = {"problem": 0.50, "puzzle": 0.18, "arithmetic": 0.07, "story": 0.25}  # shares of documents
PROMPT = "{question}\nThe answer is: {answer}"  # the default GSM8K prompt of the recipes


def documents(rng: random.Random) -> Iterator[str]:
    """An endless stream: problems of the pretraining families, puzzles, arithmetic, stories of every family."""
    families, storied = list(PRETRAINING.values()), [*TARGETS.values(), *PRETRAINING.values()]
    spoken = {family.name: statements(family) for family in storied}
    while True:
        kind = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
        if kind == "arithmetic":
            yield arithmetic_line(rng)
        elif kind == "puzzle":
            yield number_puzzle(rng)
        elif kind == "story":
            family = rng.choice(list(TARGETS.values()) if rng.random() < 0.85 else families)
            yield story(rng, family, spoken[family.name])
        else:
            family = rng.choice(families)
            template = rng.choice(family.templates)
            numbers = template.draw(rng)
            if wordmath.split_of(family.structure(template, numbers)) == "train":
                yield PROMPT.format_map(family.tell(template, numbers, rng.randrange(1 << 30)))


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, trained on the corpus plus target-family text (its words only)."""
    stream = documents(random.Random(derive_seed(seed, "tokenizer")))
    corpus = [next(stream) for _ in range(12_000)]
    corpus += [PROMPT.format_map(row) for row in wordmath.generate("train", 10_000, seed=seed)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="right",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


SIZES: dict[str, dict[str, int]] = {
    "1.5m": dict(hidden_size=128, intermediate_size=320, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2),
    "10m": dict(hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5, num_key_value_heads=5),
    "30m": dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=4),
    "100m": dict(hidden_size=768, intermediate_size=2112, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=4),
}  # fmt: skip
"""Parameters, roughly; 1.5m is the one that Headgate ships."""


def model_config(size: str = "1.5m") -> LlamaConfig:
    return LlamaConfig(
        **SIZES[size], vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, tie_word_embeddings=True, rms_norm_eps=1e-5,
        initializer_range=0.03, pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_bias=False,
    )  # fmt: skip


def size_of(work: Path, wanted: str | None = None) -> str:
    """The size that a folder was begun with; a fresh one is begun with ``wanted``. Exits where they differ."""
    path = work / "size.json"
    begun = json.loads(path.read_text()) if path.exists() else None
    if begun is None and (work / "checkpoint.safetensors").exists():
        begun = "1.5m"  # there was no other once
    if begun is not None and wanted not in (None, begun):
        raise SystemExit(f"{work} was begun with --size {begun}, not {wanted}: give another --work")
    size = begun or wanted or "1.5m"
    if begun is None and wanted is not None:
        path.write_text(json.dumps(size))
    return size


def batch(step: int, seed: int, count: int, width: int, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """``[count / width, width]`` token ids: documents end to end, no padding, each ``<bos> ... <eos>``."""
    stream = documents(random.Random(derive_seed(seed, "pretraining", step)))
    ids: list[int] = []
    while len(ids) < count:
        for encoded in tokenizer([next(stream) for _ in range(64)])["input_ids"]:
            ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids[:count]).view(-1, width)


def learning_rate(seen: int, total: int, peak: float, warmup: int = 200_000, decay: float = 0.3) -> float:
    """WSD: linear warm-up over ``warmup`` tokens, constant, linear decay to zero over the last ``decay``."""
    return peak * min(1.0, seen / warmup + 0.01, max(0.0, (total - seen) / (decay * total)))


def save(work: Path, step: int, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """One file, written beside and renamed: a checkpoint is complete or absent."""
    tensors = {f"model.{n}": p.detach().cpu() for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value.detach().cpu().clone()
    save_file(tensors, work / "checkpoint.tmp", metadata={"step": str(step)})
    os.replace(work / "checkpoint.tmp", work / "checkpoint.safetensors")


def restore(work: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer | None) -> int:
    """The step to go on from, 0 in a fresh folder."""
    path = work / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            if optimizer is not None:
                optimizer.state[parameter] = {"step": tensors[f"step.{name}"]} | {
                    key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")
                }
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def train(args: argparse.Namespace) -> None:
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    if not (work / "tokenizer" / "tokenizer.json").exists():
        build_tokenizer(args.seed).save_pretrained(work / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    )
    model = LlamaForCausalLM(
        model_config(size_of(work, args.size))
    )  # drawn on the host: the same on every device
    # in bf16 on a CPU eager is twice as fast as the flash kernel at the smallest size
    model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    model.to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    step = restore(work, model, optimizer)
    held_out = batch(0, args.seed + 1, 8192, 256, tokenizer).to(device)
    tokens_per_step = args.batch_tokens
    total_steps = args.tokens // tokens_per_step
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, step {step} of {total_steps}", flush=True
    )
    clock = time.perf_counter()
    upcoming = batches(args, step, total_steps, tokenizer)
    while step < total_steps:
        rate = learning_rate(step * tokens_per_step, args.tokens, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = next(upcoming).to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = language_loss(model, ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.log_every == 0 or step == total_steps:
            elapsed, clock = time.perf_counter() - clock, time.perf_counter()
            entry = {
                "step": step, "tokens": step * tokens_per_step, "loss": round(loss.item(), 4), "learning_rate": rate,
                "grad_norm": round(norm.item(), 3), "tokens_per_second": round(args.log_every * tokens_per_step / elapsed),
            }  # fmt: skip
            if step % args.save_every == 0 or step == total_steps:
                with torch.no_grad():
                    entry["held_out_loss"] = round(language_loss(model, held_out).item(), 4)
                save(work, step, model, optimizer)
            with open(work / "log.jsonl", "a") as log:
                log.write(json.dumps(entry) + "\n")
            print(entry, flush=True)


def batches(
    args: argparse.Namespace, done: int, total: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[torch.Tensor]:
    """The batches after step ``done``, in order, whoever makes them."""

    def wanted(step: int) -> tuple[int, int, int, int, PreTrainedTokenizerFast]:
        width = SHORT if step < LONG_FROM * total else CONTEXT
        return step + 1, args.seed, args.batch_tokens, width, tokenizer

    if args.workers == 0:
        yield from (batch(*wanted(step)) for step in range(done, total))
        return
    ahead = 4 * args.workers
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        pending = [pool.apply_async(batch, wanted(step)) for step in range(done, min(done + ahead, total))]
        for step in range(done, total):
            if step + ahead < total:
                pending.append(pool.apply_async(batch, wanted(step + ahead)))
            yield pending.pop(0).get()


def language_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", default="build/embedded")
    parser.add_argument("--size", choices=sorted(SIZES), help="of a fresh folder; 1.5m by default")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that make batches; 0: the trainer itself"
    )
    parser.add_argument("--tokens", type=int, default=18_000_000)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=100)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
