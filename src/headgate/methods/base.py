"""Method: one paper, as a few verbs, most left empty.

A method owns parameters and buffers, which are all of its persistent state. It touches the model through
``models.surgery`` only, so that ``detach`` gives the model back bitwise, apart from what was trained.

Here stands what every method has. What one or two methods alone need (columns of their own, batches of their own, an account
of what a step cost) are the small protocols of ``methods.protocols``, which a method may implement.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from headgate.config import StrictConfig, build_config
from headgate.errors import ConfigError
from headgate.methods.stage import ScheduledStage
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy, Batch
from headgate.models.surgery import Handle
from headgate.modules.structure import Structure


class Method(nn.Module):
    """Base of the four methods. Subclasses set ``name``, ``Config`` and ``citation``.

    Built from a config object or its keyword arguments: ``SchemaBank(top_k=2)``.
    """

    name: ClassVar[str]
    Config: ClassVar[type[StrictConfig]]
    citation: ClassVar[str] = ""  # BibTeX
    attach_order: ClassVar[int] = 0
    """Nesting, innermost first: layer_routing 10, lora_experts 20, schema_bank 30, backward_gate 40."""
    is_adapter: ClassVar[bool] = False
    """True where the method is what is trained: a base without a PEFT adapter is then frozen, not fine-tuned."""
    adapter_alone: ClassVar[bool] = False
    """True where a trained run is its base and its adapter: the method only decided what to learn from, or when."""
    telemetry_names: ClassVar[Sequence[str]] = ()
    """Names that it logs besides ``loss/<its losses>``; ``<part>`` stands for any word without spaces."""
    __signature__: ClassVar[inspect.Signature]
    neutral: ClassVar[Mapping[str, object] | None] = None
    """Options under which training is bitwise that of the adapter alone; None where there are none."""

    def __init__(self, config: StrictConfig | None = None, **options: object) -> None:
        super().__init__()
        if config is not None and options:
            raise ConfigError(f"{type(self).__name__}: give a config or keyword arguments, not both")
        self.config: Any = config if config is not None else build_config(self.Config, options)
        self.seed = 0
        self.handles: list[Handle] = []

    def __init_subclass__(cls, **options: object) -> None:
        """``help(SchemaBank)`` and completion show the settings by name, with their defaults."""
        super().__init_subclass__(**options)
        if "Config" in cls.__dict__:
            cls.__signature__ = keywords_of(cls.Config)

    def __repr__(self) -> str:
        """As it would be written again: the settings that differ from their defaults."""
        changed = self.config.model_dump(exclude_defaults=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    # -- installation ---------------------------------------------------------------------------------
    def attach(self, anatomy: Anatomy) -> None:
        """Install into the model; append every handle to ``self.handles``."""

    def detach(self) -> None:
        """Remove every handle: the model is bitwise what it was, apart from what was trained."""
        while self.handles:
            self.handles.pop().remove()

    @property
    def attached(self) -> bool:
        return bool(self.handles)

    # -- what is trained, on what, from what ------------------------------------------------------------
    def parameter_groups(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Trainable tensors by group name. Group names are unique over all methods; ``lora`` is taken."""
        return {}

    def group_learning_rates(self, learning_rate: float) -> Mapping[str, float]:
        """Peak rate of each group in a run without stages of its own."""
        return dict.fromkeys(self.parameter_groups(), learning_rate)

    def columns(self) -> Sequence[str]:
        """Extra batch columns it needs; a missing one is an error that names the method."""
        return ()

    # -- state ------------------------------------------------------------------------------------------
    def structure(self) -> Structure:
        """JSON: all that ``from_structure`` needs to build a module into which the state loads strictly."""
        return {"config": self.config.model_dump(mode="json")}

    @classmethod
    def from_structure(cls, structure: Structure) -> Method:
        return cls(build_config(cls.Config, structure["config"]))

    # -- training ---------------------------------------------------------------------------------------
    def check_run(self, max_steps: int) -> None:
        """Raise ConfigError for settings that cannot work in a run of this many optimizer steps."""

    def on_stage_start(self, scheduled: ScheduledStage, probe: Iterable[Batch] | None) -> None:
        """Grow, freeze. ``probe`` yields a few batches of the stage's data (an iterable), or None; the trainer's has
        ``validation`` besides: the validation's batches, or None."""

    def on_step_start(self, step: Step) -> None:
        """Temperatures, warm-ups; before the forward of every micro-batch."""

    def vote(self, step: Step) -> Tensor | None:
        """Learn from this? A bool scalar tensor; None abstains. ``step.phase`` says when it is asked."""
        return None

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Auxiliary losses of an accepted micro-batch, already weighted, logged by name."""
        return {}

    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        """State updates (from accepted batches only); telemetry as tensors, read at logging steps only."""
        return {}

    def summary(self) -> Mapping[str, object]:
        """Final JSON figures for the run's result (accepted steps, utilization held, experts made)."""
        return {}


def keywords_of(config_class: type[StrictConfig]) -> inspect.Signature:
    """The constructor of a method as it may be called: a config, or its fields as keywords."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    fields = [
        inspect.Parameter(
            name, keyword, default=field.get_default(call_default_factory=True), annotation=field.annotation
        )
        for name, field in config_class.model_fields.items()
    ]
    config = inspect.Parameter(
        "config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=config_class | None
    )
    return inspect.Signature([config, *fields])
