"""What the routers of a bank do, as telemetry of one batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headgate.methods.schema_bank.config import SchemaBankConfig
from headgate.methods.schema_bank.layer import SchemaLayer
from headgate.methods.schema_bank.tags import tag_table
from headgate.methods.step import Step
from headgate.ops.gating import Gates
from headgate.ops.routing_losses import document_mean, routing_entropy, tag_alignment, token_mean

DEAD_BELOW = 0.01
"""A schema is dead when its average load is under this share of an equal one."""


def document_logits(step: Step, records: Mapping[str, Gates]) -> tuple[dict[str, Tensor], Tensor]:
    """Token-mean logits per layer, ``[D, S]``, and the tags, ``[D, L]``; a document is a sample."""
    tags = tag_table(step.batch["tags"], packed=step.segment_ids is not None).to(step.valid.device)
    segments = step.segment_ids
    if segments is None:
        return {key: token_mean(gates.logits, step.valid) for key, gates in records.items()}, tags
    starts = torch.tensor([0, *map(len, step.batch["tags"])][:-1], device=segments.device).cumsum(0)
    numbered = torch.where(segments >= 0, segments + starts.unsqueeze(-1), -1)
    return {k: document_mean(g.logits, numbered, len(tags)) for k, g in records.items()}, tags


def of_routing(
    config: SchemaBankConfig,
    layers: Mapping[str, SchemaLayer],
    step: Step,
    records: Mapping[str, Gates],
    loads: Tensor,
) -> dict[str, Tensor]:
    """Entropies, load, dead schemas, orthonormality and tag alignment of every layer; ``loads`` is ``[layers, S]``."""
    found: dict[str, Tensor] = {}
    supervised = "tags" in step.batch and config.router != "uniform"
    means, tags = document_logits(step, records) if supervised else ({}, None)
    for (key, gates), load in zip(records.items(), loads, strict=True):
        layer, name = layers[key], f"schema/{key}"
        h = routing_entropy(torch.softmax(gates.logits, -1).expand(*step.valid.shape, -1), step.valid)
        found[f"{name}/entropy"], found[f"{name}/entropy_of_mean"] = h.mean_of, h.of_mean
        found[f"{name}/entropy_normalised"] = h.mean_of_normalised
        found[f"{name}/entropy_of_mean_normalised"] = h.of_mean_normalised
        found[f"{name}/load"] = load
        found[f"{name}/dead"] = (layer.load_average < DEAD_BELOW / config.num_schemas).sum().float()
        found[f"{name}/orthonormality"] = layer.bank.orthonormality("mean")
        if tags is not None:
            found[f"{name}/tag_alignment"] = tag_alignment(means[key], tags, config.top_k)
    return found
