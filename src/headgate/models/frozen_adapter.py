"""FrozenAdapter: a saved LoRA adapter that adds to the base's linears inside a context and is never installed.

    y = W x + (alpha / r) B A x

Its tensors are no parameters of the model: nothing about what is trained, saved or counted changes, and its rank and
targets need not be those of the adapter in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from headgate.errors import ModelError
from headgate.models.adapters import check_recorded_base
from headgate.models.anatomy import Anatomy, linear_size
from headgate.models.surgery import on_linear

PREFIX = "base_model.model."


class FrozenAdapter:
    """``pairs``: of every linear it adapts, by path in the transformers model, A ``[r, in]`` and B ``[out, r]``."""

    def __init__(
        self, folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], scale: dict[str, float]
    ) -> None:
        self.folder, self.pairs, self.scale = folder, pairs, scale

    @classmethod
    def read(cls, folder: Path) -> FrozenAdapter:
        """From ``adapter_config.json`` and its weights.

        Raises ModelError where there is none, or where it is more than plain LoRA.
        """
        import peft
        from peft.utils import load_peft_weights

        if not (folder / "adapter_config.json").exists():
            raise ModelError(
                f"{folder} holds no adapter (no adapter_config.json): give a run that trained with `lora`"
            )
        config = peft.PeftConfig.from_pretrained(str(folder))
        unusual = [
            name
            for name, plain in (
                ("use_dora", False),
                ("bias", "none"),
                ("modules_to_save", None),
                ("alpha_pattern", {}),
            )
            if (getattr(config, name, plain) or plain) != plain
        ]
        if not isinstance(config, peft.LoraConfig) or config.peft_type != "LORA" or unusual:
            raise ModelError(
                f"the adapter in {folder} is more than plain LoRA ({config.peft_type}"
                f"{', ' + ', '.join(unusual) if unusual else ''}): only plain LoRA can be read beside another adapter"
            )
        try:
            weights: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"the adapter in {folder} cannot be read: {error}") from None
        pairs, scale = {}, {}
        for key, a in weights.items():
            if not key.endswith(".lora_A.weight"):
                continue
            path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            pairs[path] = a, weights[key.replace(".lora_A.", ".lora_B.")]
            scale[path] = config.lora_alpha / (len(a) ** 0.5 if config.use_rslora else len(a))
        return cls(folder, pairs, scale)

    def check(self, anatomy: Anatomy) -> None:
        """Raises ModelError for an adapter of another base than this model, which may lie on the meta device."""
        check_recorded_base(anatomy.model, self.folder)
        for path, (a, b) in self.pairs.items():
            try:
                linear = anatomy.model.get_submodule(path)
            except AttributeError:
                raise ModelError(
                    f"adapter {self.folder} adapts {path}, which this model does not have"
                ) from None
            shape = (a.shape[1], b.shape[0])
            if linear_size(linear) != shape:
                raise ModelError(
                    f"adapter {self.folder} was made for another base: {path} maps {shape[0]} to {shape[1]} there and "
                    f"{linear_size(linear)[0]} to {linear_size(linear)[1]} here"
                )

    def to(self, device: torch.device) -> FrozenAdapter:
        self.pairs = {path: (a.to(device), b.to(device)) for path, (a, b) in self.pairs.items()}
        return self

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the linears of the transformers ``model`` add this adapter's output to their own."""
        handles = [on_linear(model.get_submodule(path), self._delta(path)) for path in self.pairs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _delta(self, path: str) -> Callable[[Tensor], Tensor]:
        (a, b), scale = self.pairs[path], self.scale[path]

        def delta(x: Tensor) -> Tensor:
            return (x.to(a.dtype) @ a.T @ b.T) * scale

        return delta
