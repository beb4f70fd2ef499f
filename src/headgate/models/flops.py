"""Matrix products of one block, counted once for the accounts of training and the shares of routing."""

from __future__ import annotations

from dataclasses import dataclass

from headgate.models.anatomy import Anatomy


@dataclass(frozen=True)
class BlockFlops:
    """FLOPs of one block for one token (2 per multiply-add), attention scores left out.

    Attributes:
        attention: q, k, v and output projections. keys_values: the part of it that makes keys and values. mlp: gated or plain.
    """

    attention: float
    keys_values: float
    mlp: float

    @property
    def block(self) -> float:
        return self.attention + self.mlp

    @classmethod
    def of(cls, anatomy: Anatomy) -> BlockFlops:
        h = anatomy.hidden_size
        queries, keys = anatomy.num_heads * anatomy.head_dim, anatomy.num_kv_heads * anatomy.head_dim
        mlp = anatomy.mlp(anatomy.blocks[0])
        gated = hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj")
        return cls(
            attention=2.0 * 2 * h * (queries + keys),
            keys_values=2.0 * 2 * h * keys,
            mlp=2.0 * (3 if gated else 2) * h * anatomy.intermediate_size,
        )
