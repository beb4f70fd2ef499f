"""SchemaBank as a Method: routed banks on the last blocks, three stages, tag supervision, removed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from headgate.config import build_config
from headgate.errors import ConfigError, ModelError
from headgate.methods.base import Method
from headgate.methods.costs import StepCost
from headgate.methods.schema_bank.config import BANK, ROUTER, Routing, SchemaBankConfig
from headgate.methods.schema_bank.layer import SchemaLayer
from headgate.methods.schema_bank.removal import Removal
from headgate.methods.schema_bank.reporting import document_logits, of_routing
from headgate.methods.schema_bank.tagger import Tagger
from headgate.methods.schema_bank.tags import kept_share
from headgate.methods.stage import Stage
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy, Batch
from headgate.models.surgery import on_block_output
from headgate.modules.structure import Structure
from headgate.ops.gating import Gates
from headgate.ops.randomness import generator
from headgate.ops.routing_losses import (
    entropy,
    expert_load,
    flat_mean,
    tag_cross_entropy,
)

LOAD_DECAY = 0.99


class SchemaBank(Method):
    """Routed low-rank transforms that shape a LoRA adapter while it trains; see the package docstring."""

    name = "schema_bank"
    Config = SchemaBankConfig
    attach_order = 30
    telemetry_names = ("schema/<layer>/<part>", "routing_entropy")
    citation = (
        "@software{schemabank2025,\n"
        "  title={SchemaBank: Sparse Routing as Training Curriculum for Parameter-Efficient Fine-Tuning},\n"
        "  author={Dean Brown}, year={2025}, url={https://github.com/dean-brown1/sb_poc_V4}\n}"
    )

    def __init__(self, config: SchemaBankConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.layers = nn.ModuleDict()
        self.hidden_size = 0
        self.routing: Routing = self.config.eval_routing
        self.removal = Removal(self.config)
        self.anatomy: Anatomy | None = None
        self._records: dict[str, Gates | None] | None = None
        self._trace: dict[str, list[Tensor]] | None = None
        self.tagger = Tagger(self.config)

    # -- installation ---------------------------------------------------------------------------------
    def attach(self, anatomy: Anatomy) -> None:
        """Put a bank on the output of each chosen block. Raises ModelError if a saved bank does not fit."""
        if not self.layers:
            self._build(self.config.blocks(anatomy.num_blocks), anatomy.hidden_size)
        if self.hidden_size != anatomy.hidden_size or max(self._blocks()) >= anatomy.num_blocks:
            raise ModelError(
                f"the bank was made for blocks {self._blocks()} of width {self.hidden_size}; this model has "
                f"{anatomy.num_blocks} blocks of width {anatomy.hidden_size}: load it with its own base model"
            )
        self.anatomy = anatomy
        for key, layer in self.layers.items():
            block = anatomy.blocks[int(key)]
            self.handles.append(on_block_output(block, self._transform(key, block, layer)))

    def detach(self) -> None:
        super().detach()
        self.anatomy = None

    def _build(self, blocks: Sequence[int], hidden_size: int) -> None:
        self.hidden_size = hidden_size
        for block in blocks:
            stream = generator(self.seed, 0, f"schema_bank.init.{block}")
            self.layers[str(block)] = SchemaLayer(self.config, hidden_size, stream)

    @property
    def lowest_block(self) -> int:
        """The bank of block b acts on its output: the gradient passes the blocks above b."""
        return min(self._blocks()) + 1

    def _blocks(self) -> list[int]:
        return [int(key) for key in self.layers]

    def _transform(self, key: str, block: nn.Module, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        assert isinstance(layer, SchemaLayer)

        def transform(hidden: Tensor) -> Tensor:
            routing = self.removal.routing(block.training, self.routing)
            if self._trace is not None:
                self._trace[key].append(layer.gates(hidden).weight.detach())
            output, gates = layer(hidden, routing)
            # The first differentiable pass of the step: a recompute or a teacher's pass leaves it alone.
            if block.training and self._records is not None and torch.is_grad_enabled():
                self._records.setdefault(key, gates)
            return self.removal.mixed(hidden, output, block.training)

        return transform

    def claims(self) -> Sequence[str]:
        if self.config.combine == "add":
            return ()
        return [f"replaces:block {block}" for block in self._blocks()]

    # -- what is trained, on what, from what ------------------------------------------------------------
    def parameter_groups(self) -> Mapping[str, Sequence[nn.Parameter]]:
        layers = [layer for layer in self.layers.values() if isinstance(layer, SchemaLayer)]
        groups = {
            ROUTER: [p for layer in layers for p in layer.router_parameters()],
            BANK: [p for layer in layers for p in layer.bank_parameters()],
        }
        return {name: parameters for name, parameters in groups.items() if parameters}

    def stages(self, learning_rate: float) -> Sequence[Stage]:
        stages: list[Stage] = self.config.stages(learning_rate)
        return stages

    def group_learning_rates(self, learning_rate: float) -> Mapping[str, float]:
        groups = {group for stage in self.stages(learning_rate) for group in stage.train}
        return {group: learning_rate for group in (ROUTER, BANK) if group in groups}

    def columns(self) -> Sequence[str]:
        return () if self.config.tags == "none" else ("tags",)

    def fit_columns(self, embed: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> None:
        self.tagger.fit(embed, texts)

    def tags_of(self, row: Mapping[str, object]) -> list[int]:
        """The tags of a normalised data row; see ``Tagger``."""
        return self.tagger.tags_of(row)

    def column_makers(self) -> Mapping[str, Callable[[Mapping[str, object]], object]]:
        return {} if self.config.tags == "none" else {"tags": self.tags_of}

    def row_transform(self, stage: Stage) -> Callable[[Mapping[str, object], int, float], object] | None:
        """The released code's text prefix ``[Schema: a,b] `` on the examples that keep their tag."""
        if not self.config.tag_prefix or not stage.options.get("tags"):
            return None
        return partial(self.tagger.prefixed, seed=self.seed)

    # -- state ------------------------------------------------------------------------------------------
    def structure(self) -> Structure:
        """Config, what it changes of its preset, where the banks sit, and what the last validation measured of them."""
        deviations = self.config.deviations()
        place = {"blocks": self._blocks(), "hidden_size": self.hidden_size}
        measured = {"validation": dict(self.removal.losses)}
        return {**super().structure(), "preset_deviations": deviations, **place, **measured}

    @classmethod
    def from_structure(cls, structure: Structure) -> SchemaBank:
        method = cls(build_config(cls.Config, structure["config"]))
        method._build(structure["blocks"], structure["hidden_size"])
        method.restore(structure)
        return method

    def restore(self, structure: Structure) -> None:
        self.removal.losses = dict(structure.get("validation", {}))  # earlier runs did not measure it

    # -- training ---------------------------------------------------------------------------------------
    def on_step_start(self, step: Step) -> None:
        self._records = {}
        self.removal.begin(step)

    @property
    def reads_hidden(self) -> bool:
        return bool(self.config.removal == "distil")

    def loss_weight(self, step: Step) -> float:
        return 1 - self.config.distil_weight if self.removal.teaches(step) else 1.0

    def cost(self, step: Step) -> StepCost:
        """The kept model's forward, where it teaches."""
        return StepCost(forwards=float(step.accepted and self.removal.teaches(step)))

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """``schema_tag``, ``schema_orth``, ``schema_entropy`` and ``schema_distil``, each where its stage and weight ask for it.

        Equation: schema_bank (10): L_1 = L_LM + lambda_tag L_tag
        Equation: schema_bank (11, 12): L_2 = L_3 = L_LM + lambda_orth L_orth
        Proved by: tests/schema_bank/test_equations.py::test_stage_losses_are_the_papers
        Proved by: tests/schema_bank/test_config.py::test_default_stages_are_the_table
        """
        config, options, seen = self.config, step.stage.options, self._records or {}
        if set(seen) != set(self.layers):
            raise ModelError(
                f"schema_bank: blocks {sorted(set(self.layers) - set(seen))} ran without a gradient graph in "
                "training: call the model without torch.no_grad, and checkpoint with use_reentrant=False"
            )
        found: dict[str, Tensor] = {}
        if self.removal.teaches(step):
            assert self.anatomy is not None
            found["schema_distil"] = config.distil_weight * self.removal.distillation(self.anatomy, step)
        records = {key: gates for key, gates in seen.items() if gates is not None}
        if not records:  # the bank is absent from this step
            return found
        if options.get("tags") and config.lambda_tag and config.router != "uniform":
            means, tags = document_logits(step, records)
            keep_share = kept_share(config.tag_schedule, step.stage_step, step.stage_steps)
            kept = torch.rand(len(tags), generator=step.generator("schema_bank.tags")) < keep_share
            per_layer = [tag_cross_entropy(mean, tags, kept.to(tags.device)) for mean in means.values()]
            found["schema_tag"] = config.lambda_tag * torch.stack(per_layer).mean()
        if options.get("orth") and config.lambda_orth:
            per_layer = [
                layer.bank.orthonormality(config.reduction) for layer in self._schema_layers().values()
            ]
            stacked = torch.stack(per_layer)
            found["schema_orth"] = config.lambda_orth * (
                stacked.mean() if config.reduction == "mean" else stacked.sum()
            )
        if config.lambda_entropy and config.router == "trained":
            mean_of = [
                flat_mean(entropy(torch.softmax(gates.logits, -1)).unsqueeze(-1), step.valid).squeeze(-1)
                for gates in records.values()
            ]
            found["schema_entropy"] = config.lambda_entropy * torch.stack(mean_of).mean()
        return found

    def _schema_layers(self) -> dict[str, SchemaLayer]:
        return {key: layer for key, layer in self.layers.items() if isinstance(layer, SchemaLayer)}

    @torch.no_grad()
    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        """Load averages from accepted batches; statistics of this batch's routing at logging steps."""
        seen, self._records = self._records or {}, None
        records = {key: gates for key, gates in seen.items() if gates is not None}
        if not step.accepted or not seen:
            return {}
        line = self.removal.telemetry() if step.should_log else {}
        if not records:  # the bank was absent
            return line
        valid = step.valid
        shape = valid.shape
        loads = torch.stack([expert_load((g.weight > 0).expand(*shape, -1), valid) for g in records.values()])
        summed = step.sum_across_ranks(torch.cat([loads, torch.ones_like(loads[:1])]))
        loads = summed[:-1] / summed[-1]
        for key, load in zip(records, loads, strict=True):
            self._schema_layers()[key].load_average.lerp_(load, 1 - LOAD_DECAY)
        if step.should_log:
            line |= of_routing(self.config, self._schema_layers(), step, records, loads)
        return line

    # -- evaluation -------------------------------------------------------------------------------------
    def on_evaluation_start(self, skill: str | None, probe: Iterable[Batch] | None) -> None:
        """The validation's loss with the bank and without it."""
        if probe is not None and self.anatomy is not None:
            self.removal.validate(self.anatomy, probe)

    def summary(self) -> Mapping[str, object]:
        """``bank_validation``: the last validation's loss ``with`` and ``without`` the bank."""
        return {"bank_validation": self.removal.losses} if self.removal.losses else {}

    def set_routing(self, routing: str) -> None:
        """``removed`` (plain LoRA), ``on`` (as trained), ``all`` (eq. 6) or ``dense`` (softmax over all)."""
        if routing not in get_args(Routing):
            raise ConfigError(f"routing {routing!r} is not one of {', '.join(get_args(Routing))}")
        if routing != "removed" and not self.layers:
            raise ConfigError(f"routing {routing!r} needs a bank, and this model was saved without one")
        self.routing = routing  # type: ignore[assignment]

    @contextmanager
    def tracing(self) -> Iterator[dict[str, list[Tensor]]]:
        """Inside, the gate weights ``[B, T, S]`` of every forward are kept, per block, whatever the routing."""
        self._trace = {key: [] for key in self.layers}
        try:
            yield self._trace
        finally:
            self._trace = None
