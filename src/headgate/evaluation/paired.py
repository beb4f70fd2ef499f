"""Two sets of predictions over the same items, side by side: what flipped, and the pairs to test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headgate.data.readers.base import RawRow
from headgate.errors import DataError
from headgate.evaluation.predictions import Item


@dataclass(frozen=True)
class Pair:
    """One item under both runs."""

    id: str
    prompt: str
    gold: str | None
    a: Item
    b: Item


def pair(a: Sequence[RawRow], b: Sequence[RawRow]) -> list[Pair]:
    """Items matched on the prompt's hash (and the id, where a prompt occurs twice), in the order of ``a``.

    Raises DataError when the two runs did not answer the same items: a comparison of different ones is not paired.
    """
    left, right = ({_key(item): dict(item) for item in items} for items in (a, b))
    only_a, only_b = left.keys() - right.keys(), right.keys() - left.keys()
    if only_a or only_b:
        raise DataError(
            f"the runs were not measured on the same items: {len(only_a)} only in the first, {len(only_b)} only in the "
            "second; evaluate both with the same task, source, split, limit and prompt style"
        )
    return [
        Pair(str(one.get("id")), str(one.get("prompt", "")), one.get("gold"), one, right[key])
        for key, one in left.items()
    ]


def flips(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Items that only one of the two got right: ``gained`` by the second, ``lost`` by it."""
    return {
        "gained": [p for p in pairs if p.b["correct"] and not p.a["correct"]],
        "lost": [p for p in pairs if p.a["correct"] and not p.b["correct"]],
    }


def _key(item: Mapping[str, object]) -> tuple[str, str]:
    return str(item.get("prompt_hash", "")), str(item.get("id"))
