"""The backward gate in a plain PyTorch loop: one forward, and a backward only where it is worth it.

Run: python examples/backward_gate_plain_loop.py [--steps 200] [--redundancy 0.7]

A random tiny Llama learns sequences, most of which repeat four short patterns. The gate learns from about 30%
of the batches after its burn-in. The loop is yours; the gate has five verbs.
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headgate import BackwardGate

VOCABULARY = 97
PATTERNS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(99))


def make_batch(step: int, redundancy: float) -> tuple[torch.Tensor, bool]:
    """Four sequences of 24 tokens and whether they are new: always the same patterns, or (seldom) fresh ones."""
    g = torch.Generator().manual_seed(step)
    fresh = torch.randint(3, VOCABULARY, (4, 24), generator=g)
    return (PATTERNS, False) if torch.rand((), generator=g) < redundancy else (fresh, True)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--redundancy", type=float, default=0.7)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    gate = BackwardGate(
        d_hidden=32,
        vocab_size=97,
        target_acceptance=0.3,
        m=128,
        k=16,
        total_steps=options.steps,
        ema_rate=0.02,
    )

    first = model(input_ids=PATTERNS, labels=PATTERNS).loss.item()
    seen, accepted = {True: 0, False: 0}, {True: 0, False: 0}
    for step in range(options.steps):
        ids, is_new = make_batch(step, options.redundancy)
        out = model(input_ids=ids, labels=ids, output_hidden_states=True)
        z = gate.embed(
            out.hidden_states[-1], out.logits, ids
        )  # shifted inside, as the model shifts its labels
        learn = gate.accept(gate.score(z))
        if learn:
            out.loss.backward()  # of the same forward
            optimizer.step()
            optimizer.zero_grad()
            gate.update(z)
        seen[is_new] += 1
        accepted[is_new] += learn
    last = model(input_ids=PATTERNS, labels=PATTERNS).loss.item()
    shares = {new: accepted[new] / max(1, seen[new]) for new in seen}
    print(f"accepted {gate.acceptance_rate():.0%} of {options.steps} batches:", end=" ")
    print(f"{shares[True]:.0%} of the new ones, {shares[False]:.0%} of the repeated ones")
    print(f"loss on the patterns {first:.2f} -> {last:.2f}")
    return {"acceptance": gate.acceptance_rate(), "first_loss": first, "last_loss": last}


if __name__ == "__main__":
    main()
