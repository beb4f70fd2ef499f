"""How alike are the experts? What ``merge_above`` is chosen by."""

from __future__ import annotations

from typing import Any

from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from headgate.methods.lora_experts.experts import ExpertSet
from headgate.methods.lora_experts.reporting import info_table
from headgate.ops.expert_merging import cosines


def likeness(experts: ExpertSet) -> dict[str, Any]:
    """``experts``: a row each. ``cosines`` ``[N][N]`` of their updates, all sites as one vector. ``joins``: what average
    linkage joins, the most alike first, with the mean cosine up to which ``merge_above`` would."""
    numbers = [info.number for info in experts.roster]
    likes = cosines([experts.factors(number) for number in numbers])
    joins = []
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
