"""What do many experts cost? From one to a thousand against one PEFT LoRA of the same rank (``headgate bench experts --scale``).

Of each number of experts and a young one beside them, which is when they cost most, in turn with the LoRA: a training step
(sparse, as by default, and, up to 64, in the plan's dense phase), and greedy decoding. Of each number too: a birth with what
it entails (factors and router row, everybody else frozen, packing, the optimizer's parameters and state), the join that merging looks at, and the bytes held for the experts'
factors beside the factors' own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from headgate.experiments.benchmarks.experts import (
    ONE_LORA,
    RANK,
    TARGETS,
    TOP_K,
    Decoding,
    Training,
    filled,
    sliced,
)
from headgate.experiments.benchmarks.frame import (
    Report,
    Say,
    at_most,
    interleaved,
    not_measured,
    paired_ratio,
    spread,
    synchronize,
)
from headgate.experiments.records import Figures
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.lora_experts.inspect import likeness
from headgate.models.anatomy import describe

COUNTS = (1, 8, 64, 256, 1024)
BLOCKS, TOKENS, NEW_TOKENS, BIRTHS = 4, 2048, 48, 3
FEW = 64
"""Up to so many experts all are measured dense, and compared with each other: N forwards' worth, and N^2 products."""
STEP_LIMITS = {64: 1.10, 1024: 1.25}
BIRTH_LIMITS = {64: 0.1, 1024: 1.0}
MEMORY_LIMIT = 1.10
"""One row in sixteen is kept free for births."""
LORA = "one PEFT LoRA"


class Crowd:
    """A model of width 1,024 with so many mature experts, one of which trains, and its optimizer."""

    def __init__(self, count: int, device: str, *, dense: bool = False) -> None:
        self.model = sliced(device, blocks=BLOCKS)
        self.method = LoraExperts(
            experts=count,
            r=RANK,
            new_r=RANK,
            alpha=2 * RANK,
            new_alpha=2 * RANK,
            target_modules=TARGETS,
            top_k=TOP_K,
            dense_phase=dense,
            spawn={"policy": "always", "max_experts": count + 2 * BIRTHS},
        )
        self.method.attach(describe(self.model))
        self.method.to(device)
        filled(self.method)
        self.method.experts.train_only(0)
        self.training = Training(self.model, self.trained(), TOKENS, device)

    def trained(self) -> list[Tensor]:
        return [p for group in self.method.parameter_groups().values() for p in group]

    def give_birth(self) -> float:
        """Seconds of a new expert that trains alone, with all that it entails; beyond what a token and an update take anyway."""

        def born() -> None:
            self.method.experts.train_only(self.method.experts.add())
            self.training = self.training.with_parameters(self.trained())
            self.use()

        return _seconds(born) - _seconds(self.use)

    def use(self) -> None:
        """A token and an update: after a birth they pack its factors and make its optimizer's state."""
        with torch.no_grad():
            self.model(input_ids=self.training.ids[:1, :1], use_cache=False)
        for parameter in self.trained():
            parameter.grad = torch.zeros_like(parameter)
        self.training.optimizer.step()
        self.training.optimizer.zero_grad()

    def held(self) -> tuple[int, int]:
        """Bytes of the storages behind all factors, and of the factors themselves."""
        factors = [
            tensor
            for bank in self.method.experts.banks.values()
            for tensor in (*bank.parameters(), *bank.buffers())
        ]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in factors}
        return sum(storages.values()), sum(t.nbytes for t in factors)


def _seconds(work: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


class Scale:
    """The figures of one number of experts after another, beside one LoRA that stays."""

    def __init__(self, report: Report, device: str, rounds: int) -> None:
        self.report, self.device, self.rounds = report, device, rounds
        lora = filled(sliced(device, ONE_LORA, blocks=BLOCKS))
        self.lora_training = Training(lora, list(lora.parameters()), TOKENS, device)
        self.lora_decoding = Decoding(lora, NEW_TOKENS, device)

    def against_lora(self, name: str, work: Callable[[], object], lora: Callable[[], object]) -> float:
        seconds = interleaved({name: work, LORA: lora}, rounds=self.rounds, warmup=1)
        for arm, taken in seconds.items():
            self.report.arms[name if arm == name else f"{name}: {LORA} in turn"] = spread(taken)
        ratio = paired_ratio(seconds[name], seconds[LORA])
        self.report.ratios[f"{name} / {LORA}"] = ratio
        return ratio

    def measure(self, count: int) -> dict[str, float]:
        """Ratios to one LoRA; ``birth``: seconds beyond a usual step; ``memory``: bytes held over bytes of factors."""
        crowd, young = Crowd(count, self.device), f"{count} and a young one"
        crowd.training()
        births = [crowd.give_birth() for _ in range(BIRTHS)]
        found = {"training": self.against_lora(f"training, {young}", crowd.training, self.lora_training)}
        self.report.arms[f"birth at {count}"] = spread(births)
        found["birth"] = statistics.median(births)
        found["decoding"] = self.against_lora(
            f"decoding, {young}", Decoding(crowd.model, NEW_TOKENS, self.device), self.lora_decoding
        )
        held, own = crowd.held()
        found["memory"] = held / own
        self.report.ratios[f"bytes held for {young} / their factors"] = held / own
        if count <= FEW:
            self.report.arms[f"cosines of all {count}"] = spread(
                [_seconds(lambda: likeness(crowd.method.experts))]
            )
        crowd.method.detach()
        if count <= FEW:
            dense = Crowd(count, self.device, dense=True)
            dense.give_birth()
            found["dense phase"] = self.against_lora(
                f"training, {young}, dense phase", dense.training, self.lora_training
            )
            dense.method.detach()
        return found

    def check(self, count: int, found: dict[str, float] | None) -> None:
        limit, seconds = STEP_LIMITS[count], BIRTH_LIMITS[count]
        wanted = [
            (
                "training",
                f"training step, {count} experts and a young one, against one LoRA ({self.device})",
                limit,
            ),
            ("decoding", f"decoding, {count} experts, against one LoRA ({self.device})", limit),
            ("birth", f"seconds of a birth at {count} experts, with all it entails ({self.device})", seconds),
            ("memory", f"bytes held for {count} experts, over their factors' own", MEMORY_LIMIT),
        ]
        for key, label, most in wanted:
            self.report.checks.append(
                not_measured(label, f"<= {most:g}", "left out by --quick")
                if found is None
                else at_most(label, found[key], most)
            )


def run(*, quick: bool, say: Say) -> Report:
    """Steps, decoding, births and memory by number of experts; the ratios are to one PEFT LoRA, measured in turn."""
    report, device = Report("experts_scale"), "cuda" if torch.cuda.is_available() else "cpu"
    counts, rounds = (COUNTS[:3], 3) if quick else (COUNTS, 5)
    say(f"experts: {BLOCKS} blocks of width 1,024, rank {RANK}, top-{TOP_K}; {TOKENS} tokens a step")
    scale = Scale(report, device, rounds)
    measured: dict[int, Figures] = {}
    for count in counts:
        measured[count] = scale.measure(count)
        say(
            f"experts: {count}: "
            + ", ".join(f"{name} {value:.3f}" for name, value in measured[count].items())
        )
        torch.cuda.empty_cache()
    for count in STEP_LIMITS:
        scale.check(count, measured.get(count))
    return report
