"""LoraExperts as a Method: experts on linear layers, mixed per token by one router."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headgate.errors import ModelError
from headgate.methods.base import DataView, Method, build_config
from headgate.methods.lora_experts.bursts import NoveltyBuffer, waiting_for_bursts
from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.forward import Pass, RoutedForward
from headgate.methods.lora_experts.growth import GrowingExperts
from headgate.methods.lora_experts.merging import end_refresh_when_due
from headgate.methods.lora_experts.reporting import follow, grow_older, info_table, loads, telemetry
from headgate.methods.lora_experts.roster import Roster
from headgate.methods.lora_experts.skills import SkillTracking
from headgate.methods.lora_experts.targets import target_linears
from headgate.methods.lora_experts.teaching import SKILL, auxiliary_losses, distilled_rows
from headgate.methods.lora_experts.watching import BurstBatches, WatchedSkill
from headgate.methods.stage import ScheduledStage
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy, linear_size
from headgate.models.surgery import on_block_input, on_linear, override_forward
from headgate.modules.arrow import ArrowRouter
from headgate.modules.expert_bank import ExpertBank
from headgate.modules.expert_router import ExpertRouter
from headgate.modules.feature_sketch import FeatureSketch
from headgate.modules.prototype_router import PrototypeRouter
from headgate.modules.skill_library import SkillLibrary

EXPERTS, ROUTER = "experts", "expert_router"


class LoraExperts(RoutedForward, GrowingExperts, SkillTracking, WatchedSkill, Method):
    """LoRA experts that appear when the data is new; see the package docstring."""

    name = "lora_experts"
    Config = LoraExpertsConfig
    attach_order = 20
    is_adapter = True
    citation = (
        "@software{dyloramoe2025,\n"
        "  title={DyLoRA-MoE: POC Training Run Analysis and Improvement Plan}, year={2025},\n"
        "  note={the plan of 2025-08-27 that lora_experts builds to}\n}"
    )

    def __init__(self, config: LoraExpertsConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.roster = Roster()
        self.banks = nn.ModuleDict()
        self.routers = nn.ModuleDict()
        self.hidden_size = 0
        self.current = 0
        self.pending: list[str] = []
        self.refreshing: list[int] = []
        self.burst_left, self._kept = 0, 0
        self.usual: dict[str, float] = {}
        self.decisions: list[dict[str, Any]] = []
        self.similarities: Tensor | None = None
        self.skill: str | None = None
        self.routing: str = self.config.eval_routing
        self.suspended, self.recording = False, False
        self.without: tuple[int, ...] = ()
        self.evaluated: str | None = None
        self.looking: list[Tensor] | None = None
        self.arrows: dict[str, ArrowRouter] = {}
        self.running: Pass | None = None
        self.record: Pass | None = None
        self._anatomy: Anatomy | None = None
        self._accepted_in_window, self._taught = False, False
        self._step = 0

    # -- installation -----------------------------------------------------------------------------------
    def attach(self, anatomy: Anatomy) -> None:
        """Hook every target linear. Raises ModelError where a target matches nothing or a saved bank does not fit."""
        linears = target_linears(anatomy, self.config.target_modules, self.config.first_block)
        sizes = {site: linear_size(linear) for site, linear in linears.items()}
        if not self.banks:
            self._build(sizes, anatomy.hidden_size)
            self.found(self.config.experts)
        made = {site: (self.bank(site).in_features, self.bank(site).out_features) for site in self.banks}
        if made != sizes or self.hidden_size != anatomy.hidden_size:
            wrong = next((s for s in {**made, **sizes} if made.get(s) != sizes.get(s)), "the hidden size")
            raise ModelError(
                f"the experts were made for another model: {wrong} is {made.get(wrong, self.hidden_size)} there and "
                f"{sizes.get(wrong, anatomy.hidden_size)} here: load them with their own base model"
            )
        self._anatomy = anatomy
        self.handles.append(override_forward(anatomy.backbone, self.around_backbone))
        if self.config.features.startswith("block"):
            block = anatomy.blocks[self.config.first_block]
            self.handles.append(on_block_input(block, self.read_features))
        for site, linear in linears.items():
            self.handles.append(on_linear(linear, self.delta(site)))

    def detach(self) -> None:
        super().detach()
        self.running = self.record = self._anatomy = None

    def _build(self, sizes: Mapping[str, Sequence[int]], hidden_size: int) -> None:
        config, self.hidden_size = self.config, hidden_size
        for site, (in_features, out_features) in sizes.items():
            self.banks[site] = ExpertBank(in_features, out_features)
        width = config.feature_width(hidden_size)
        if config.router == "prototype":
            self.routers["shared"] = PrototypeRouter(width)
        if config.router == "learned":
            for site in ["shared"] if config.router_sites == "shared" else sizes:
                self.routers[site] = ExpertRouter(width, directions=config.gate_projection)
        self.sketch = FeatureSketch(width, config.gate_projection)
        self.library = SkillLibrary(hidden_size, seed=self.seed, contrast=config.spawn.contrast)
        if config.burst is not None:
            self.novel = waiting_for_bursts(hidden_size, config.burst, config.spawn.false_spawns)
            self.burst = NoveltyBuffer(hidden_size, least=config.burst)
        if config.freeze_first:
            self.sites_named(config.freeze_first)

    # -- what is trained, what is saved -----------------------------------------------------------------
    def parameter_groups(self) -> Mapping[str, Sequence[nn.Parameter]]:
        groups = {EXPERTS: [p for info in self.roster for p in self.expert_parameters(info.number)]}
        if self.config.router == "learned":
            groups[ROUTER] = list(self.routers.parameters())
        return groups

    def group_learning_rates(self, learning_rate: float) -> Mapping[str, float]:
        rates = {EXPERTS: learning_rate}
        if self.config.router == "learned":
            rates[ROUTER] = self.config.router_lr or learning_rate
        return rates

    def structure(self) -> dict[str, Any]:
        """Config, sites and their sizes, the experts, what is pending, and what was decided and why."""
        return {
            **super().structure(),
            "sites": {s: [self.bank(s).in_features, self.bank(s).out_features] for s in self.banks},
            "hidden_size": self.hidden_size,
            "roster": self.roster.structure(),
            "library": self.library.structure(),
            "current": self.current,
            "pending": [list(self.pending), list(self.refreshing)],
            "skill": self.skill,
            "decisions": self.decisions,
            "bursts": None if self.config.burst is None else self.burst_structure(),
        }

    @classmethod
    def from_structure(cls, structure: Mapping[str, Any]) -> LoraExperts:
        method = cls(build_config(cls.Config, structure["config"]))
        method._build(structure["sites"], structure["hidden_size"])
        method.restore(structure)
        return method

    def restore(self, structure: Mapping[str, Any]) -> None:
        self.rebuild(structure["roster"])
        self.library.restore(structure["library"])
        self.current, self.skill = structure["current"], structure["skill"]
        self.pending, self.refreshing = map(list, structure["pending"])
        self.decisions = list(structure["decisions"])
        if self.config.burst is not None:
            self.restore_burst(structure["bursts"])

    # -- training ---------------------------------------------------------------------------------------
    def on_stage_start(self, scheduled: ScheduledStage, probe: Any) -> None:
        """A skill of a stream begins: its expert is found or made, and what older skills look like is protected."""
        self.skill = scheduled.stage.options.get("skill")
        self.pending.clear()  # what the last evaluation of a skill asks for its expert comes too late
        basis = self.sketch.basis()
        if basis is not None:
            for site in self.routers:
                self.router(site).protect(basis)
        self.begin_skill(scheduled, probe)

    def on_step_start(self, step: Step) -> None:
        self.record, self.recording, self._taught, self._step = None, True, False, step.global_step
        if step.is_window_start:
            self._accepted_in_window = False

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """``expert_z``, ``_balance``, ``_entropy``, ``_orthogonality``, ``_kd``, each where its weight asks for it."""
        if self.record is None:
            raise ModelError(
                "lora_experts: the forward ran without a gradient graph in training: call the model without torch.no_grad"
            )
        found = auxiliary_losses(self, self.record, step)
        self._taught = "expert_kd" in found
        return found

    @torch.no_grad()
    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        """Age, usage, loss and feature sketch move on accepted batches only, alike on every rank."""
        done, self.record, self.recording = self.record, None, False
        found: dict[str, Tensor] = {}
        if step.accepted and done is not None:
            self._accepted_in_window = True
            if self.config.burst is not None:
                self.watch(step)
            mixtures = self.mixtures_of(done)
            soft, dispatched = loads(mixtures, done.context.valid)
            follow(self, step, dispatched, mixtures[0].experts, done.context.valid.sum())
            if self.routers and done.features is not None:
                self.sketch.add(done.features[done.context.valid])
            if step.should_log and step.is_window_end:
                found = telemetry(self, done, mixtures, soft, dispatched)
        if step.is_window_end and self._accepted_in_window:
            grow_older(self)
        if step.is_window_end:
            end_refresh_when_due(self, step)
        if self.similarities is not None and step.should_log:
            found["similarity_scores_on_creation"], self.similarities = self.similarities, None
        return found

    @property
    def needs_replay(self) -> str | None:
        if self.config.merge_replay:
            return "merge_replay"
        return "kd_on: replayed" if self.config.kd_weight and self.config.kd_on == "replayed" else None

    def columns(self) -> Sequence[str]:
        return (SKILL,) if self.config.kd_weight and self.config.kd_on == "replayed" else ()

    def extra_forwards(self, step: Step) -> float:
        """The prepass; of an accepted batch, also the bare model's look for bursts and the distillation's teacher."""
        prepass = float(self.config.features == "prepass")
        if not step.accepted:
            return prepass
        taught = len(distilled_rows(self, step.batch)) / len(step.labels) if self._taught else 0.0
        return prepass + float(self.config.burst is not None) + taught * (1 + prepass)

    @property
    def forms_batches(self) -> bool:
        return self.config.burst is not None

    def data_view(self, batches: Iterable[Any], epoch: Callable[[], int] = lambda: 0) -> DataView | None:
        """A burst takes the place of the next batches."""
        return BurstBatches(self, batches) if self.forms_batches else None

    def on_evaluation_start(self, skill: str | None, probe: Any) -> None:
        """The oracle is told whose rows come; nobody else reads it."""
        self.evaluated = skill

    def on_evaluation(self, metrics: Mapping[str, float]) -> None:
        """The validation loss of the skill in training may double its expert's rank or freeze it."""
        self.evaluated = None
        loss = metrics.get(f"eval_{self.skill}_loss", metrics.get("eval_loss"))
        if loss is not None:
            self.judge(float(loss), self._step)

    def substage(self, step: Step | None) -> str | None:
        return self.carry_out()

    def summary(self) -> Mapping[str, Any]:
        return {
            "experts": info_table(self.roster, self.config),
            "expert_decisions": self.decisions,
            "expert_parameters": self.total_size(),
        }

    # -- elsewhere --------------------------------------------------------------------------------------
    def export_experts(self, folder: Path, mixture: str | None = None) -> Mapping[str, str]:
        """Every expert as a plain PEFT adapter in a folder of its own, and the routing that it equals; see export.py."""
        from headgate.methods.lora_experts.export import export_experts

        return export_experts(self, folder, mixture)

    def mixtures(self) -> Mapping[str, str]:
        """Routings with fixed gates that an export may choose from, by what they are; see export.py."""
        from headgate.methods.lora_experts.export import mixtures

        return mixtures(self)

    def why_not_merged(self) -> str:
        """Why ``headgate export --to merged`` refuses this method."""
        from headgate.methods.lora_experts.export import NOT_MERGEABLE

        return NOT_MERGEABLE

    def _forget(self, number: int) -> None:
        if number in self.library.experts:
            self.library.remove(number)
