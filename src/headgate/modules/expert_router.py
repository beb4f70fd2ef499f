"""ExpertRouter: one row of weights per expert, so that rows come and go and the others keep their optimizer state.

Legend: B batch, T tokens, F features, N experts asked for, K directions of a subspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Packed(NamedTuple):
    """All rows by name, in one matrix that they are views of."""

    names: tuple[str, ...]
    rows_NF: Tensor


class ExpertRouter(nn.Module):
    """z_i = w_i . f for features that are normalised already; fp32, autocast or not.

    ``protect`` holds the logits of old inputs: from then on only the part of a row's *change* that is orthogonal to
    ``basis`` [F, K] acts, w = w_0 + (I - U U^T)(w - w_0). Written as a function of the parameters and not as a
    correction of their gradients, because AdamW does not move along the gradient.

    Equation: lora_experts (projection): w = w_0 + (I - U U^T) (w - w_0)
    Proved by: tests/lora_experts/test_bank.py::test_protected_logits_do_not_move_whatever_the_optimizer_does
    """

    basis: Tensor

    def __init__(self, features: int, *, directions: int = 0) -> None:
        super().__init__()
        self.features = features
        self.rows = nn.ParameterDict()
        self.anchors = _Tensors()
        self._packed: _Packed | None = None
        self.register_buffer("basis", torch.zeros(features, directions))

    def add(self, name: str, row_F: Tensor) -> None:
        """A new expert's row, which starts (and is anchored) at ``row_F``."""
        self._packed = None
        self.rows[name] = nn.Parameter(row_F.clone())
        if self.basis.shape[1]:
            self.anchors.put(name, row_F.clone())

    def remove(self, name: str) -> None:
        self._packed = None
        del self.rows[name]
        if self.basis.shape[1]:
            self.anchors.drop(name)

    @torch.no_grad()
    def replace(self, name: str, row_F: Tensor) -> None:
        """Give an expert another row, which acts in full from now on."""
        self.rows[name].copy_(row_F)
        if self.basis.shape[1]:
            self.anchors.get(name).copy_(row_F)

    @torch.no_grad()
    def protect(self, basis_FK: Tensor) -> None:
        """Anchor every row where it acts now, and let no later change act along ``basis_FK``."""
        for name in self.rows:
            acting_F = self.weight([name])[0]
            self.rows[name].copy_(acting_F)
            self.anchors.get(name).copy_(acting_F)
        self.basis.copy_(basis_FK)

    def weight(self, names: Sequence[str]) -> Tensor:
        """``[N, F]`` as it acts."""
        weight_NF = self._stacked(names).float()
        if not self.basis.shape[1]:
            return weight_NF
        moved_NF = weight_NF - torch.stack([self.anchors.get(name) for name in names])
        return weight_NF - (moved_NF @ self.basis) @ self.basis.T

    def _stacked(self, names: Sequence[str]) -> Tensor:
        """The named rows; without gradients rows of the matrix that all are views of, where they are asked for in its order."""
        if torch.is_grad_enabled():
            return torch.stack([self.rows[name] for name in names])
        packed = self._packed if self._packed is not None and self._are_views(self._packed) else self._pack()
        first = packed.names.index(names[0])
        rows = slice(first, first + len(names))  # a newborn, which stands last, is not asked for
        if packed.names[rows] == tuple(names):
            return packed.rows_NF[rows]
        places = {name: place for place, name in enumerate(packed.names)}
        return packed.rows_NF[[places[name] for name in names]]

    def _are_views(self, packed: _Packed) -> bool:
        """Whether every row still is; moving to another device, a load that assigns, or other ``.data`` ends that."""
        start, size = packed.rows_NF.data_ptr(), packed.rows_NF.stride(0) * packed.rows_NF.element_size()
        rows = self.rows._parameters.values()  # the dict's own look-ups would cost more than the product
        return all(
            row is not None and row.data_ptr() == start + place * size for place, row in enumerate(rows)
        )

    @torch.no_grad()
    def _pack(self) -> _Packed:
        """Turn every row into a view of one matrix, as in ExpertBank; no value and no Parameter's identity changes."""
        with torch.inference_mode(False):  # an inference tensor could not be trained later
            rows_NF = torch.stack([row.detach() for row in self.rows.values()])
            for row, view_F in zip(self.rows.values(), rows_NF, strict=True):
                row.data = view_F
        self._packed = _Packed(tuple(self.rows), rows_NF)
        return self._packed

    def forward(self, features_BTF: Tensor, names: Sequence[str]) -> Tensor:
        with torch.autocast(features_BTF.device.type, enabled=False):
            return F.linear(features_BTF.float(), self.weight(names))


class _Tensors(nn.Module):
    """Buffers by name."""

    def put(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(f"of_{name}", tensor)

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self._buffers[f"of_{name}"]  # type: ignore[assignment]
        return tensor

    def drop(self, name: str) -> None:
        delattr(self, f"of_{name}")
