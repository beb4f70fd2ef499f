"""Which experts are alike? Average-linkage clusters of their updates; what ``merge_above`` merges (see ExpertSet.merge).

Experts are alike when cos(dW_i, dW_j), over all sites as one vector, is high. A cluster's updates are averaged, each
with the tokens that it ever served (the moving usage has forgotten whoever is idle now, and merging by it would only
keep the newest), and brought back to the survivor's rank (QR, SVD); its gates add up. With ``merge_replay`` the survivors
train on at the start of the skill that follows, on the rows of theirs that ``data.replay`` brings back.
"""

from __future__ import annotations

from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from headgate.methods.lora_experts.experts import ExpertSet
from headgate.ops.expert_merging import cosines

ALIKE = 0.8


def clusters(experts: ExpertSet, threshold: float = ALIKE) -> list[list[int]]:
    """Experts grouped by average linkage with mean cosine >= ``threshold``; pinned ones stay alone."""
    numbers = [info.number for info in experts.roster if not info.pinned]
    alone = [[info.number] for info in experts.roster if info.pinned]
    if len(numbers) < 2:
        return alone + [[number] for number in numbers]
    distance = 1 - cosines([experts.factors(number) for number in numbers])
    tree = linkage(squareform(distance.numpy(), checks=False), method="average")
    labels = fcluster(tree, t=1 - threshold + 1e-9, criterion="distance")
    groups = [
        [n for n, at in zip(numbers, labels, strict=True) if at == label] for label in sorted(set(labels))
    ]
    return alone + groups


def merge_alike(experts: ExpertSet, threshold: float = ALIKE) -> list[list[int]]:
    """Merge every cluster of more than one expert; returns the clusters that were merged."""
    groups = [group for group in clusters(experts, threshold) if len(group) > 1]
    for group in groups:
        experts.merge(group)
    return groups
