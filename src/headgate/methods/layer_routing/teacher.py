"""Teacher: distillation from the same model with adapter and routing off, or with a saved run's adapter."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor

from headgate.errors import ConfigError
from headgate.methods.layer_routing.config import LayerRoutingConfig
from headgate.methods.registry import method_class
from headgate.methods.step import Step
from headgate.methods.teacher import distilled
from headgate.models.anatomy import Anatomy, model_inputs
from headgate.models.aside import has_adapters, look_aside
from headgate.models.frozen_adapter import FrozenAdapter
from headgate.models.surgery import head_bypassed


class Teacher:
    """Who teaches, when, and what: w T^2 KL(teacher || student)."""

    def __init__(self, config: LayerRoutingConfig) -> None:
        self.config = config
        self.adapter: FrozenAdapter | None = None

    def teaches(self, step: Step) -> bool:
        return self.config.kd and step.global_step >= self.config.kd_warmup

    def check(self, anatomy: Anatomy) -> None:
        """Raises ConfigError or ModelError where the named run is absent or does not fit the model."""
        if self.config.teacher != "base":
            read_teacher(self.config.teacher).check(anatomy)

    def prepare(self, anatomy: Anatomy) -> None:
        """A teacher needs an adapter to switch off, and what is named as one must be there and fit the model."""
        if self.config.kd and not has_adapters(anatomy.model):
            raise ConfigError(
                "layer_routing: kd distils from the model with its adapter off, and this model has no adapter: "
                "set lora, or methods.layer_routing.kd: false"
            )
        if self.config.teacher != "base":
            adapter = read_teacher(self.config.teacher)
            adapter.check(anatomy)
            self.adapter = adapter.to(next(anatomy.model.parameters()).device)

    def loss(self, anatomy: Anatomy, step: Step, paused: AbstractContextManager[None]) -> Tensor:
        """KL from the teacher, at full depth (``paused`` routing) and in evaluation mode, over labelled tokens."""
        assert step.hidden is not None
        model = anatomy.model
        inputs = model_inputs(step.batch, labels=False)
        added = self.adapter.applied(model) if self.adapter is not None else nullcontext()
        with (
            paused,
            look_aside(model, adapters=False),
            added,
            head_bypassed(anatomy.head) as captured,
        ):
            model(**inputs, use_cache=False)
        return distilled(anatomy, step.hidden, captured[-1], step.labels, self.config.kd_temperature)


def read_teacher(teacher: str) -> FrozenAdapter:
    """The adapter of ``run:<path>``, a run directory or the folder of a saved model.

    Raises ConfigError where there is none, or where that run's function is more than its base and adapter.
    """
    given = Path(teacher.removeprefix("run:"))
    folder = next((f for f in (given, given / "checkpoint") if (f / "adapter_config.json").exists()), None)
    where = f"layer_routing.teacher={teacher}"
    if folder is None:
        why = (
            "the folder does not exist"
            if not given.exists()
            else (
                "there is no adapter_config.json in it or in its checkpoint/ (a run that is not complete, or one without lora)"
            )
        )
        raise ConfigError(f"{where}: {why}: give a complete run that trained with `lora`, or teacher: base")
    description = folder / "headgate.json"
    methods = json.loads(description.read_text())["methods"] if description.exists() else {}
    beyond = sorted(name for name in methods if not method_class(name).adapter_alone)
    if beyond:
        raise ConfigError(
            f"{where}: that run's function is more than its LoRA adapter ({', '.join(beyond)}), and only the adapter can "
            "teach: give a run of `lora` alone, or teacher: base"
        )
    return FrozenAdapter.read(folder)
