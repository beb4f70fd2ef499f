"""An example's tags: which schemas its router should choose in stage 1.

``hash``, ``hash_pair`` and ``keyword`` read the text alone. ``cluster``, ``similarity`` and ``learned`` read the
frozen base model's pooled embeddings of the training texts (the paper's future work) and are fitted once.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from headgate.data.tags import hash_tags, keyword_tags
from headgate.ops.randomness import derive_seed, generator

TEXT_SOURCES = ("hash", "hash_pair", "keyword")


def hash_pair(text: str, num_schemas: int, seed: int = 0) -> list[int]:
    """(h mod S, h div S mod S) in ascending order: the released code's two tags, from a hash that every process shares.

    Both may be the same schema, as there.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    value = int.from_bytes(digest, "big")
    return sorted((value % num_schemas, value // num_schemas % num_schemas))


def text_tags(source: str, text: str, num_schemas: int, count: int, seed: int) -> list[int]:
    """Tags from the text alone."""
    if source == "hash_pair":
        return hash_pair(text, num_schemas, seed)
    return (hash_tags if source == "hash" else keyword_tags)(text, num_schemas, count, seed)


def _unit(vectors: Tensor) -> Tensor:
    centred = vectors.double() - vectors.double().mean(0)
    return torch.nn.functional.normalize(centred, dim=-1)


def _first_centres(points: Tensor, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(points), generator=generator(seed, 0, "schema_bank.centres"))
    return points[order[torch.arange(count) % len(points)]].clone()


def similarity_order(embeddings: Tensor, num_schemas: int, seed: int) -> Tensor:
    """Schemas by cosine to S example problems drawn by ``seed``, nearest first, [n, S]."""
    points = _unit(embeddings)
    return (points @ _first_centres(points, num_schemas, seed).T).argsort(
        dim=-1, descending=True, stable=True
    )


def cluster_order(embeddings: Tensor, num_schemas: int, seed: int, iterations: int = 50) -> Tensor:
    """Spherical k-means; schemas by cosine to their centre, nearest first, [n, S]."""
    points = _unit(embeddings)
    centres = _first_centres(points, num_schemas, seed)
    assigned = torch.full((len(points),), -1)
    for _ in range(iterations):
        nearest = (points @ centres.T).argmax(-1)
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        sums = torch.zeros_like(centres).index_add(0, assigned, points)
        filled = torch.bincount(assigned, minlength=num_schemas) > 0
        centres[filled] = torch.nn.functional.normalize(sums[filled], dim=-1)
    return (points @ centres.T).argsort(dim=-1, descending=True, stable=True)


def learned_order(
    embeddings: Tensor, num_schemas: int, seed: int, rounds: int = 20, sharpness: float = 10.0
) -> Tensor:
    """A balanced assignment learned with its prototypes (Sinkhorn-Knopp, as in SwAV), [n, S].

    Each round makes every schema claim an equal share of the examples, then moves its prototype to them.
    """
    points = _unit(embeddings)
    prototypes = _first_centres(points, num_schemas, seed)
    plan = torch.zeros(len(points), num_schemas, dtype=points.dtype)
    normalize = torch.nn.functional.normalize
    for _ in range(rounds):
        plan = torch.exp(sharpness * (points @ prototypes.T))
        for _ in range(20):
            plan = normalize(normalize(plan, p=1, dim=0), p=1, dim=1)  # scaled as a whole it is the same plan
        prototypes = normalize(plan.T @ points, dim=-1)
    return plan.argsort(dim=-1, descending=True, stable=True)


ORDERS = {"cluster": cluster_order, "similarity": similarity_order, "learned": learned_order}


def fitted_tags(source: str, embeddings: Tensor, num_schemas: int, count: int, seed: int) -> list[list[int]]:
    """The ``count`` best schemas of every embedded text."""
    tags: list[list[int]] = ORDERS[source](embeddings, num_schemas, seed)[:, :count].tolist()
    return tags


def permute_tags(tags: list[list[int]], seed: int) -> list[list[int]]:
    """The same tags on other examples: their distribution stays, their meaning goes."""
    stream = torch.Generator().manual_seed(derive_seed(seed, "schema_bank.permuted_tags"))
    return [tags[i] for i in torch.randperm(len(tags), generator=stream).tolist()]


def kept_share(schedule: str | list[float], step: int, steps: int) -> float:
    """P_tag(n): the probability that an example keeps its tag at step n of a stage of N (eq. 9 and its list).

    ``linear``: max(.25, 1 - .75 n/N). ``steps``: 100, 75, 50, 25% by quarter. A list: equal parts.

    Equation: schema_bank (9): P_tag(n) = max(1/4, 1 - 3/4 n / N)
    Proved by: tests/schema_bank/test_tags.py::test_schedules
    Proved by: tests/schema_bank/test_method.py::test_the_tag_draw_follows_schedule_and_seed
    """
    if schedule == "linear":
        return max(0.25, 1 - 0.75 * step / steps)
    parts = [1.0, 0.75, 0.5, 0.25] if isinstance(schedule, str) else schedule
    return parts[min(step * len(parts) // steps, len(parts) - 1)]


def tag_table(tags: Any, packed: bool) -> Tensor:
    """Tags of a batch as ``[D, L]``, -1 where an example has fewer; packed rows hold a list per document."""
    if isinstance(tags, Tensor):
        return tags.view(len(tags), -1)
    documents = [document for row in tags for document in row] if packed else list(tags)
    documents = [[document] if isinstance(document, int) else list(document) for document in documents]
    width = max(1, *map(len, documents)) if documents else 1
    return torch.tensor([document + [-1] * (width - len(document)) for document in documents])
