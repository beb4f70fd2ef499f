"""LoRA experts: adapters that appear when the data is new, mixed per token by one router.

Continual fine-tuning over a stream of skills. Every chosen linear carries a bank of low-rank experts; a router that
reads the token and what came before it in its document weighs them, and no task id is needed at inference. When a
skill is novel an expert is born for it; it ramps up, matures, may grow, freeze, merge with others, or go.

    y = W x + ((x A^T) * repeat(g alpha / r, ranks)) B^T         all experts of a linear in two products
    g_i proportional to m_i exp(z_i / tau), z = W_r f            m: maturity, tau decays from the last birth
    the top 2 of the mature experts and whoever is young, then the top 1 with its probability among all
    L = CE + a N sum f_i P_i + b mean (logsumexp z)^2 + entropies + orthogonality + T^2 KL(mature || young)

Implemented: all of that, over any base (quantised linears too), with or without a PEFT adapter beside it; spawn
policies and novelty (spawn.py, probe.py); growth without a change of function; rank doubling, freezing, eviction,
merging; export of every expert as a plain PEFT adapter.

Deviations from the plan (seeds/003): an expert of maturity 0 is left out of the products instead of multiplied by
zero, which makes birth neutral bit for bit; gates act on the LoRA outputs, not on final logits; the router reads
frozen embeddings by default, not a second forward.

Cost: one forward whatever the number of experts; the router below 1% of a forward; two products of the experts'
total rank at each linear, or of the chosen ones' alone where that is cheaper (ops/low_rank).
"""

from typing import TYPE_CHECKING

from headgate.methods.lora_experts.config import LoraExpertsConfig

if TYPE_CHECKING:
    from headgate.methods.lora_experts.method import LoraExperts as LoraExperts

__all__ = ["LoraExperts", "LoraExpertsConfig"]


def __getattr__(name: str) -> object:
    """The method when it is asked for: its settings are checked without torch."""
    if name == "LoraExperts":
        from headgate.methods.lora_experts.method import LoraExperts

        return LoraExperts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
