"""Fewer experts: average-linkage clusters of alike updates, each merged into one expert.

Experts are alike when cos(dW_i, dW_j), over all sites as one vector, is high. A cluster's updates are averaged, each
with the tokens that it ever served (the moving usage has forgotten whoever is idle now, and merging by it would only
keep the newest), and brought back to the survivor's rank (QR, SVD); its gates add up. With ``merge_replay`` the survivors
train on at the start of the skill that follows, on the rows of theirs that ``data.replay`` brings back.
"""

from __future__ import annotations

from collections.abc import Sequence

from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from headgate.errors import ConfigError
from headgate.methods.lora_experts.experts import ExpertSet
from headgate.ops.expert_merging import Factors, cosines, merged

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
        merge(experts, group)
    return groups


def merge(experts: ExpertSet, numbers: Sequence[int]) -> int:
    """Merge experts into one of them, weighed by tokens served; the others go. Returns the survivor.

    The survivor is the one in training, or else a mature one, of the highest rank, the oldest of these; it takes over
    their skills, prototypes and maturity. Its row of a learned router is the mean of theirs with the same weights.
    Identical experts merge exactly; what the gates gave several of them goes to one, up to the router.
    Raises ConfigError, before anything is written, for fewer than two experts or a pinned one.
    """
    numbers, roster = list(dict.fromkeys(numbers)), experts.roster
    if len(numbers) < 2:
        raise ConfigError(f"merging needs two experts or more, got {numbers}")
    pinned = [n for n in numbers if roster.info(n).pinned]
    if pinned:
        raise ConfigError(f"experts {pinned} are pinned: they cannot be merged")
    mature = set(experts.mature())
    keep = max(numbers, key=lambda n: (n == experts.current, n in mature, roster.info(n).rank, -n))
    order = [keep, *(n for n in numbers if n != keep)]
    absorb(experts, order, roster.served_shares(order))
    return keep


def absorb(experts: ExpertSet, order: Sequence[int], weights: Sequence[float]) -> None:
    """The first expert becomes the weighted sum of all; the others go, and it is their heir."""
    keep, *gone = order
    experts.write(keep, combined(experts, order, weights))
    experts.routers.combine(keep, gone, weights)
    for number in gone:
        experts.remove(number, heir=keep)


def combined(experts: ExpertSet, order: Sequence[int], weights: Sequence[float]) -> list[Factors]:
    """The weighted sum of experts' updates, at the rank and scale of the first: its factors at every site."""
    info, members = experts.roster.info(order[0]), [experts.factors(number) for number in order]
    sums = [merged(of_site, weights, info.rank) for of_site in zip(*members, strict=True)]
    return [(down, up / info.scale) for down, up in sums]
