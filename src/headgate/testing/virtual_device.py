"""An accelerator's memory without one: which tensors would live there, and where Python would have to wait for it.

Tensors stay on the CPU. What is told to be on the device (a model, a batch) is marked by its storage, and so is whatever is
computed from it or made with ``device=``. A read of a marked tensor waits until all work queued so far is done: ``item``,
``tolist``, ``if tensor``, ``.cpu()``, and the operators whose result has a size that only the device knows (``nonzero``, a
boolean index, ``bincount``). A read of a host tensor costs nothing and is not counted.

Legend of an ambiguity: on a CPU ``x.to(y.device)`` and ``x.to(torch.device("cpu"))`` look the same, and count as a move onto
the device. Only ``.cpu()`` and ``.to("cpu")`` are copies to the host.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = frozenset({
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.bincount.default,
    aten.equal.default, aten.repeat_interleave.Tensor, aten._unique2.default, aten.unique_consecutive.default,
    aten.unique_dim.default,
})  # fmt: skip
"""Operators that hand a number or a size to the host."""
INDEXED = frozenset(
    {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
)
"""They wait where an index is boolean: its size is only known once it is counted."""
HOST_READS = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__})
MOVES = frozenset({Tensor.to, Tensor.cpu})


class VirtualDevice(TorchDispatchMode):
    """Counts waits by ``file:line`` of the innermost frame below one of ``folders``.

    Args:
        folders: whose code is watched; what other libraries read on their own is theirs.

    Attributes:
        places: waits, by place. uploads: host tensors moved onto the device by a copy that is waited for, by place.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        super().__init__()
        self.folders = tuple(f"{folder}/" for folder in folders)
        self.places: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self._resident: dict[int, StorageWeakRef] = {}
        self._python = _PythonSide(self)

    # -- where a tensor lives -------------------------------------------------------------------------
    def put(self, *values: object) -> None:
        """These tensors, or those inside them, are on the device."""
        for tensor in _tensors(values):
            reference = StorageWeakRef(tensor.untyped_storage())  # weak: its address is not given away again
            self._resident[reference.cdata] = reference

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is on the device."""
        return tensor.untyped_storage()._cdata in self._resident

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy on the host, counted where ``tensor`` is on the device."""
        if not self.holds(tensor):
            return tensor
        self.wait()
        copy = tensor.clone()
        self._resident.pop(copy.untyped_storage()._cdata, None)
        return copy

    # -- what is watched ------------------------------------------------------------------------------
    @contextmanager
    def watching(self) -> Iterator[None]:
        """Waits inside are counted."""
        with self._python, self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        kwargs = kwargs or {}
        resident = [self.holds(tensor) for tensor in _tensors((args, kwargs))]
        if any(resident):
            boolean = func in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
            onto_host = func is aten.copy_.default and not resident[0]
            if func in WAITS or onto_host or (boolean and not _fills(func, args)):
                self.wait()
        result = func(*args, **kwargs)
        if any(resident) and not (func is aten.copy_.default and not resident[0]):
            self.put(result)
        return result

    def wait(self, kind: Counter[str] | None = None) -> None:
        """Count one in ``kind`` (else in ``places``), at the innermost watched frame."""
        counter = self.places if kind is None else kind
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if file != __file__ and file.startswith(self.folders):
                counter[f"{Path(file).name}:{frame.f_lineno}"] += 1
                return
            frame = frame.f_back


class _PythonSide(TorchFunctionMode):
    """What never reaches an operator on a CPU: ``tolist``, ``numpy``, ``cpu``, ``to``, and ``device=`` of a factory."""

    def __init__(self, device: VirtualDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        kwargs, device = kwargs or {}, self.device
        if func in HOST_READS and device.holds(args[0]):
            device.wait()
        result = func(*args, **kwargs)
        if func in MOVES:
            if func is Tensor.cpu or "cpu" in args[1:] or kwargs.get("device") == "cpu":
                return device.to_host(args[0]).to(result.dtype)
            if any(isinstance(a, torch.device) for a in (*args[1:], kwargs.get("device"))):
                if not device.holds(args[0]) and not kwargs.get("non_blocking"):
                    device.wait(device.uploads)
                device.put(result)
        elif isinstance(kwargs.get("device"), torch.device) and isinstance(result, Tensor):
            if func is torch.tensor:
                device.wait(device.uploads)
            device.put(result)
        return result


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def _fills(func: Any, args: tuple[object, ...]) -> bool:
    """``x[mask] = number``: CUDA fills under the mask and counts nothing."""
    return func is not aten.index.Tensor and isinstance(args[2], Tensor) and args[2].numel() == 1
