"""What one or two methods alone need: small protocols that a Method may implement.

A method implements a protocol by having its members; it declares nothing and inherits nothing. ``MethodStack`` asks with
``having``, on the class: a property is then never read only to learn whether it is there. Half a protocol is a mistake that
would otherwise pass unnoticed, so ``check_protocols`` refuses it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from headgate.errors import ConfigError
from headgate.methods.costs import Reading, StepCost
from headgate.methods.stage import ScheduledStage, Stage
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy, Batch, Columns
from headgate.modules.fused_head import HeadChunk
from headgate.modules.structure import Structure

# -- what it installs -------------------------------------------------------------------------------------


class Exclusive(Protocol):
    def claims(self) -> Sequence[str]:
        """What it replaces in the model; two methods with a claim in common cannot be composed."""


class FitsModel(Protocol):
    def check_model(self, anatomy: Anatomy) -> None:
        """Raise ConfigError for settings that this model rules out; it may lie on the meta device, without weights."""


class Restorable(Protocol):
    def restore(self, structure: Structure) -> None:
        """Grow or shrink an attached method to ``structure`` before its state is loaded on resume."""


# -- what it needs of the data ----------------------------------------------------------------------------


class FitsColumns(Protocol):
    """Looks at all training texts before its columns are made."""

    def fit_columns(self, embed: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> None:
        """Called once before the columns are made; ``embed`` gives the base model's pooled ``[n, H]``."""


class MakesColumns(Protocol):
    """Computes batch columns from the rows (``tags`` from the problem text)."""

    def column_makers(self) -> Mapping[str, Callable[[Mapping[str, object]], object]]:
        """Columns by name, each a function of a normalised data row."""


class RewritesRows(Protocol):
    def row_transform(self, stage: Stage) -> Callable[[Mapping[str, object], int, float], object] | None:
        """A change of the normalised rows that a stage reads (a text prefix), or None.

        The callable takes (row, place in the order in which the stage reads, share of the stage done, in [0, 1)) and
        returns a row.
        """


class DataView(Protocol):
    """Batches formed from others, and what it holds between two of them."""

    def __iter__(self) -> Iterator[Batch]: ...

    def held(self) -> tuple[list[Columns], dict[str, int]]:
        """Batches or rows in hand (tensors and lists) and counters: all that ``restore`` needs to continue exactly."""

    def restore(self, parts: list[Columns], counters: Mapping[str, int]) -> None: ...


class FormsBatches(Protocol):
    """Trains on batches of its own making: a scored pool, a memory over epochs."""

    @property
    def forms_batches(self) -> bool:
        """Whether it does so under its present settings."""

    def data_view(self, batches: Iterable[object], epoch: Callable[[], int] = lambda: 0) -> DataView | None:
        """Other batches formed from the trainer's; ``epoch`` gives the passes over the data that are complete when a
        batch is taken. None where ``forms_batches`` is False."""


class NeedsReplay(Protocol):
    @property
    def needs_replay(self) -> str | None:
        """The setting that only works on rows of earlier skills (``data.replay``), or None."""


# -- what it does to a step -------------------------------------------------------------------------------


class BringsCurriculum(Protocol):
    def stages(self, learning_rate: float) -> Sequence[Stage]:
        """The method's curriculum; one method of a run at most may bring one."""


class StopsForward(Protocol):
    @property
    def partial_block(self) -> int | None:
        """The block after which ``vote`` is asked with phase ``partial``; a reject stops the forward."""


class ObservesHead(Protocol):
    """Reads the head's errors: ``loss: auto`` is then the chunked loss."""

    def head_observer(self, step: Step) -> Callable[[HeadChunk], Tensor | None] | None:
        """A callback that the chunked head loss calls with every chunk (see modules.fused_head), or None."""


class ReadsHidden(Protocol):
    @property
    def reads_hidden(self) -> bool:
        """Whether it reads ``step.hidden``, what enters the head; some trainers' losses never show it."""


class WeighsLoss(Protocol):
    def loss_weight(self, step: Step) -> float | Tensor:
        """A factor on the task loss of an accepted micro-batch; what is reported stays unweighted."""


class Renormalizes(Protocol):
    @property
    def renormalizes(self) -> bool:
        """Whether the gradient of a partly accepted window is divided by what was accepted, not by what was offered.

        It is, where no method says otherwise.
        """


class SkipsGradients(Protocol):
    @property
    def skips_blocks(self) -> bool:
        """Whether some trained tensors may see no gradient in a given step because their block did not run."""


class ChangesParameters(Protocol):
    def substage(self, step: Step | None) -> str | None:
        """Asked at a step boundary: change the parameter set now and say why a sub-stage begins, or None.

        ``step`` is the last micro-batch, None at the first boundary of a run and right after a resume: what is to
        happen then must follow from saved state alone.
        """


class HoldsOut(Protocol):
    """Takes labels of some rows out of every batch before its forward (rows that judge what was trained)."""

    def held_out_tokens(self, batch: Mapping[str, Tensor]) -> int:
        """Trained tokens of a batch, as the loader made it, that it will take out: no gradient is divided by them."""


class EndsStages(Protocol):
    def on_stage_end(self, scheduled: ScheduledStage) -> None:
        """After a stage's last optimizer step, before it is validated or saved: values may change, the parameter set not."""


# -- what a step costs ------------------------------------------------------------------------------------


class Costed(Protocol):
    def cost(self, step: Step) -> StepCost:
        """Asked after the decision, of a micro-batch whose forward ran at least in part."""


class ReadsBesides(Protocol):
    def take_readings(self) -> Sequence[Reading]:
        """What it read besides the steps' own batches (at a boundary, of a memory) since it was last asked."""


class BoundsBackward(Protocol):
    @property
    def lowest_block(self) -> int:
        """The lowest block through which the gradient of its parameters flows: below it a backward ends.

        The first, where a method does not say.
        """


# -- evaluation and afterwards ----------------------------------------------------------------------------


class Routed(Protocol):
    """Acts at evaluation in more than one way: ``on``, ``removed``, ..."""

    routing: str

    def set_routing(self, routing: str) -> None:
        """Raises ConfigError for a way that it does not have."""


class WatchesValidation(Protocol):
    """Counts or sets something at the validations during training: every rank then sees all of their rows."""

    def on_evaluation_start(self, skill: str | None, probe: Iterable[Mapping[str, object]] | None) -> None:
        """Before a validation, with the skill whose rows come (None: the stream has no skills).

        ``probe`` yields the validation's own batches, all of them on every rank; None of a stream's skill.
        """


class HearsValidation(Protocol):
    """Is told what the validations during training measured."""

    def on_evaluation(self, metrics: Mapping[str, float]) -> None:
        """After every validation, once per data set, with its ``eval_...`` figures."""


class MeasuresEvaluation(Protocol):
    """Knows what an evaluation really ran."""

    def start_figures(self, padding: int | None) -> None:
        """Count from here on. ``padding``: the id that a finished row is filled with while others go on."""

    def evaluation_figures(self) -> Mapping[str, float]:
        """What was counted since; counting ends."""


class ExportsExperts(Routed, Protocol):
    """Keeps experts that other servers can load, each as a plain PEFT adapter."""

    name: str
    experts: Any

    def export_experts(self, folder: Path, mixture: str | None = None) -> Mapping[str, str]:
        """Write them below ``folder``; the routing that each equals, by the name of its folder."""

    def mixtures(self) -> Mapping[str, str]:
        """Routings with fixed gates that an export may choose from, by what they are."""


class NotMergeable(Protocol):
    def why_not_merged(self) -> str:
        """Why no plain merged model can equal it, for the error."""


PROTOCOLS: tuple[type, ...] = (
    Exclusive, FitsModel, Restorable, FitsColumns, MakesColumns, RewritesRows, FormsBatches, NeedsReplay, BringsCurriculum, StopsForward,
    ObservesHead, ReadsHidden, WeighsLoss, Renormalizes, SkipsGradients, ChangesParameters, HoldsOut, EndsStages, Costed, ReadsBesides, BoundsBackward, Routed,
    WatchesValidation, HearsValidation, MeasuresEvaluation, ExportsExperts, NotMergeable,
)  # fmt: skip
P = TypeVar("P")


def members(protocol: type) -> frozenset[str]:
    """The verbs and properties of a protocol; attributes that an instance may set itself are left out."""
    return frozenset(name for name in vars(protocol) if not name.startswith("_"))


def having(methods: Iterable[Any], protocol: type[P]) -> list[P]:
    """Those of ``methods`` whose class has every member of ``protocol``."""
    return [m for m in methods if all(hasattr(type(m), name) for name in members(protocol))]


def check_protocols(method: object) -> None:
    """Raise ConfigError for a method that has a part of a protocol: nobody would ever call it."""
    for protocol in PROTOCOLS:
        lacking = sorted(name for name in members(protocol) if not hasattr(type(method), name))
        own = sorted(members(protocol) - set(lacking))
        if own and lacking:
            raise ConfigError(
                f"{type(method).__name__} has {', '.join(own)} but no {', '.join(lacking)}: "
                f"headgate.methods.protocols.{protocol.__name__} needs all of them"
            )
