"""The inside of a decoder block: norms, keys and values, queries, attention, MLP, so that tokens can run alone.

``Family.inside`` names a family's norms. What a family's own block does is repeated here for chosen tokens only. Keys and values are made
for all tokens, so that a token that skips a block is still seen by those that do not, unless the caller says what the
others leave instead (``left``).

Legend: B batch, T tokens, H hidden, M open tokens, R rows that have one, Q most open tokens of a row, K keys,
N heads, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headgate.errors import ModelError
from headgate.models.anatomy import Anatomy
from headgate.models.families import FAMILIES
from headgate.models.private import attention_implementation

ATTENTION_KINDS = ("sdpa", "eager")
KeysValues = tuple[Tensor, Tensor]
Call = Mapping[str, Any]
"""The keyword arguments that a decoder layer is called with: its own release of transformers says which."""


MOST_RUNS = 4
"""Stretches of neighbouring rows that attend one by one, on views of their keys; more are gathered and attend together."""


def runs_of(rows: Sequence[int]) -> list[tuple[int, int]]:
    """First row and number of rows of every stretch of neighbours among sorted ``rows``."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return runs


def uploaded(indices: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Index vectors of the host on ``device``, in one copy for which nobody waits."""
    if device.type == "cpu":
        return indices
    packed = torch.cat(list(indices))
    packed = packed.pin_memory() if device.type == "cuda" else packed
    return packed.to(device, non_blocking=True).split([len(index) for index in indices])


class OpenTokens:
    """Indices of the open tokens of ``open_BT``: flat, and by slot within the rows that have any.

    ``open_BT`` is on the host: how many tokens are open decides every shape, and to ask ``device`` would be to wait for it.
    Rows are moved by ``index_select`` and ``index_copy``, whose backward is far cheaper than indexing's.
    """

    def __init__(self, open_BT: Tensor, device: torch.device) -> None:
        self.rows, self.length = open_BT.shape
        if self.length == 1:
            self._one_a_row(open_BT[:, 0].tolist(), device)
            return
        row_M, col_M = open_BT.nonzero(as_tuple=True)
        has_B = open_BT.any(1)
        self.width = int(open_BT.sum(1).max()) if len(row_M) else 0
        compact_M = (has_B.long().cumsum(0) - 1)[row_M]
        slot_M = (open_BT.long().cumsum(1) - 1)[row_M, col_M]
        self.col_M, self.flat_M, self.slot_M, self.rows_R = uploaded(
            [col_M, row_M * self.length + col_M, compact_M * self.width + slot_M, has_B.nonzero()[:, 0]],
            device,
        )
        self.runs = runs_of(has_B.nonzero()[:, 0].tolist())

    @classmethod
    def of_step(cls, open_B: list[bool], device: torch.device) -> OpenTokens:
        """Of one token a row, told in Python: a decoding step counts every operation."""
        tokens = cls.__new__(cls)
        tokens.rows, tokens.length = len(open_B), 1
        tokens._one_a_row(open_B, device)
        return tokens

    def _one_a_row(self, open_B: list[bool], device: torch.device) -> None:
        """A token's row is its place."""
        rows = [row for row, opened in enumerate(open_B) if opened]
        self.width, self.runs = int(bool(rows)), runs_of(rows)
        (self.flat_M,) = uploaded([torch.tensor(rows, dtype=torch.long)], device)
        self.rows_R = self.flat_M
        self.col_M = self.slot_M = torch.zeros_like(self.flat_M)  # slots: nothing is padded, nobody asks

    def __len__(self) -> int:
        return len(self.flat_M)

    def take(self, x_BT: Tensor) -> Tensor:
        """Rows of ``[B|1, T, ...]`` at the open tokens, ``[M, ...]``."""
        if x_BT.shape[0] == 1:
            return x_BT[0].index_select(0, self.col_M)
        return x_BT.flatten(0, 1).index_select(0, self.flat_M)

    def put(self, x_BTH: Tensor, new_MH: Tensor) -> Tensor:
        """``x`` with its open tokens replaced."""
        return x_BTH.flatten(0, 1).index_copy(0, self.flat_M, new_MH).view(x_BTH.shape)

    def pad(self, x_M: Tensor, value: float | bool = 0.0) -> Tensor:
        """``[M, ...]`` by row and slot, ``[R, Q, ...]``; ``value`` where a row has fewer."""
        shape = (len(self.rows_R), self.width, *x_M.shape[1:])
        if len(x_M) == shape[0] * shape[1]:
            return x_M.view(shape)
        padded = x_M.new_full((shape[0] * shape[1], *shape[2:]), value)
        return padded.index_copy(0, self.slot_M, x_M).view(shape)

    def unpad(self, x_RQ: Tensor) -> Tensor:
        """The inverse of ``pad``."""
        flat = x_RQ.flatten(0, 1)
        return flat if len(flat) == len(self) else flat.index_select(0, self.slot_M)


class BlockParts:
    """One block, callable in parts. ``call`` holds the keyword arguments its forward was given."""

    def __init__(self, anatomy: Anatomy, block: nn.Module) -> None:
        inside = anatomy.family.inside
        if inside is None:
            config = anatomy.model.config
            raise ModelError(
                f"no sparse engine for architecture {config.get_text_config().model_type!r} (there is one for "
                f"{', '.join(name for name, family in FAMILIES.items() if family.inside)}): "
                "set methods.layer_routing.engine: masked and units: block"
            )
        self.inside = inside
        attention: Any = anatomy.attention(block)
        self.attention = attention
        self.mlp = anatomy.mlp(block)
        self.before_attention = block.get_submodule(self.inside.before_attention)
        self.before_mlp = block.get_submodule(self.inside.before_mlp)
        self.after_attention = self._maybe(block, self.inside.after_attention)
        self.after_mlp = self._maybe(block, self.inside.after_mlp)
        self.head_dim, self.kv_heads = anatomy.head_dim, anatomy.num_kv_heads
        self.implementation = attention_implementation(attention.config) or "eager"
        if self.implementation not in ATTENTION_KINDS:
            raise ModelError(
                f"the sparse engine runs on attn_implementation {' or '.join(ATTENTION_KINDS)}, the model has "
                f"{self.implementation!r}: set model.attn_implementation: sdpa"
            )

    @staticmethod
    def _maybe(block: nn.Module, name: str | None) -> nn.Module:
        return nn.Identity() if name is None else block.get_submodule(name)

    def mlp_branch(self, x: Tensor) -> Tensor:
        """What the MLP adds, for tokens in any shape ``[..., H]``."""
        out: Tensor = self.after_mlp(self.mlp(self.before_mlp(x)))
        return out

    def attention_branch(self, x_BTH: Tensor, call: Call) -> Tensor:
        """What attention adds, for all tokens, through the family's own module."""
        output, _ = self.attention(self.before_attention(x_BTH), **call)
        added: Tensor = self.after_attention(output)
        return added

    def nothing(self, x_BTH: Tensor) -> KeysValues:
        """Zeros in the shape of keys and values, for tokens that leave none."""
        kind = x_BTH.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTH.dtype
        shape = (x_BTH.shape[0], self.kv_heads, x_BTH.shape[1], self.head_dim)
        return (x_BTH.new_zeros(shape, dtype=dtype), x_BTH.new_zeros(shape, dtype=dtype))

    def write_cache(self, x_BTH: Tensor, call: Call, left: KeysValues | None = None) -> None:
        """Keys and values of all tokens, or what they ``left``, into the cache; nothing else."""
        if call.get("past_key_values") is not None:
            made = self._keys_values(self.before_attention(x_BTH), None, call) if left is None else left
            self._cached(*made, call)

    def open_attention(
        self, x_BTH: Tensor, tokens: OpenTokens, call: Call, left: KeysValues | None = None
    ) -> Tensor:
        """What attention adds to the open tokens, ``[M, H]``.

        Every token is a key and a value; with ``left`` ``[B, N, T, D]`` the closed ones by what they left.
        """
        normed_BTH = self.before_attention(x_BTH)
        if left is None:
            key, value = self._keys_values(normed_BTH, None, call)
        else:
            made = self._keys_values(tokens.take(normed_BTH), tokens, call)
            key, value = (
                tokens.put(old.transpose(1, 2), new.to(old.dtype)).transpose(1, 2)
                for old, new in zip(left, made, strict=True)
            )
        key, value = self._cached(key, value, call)
        query_MND = self._queries(tokens.take(normed_BTH), tokens, call)
        query = tokens.pad(query_MND).transpose(1, 2)
        mask = self._mask(call.get("attention_mask"), tokens, x_BTH.shape[1], key)
        output = self._attend_rows(query, key, value, mask, tokens)
        mixed_MH = tokens.unpad(output).flatten(1)
        attention = self.attention
        projected = (
            attention.resid_dropout(attention.c_proj(mixed_MH))
            if self.inside.fused
            else attention.o_proj(mixed_MH)
        )
        added_MH: Tensor = self.after_attention(projected)
        return added_MH

    def _keys_values(self, normed: Tensor, tokens: OpenTokens | None, call: Call) -> KeysValues:
        """Of all tokens, ``[B, N, T, D]`` from ``[B, T, H]``; of the open ones, ``[M, N, D]`` from ``[M, H]``."""
        attention, shape = self.attention, (*normed.shape[:-1], -1, self.head_dim)
        if self.inside.fused:
            _, key, value = attention.c_attn(normed).split(attention.split_size, dim=-1)
            key, value = key.view(shape), value.view(shape)
        else:
            key, value = attention.k_proj(normed).view(shape), attention.v_proj(normed).view(shape)
            key = attention.k_norm(key) if hasattr(attention, "k_norm") else key
            cos, sin = (part if tokens is None else tokens.take(part) for part in call["position_embeddings"])
            key = rotated(key, cos.unsqueeze(-2), sin.unsqueeze(-2))
        return (key.transpose(1, 2), value.transpose(1, 2)) if tokens is None else (key, value)

    def _cached(self, key: Tensor, value: Tensor, call: Call) -> KeysValues:
        """These after what the cache holds."""
        cache = call.get("past_key_values")
        if cache is None:
            return key, value
        own: Any = getattr(cache, "self_attention_cache", cache)
        found: KeysValues = own.update(key, value, self.attention.layer_idx)
        return found

    def _queries(self, normed_MH: Tensor, tokens: OpenTokens, call: Call) -> Tensor:
        attention, shape = self.attention, (len(normed_MH), -1, self.head_dim)
        if self.inside.fused:
            query_MH: Tensor = attention.c_attn(normed_MH).split(attention.split_size, dim=1)[0]
            return query_MH.view(shape)
        query_MND: Tensor = attention.q_proj(normed_MH).view(shape)
        query_MND = attention.q_norm(query_MND) if hasattr(attention, "q_norm") else query_MND
        cos_BTD, sin_BTD = call["position_embeddings"]
        return rotated(query_MND, tokens.take(cos_BTD).unsqueeze(1), tokens.take(sin_BTD).unsqueeze(1))

    def _mask(self, mask: Tensor | None, tokens: OpenTokens, length: int, key: Tensor) -> Tensor | None:
        """The mask's rows of the open tokens, ``[R, 1, Q, K]``; an unused slot sees everything and is dropped."""
        keys = key.shape[2]
        if mask is None:
            if length == 1:
                return None
            # as transformers' attention reads a missing mask: from the first key on, whatever room a static cache has left
            rows_MK = torch.arange(keys, device=key.device).unsqueeze(0) <= tokens.col_M.unsqueeze(1)
        else:
            rows_MK = tokens.take(mask[:, 0])
        if rows_MK.dtype == torch.bool and self.implementation == "eager":
            floor = torch.finfo(key.dtype).min
            rows_MK = torch.zeros_like(rows_MK, dtype=key.dtype).masked_fill(~rows_MK, floor)
        return tokens.pad(rows_MK, rows_MK.dtype == torch.bool).unsqueeze(1)

    def _attend_rows(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, tokens: OpenTokens
    ) -> Tensor:
        """``query`` ``[R, N, Q, D]`` on the keys of its own rows among ``[B, N, K, D]``.

        A step reads the whole cache once: to gather its rows would be to move it a second and a third time.
        """
        if len(tokens.rows_R) == key.shape[0]:
            return self._attend(query, key, value, mask)
        if len(tokens.runs) > MOST_RUNS:
            rows = tokens.rows_R
            return self._attend(query, key.index_select(0, rows), value.index_select(0, rows), mask)
        outputs, done = [], 0
        for first, count in tokens.runs:
            part = None if mask is None else mask.narrow(0, done, count)
            keys, values = key.narrow(0, first, count), value.narrow(0, first, count)
            outputs.append(self._attend(query.narrow(0, done, count), keys, values, part))
            done += count
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        attention = self.attention
        eager = sys.modules[type(attention).__module__].eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager)
        dropout = attention.attn_dropout.p if self.inside.fused else attention.attention_dropout
        options = {"softcap": attention.attn_logit_softcapping} if self.inside.softcap else {}
        output: Tensor = attend(
            attention,
            query,
            key,
            value,
            mask,
            dropout=dropout if attention.training else 0.0,
            scaling=attention.scaling,
            **options,
        )[0]
        return output


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x cos + rotate_half(x) sin``: rotary positions on the last dimension (Su et al. 2021)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
