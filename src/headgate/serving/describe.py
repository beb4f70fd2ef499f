"""From a live run to what is served: the description in ``config.json``, and the tensors of ``model.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from headgate.errors import ConfigError
from headgate.methods.base import Method
from headgate.methods.compose import methods_of
from headgate.methods.layer_routing.config import LEARNED
from headgate.methods.layer_routing.method import PURPOSE, LayerRouting
from headgate.methods.lora_experts.method import LoraExperts
from headgate.methods.schema_bank.method import SchemaBank
from headgate.models.anatomy import linear_size, unwrap
from headgate.models.plain_adapter import plain_adapter
from headgate.models.private import attention_implementation
from headgate.ops.randomness import derive_seed
from headgate.serving.adapter import AdapterEntry
from headgate.serving.modeling import FORMAT

ROUTING = ("policy", "features", "kv", "engine", "prefix_tokens", "scaling")
EXPERTS = (
    "router", "router_sites", "base_prior", "features", "granularity", "prefix_tokens", "temperature_start", "temperature_min",
    "temperature_half_life", "maturity_steps", "top_k", "dense_phase", "top_1_after", "capacity_factor",
    "gate_projection", "freeze_first", "eval_routing",
)  # fmt: skip
SCHEMAS = (
    "num_schemas", "rank", "top_k", "adaptive_mass", "gating", "combine", "attributes", "attribute_dim",
    "train_attributes", "router", "bank", "init_std",
)  # fmt: skip


def describe_run(model: nn.Module) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The description and the tensors of a loaded run, adapter unmerged; the model is left as it is.

    Raises ConfigError for a method that cannot be served, and for an adapter that is no plain LoRA.
    """
    base = unwrap(model)
    adapter: dict[str, AdapterEntry] = {}
    methods: dict[str, object] = {}
    if base is not model:
        adapter, state = _base_and_adapter(base)
    else:
        state = {f"base.{name}": tensor for name, tensor in base.state_dict().items()}
    for method in methods_of(model):
        made = _method(method)
        if made is None:
            continue
        methods[method.name], own = made
        state |= {f"methods.{method.name}.{name}": tensor for name, tensor in own.items()}
    told: dict[str, object] = {
        "format": FORMAT,
        "attn_implementation": attention_implementation(base.config),
        "adapter": adapter,
        "methods": methods,
    }
    return told, _untied(base, {name: tensor.detach() for name, tensor in state.items()})


def _untied(base: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights once: safetensors holds no tensor twice, and loading ties them again."""
    tied = {f"base.{name}" for name in getattr(base, "all_tied_weights_keys", {})}
    return {name: tensor.cpu().contiguous().clone() for name, tensor in state.items() if name not in tied}


def _base_and_adapter(base: nn.Module) -> tuple[dict[str, AdapterEntry], dict[str, Tensor]]:
    modules: dict[str, AdapterEntry] = {}
    state: dict[str, Tensor] = {}
    wrapped = plain_adapter(base)
    for path, part in wrapped.items():
        modules[path] = {"sizes": list(linear_size(part.layer)), "rank": part.rank, "scaling": part.scaling}
        state[f"base.{path}.lora_A.weight"], state[f"base.{path}.lora_B.weight"] = part.down, part.up
    for name, tensor in base.state_dict().items():
        owner = next((path for path in wrapped if name.startswith(path + ".")), None)
        if owner is None or name.startswith(f"{owner}.base_layer."):
            state[f"base.{name}"] = tensor
    return modules, state


def _method(method: Method) -> tuple[dict[str, object], dict[str, Tensor]] | None:
    """Of one method; None for one that only decided what to learn from, or is removed at inference."""
    if isinstance(method, LayerRouting):
        return None if method.config.policy == "dense" else _routing(method)
    if isinstance(method, LoraExperts):
        return _experts(method)
    if isinstance(method, SchemaBank):
        return None if method.config.eval_routing == "removed" else _schemas(method)
    if method.adapter_alone:
        return None
    raise ConfigError(
        f"--to transformers knows layer_routing, lora_experts and schema_bank, not {method.name!r}: use --to merged"
    )


def _routing(method: LayerRouting) -> tuple[dict[str, object], dict[str, Tensor]]:
    config = method.config
    masked = method.fallback is not None and bool(method.fallback.active)
    told: dict[str, object] = {
        "config": {name: getattr(config, name) for name in ROUTING}
        | {
            "routes_per": config.routes_per,
            "gates_per_block": config.gates_per_block,
            "eval_routing": "removed" if config.eval_routing == "removed" else "on",
        },
        "blocks": [method.blocks.start, method.blocks.stop],
        "hidden_size": method.hidden_size,
        "salt": derive_seed(method.seed, 0, PURPOSE),
        "share": method.shares.of_gates(config.target_utilization),
        "fallback": method.fallback.mask.tolist() if masked and method.fallback is not None else None,
        "has_router": config.policy in LEARNED,
        "patch_rank": config.patch.rank if config.patch is not None else 0,
    }
    kept = ("router.", "patches.", "fixed")
    state = {name: tensor for name, tensor in method.state_dict().items() if name.startswith(kept)}
    return told, {**state, "threshold": method.budget.threshold}


def _experts(method: LoraExperts) -> tuple[dict[str, object], dict[str, Tensor]]:
    config = method.config
    told: dict[str, object] = {
        "config": {name: getattr(config, name) for name in EXPERTS} | {"first_block": config.first_block},
        "feature_width": config.feature_width(method.experts.hidden_size),
        "structure": method.experts.structure(),
    }
    state = {
        f"experts.{name}": tensor
        for name, tensor in method.experts.state_dict().items()
        if not name.endswith((".mean", ".count", ".scatter"))
    }
    return told, state


def _schemas(method: SchemaBank) -> tuple[dict[str, object], dict[str, Tensor]]:
    told: dict[str, object] = {
        "config": {name: getattr(method.config, name) for name in SCHEMAS},
        "routing": method.config.eval_routing,
        "blocks": [int(key) for key in method.layers],
        "hidden_size": method.hidden_size,
    }
    return told, dict(method.state_dict())
