"""Method: one paper, as a few verbs, most left empty.

A method owns parameters and buffers, which are all of its persistent state. It touches the model through
``models.surgery`` only, so that ``detach`` gives the model back bitwise, apart from what was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from headgate.config import StrictConfig, explain
from headgate.errors import ConfigError
from headgate.methods.stage import ScheduledStage, Stage
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy
from headgate.models.surgery import Handle


class DataView(Protocol):
    """Batches formed from others, and what it holds between two of them."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def held(self) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Batches or rows in hand (tensors and lists) and counters: all that ``restore`` needs to continue exactly."""
        ...

    def restore(self, parts: list[dict[str, Any]], counters: Mapping[str, int]) -> None: ...


class Method(nn.Module):
    """Base of the four methods. Subclasses set ``name``, ``Config`` and ``citation``.

    Built from a config object or its keyword arguments: ``SchemaBank(top_k=2)``.
    """

    name: ClassVar[str]
    Config: ClassVar[type[StrictConfig]]
    citation: ClassVar[str] = ""  # BibTeX
    attach_order: ClassVar[int] = 0
    """Nesting, innermost first: layer_routing 10, lora_experts 20, schema_bank 30, backward_gate 40."""
    skips_blocks: ClassVar[bool] = False
    """True where some trained tensors may see no gradient in a given step because their block did not run."""
    is_adapter: ClassVar[bool] = False
    """True where the method is what is trained: a base without a PEFT adapter is then frozen, not fine-tuned."""
    adapter_alone: ClassVar[bool] = False
    """True where a trained run is its base and its adapter: the method only decided what to learn from, or when."""
    telemetry_names: ClassVar[Sequence[str]] = ()
    """Names that it logs besides ``loss/<its losses>``; ``<part>`` stands for any word without spaces."""
    neutral: ClassVar[Mapping[str, Any] | None] = None
    """Options under which training is bitwise that of the adapter alone; None where there are none."""
    observes_head: ClassVar[bool] = False
    """True where ``head_observer`` reads the head's errors: ``loss: auto`` is then chunked."""

    @property
    def renormalizes(self) -> bool:
        """Whether the gradient of a partly accepted window is divided by what was accepted, not by what was offered."""
        return True

    @property
    def reads_hidden(self) -> bool:
        """True where the method reads ``step.hidden``, what enters the head; some trainers' losses never show it."""
        return False

    def __init__(self, config: StrictConfig | None = None, **options: Any) -> None:
        super().__init__()
        if config is not None and options:
            raise ConfigError(f"{type(self).__name__}: give a config or keyword arguments, not both")
        self.config: Any = config if config is not None else build_config(self.Config, options)
        self.seed = 0
        self.handles: list[Handle] = []

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

    def claims(self) -> Sequence[str]:
        """What this method replaces in the model; two methods with a claim in common cannot be composed."""
        return ()

    @property
    def lowest_block(self) -> int:
        """The lowest block through which the gradient of its parameters flows: below it a backward ends."""
        return 0

    # -- what is trained, on what, from what ------------------------------------------------------------
    def parameter_groups(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Trainable tensors by group name. Group names are unique over all methods; ``lora`` is taken."""
        return {}

    def stages(self, learning_rate: float) -> Sequence[Stage] | None:
        """The method's curriculum, or None where it has none: its groups then train at ``learning_rate``."""
        return None

    def group_learning_rates(self, learning_rate: float) -> Mapping[str, float]:
        """Peak rate of each group in a run without stages of its own."""
        return dict.fromkeys(self.parameter_groups(), learning_rate)

    def columns(self) -> Sequence[str]:
        """Extra batch columns it needs; a missing one is an error that names the method."""
        return ()

    def column_makers(self) -> Mapping[str, Callable[[Mapping[str, Any]], Any]]:
        """Columns it can compute from a normalised data row (``tags`` from the problem text)."""
        return {}

    def fit_columns(self, embed: Callable[[list[str]], Tensor], texts: list[str]) -> None:
        """Called once before the columns are made; ``embed`` gives the base model's pooled ``[n, H]``."""

    def row_transform(self, stage: Stage) -> Callable[[Mapping[str, Any], int, float], Any] | None:
        """A change of the normalised rows that a stage reads (a text prefix), or None.

        The callable takes (row, place in the order in which the stage reads, share of the stage done, in [0, 1)) and
        returns a row.
        """
        return None

    @property
    def forms_batches(self) -> bool:
        """Whether ``data_view`` gives a view: the batches trained on are then formed by this method."""
        return False

    def data_view(self, batches: Iterable[Any], epoch: Callable[[], int] = lambda: 0) -> DataView | None:
        """Other batches formed from the trainer's (a scored pool, a memory over epochs), or None.

        ``epoch`` gives the passes over the data that are complete when a batch is taken.
        """
        return None

    # -- state ------------------------------------------------------------------------------------------
    def structure(self) -> dict[str, Any]:
        """JSON: all that ``from_structure`` needs to build a module into which the state loads strictly."""
        return {"config": self.config.model_dump(mode="json")}

    @classmethod
    def from_structure(cls, structure: Mapping[str, Any]) -> Method:
        return cls(build_config(cls.Config, structure["config"]))

    def restore(self, structure: Mapping[str, Any]) -> None:
        """Grow or shrink an attached method to ``structure`` before its state is loaded on resume."""

    # -- training ---------------------------------------------------------------------------------------
    def check_model(self, anatomy: Anatomy) -> None:
        """Raise ConfigError for settings that this model rules out; it may lie on the meta device, without weights."""

    @property
    def needs_replay(self) -> str | None:
        """The setting that only works on rows of earlier skills (``data.replay``), or None."""
        return None

    def check_run(self, max_steps: int) -> None:
        """Raise ConfigError for settings that cannot work in a run of this many optimizer steps."""

    def on_stage_start(self, scheduled: ScheduledStage, probe: Any) -> None:
        """Grow, freeze. ``probe`` yields a few batches of the stage's data (an iterable), or None."""

    def on_step_start(self, step: Step) -> None:
        """Temperatures, warm-ups; before the forward of every micro-batch."""

    def vote(self, step: Step) -> Tensor | None:
        """Learn from this? A bool scalar tensor; None abstains. ``step.phase`` says when it is asked."""
        return None

    @property
    def partial_block(self) -> int | None:
        """The block after which ``vote`` is asked with phase ``partial``; a reject stops the forward."""
        return None

    def head_observer(self, step: Step) -> Callable[[Any], Tensor | None] | None:
        """A callback that the chunked head loss calls with every chunk (see modules.fused_head), or None."""
        return None

    def loss_weight(self, step: Step) -> float | Tensor:
        """A factor on the task loss of an accepted micro-batch; what is reported stays unweighted."""
        return 1.0

    def executed_share(self, step: Step) -> float | Tensor:
        """Share of the blocks' FLOPs on real tokens that this forward really executed."""
        return 1.0

    def extra_forwards(self, step: Step) -> float:
        """Whole forwards without a graph that this micro-batch took besides its own (a teacher's, a prepass)."""
        return 0.0

    def extra_heads(self, step: Step) -> float:
        """Passes through the language-model head alone that this micro-batch took besides its own."""
        return 0.0

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Auxiliary losses of an accepted micro-batch, already weighted, logged by name."""
        return {}

    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        """State updates (from accepted batches only); telemetry as tensors, read at logging steps only."""
        return {}

    def substage(self, step: Step | None) -> str | None:
        """Asked at a step boundary: change the parameter set now and say why a sub-stage begins, or None.

        ``step`` is the last micro-batch, None at the first boundary of a run and right after a resume: what is to
        happen then must follow from saved state alone.
        """
        return None

    def on_evaluation_start(self, skill: str | None, probe: Iterable[Mapping[str, Any]] | None) -> None:
        """Before a validation during training, with the skill whose rows come (None: the stream has no skills).

        ``probe`` yields the validation's own batches, all of them on every rank; None of a stream's skill.
        """

    def on_evaluation(self, metrics: Mapping[str, float]) -> None:
        """After every validation during training, once per data set, with its ``eval_...`` figures."""

    def summary(self) -> Mapping[str, Any]:
        """Final JSON figures for the run's result (accepted steps, utilization held, experts made)."""
        return {}

    # -- evaluation -------------------------------------------------------------------------------------
    def set_routing(self, routing: str) -> None:
        """Choose how the method acts at evaluation (``on``, ``removed``, ...); ConfigError if it cannot."""
        raise ConfigError(f"{self.name} has no routing to set (asked for {routing!r})")


def build_config(config_class: type[StrictConfig], options: Mapping[str, Any], where: str = "") -> Any:
    """Validate keyword options; pydantic's complaints become one ConfigError, which names ``where`` or the class."""
    from pydantic import ValidationError

    try:
        return config_class(**options)
    except ValidationError as error:
        details = "; ".join(explain(item, config_class, where) for item in error.errors())
        raise ConfigError(details if where else f"{config_class.__name__}: {details}") from None
