"""Every number that a recipe can set: what it is where nothing is said, and from where to where it may go.

``[`` and ``]``: the end itself is taken; ``(`` and ``)``: it is not. ``..``: no end. ``-``: none.
"""

from __future__ import annotations

import math
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import TypeAdapter, ValidationError

from headgate.config import StrictConfig
from headgate.methods.backward_gate.config import BackwardGateConfig
from headgate.methods.continual_config import AGEMConfig, DERPPConfig, EWCConfig, LwFConfig
from headgate.methods.layer_routing.config import LayerRoutingConfig, PatchConfig
from headgate.methods.lora_experts.config import LoraExpertsConfig
from headgate.methods.lora_experts.spawn_config import SpawnConfig
from headgate.methods.schema_bank.config import SchemaBankConfig
from headgate.methods.stage import Stage
from headgate.training.config import EarlyStopping, TrainingConfig

NUMBERS: dict[type[StrictConfig], str] = {
    TrainingConfig: """
        epochs                        -      (0 1000000]
        max_steps                     -      [0 2147483648]
        per_device_train_batch_size   4      [1 1048576]
        per_device_eval_batch_size    -      [1 1048576]
        gradient_accumulation_steps   1      [1 1048576]
        dataloader_workers            0      [0 1024]
        learning_rate                 0.0001 (0 100]
        epsilon                       1e-8   (0 1]
        warmup                        0.05   [0 1]
        weight_decay                  0.01   [0 ..]
        max_grad_norm                 1      [0 ..]
        label_smoothing               0      [0 1)
        eval_every                    0.1    (0 ..]
        save_every                    0.1    (0 ..]
    """,
    EarlyStopping: "patience 5 [1 ..]",
    Stage: """
        share   -   (0 1]
        steps   -   [1 ..]
        warmup  -   [0 1]
    """,
    BackwardGateConfig: """
        target_acceptance        0.3    (0 1]
        m                        512    [2 ..]
        k                        64     [1 ..]
        floor                    0      [0 1)
        beta                     40     (0 ..]
        ema_rate                 0.01   (0 0.1]
        window                   256    [8 ..]
        burn_in                  -      [0 ..]
        error_top_k              64     [1 ..]
        fd_decay                 1      (0 1]
        refresh                  8      [1 ..]
        reorthonormalize_every   128    [1 ..]
        loss_floor               -      [.. ..]
        prune                    0.5    (0 1)
        anneal                   0.875  (0 1]
        cost_ratio               1      (0 ..]
        max_weight               10     [1 ..]
        rescore_every            3      [1 ..]
        memory_slots             65536  [16 ..]
        score_layer              -      [0 ..]
        pool_factor              4      [2 ..]
        diagnostic_every         10     [0 ..]
    """,
    LayerRoutingConfig: """
        keep_last            0      [0 ..]
        prefix_tokens        16     [1 ..]
        init_keep            0.9    (0 1)
        router_lr            0.001  (0 ..]
        target_utilization   0.75   (0 1]
        budget_weight        0.1    [0 ..]
        dual_step            0.01   [0 ..]
        damping              2      [0 ..]
        calibrate_to         -      (0 1]
        search_share         0.15   (0 1)
        adapt_share          0.3    [0 1)
        trial_share          0.3    (0 1)
        logit_bound          -      (0 ..]
        kd_weight            0.5    (0 1]
        kd_temperature       2      (0 ..]
        kd_warmup            50     [0 ..]
        temperature          1      (0 ..]
        temperature_decay    0.95   (0 1]
        temperature_floor    0.5    (0 ..]
        noise                1      [0 ..]
        entropy_bonus        0      [0 ..]
        drop_rate            0.5    [0 1)
    """,
    PatchConfig: "rank 16 [1 ..]",
    LoraExpertsConfig: """
        experts                 1      [1 ..]
        base_prior              0.1    [0 1]
        r                       8      [1 ..]
        alpha                   16     (0 ..]
        new_r                   16     [1 ..]
        new_alpha               32     (0 ..]
        prefix_tokens           32     [1 ..]
        router_std              0.01   [0 ..]
        router_lr               -      (0 ..]
        temperature_start       2      (0 ..]
        temperature_min         0.5    (0 ..]
        temperature_half_life   200    (0 ..]
        maturity_steps          200    [1 ..]
        top_k                   2      [1 ..]
        top_1_after             -      [0 ..]
        balance                 0.01   [0 ..]
        z_loss                  0.001  [0 ..]
        entropy_token           0      [0 ..]
        entropy_mean            0      [0 ..]
        capacity_factor         -      (0 ..]
        orthogonality           0      [0 ..]
        kd_weight               0      [0 ..]
        kd_temperature          2      (0 ..]
        gate_projection         0      [0 ..]
        burst                   -      [2 ..]
        freeze_after            -      [1 ..]
        double_after            -      [1 ..]
        double_gain             0.01   (0 1)
        max_rank                32     [1 ..]
        merge_above             -      (0 1]
        merge_replay            0      [0 ..]
        max_parameters          -      [1 ..]
    """,
    SpawnConfig: """
        contrast        0      [0 ..]
        base            0.75   (-1 1]
        delta           0.05   [0 ..]
        threshold_min   0.4    [-1 1]
        false_spawns    0.02   (0 0.5)
        min_samples     32     [2 ..]
        min_tokens      2048   [1 ..]
        confidence      0.95   (0 1)
        cooldown        200    [0 ..]
        loss_ratio      1.1    [0 ..]
        served          0.9    (0 1]
        least_gain      0.02   [0 1)
        max_experts     64     [1 ..]
    """,
    SchemaBankConfig: """
        num_schemas        32     [1 ..]
        rank               16     [1 ..]
        top_k              2      [1 ..]
        adaptive_mass      -      (0 1]
        attribute_dim      32     [1 ..]
        lambda_tag         1      [0 ..]
        lambda_orth        0.01   [0 ..]
        lambda_entropy     0      [.. ..]
        tags_per_example   1      [1 ..]
        tag_seed           0      [0 4294967295]
        init_std           0.02   [0 ..]
        distil_weight      0.5    (0 1]
    """,
    EWCConfig: """
        strength   30     [0 ..]
        decay      1      (0 1]
        beta       0.95   [0 1)
    """,
    AGEMConfig: """
        per_skill   256   [1 ..]
        rows        8     [1 ..]
    """,
    DERPPConfig: """
        alpha       0.1   [0 ..]
        beta        0.5   [0 ..]
        per_skill   256   [1 ..]
        rows        4     [1 ..]
    """,
    LwFConfig: """
        weight        1   [0 ..]
        temperature   2   (0 ..]
    """,
}
ROWS = [(config, *line.split()) for config, lines in NUMBERS.items() for line in lines.strip().splitlines()]


def kinds(annotation: Any) -> set[Any]:
    """What a setting may be: a number, a list, none."""
    if get_origin(annotation) is Annotated:
        return kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(kinds, get_args(annotation)))
    return {get_origin(annotation) or annotation}


def taken(config: type[StrictConfig], name: str, value: float) -> bool:
    field = config.model_fields[name]
    try:
        TypeAdapter(Annotated[field.annotation, field]).validate_python(value)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    ("config", "name", "default", "low", "high"), ROWS, ids=[f"{c.__name__}.{name}" for c, name, *_ in ROWS]
)
def test_a_number_has_its_default_and_its_ends(
    config: type[StrictConfig], name: str, default: str, low: str, high: str
) -> None:
    stands = config.model_fields[name].default
    assert stands is None if default == "-" else stands == float(default)
    whole = float not in kinds(config.model_fields[name].annotation)
    for end, closed, outwards in ((low[1:], low[0] == "[", -1), (high[:-1], high[-1] == "]", 1)):
        if end == "..":
            assert taken(config, name, outwards * 10**15)
            continue
        number = int(end) if whole else float(end)
        beyond = number + outwards if whole else math.nextafter(number, outwards * math.inf)
        within = number - outwards if whole else math.nextafter(number, -outwards * math.inf)
        assert [taken(config, name, v) for v in (within, number, beyond)] == [True, closed, False]


@pytest.mark.parametrize("config", NUMBERS, ids=lambda config: config.__name__)
def test_no_number_is_missing_above(config: type[StrictConfig]) -> None:
    numbers = {
        name
        for name, field in config.model_fields.items()
        if kinds(field.annotation) <= {int, float, type(None)}
    }
    assert numbers == {name for kind, name, *_ in ROWS if kind is config}


def test_the_betas_of_adam_are_shares() -> None:
    assert TrainingConfig().betas == (0.9, 0.999)
    assert TrainingConfig(betas=(0, math.nextafter(1, 0))).betas[0] == 0
    for betas in ((-1e-9, 0.5), (0.5, 1)):
        with pytest.raises(ValidationError):
            TrainingConfig(betas=betas)


ON = {
    TrainingConfig: {"deterministic"},
    BackwardGateConfig: {"center", "rank", "length_correction"},
    LayerRoutingConfig: {"kd", "scaling"},
    LoraExpertsConfig: {"freeze_others"},
    SchemaBankConfig: {"train_attributes"},
}


@pytest.mark.parametrize("config", NUMBERS, ids=lambda config: config.__name__)
def test_what_is_on_where_nothing_is_said(config: type[StrictConfig]) -> None:
    switches = {n: f.default for n, f in config.model_fields.items() if f.annotation is bool}
    assert {name for name, on in switches.items() if on} == ON.get(config, set())
