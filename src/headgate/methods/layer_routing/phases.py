"""The phases of a run that searches its mask by training: search, then the mask, or routing from it on trial.

    search   adapter and patches train, every micro-batch under a mask of the depth drawn at random
    adapt    under the mask that validation then likes best; with policy static to the end
    trial    the gates start at that mask, so that nothing changes at first; noise, if any, falls to nothing
    settle   the router where it beats the mask on validation, else the mask, training included

They are stages, and share the run's steps: a search is paid for by the run that it is part of. The rate is constant but in
the last phase, where it falls by the run's own schedule.
"""

from __future__ import annotations

from collections.abc import Mapping

from headgate.errors import ConfigError
from headgate.methods.layer_routing.config import LayerRoutingConfig
from headgate.methods.layer_routing.learned import ROUTER
from headgate.methods.stage import LORA_GROUP as ADAPTER
from headgate.methods.stage import Stage
from headgate.methods.step import Step

SEARCH, ADAPT, TRIAL, SETTLE = "search", "adapt", "trial", "settle"
KEY = "layer_routing"
"""In a stage's options: which phase it is."""
RESTART = 0.05
"""Warm-up, as a share of a later phase: its optimizer starts anew."""


def stages_of(config: LayerRoutingConfig, learning_rate: float, own: Mapping[str, float]) -> list[Stage]:
    """The phases as stages, or none. ``own``: rates of the method's groups; the router waits for the trial."""
    if not config.has_phases:
        return []
    everything = {ADAPTER: learning_rate, **own}
    adapter = {group: rate for group, rate in everything.items() if group != ROUTER}

    def phase(name: str, share: float, train: Mapping[str, float], last: bool = False) -> Stage:
        return Stage(
            name=name,
            share=share,
            train=dict(train),
            lr_scheduler=None if last else "constant_with_warmup",
            warmup=None if name == SEARCH else RESTART,
            options={KEY: name},
        )

    search, adapt, trial = config.search_share, config.adapt_share, config.trial_share
    first = phase(SEARCH, search, adapter)
    if config.policy == "static":
        return [first, phase(ADAPT, 1 - search, adapter, last=True)]
    settle = phase(SETTLE, 1 - search - adapt - trial, everything, last=True)
    later = [phase(TRIAL, trial, everything), settle]
    if config.skip is not None:
        return [phase(ADAPT, search + adapt, adapter), *later]
    return [first, *([phase(ADAPT, adapt, adapter)] if adapt else []), *later]


def phase_of(stage: Stage) -> str | None:
    """Which phase a stage is, or None."""
    return None if stage is None else stage.options.get(KEY)


def noise_in(config: LayerRoutingConfig, step: Step | None) -> float:
    """Scale of the gates' noise at a training step: falls to 0 over the trial, constant without phases."""
    phase = phase_of(step.stage) if step is not None else None
    if step is None or phase is None:
        return config.noise
    return config.noise * (1 - step.stage_step / step.stage_steps) if phase == TRIAL else 0.0


def check_stage(config: LayerRoutingConfig, stage: Stage, validation: object) -> None:
    """Raises ConfigError where a run with phases has neither its stages nor rows to choose on."""
    if not config.has_phases:
        return
    asks = "start: mask" if config.start == "mask" else "search: trained"
    if phase_of(stage) is None:
        raise ConfigError(
            f"layer_routing: {asks} brings the stages search, adapt, trial and settle, and this run has stages of its "
            f"own (the first is {stage.name!r}): leave training.stages and data.stream out, or {asks.split(':')[0]}"
        )
    if validation is None:
        raise ConfigError(
            f"layer_routing: {asks} chooses on validation rows, and this run has none: give data.validation"
        )
