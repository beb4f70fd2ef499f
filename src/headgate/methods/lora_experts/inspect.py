"""How alike are the experts (what ``merge_above`` is chosen by), and how did the stream go?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from headgate.methods.lora_experts.experts import ExpertSet
from headgate.methods.lora_experts.reporting import ExpertRow, info_table
from headgate.methods.lora_experts.trial import Outcome
from headgate.ops.expert_merging import cosines

ENDS = {outcome.value for outcome in (Outcome.MERGED, Outcome.HANDED_OVER, Outcome.DROPPED)}
"""Verdicts after which an expert is gone."""


class Likeness(TypedDict):
    """``experts``: a row each. ``cosines`` ``[N][N]`` of their updates, all sites as one vector. ``joins``: what average
    linkage joins, the most alike first, with the mean cosine up to which ``merge_above`` would."""

    experts: list[ExpertRow]
    cosines: list[list[float]]
    joins: list[dict[str, object]]


def likeness(experts: ExpertSet) -> Likeness:
    """How alike the experts are, each with each."""
    numbers = [info.number for info in experts.roster]
    likes = cosines([experts.factors(number) for number in numbers])
    joins: list[dict[str, object]] = []
    if len(numbers) > 1:
        groups = [[number] for number in numbers]
        for left, right, distance, _ in linkage(squareform((1 - likes).numpy(), checks=False), "average"):
            groups.append(sorted(groups[int(left)] + groups[int(right)]))
            joins.append({"experts": groups[-1], "cosine": 1 - float(distance)})
    return {
        "experts": info_table(experts),
        "cosines": likes.tolist(),
        "joins": joins,
    }


def timeline(decisions: Sequence[Mapping[str, Any]], experts: Sequence[ExpertRow]) -> dict[str, object]:
    """A stream as it went, from its decisions and the ``experts`` that are left (rows of ``info_table``).

    ``events``: every decision, verdict and merge, in order. ``lives``: by expert, from which step it was there, until when
    (None: to the end, or removed without a verdict, as an eviction is: then ``here`` is False) and its heir. ``served``:
    the expert that serves each skill at the end. The skills' losses are the matrix in ``result.json: continual``.
    """
    left = {row["expert"] for row in experts}
    events: list[dict[str, object]] = []
    lives: dict[int, dict[str, object]] = {}

    def life(number: int, step: int) -> dict[str, object]:
        fresh: dict[str, object] = {
            "expert": number,
            "from": step,
            "until": None,
            "heir": None,
            "here": number in left,
        }
        return lives.setdefault(number, fresh)

    for one in decisions:
        step, kind, number = one["step"], one["kind"], one["expert"]
        for group in one.get("merged") or []:
            events.append({"step": step, "what": "merged", "experts": list(group), "reason": "alike"})
            heirs = left & set(group)  # all but the survivor went at once: one of them can be left, or none
            for gone in set(group) - left:
                if heirs:
                    life(gone, 0).update(until=step, heir=next(iter(heirs)))
        asked = one.get("trial", number)
        heir = number if number != asked else None
        life(asked, step)
        if kind in ENDS and asked not in left:
            lives[asked].update(until=step, heir=heir)
        told = {name: one[name] for name in ("skill", "base_loss", "loss") if one.get(name) is not None}
        into = {} if heir is None else {"into": heir}
        events.append(
            {"step": step, "what": kind, "experts": [asked], **into, "reason": one["reason"], **told}
        )
    served: dict[str, int] = {skill: row["expert"] for row in experts for skill in row["skills"]}
    return {"events": events, "lives": [lives[number] for number in sorted(lives)], "served": served}
