"""LoraExperts as a Method: its parts, and which of them each hook of training asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from headgate.config import build_config
from headgate.errors import ModelError
from headgate.methods.base import Method
from headgate.methods.costs import Reading, StepCost
from headgate.methods.lora_experts import export
from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.experts import ExpertSet, Sizes
from headgate.methods.lora_experts.forward import RoutedForward
from headgate.methods.lora_experts.lifecycle import Lifecycle
from headgate.methods.lora_experts.merging import merge_alike
from headgate.methods.lora_experts.reporting import info_table, loads, telemetry
from headgate.methods.lora_experts.stream import SkillStream
from headgate.methods.lora_experts.targets import target_linears
from headgate.methods.lora_experts.teaching import SKILL, auxiliary_losses, distilled_rows
from headgate.methods.lora_experts.trial import Trial
from headgate.methods.lora_experts.watch import BurstBatches, BurstWatch
from headgate.methods.protocols import DataView
from headgate.methods.stage import ScheduledStage
from headgate.methods.step import Step
from headgate.models.anatomy import Anatomy, Batch, linear_size
from headgate.modules.feature_sketch import FeatureSketch
from headgate.modules.structure import Structure

EXPERTS, ROUTER = "experts", "expert_router"


class LoraExperts(Method):
    """LoRA experts that appear when the data is new; see the package docstring.

    ``experts``: who there is. ``routed``: them at work in the model. ``stream``: skills and decisions. ``trial``: whether what a
    segment trains is kept. ``watch``: what comes unannounced, where ``burst`` asks for it. ``lifecycle``: what waits for a step
    boundary. ``sketch``: directions of what the router has read. Stream, trial, watch, sketch: there once attached or loaded.
    """

    name = "lora_experts"
    Config = LoraExpertsConfig
    attach_order = 20
    is_adapter = True
    telemetry_names = (
        "experts/<part>",
        "routing_entropy",
        "expert_usage_<name>",
        "similarity_scores_on_creation",
    )
    citation = (
        "@software{dyloramoe2025,\n  title={DyLoRA-MoE: POC Training Run Analysis and Improvement Plan}, year={2025},\n"
        "  note={the plan of 2025-08-27 that lora_experts builds to}\n}"
    )
    stream: SkillStream
    trial: Trial
    sketch: FeatureSketch

    def __init__(self, config: LoraExpertsConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.experts = ExpertSet(self.config)
        self.routed = RoutedForward(self.config, self.experts)
        self.lifecycle = Lifecycle(self.config, self.experts)
        self.watch: BurstWatch | None = None
        self._accepted_in_window, self._taught, self._step = False, False, 0

    @property
    def reads_hidden(self) -> bool:
        """Distillation compares what enters the head."""
        return bool(self.config.kd_weight)

    # -- installation -----------------------------------------------------------------------------------
    def attach(self, anatomy: Anatomy) -> None:
        """Hook every target linear. Raises ModelError where a target matches nothing or a saved bank does not fit."""
        linears = target_linears(anatomy, self.config.target_modules, self.config.first_block)
        sizes = {site: linear_size(linear) for site, linear in linears.items()}
        if not (experts := self.experts).banks:
            self._build(sizes, anatomy.hidden_size)
            experts.found()
        if experts.sizes != sizes or experts.hidden_size != anatomy.hidden_size:
            made, there = experts.sizes, experts.hidden_size
            wrong = next((s for s in {**made, **sizes} if made.get(s) != sizes.get(s)), "the hidden size")
            raise ModelError(
                f"the experts were made for another model: {wrong} is {made.get(wrong, there)} there and "
                f"{sizes.get(wrong, anatomy.hidden_size)} here: load them with their own base model"
            )
        self.handles += self.routed.attach(anatomy, linears)

    def detach(self) -> None:
        super().detach()
        self.routed.detach()

    def _build(self, sizes: Sizes, hidden_size: int) -> None:
        self.experts.build(sizes, hidden_size, self.seed)
        self.sketch = FeatureSketch(self.config.feature_width(hidden_size), self.config.gate_projection)
        self.stream = SkillStream(self.config, self.routed, self.seed)
        self.trial = Trial(self.config, self.routed)
        self.experts.on_removal = self.stream.forget
        if self.config.burst is not None:
            self.watch = BurstWatch(self.config, self.routed, self.seed)

    # -- what is trained, what is saved -----------------------------------------------------------------
    def parameter_groups(self) -> Mapping[str, Sequence[nn.Parameter]]:
        experts = self.experts
        groups = {EXPERTS: [p for info in experts.roster for p in experts.live_factors(info.number)]}
        if self.config.router == "learned":
            groups[ROUTER] = list(experts.routers.parameters())
        return groups

    def group_learning_rates(self, learning_rate: float) -> Mapping[str, float]:
        rates = {EXPERTS: learning_rate}
        if self.config.router == "learned":
            rates[ROUTER] = self.config.router_lr or learning_rate
        return rates

    def structure(self) -> Structure:
        """Config, sites and their sizes, the experts, what is pending, and what was decided and why."""
        return {
            **super().structure(),
            **self.experts.structure(),
            **self.stream.structure(),
            "lifecycle": self.lifecycle.structure(),
            "trial": self.trial.structure(),
            "bursts": None if self.watch is None else self.watch.structure(),
        }

    @classmethod
    def from_structure(cls, structure: Structure) -> LoraExperts:
        method = cls(build_config(cls.Config, structure["config"]))
        method._build(structure["sites"], structure["hidden_size"])
        method.restore(structure)
        return method

    def restore(self, structure: Structure) -> None:
        self.experts.restore(structure)
        self.stream.restore(structure)
        self.lifecycle.restore(structure["lifecycle"])
        self.trial.restore(structure["trial"])
        if self.watch is not None:
            self.watch.restore(structure["bursts"])

    # -- training ---------------------------------------------------------------------------------------
    def on_stage_start(self, scheduled: ScheduledStage, probe: Iterable[Batch] | None) -> None:
        """A skill of a stream begins: its expert is found or made, and what older skills look like is protected."""
        self.stream.skill = scheduled.stage.options.get("skill")
        self.lifecycle.pending.clear()  # what the last evaluation of a skill asks for its expert comes too late
        basis = self.sketch.basis()
        if basis is not None:
            self.experts.routers.protect(basis)
        if self.stream.skill is None:
            return
        assert probe is not None  # a stream's rows
        self.trial.end(self.stream, scheduled.start)
        merged = merge_alike(self.experts, above) if (above := self.config.merge_above) else []
        segment = self.stream.begin(scheduled, probe, merged)
        self.trial.begin(segment, self.stream, probe)
        self.lifecycle.begin_skill(merged)

    def on_stage_end(self, scheduled: ScheduledStage) -> None:
        if self.stream.skill is not None:
            self.trial.finish(self.stream, scheduled.stop)

    def held_out_tokens(self, batch: Batch) -> int:
        return self.trial.rows.tokens_in(batch)

    def take_readings(self) -> Sequence[Reading]:
        return self.routed.readings.take()

    def on_step_start(self, step: Step) -> None:
        self.routed.start_recording()
        self.trial.prepare(step)
        self._taught, self._step = False, step.global_step
        if step.is_window_start:
            self._accepted_in_window = False

    def vote(self, step: Step) -> Tensor | None:
        """No, where a trial has ended the training of its segment."""
        return self.trial.vote(step)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """``expert_z``, ``_balance``, ``_entropy``, ``_orthogonality``, ``_kd``, each where its weight asks for it."""
        if self.routed.record is None:
            raise ModelError(
                "lora_experts: the forward ran without a gradient graph in training: call the model without torch.no_grad"
            )
        parts = auxiliary_losses(self.routed, self.routed.record, step, self.stream.skill)
        self._taught = "expert_kd" in parts
        return parts

    @torch.no_grad()
    def on_step_end(self, step: Step) -> Mapping[str, Tensor]:
        """Age, usage, loss and feature sketch move on accepted batches only, alike on every rank."""
        done = self.routed.take_record()
        figures: dict[str, Tensor] = {}
        if step.accepted and done is not None:
            self._accepted_in_window = True
            if self.watch is not None:
                self.watch.read(step, self.stream)
            mixtures = self.routed.mixtures_of(done)
            soft, dispatched = loads(mixtures, done.context.valid)
            self._follow(step, mixtures[0].experts, dispatched, done.context.valid.sum())
            if self.experts.routers and done.features is not None:
                self.sketch.add(done.features, done.context.valid)
            if step.should_log and step.is_window_end:
                figures = telemetry(self.experts, done, mixtures, soft, dispatched)
        if step.is_window_end:
            if self._accepted_in_window:
                self.experts.roster.grow_older(self.config.maturity_steps)
            self.lifecycle.end_replay_when_due(step)
            self.trial.end_step(step)
        if self.stream.similarities is not None and step.should_log:
            figures["similarity_scores_on_creation"] = self.stream.similarities
            self.stream.similarities = None
        return figures

    def _follow(self, step: Step, names: Sequence[str], dispatched: Tensor, tokens: Tensor) -> None:
        """What an accepted micro-batch says of the experts, averaged over ranks."""
        loss = step.task_loss if step.task_loss is not None else dispatched.new_full((), float("nan"))
        rest = torch.stack([loss.float(), tokens.float(), torch.ones_like(tokens, dtype=torch.float)])
        total = step.sum_across_ranks(torch.cat([dispatched.float(), rest]))
        mean, tokens = total / total[-1], total[-2]
        self.experts.roster.follow(names, mean[:-3], tokens, mean[-3], self.experts.current)

    @property
    def needs_replay(self) -> str | None:
        if self.config.merge_replay:
            return "merge_replay"
        return "kd_on: replayed" if self.config.kd_weight and self.config.kd_on == "replayed" else None

    def columns(self) -> Sequence[str]:
        return (SKILL,) if self.config.kd_weight and self.config.kd_on == "replayed" else ()

    def cost(self, step: Step) -> StepCost:
        """The prepass; of an accepted batch, also the bare model's look for bursts and the distillation's teacher."""
        prepass = float(self.config.features == "prepass")
        if not step.accepted:
            return StepCost(forwards=prepass)
        rows = distilled_rows(self.config.kd_on, step.batch, self.stream.skill) if self._taught else ()
        taught = len(rows) / len(step.labels)
        return StepCost(forwards=prepass + float(self.watch is not None) + taught * (1 + prepass))

    @property
    def forms_batches(self) -> bool:
        return self.config.burst is not None

    def data_view(self, batches: Iterable[Batch], epoch: Callable[[], int] = lambda: 0) -> DataView | None:
        """A burst takes the place of the next batches."""
        return None if self.watch is None else BurstBatches(self.watch, self.stream, batches)

    def on_evaluation_start(self, skill: str | None, probe: object) -> None:
        """The oracle is told whose rows come; nobody else reads it."""
        self.routed.evaluated = skill or ""

    def on_evaluation(self, metrics: Mapping[str, float]) -> None:
        """The validation loss of the skill in training may double its expert's rank or freeze it."""
        self.routed.evaluated = ""
        loss = metrics.get(f"eval_{self.stream.skill}_loss", metrics.get("eval_loss"))
        if loss is not None:
            self.lifecycle.judge(float(loss), self._step)

    def substage(self, step: Step | None) -> str | None:
        born = [] if self.watch is None else self.watch.birth(self.stream)
        return "; ".join(born + self.lifecycle.carry_out() + self.trial.carry_out(self.stream)) or None

    def summary(self) -> Mapping[str, object]:
        return {
            "experts": info_table(self.experts),
            "expert_decisions": self.stream.decisions,
            "expert_parameters": self.experts.total_size(),
        }

    # -- by hand, evaluation and elsewhere ---------------------------------------------------------------
    def spawn(self, rank: int | None = None, reason: str = "asked for") -> int:
        """A new expert by hand; no logit changes. Returns its number; see ExpertSet.add for what it refuses."""
        return self.experts.add(rank, reason)

    @property
    def routing(self) -> str:
        return self.routed.route

    def set_routing(self, routing: str) -> None:
        """``on``, ``removed`` (the base), ``arrow`` (modules/arrow.py), ``expert:<number or skill>`` (that one alone,
        gate 1), or fixed gates, ``mixture:<number or skill>=<weight>,...``. Raises ConfigError for anything else."""
        self.routed.set_route(routing)

    def export_experts(self, folder: Path, mixture: str | None = None) -> Mapping[str, str]:
        """Every expert as a plain PEFT adapter in a folder of its own, and the routing that it equals; see export.py."""
        return export.export_experts(self.experts, self.routed.anatomy, folder, mixture)

    def mixtures(self) -> Mapping[str, str]:
        """Routings with fixed gates that an export may choose from, by what they are; see export.py."""
        return export.mixtures(self.experts)

    def why_not_merged(self) -> str:
        """Why ``headgate export --to merged`` refuses this method."""
        return export.NOT_MERGEABLE
