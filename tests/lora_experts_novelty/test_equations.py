"""Skill novelty by hand: similarity, thresholds and intervals where a factor or an edge decides."""

from __future__ import annotations

import pytest
import torch

from headgate.methods.lora_experts.spawn import Evidence, Novelty, SpawnConfig
from headgate.modules.feature_sketch import FeatureSketch
from headgate.modules.skill_library import SkillLibrary
from headgate.ops import novelty as N
from headgate.ops.subspace import shrink


def test_similarity_is_the_cosine_of_centred_means() -> None:
    reference = torch.tensor([1.0, 1.0, 0.0])
    found = N.cosines(
        torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[3.0, 1.0, 0.0], [1.0, 3.0, 4.0]]), reference
    )
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0]]))
    cosines = torch.tensor([[0.1, 0.5, 0.9]])
    assert float(N.library_similarity(cosines, "max")) == pytest.approx(0.9)
    assert float(N.library_similarity(cosines, "median")) == pytest.approx(0.5)


def test_the_interval_is_the_centred_spread() -> None:
    """Value plus (quantiles - mean) of what was drawn; a skewed draw never moves an end past the value."""
    drawn = torch.linspace(0.0, 1.0, 101)
    low, high = N.interval(0.8, drawn, 0.9)
    assert (low, high) == pytest.approx((0.8 - 0.45, 0.8 + 0.45))
    skewed = torch.cat([torch.zeros(1), torch.ones(99)])  # mean .99, both quantiles above it
    low, high = N.interval(0.8, skewed, 0.9)
    assert (low, high) == pytest.approx((0.8, 0.81))


def test_calibrated_threshold_leaves_half_the_spread() -> None:
    within = torch.full((50,), 0.8)
    assert N.calibrated_threshold(within, [], 0.02) == pytest.approx(0.8 - 0.1)
    assert N.calibrated_threshold(within, [0.7], 0.02) == pytest.approx(0.8 - 0.05), (
        "half-way to the nearest other"
    )
    assert N.calibrated_threshold(within, [0.2, 0.7], 0.02) == pytest.approx(0.75), (
        "the nearest, not the farthest"
    )
    assert N.calibrated_threshold(within, [0.9], 0.02) == pytest.approx(0.7), (
        "one above its own likeness says nothing"
    )


@pytest.mark.parametrize(("shift", "kind"), [(0.0, "known"), (1e-4, "undecided")])
def test_a_look_whose_lowest_end_is_at_the_threshold_is_known(
    shift: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole interval counts, its end included: low >= threshold is known, anything below it waits."""
    library = SkillLibrary(4)
    rows, tokens = torch.eye(4)[torch.zeros(40, dtype=torch.long)], torch.full((40,), 100)
    library.add(0, rows + 0.1 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), tokens)
    library.add(1, torch.eye(4)[torch.ones(40, dtype=torch.long)], tokens)
    monkeypatch.setattr(N, "interval", lambda value, drawn, confidence: (0.5 - shift, 0.9))
    config = SpawnConfig(threshold="fixed", base=0.5, delta=0.0, threshold_min=0.4)
    decision = Novelty(config, library).decide(Evidence(rows, tokens, num_experts=2))
    assert (decision.threshold, decision.kind) == (0.5, kind)


def test_a_feature_sketch_reads_evenly_spaced_rows_from_the_first_to_the_last() -> None:
    features = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    sketch = FeatureSketch(6, 3)
    padded = torch.stack(
        [torch.cat([features[:5], features.new_full((2, 6), 7.0)]), torch.cat([features[5:], features[:3]])]
    )
    valid = torch.tensor([[True] * 5 + [False] * 2, [True] * 4 + [False] * 3])
    sketch.add(padded, valid)
    before = sketch.rows.clone()
    sketch.add(padded, torch.zeros_like(valid))
    assert torch.equal(sketch.rows, before), "a batch without a token has moved it"
    sketch.add(padded * 2, valid)
    wanted = torch.zeros(6, 6)
    for rows in (features, features * 2):
        wanted[3:] = rows[[0, 4, 8]]
        wanted = shrink(wanted, 3)
    torch.testing.assert_close(sketch.rows, wanted)
    assert FeatureSketch(6, 0).basis() is None and FeatureSketch(6, 3).basis() is None
