"""The backward gate: what it costs, what it saves, and the memory of the chunked head.

Four measurements: gate cost as a share of the forward; time per offered micro-batch at acceptance .1, .25 and .5
against the (1 + rho a)/(1 + rho) law; the same with ``score_layer``; peak memory at V = 152k.

What ``score_layer`` saves depends on the head, which every score needs: a rejected batch costs the blocks up to the
layer and the head. Its target is checked at the proportions of a 1.1B model, where the head is 6% of a forward; at those of
a 0.5B model with its large vocabulary (28%) the figure is reported.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headgate.experiments.benchmarks.frame import (
    Check,
    Report,
    Say,
    at_most,
    interleaved,
    not_measured,
    paired_ratio,
    spread,
)
from headgate.experiments.benchmarks.live_bytes import peak_bytes
from headgate.methods.backward_gate import BackwardGate, Score
from headgate.methods.backward_gate.evidence import at_block
from headgate.models.anatomy import Anatomy, describe, unwrap
from headgate.models.load import load_model
from headgate.models.sharding import head_tensors
from headgate.models.surgery import BlockOutput, head_bypassed, hidden_of
from headgate.modules.fused_head import chunked_head_loss
from headgate.modules.head_sketch import HeadSketcher

ACCEPTANCES = (0.1, 0.25, 0.5)
OFFERED = 12
LARGE_VOCABULARY = 151_936
SLICE = "random:tinyllama-1.1b"
SLICE_BLOCKS = 4
"""Head and blocks of this slice have the proportion of a whole 0.5B model, at a tenth of its time on a CPU."""
BODY_BLOCKS, BODY_VOCABULARY = 8, 11_636
"""With so many of its 22 blocks and as large a share of its 32,000 tokens it has the proportion of the 1.1B model."""


def keep_first_blocks(anatomy: Anatomy, count: int) -> None:
    """Take the others out of the model, in place."""
    setattr(anatomy.backbone, anatomy.family.blocks, nn.ModuleList(anatomy.blocks[:count]))
    anatomy.model.config.num_hidden_layers = count


class Bench:
    """One adapted model, one batch, and the pieces of a gated step."""

    def __init__(
        self, name: str, rows: int, length: int, blocks: int | None = None, vocabulary: int | None = None
    ) -> None:
        self.model, _ = load_model(name, lora={"dropout": 0.0}, seed=1, device="cpu")
        if blocks is not None:
            keep_first_blocks(describe(self.model), blocks)
        if vocabulary is not None:
            unwrap(self.model).resize_token_embeddings(vocabulary)
        self.anatomy: Anatomy = describe(self.model)
        stream = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, self.anatomy.vocab_size, (rows, length), generator=stream)
        self.gate = BackwardGate(burn_in=1 << 30)
        self.gate.attach(self.anatomy)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4)

    def forward(self, observed: bool) -> Tensor:
        """Loss of the batch; a gated one recomputes the head's logits in its backward, if there is one."""
        core = self.gate._core()
        core.sketcher.begin()
        with head_bypassed(self.anatomy.head) as captured:
            self.model(input_ids=self.ids)
        weight_VH, bias_V = head_tensors(self.anatomy)
        return chunked_head_loss(
            captured[-1],
            weight_VH,
            self.ids,
            bias=bias_V,
            softcap=self.anatomy.softcap,
            observers=(core.sketcher.observe,) if observed else (),
            gradients="recompute",
        )

    def decide(self) -> Score:
        core = self.gate._core()
        score = core.score(core.sketcher.end())
        core.accept(score, optimizer_step=0)
        return score

    def learn(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ungated(self) -> None:
        for _ in range(OFFERED):
            self.learn(self.forward(observed=False))

    def forwards(self) -> None:
        for _ in range(OFFERED):
            self.forward(observed=False)

    def gated(self, acceptance: float) -> Callable[[], None]:
        """Gate work on every micro-batch, backward on exactly ``acceptance`` of them, evenly spaced."""

        def work() -> None:
            for place in range(OFFERED):
                loss = self.forward(observed=True)
                score = self.decide()
                if int((place + 1) * acceptance) > int(place * acceptance):
                    self.learn(loss)
                    self.gate._core().update(score)

        return work

    def partial(self, acceptance: float, depth: float) -> Callable[[], None]:
        """``score_layer`` at a share of the depth: what is rejected runs the blocks up to there only."""
        last = round(self.anatomy.num_blocks * depth) - 1
        core = self.gate._core()

        class Stop(Exception):
            pass

        def work() -> None:
            for place in range(OFFERED):
                accepted = int((place + 1) * acceptance) > int(place * acceptance)

                def look(
                    _module: nn.Module,
                    _args: object,
                    output: BlockOutput,
                    accepted: bool = accepted,
                ) -> None:
                    score = core.score(at_block(core, self.anatomy, hidden_of(output).detach(), self.ids))
                    core.accept(score, optimizer_step=0)
                    if not accepted:
                        raise Stop
                    core.update(score)

                handle = self.anatomy.blocks[last].register_forward_hook(look)
                try:
                    self.learn(self.forward(observed=False))
                except Stop:
                    pass
                finally:
                    handle.remove()

        return work


def _memory(report: Report, say: Say, tokens: int, gate_tokens: int) -> None:
    """Peak of plain and chunked cross-entropy at V = 152k, and what the gate adds."""
    stream = torch.Generator().manual_seed(0)
    hidden_size = 64
    weight = torch.randn(LARGE_VOCABULARY, hidden_size, generator=stream) / 8
    hidden = torch.randn(1, tokens, hidden_size, generator=stream).requires_grad_()
    labels = torch.randint(LARGE_VOCABULARY, (1, tokens), generator=stream)

    def plain() -> None:
        logits = (hidden @ weight.T)[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()

    def chunked() -> None:
        chunked_head_loss(hidden, weight, labels, gradients="recompute").backward()

    found = {"plain head": peak_bytes(plain) / 2**20, "chunked head": peak_bytes(chunked) / 2**20}
    say(
        f"peak of the head at V=152k, {tokens} tokens: "
        + ", ".join(f"{k} {v:.0f} MiB" for k, v in found.items())
    )
    long = torch.randn(1, gate_tokens, hidden_size, generator=stream)
    long_labels = torch.randint(LARGE_VOCABULARY, (1, gate_tokens), generator=stream)
    sketcher = HeadSketcher(hidden_size, LARGE_VOCABULARY, 512)
    without = peak_bytes(lambda: chunked_head_loss(long, weight, long_labels))
    watched = peak_bytes(lambda: chunked_head_loss(long, weight, long_labels, observers=(sketcher.observe,)))
    gate = BackwardGate(d_hidden=hidden_size, vocab_size=LARGE_VOCABULARY, burn_in=0)
    state = sum(t.numel() * t.element_size() for t in gate.state_dict().values()) / 2**20
    total = max(0.0, (watched - without) / 2**20) + state
    say(f"gate at V=152k, {gate_tokens} tokens: state {state:.1f} MiB, in all {total:.1f} MiB")
    report.arms["memory"] = {**found, "gate state": state, "gate peak": total, "unit": "MiB"}
    report.ratios["memory chunked/plain"] = found["chunked head"] / max(1.0, found["plain head"])
    report.checks.append(
        Check("chunked head below plain", report.ratios["memory chunked/plain"], "< 1", True)
    )
    report.checks[-1].ok = report.ratios["memory chunked/plain"] < 1
    report.checks.append(at_most(f"gate memory at V=152k, {gate_tokens} tokens, MiB", total, 64))


def _cost(report: Report, say: Say, name: str, rows: int, length: int, rounds: int) -> float:
    """Gate cost as a share of the forward."""
    bench = Bench(name, rows, length)

    def with_gate() -> None:
        bench.forward(observed=True)
        bench.decide()

    found = interleaved({"forward": lambda: bench.forward(observed=False), "gated": with_gate}, rounds=rounds)
    share = paired_ratio(found["gated"], found["forward"]) - 1
    say(f"{name}: the gate adds {share:.2%} to a forward of {spread(found['forward'])['median_s']:.3f} s")
    report.arms |= {f"{name} {arm}": spread(seconds) for arm, seconds in found.items()}
    report.ratios[f"gate share of the forward, {name}"] = share
    return share


def _law(report: Report, say: Say, bench: Bench, rounds: int, checked: bool) -> None:
    """Step time against (1 + rho a)/(1 + rho)."""
    arms: dict[str, Callable[[], object]] = {"ungated": bench.ungated, "forward only": bench.forwards}
    arms |= {f"a={a}": bench.gated(a) for a in ACCEPTANCES}
    arms["a=0.25, score_layer at half the depth"] = bench.partial(0.25, 0.5)
    found = interleaved(arms, rounds=rounds, warmup=1)
    report.arms |= {name: spread(seconds) for name, seconds in found.items()}
    rho = paired_ratio(found["ungated"], found["forward only"]) - 1
    report.ideal["rho"] = rho
    for a in ACCEPTANCES:
        law, ratio = (1 + rho * a) / (1 + rho), paired_ratio(found[f"a={a}"], found["ungated"])
        report.ideal[f"a={a}"], report.ratios[f"a={a}"] = law, ratio
        say(f"a={a}: {ratio:.3f} of the ungated step, law {law:.3f} (rho {rho:.2f})")
        if checked:
            report.checks.append(at_most(f"step time at a={a} / law", ratio / law, 1.05))
    partial = paired_ratio(found["a=0.25, score_layer at half the depth"], found["ungated"])
    report.ratios["a=0.25, score_layer at half the depth"] = partial
    say(f"a=0.25 with score_layer at half the depth: {partial:.3f} of the ungated step")


def _score_layer(report: Report, say: Say, bench: Bench, rounds: int) -> None:
    """Step time with ``score_layer`` at a quarter of the depth, where blocks dominate."""
    arms = {"ungated": bench.ungated, "a=0.25, score_layer": bench.partial(0.25, 0.25)}
    found = interleaved(arms, rounds=rounds, warmup=1)
    report.arms |= {f"1.1B proportions, {name}": spread(seconds) for name, seconds in found.items()}
    partial = paired_ratio(found["a=0.25, score_layer"], found["ungated"])
    report.ratios["1.1B proportions, a=0.25, score_layer at a quarter of the depth"] = partial
    say(f"1.1B proportions: a=0.25 with score_layer: {partial:.3f} of the ungated step")
    report.checks.append(at_most("step time at a=0.25 with score_layer, 1.1B proportions", partial, 0.40))


def run(*, quick: bool, say: Say) -> Report:
    """Everything. ``quick`` keeps to the embedded model, on which no target is set.

    Its blocks are so narrow that a sketch of 512 buckets weighs more than in any model worth gating.
    """
    report = Report("gate")
    _cost(report, say, "embedded", 4, 160, 20 if quick else 60)
    if quick:
        why = "left out by --quick"
        report.checks.append(
            not_measured("gate cost, share of the forward, random:qwen2-0.5b", "<= 0.03", why)
        )
        report.checks.append(
            not_measured("step time / law, step time with score_layer", "<= 1.05, <= 0.40", why)
        )
        _law(report, say, Bench("embedded", 4, 128), 2, checked=False)
    else:
        share = _cost(report, say, "random:qwen2-0.5b", 1, 128, 9)
        report.checks.append(at_most("gate cost, share of the forward, random:qwen2-0.5b", share, 0.03))
        _law(report, say, Bench(SLICE, 1, 128, SLICE_BLOCKS), 4, checked=True)
        _score_layer(report, say, Bench(SLICE, 1, 128, BODY_BLOCKS, BODY_VOCABULARY), 2)
    _memory(report, say, 256 if quick else 512, 1024 if quick else 16_384)
    why = "this benchmark runs on the CPU" if torch.cuda.is_available() else "no GPU in this machine"
    report.checks.append(not_measured("gate cost, share of the forward, GPU", "<= 0.01", why))
    return report
