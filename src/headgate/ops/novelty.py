"""Skill novelty: is a set of documents unlike everything that a library of skills holds?

A skill's embedding is the mean final hidden state over the tokens of its samples, with adapters off, minus a
reference mean, at unit length. Hidden states of language models share one large direction: without the reference
every cosine is close to 1, whatever the skills (the plan's threshold of 0.85 called all of them known).

DyLoRA-MoE plan (seeds/003), sections 4.1, 5.1. Deviations: the reference; the bootstrap interval in place of one
number; the calibrated threshold.

Shapes: B rows, T tokens, H width, N samples, K skills in the library, R random repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def document_means(hidden_BTH: Tensor, documents_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Mean hidden state ``[N, H]`` fp32 and token count ``[N]`` of every document of a batch, rows in order.

    ``documents_BT`` numbers the documents within each row; negative entries are padding and enter nothing.
    """
    rows, _, width = hidden_BTH.shape
    real = documents_BT >= 0
    label = torch.arange(rows, device=real.device)[:, None] * (documents_BT.max() + 1) + documents_BT
    _, place = torch.unique(label[real], return_inverse=True)
    count = int(place.max()) + 1 if place.numel() else 0
    tokens_N = torch.bincount(place, minlength=count)
    sums_NH = torch.zeros(count, width, device=hidden_BTH.device).index_add_(
        0, place, hidden_BTH[real].float()
    )
    return sums_NH / tokens_N[:, None], tokens_N


def token_mean(means_NH: Tensor, tokens_N: Tensor) -> Tensor:
    """``[H]``: the mean over all tokens, from the means and token counts of the samples.

    Equation: lora_experts (embedding): e = mean of the final hidden state over all tokens of the samples
    Proved by: tests/lora_experts_novelty/test_novelty.py::test_the_skill_embedding_is_the_mean_over_tokens
    Proved by: tests/lora_experts_novelty/test_novelty.py::test_padding_never_enters_an_embedding
    """
    weight_N = tokens_N.to(means_NH.dtype)
    return weight_N @ means_NH / weight_N.sum()


def cosines(means_xH: Tensor, prototypes_KH: Tensor, reference_H: Tensor) -> Tensor:
    """``[..., K]`` cosine of each mean with each prototype, both centred by the reference mean.

    Equation: lora_experts (similarity): cos(e - reference, prototype_k - reference), max or median over k
    Proved by: tests/lora_experts_novelty/test_equations.py::test_similarity_is_the_cosine_of_centred_means
    """
    a = torch.nn.functional.normalize(means_xH - reference_H, dim=-1)
    b = torch.nn.functional.normalize(prototypes_KH - reference_H, dim=-1)
    return a @ b.mT


def paired_cosines(a_RH: Tensor, b_RH: Tensor, reference_H: Tensor) -> Tensor:
    """``[R]`` cosine of each row of one side with the same row of the other, both centred."""
    return torch.nn.functional.cosine_similarity(a_RH - reference_H, b_RH - reference_H, dim=-1)


def library_similarity(cosines_xK: Tensor, how: Literal["max", "median"]) -> Tensor:
    """``[...]``: similarity to a library of K skills."""
    return cosines_xK.amax(-1) if how == "max" else cosines_xK.quantile(0.5, dim=-1)


def bootstrap_means(means_NH: Tensor, tokens_N: Tensor, repeats: int, stream: torch.Generator) -> Tensor:
    """``[R, H]`` token means of N samples drawn with replacement, R times."""
    count = len(means_NH)
    drawn = torch.randint(count, (repeats, count), generator=stream).to(means_NH.device)
    times_RN = torch.zeros(repeats, count, device=means_NH.device)
    times_RN.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=times_RN.dtype))
    weight_RN = times_RN * tokens_N
    return weight_RN @ means_NH / weight_RN.sum(1, keepdim=True)


def split_half_means(
    means_NH: Tensor, tokens_N: Tensor, repeats: int, stream: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``[R, H]`` token means of one random half of the samples, and of the other. Needs two samples or more."""
    count = len(means_NH)
    order_RN = torch.rand(repeats, count, generator=stream).argsort(1)
    first_RN = torch.zeros(repeats, count).scatter_(1, order_RN[:, : count // 2], 1.0).to(means_NH.device)
    halves = []
    for chosen_RN in (first_RN, 1 - first_RN):
        weight_RN = chosen_RN * tokens_N
        halves.append(weight_RN @ means_NH / weight_RN.sum(1, keepdim=True))
    return halves[0], halves[1]


def interval(value: float, drawn_R: Tensor, confidence: float) -> tuple[float, float]:
    """Bootstrap interval of ``value``: the spread of what was drawn, moved to where the value is.

    A resampled mean carries the sampling noise twice, and noise only ever lowers a cosine near 1: plain quantiles
    would lie below the value itself.

    Equation: lora_experts (interval): value + quantiles of (bootstrap - its mean)
    Proved by: tests/lora_experts_novelty/test_novelty.py::test_interval_contains_the_value_and_narrows_with_samples
    Proved by: tests/lora_experts_novelty/test_equations.py::test_the_interval_is_the_centred_spread
    """
    tail = (1 - confidence) / 2
    quantiles = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = (torch.quantile(drawn_R.double(), quantiles) - drawn_R.double().mean()).tolist()
    return value + min(low, 0.0), value + max(high, 0.0)


def rescaled_similarity(within_R: Tensor, half: float, looks: tuple[float, float]) -> Tensor:
    """Similarities between halves of ``half`` samples each, as they would be between looks of other sizes.

    1 - cos of two noisy looks at one skill is proportional to 1/n1 + 1/n2: the variance of their means.
    """
    return 1 - (1 - within_R) * (1 / looks[0] + 1 / looks[1]) / (2 / half)


def threshold_schedule(skills: int, base: float, delta: float, lowest: float) -> float:
    """clip(base - delta ln(1 + k), lowest, base): a larger library is harder to be unlike to (plan, 5.1).

    Equation: lora_experts (threshold 5.1): tau_k = clip(base - delta ln(1 + k), tau_min, base)
    Proved by: tests/lora_experts_novelty/test_novelty.py::test_threshold_falls_with_the_library_and_stays_between_its_bounds
    """
    return min(base, max(lowest, base - delta * math.log1p(skills)))


def calibrated_threshold(within_R: Tensor, between: Sequence[float], false_spawns: float) -> float:
    """The similarity under which a look is at another skill, from the known skill's likeness to itself and others.

    A share ``false_spawns`` of the similarities ``within_R`` between looks at one skill lies below the quantile
    taken here. There is room below it: half as much again as the skill's own spread, but never more than half-way
    to the most similar other skill (``between``).

    Equation: lora_experts (calibrated threshold): known - min((1 - known) / 2, (known - nearest other) / 2)
    Proved by: tests/lora_experts_novelty/test_equations.py::test_calibrated_threshold_leaves_half_the_spread
    Proved by: tests/lora_experts_novelty/test_novelty.py::test_calibrated_threshold_lies_above_the_most_similar_other_skill
    """
    known = float(torch.quantile(within_R.double(), false_spawns))
    room = (1 - known) / 2
    below = [value for value in between if value < known]
    return known - min(room, (known - max(below)) / 2 if below else room)


def nt_xent(first_MP: Tensor, second_MP: Tensor, temperature: float = 0.1) -> Tensor:
    """Normalised temperature-scaled cross entropy of 2M unit vectors: each one's partner against all others.

    l_i = -log( exp(s_ij / t) / sum_{k != i} exp(s_ik / t) ), mean over both sides (SimCLR, equation 1).

    Equation: lora_experts (NT-Xent): -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t))
    Proved by: tests/lora_experts_novelty/test_bursts_and_contrast.py::test_nt_xent_equals_an_explicit_loop
    """
    both = torch.cat([first_MP, second_MP])
    count = len(first_MP)
    similarity = both @ both.mT / temperature
    similarity = similarity.masked_fill(
        torch.eye(2 * count, dtype=torch.bool, device=both.device), -torch.inf
    )
    partner = torch.arange(2 * count, device=both.device).roll(count)
    return torch.nn.functional.cross_entropy(similarity, partner)
