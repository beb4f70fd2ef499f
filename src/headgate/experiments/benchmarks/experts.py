"""Many routed LoRA experts against one PEFT LoRA, against an explicit loop over experts, and against PEFT's X-LoRA."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
from torch import Tensor, nn

from headgate.experiments.benchmarks.frame import (
    Report,
    Say,
    at_most,
    interleaved,
    not_measured,
    paired_ratio,
    spread,
)
from headgate.methods.lora_experts import LoraExperts
from headgate.models.anatomy import describe
from headgate.modules.expert_bank import ExpertBank, Mixture

M = TypeVar("M", bound=nn.Module)

COUNTS = (1, 8, 64)
"""Experts; the last is the target's."""
RANK, TOP_K = 16, 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SLICE = 4
LIMIT, GOAL = {"cpu": 1.25, "cuda": 1.10}, 1.10
SPAWN_LIMIT_MS = 50.0


def sliced(device: str, lora: dict[str, Any] | None = None, blocks: int = SLICE) -> Any:
    """The first blocks of a Qwen2-0.5B-shaped model of width 1,024, its vocabulary cut to what a step needs."""
    torch.manual_seed(0)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    if lora is None:
        return model.requires_grad_(False)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **lora))


ONE_LORA: dict[str, object] = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0}


def experts_on(model: nn.Module, count: int, all_live: bool = False) -> LoraExperts:
    """That many mature experts, none of them zero; one trains, as in a stream, or all do."""
    method = LoraExperts(
        experts=count,
        r=RANK,
        alpha=2 * RANK,
        target_modules=TARGETS,
        top_k=TOP_K,
        spawn={"policy": "always", "max_experts": 128},
    )
    method.attach(describe(model))
    method.to(next(model.parameters()).device)
    filled(method)
    if not all_live:
        method.experts.train_only(0)
    return method


@torch.no_grad()
def filled(module: M) -> M:
    """No B is zero any more, of experts or of a PEFT LoRA: products with zeros could be cheaper. Returns the module."""
    for name, parameter in module.named_parameters():
        if name.endswith(".up") or "lora_B" in name:
            parameter.normal_(std=0.02)
    return module


class Explicit:
    """The loop that a bank replaces: every expert on every token, weighed afterwards. Replaces the bank's forward."""

    def __init__(self, method: LoraExperts) -> None:
        for site in method.experts.banks:
            bank = method.experts.bank(site)
            bank.forward = self.of(bank)  # type: ignore[method-assign]

    @staticmethod
    def of(bank: ExpertBank) -> Callable[..., Tensor]:
        def forward(x: Tensor, mixture: Mixture) -> Tensor:
            total = torch.zeros((), dtype=x.dtype, device=x.device)
            for place, name in enumerate(mixture.experts):
                expert = bank.expert(name)
                total = total + mixture.scaled[..., place : place + 1] * ((x @ expert.down.T) @ expert.up)
            return total

        return forward


class Training:
    """One optimizer step on random tokens."""

    def __init__(self, model: nn.Module, parameters: list[Tensor], tokens: int, device: str) -> None:
        self.model = model.train()
        # fused, as the trainer's own is by default
        self.optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-5, fused=True)
        stream = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 4000, (4, tokens // 4), generator=stream).to(device)

    def with_parameters(self, parameters: list[Tensor]) -> Training:
        """The same step for other parameters: what is new joins the optimizer, what is gone leaves it."""
        wanted = [p for p in parameters if p.requires_grad]
        self.optimizer.param_groups[0]["params"] = wanted
        for gone in set(self.optimizer.state) - set(wanted):
            del self.optimizer.state[gone]
        return self

    def __call__(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Decoding:
    """Greedy tokens after a short prompt, one sequence."""

    def __init__(self, model: Any, new_tokens: int, device: str) -> None:
        self.model, self.count = model.eval(), new_tokens
        self.ids = torch.arange(10, 26, device=device)[None]

    @torch.no_grad()
    def __call__(self) -> None:
        self.model.eval()
        self.model.generate(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            min_new_tokens=self.count,
            max_new_tokens=self.count,
            do_sample=False,
        )


def xlora(device: str) -> tuple[object, list[object]] | str:
    """PEFT's X-LoRA over eight LoRAs of the same rank; why it cannot run, as text, where it cannot."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = {}
        for number in range(8):
            sliced(device, ONE_LORA).save_pretrained(str(Path(folder) / str(number)))
            paths[str(number)] = str(Path(folder) / str(number))
        try:
            base = sliced(device)
            base.config.use_cache = False
            config = peft.XLoraConfig(
                task_type="CAUSAL_LM",
                hidden_size=1024,
                adapters=paths,
                use_trainable_adapters=True,
                top_k_lora=TOP_K,
            )
            model = peft.get_peft_model(base, config)
            ids = torch.ones(1, 4, dtype=torch.long, device=device)
            model(input_ids=ids, labels=ids).loss.backward()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return model, [p for p in model.parameters() if p.requires_grad]


def _spawning(report: Report, device: str) -> None:
    method = experts_on(sliced(device), 8)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        method.experts.add(RANK)
        taken.append((time.perf_counter() - start) * 1e3)
    report.arms["spawn an expert"] = spread([ms / 1e3 for ms in taken])
    report.checks.append(at_most("milliseconds to spawn an expert", sorted(taken)[2], SPAWN_LIMIT_MS))


def run(*, quick: bool, say: Say) -> Report:
    """Training step and decoding of N routed experts, over the same of one PEFT LoRA of the same rank."""
    report, device = Report("experts"), "cuda" if torch.cuda.is_available() else "cpu"
    tokens, new_tokens, rounds = (512, 8, 3) if quick else (1024, 16, 5)
    counts = COUNTS[-1:] if quick else COUNTS
    say(f"experts: {SLICE} blocks of width 1,024, rank {RANK}, top-{TOP_K}; training {tokens} tokens a step")
    models: dict[str, tuple[object, list[object]]] = {"one PEFT LoRA": _peft_arm(device)}
    for count in counts:
        models[f"{count} experts"] = _experts_arm(device, count)
    if not quick:
        models[f"{COUNTS[-1]} experts, all training"] = _experts_arm(device, COUNTS[-1], True)
    looped = _experts_arm(device, COUNTS[-1])
    Explicit(looped[2])
    models[f"{COUNTS[-1]} experts, explicit loop"] = looped
    other = "left out by --quick" if quick else xlora(device)
    if not isinstance(other, str):
        models["X-LoRA, 8 LoRAs"] = other
    for what, work in (
        ("training step", lambda arm: Training(arm[0], arm[1], tokens, device)),
        ("decoding", lambda arm: Decoding(arm[0], new_tokens, device)),
    ):
        say(f"experts: {what}")
        arms = {
            name: work(arm) for name, arm in models.items() if what == "training step" or "X-LoRA" not in name
        }
        seconds = interleaved(arms, rounds=rounds, warmup=1)
        for name, taken in seconds.items():
            report.arms[f"{what}, {name}"] = spread(taken)
            report.ratios[f"{what}, {name} / one PEFT LoRA"] = paired_ratio(taken, seconds["one PEFT LoRA"])
        ratio = report.ratios[f"{what}, {COUNTS[-1]} experts / one PEFT LoRA"]
        label = f"{what}: {COUNTS[-1]} experts of rank {RANK}, top-{TOP_K}, one of them training, against one LoRA ({device})"
        report.checks.append(at_most(label, ratio, LIMIT[device]))
        if device == "cpu":
            report.checks.append(at_most(label + ", goal", ratio, GOAL))
    if isinstance(other, str):
        report.checks.append(not_measured("X-LoRA training step", "for comparison", other))
    else:
        why = "X-LoRA needs two forwards a token and no cache: its decoding is not comparable token by token"
        report.checks.append(not_measured("X-LoRA decoding", "for comparison", why))
    if device == "cpu":
        report.checks.append(not_measured("64 experts against one LoRA, GPU", "<= 1.1", "no GPU here"))
    _spawning(report, device)
    return report


def _peft_arm(device: str) -> Any:
    model = filled(sliced(device, ONE_LORA))
    return model, list(model.parameters())


def _experts_arm(device: str, count: int, all_live: bool = False) -> Any:
    model = sliced(device)
    method = experts_on(model, count, all_live)
    return model, list(method.parameters()), method
