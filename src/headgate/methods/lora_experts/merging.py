"""Fewer experts: average-linkage clusters of alike updates, each merged into one expert.

Experts are alike when cos(dW_i, dW_j), over all sites as one vector, is high. A cluster's updates are averaged, each
with the tokens that it ever served (the moving usage has forgotten whoever is idle now, and merging by it would only
keep the newest), and brought back to the survivor's rank (QR, SVD); its gates add up. With ``merge_replay`` the survivors train on
at the start of the skill that follows, on the rows of theirs that ``data.replay`` brings back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from headgate.errors import ConfigError
from headgate.modules.expert_bank import LowRankExpert
from headgate.ops.expert_merging import Factors, cosines, merged

if TYPE_CHECKING:
    from headgate.methods.lora_experts.method import LoraExperts
    from headgate.methods.step import Step

ALIKE = 0.8
REST = "rest"
"""The entry of ``pending`` that ends the short replay after a merge."""


def factors_of(method: LoraExperts, number: int) -> list[Factors]:
    """Of an expert at every site, its scale in ``up``."""
    info = method.roster.info(number)
    found = []
    for site in method.banks:
        expert = method.bank(site).expert(info.name)
        found.append((expert.down.detach().float(), expert.up.detach().float() * info.scale))
    return found


def clusters(method: LoraExperts, threshold: float = ALIKE) -> list[list[int]]:
    """Experts grouped by average linkage with mean cosine >= ``threshold``; pinned ones stay alone."""
    numbers = [info.number for info in method.roster if not info.pinned]
    alone = [[info.number] for info in method.roster if info.pinned]
    if len(numbers) < 2:
        return alone + [[number] for number in numbers]
    distance = 1 - cosines([factors_of(method, number) for number in numbers])
    tree = linkage(squareform(distance.numpy(), checks=False), method="average")
    labels = fcluster(tree, t=1 - threshold + 1e-9, criterion="distance")
    groups = [
        [n for n, at in zip(numbers, labels, strict=True) if at == label] for label in sorted(set(labels))
    ]
    return alone + groups


@torch.no_grad()
def merge(method: LoraExperts, numbers: list[int]) -> int:
    """Merge experts into one of them, weighed by tokens served; the others are evicted. Returns the survivor.

    The survivor is the one in training, or else a mature one, of the highest rank, the oldest of these; it takes over
    their skills. Its router row is the mean of theirs with the same weights, of a learned router only. Identical experts merge exactly; what the gates gave several of them goes to one, up to the router.
    Raises ConfigError for fewer than two experts, a pinned one, or a learned router per site gone elsewhere.
    """
    if len(set(numbers)) < 2:
        raise ConfigError(f"merging needs two experts or more, got {numbers}")
    pinned = [n for n in numbers if method.roster.info(n).pinned]
    if pinned:
        raise ConfigError(f"experts {pinned} are pinned: they cannot be merged")
    roster, numbers = method.roster, list(dict.fromkeys(numbers))
    maturity = roster.maturity(roster.age.tolist(), method.config.maturity_steps)
    ripe = {info.number: m >= 1 for info, m in zip(roster, maturity, strict=True)}
    keep = max(numbers, key=lambda n: (n == method.current, ripe[n], roster.info(n).rank, -n))
    gone = [n for n in numbers if n != keep]
    numbers = [keep, *gone]
    weights = roster.served_shares(numbers)
    info = roster.info(keep)
    members = [factors_of(method, n) for n in numbers]
    for place, site in enumerate(method.banks):
        bank = method.bank(site)
        down, up = merged([m[place] for m in members], weights, info.rank)
        expert = LowRankExpert(down, up / info.scale)
        expert.freeze(bank.expert(info.name).frozen)
        bank.add(info.name, expert)
    for site in method.routers:
        router = method.router(site)
        if hasattr(router, "rows"):
            rows = [router.weight([str(n)])[0] for n in numbers]
            router.replace(info.name, sum(w * row for w, row in zip(weights, rows, strict=True)))
        else:
            router.absorb(info.name, [str(n) for n in gone])
    for n in gone:
        info.skills += [s for s in roster.info(n).skills if s not in info.skills]
        for total in (roster.usage, roster.served):
            total[roster.place(keep)] += total[roster.place(n)]
        method.evict(n)
    return keep


def merge_alike(method: LoraExperts, threshold: float = ALIKE) -> list[list[int]]:
    """Merge every cluster of more than one expert; returns the clusters that were merged."""
    found = [group for group in clusters(method, threshold) if len(group) > 1]
    for group in found:
        merge(method, group)
    return found


def refresh(method: LoraExperts, merged_groups: list[list[int]]) -> None:
    """The survivors of these merges train beside the stage's own expert, for ``merge_replay`` steps."""
    there = {info.number for info in method.roster} - {method.current}
    wanted = method.config.merge_replay and method.config.freeze_others
    method.refreshing = [n for group in merged_groups for n in group if n in there] if wanted else []
    for number in method.refreshing:
        method.thaw(number)


def end_refresh_when_due(method: LoraExperts, step: Step) -> None:
    """At the end of an optimizer step: note at the last one of the short replay that it is over."""
    done, stage = step.global_step + 1, step.scheduled
    if method.refreshing and done - stage.start == method.config.merge_replay and done < stage.stop:
        method.pending.append(REST)


def rest(method: LoraExperts) -> str:
    """The short replay is over."""
    rested, method.refreshing = method.refreshing, []
    for number in rested:
        method.freeze(number)
    return f"merged experts {', '.join(map(str, rested))} are frozen again"
