"""Tags are pure functions of text and seed; fitted ones of the embeddings; schedules are eq. 9 and its list."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch.nn import functional

from headgate.errors import DataError
from headgate.methods.schema_bank import SchemaBank
from headgate.methods.schema_bank import tags as T

TEXTS = [f"Ann has {i} apples and gives away {i // 2}. How many are left?" for i in range(40)]
CODE = (
    "from headgate.methods.schema_bank.tags import text_tags;"
    "print([text_tags(s, f'text {i}', 32, 2, 7) for s in ('hash','hash_pair','keyword') for i in range(5)])"
)


def test_tags_are_identical_across_processes() -> None:
    here = [T.text_tags(s, f"text {i}", 32, 2, 7) for s in ("hash", "hash_pair", "keyword") for i in range(5)]
    environment = {"PYTHONHASHSEED": "123", "PATH": "/usr/bin"}
    ran = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=True
    )
    assert ran.stdout.strip() == str(here)


@given(st.text(max_size=50), st.integers(1, 64), st.integers(0, 9))
def test_text_tags_are_schemas(text: str, count: int, seed: int) -> None:
    for source in T.TEXT_SOURCES:
        assert all(0 <= tag < count for tag in T.text_tags(source, text, count, 1, seed))


def test_hash_tags_spread_evenly() -> None:
    counts = Counter(T.text_tags("hash", f"problem {i}", 8, 1, 0)[0] for i in range(4000))
    assert max(abs(n - 500) for n in counts.values()) < 5 * 500**0.5


@pytest.mark.parametrize("source", ["cluster", "similarity", "learned"])
def test_fitted_tags_find_separated_groups(source: str) -> None:
    stream = torch.Generator().manual_seed(0)
    groups = torch.arange(60) % 3
    points = torch.eye(3, 8)[groups] * 4 + torch.randn(60, 8, generator=stream) * 0.05
    tags = [t[0] for t in T.fitted_tags(source, points, 3, 1, seed=1)]
    assert tags == [t[0] for t in T.fitted_tags(source, points, 3, 1, seed=1)]
    if source != "similarity":  # its anchors are drawn, and may fall into one group
        assert len(set(zip(tags, groups.tolist()))) == 3


def test_learned_tags_are_balanced() -> None:
    points = torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
    counts = Counter(t[0] for t in T.fitted_tags("learned", points, 6, 1, seed=0))
    assert max(counts.values()) <= 3 * 120 / 6


def test_learned_tags_follow_the_balanced_plan() -> None:
    """Sinkhorn's theorem: of exp(10 cos) with its rows and its columns scaled, one matrix has rows and columns of equal sums."""
    points = torch.randn(24, 5, generator=torch.Generator().manual_seed(3)).double()
    unit = functional.normalize(points - points.mean(0), dim=-1)
    prototypes = T._first_centres(unit, 4, 7)
    for _ in range(3):
        logs = (10 * unit @ prototypes.T).numpy()
        for _ in range(500):
            logs = logs - logsumexp(logs, axis=0, keepdims=True) - np.log(4)
            logs = logs - logsumexp(logs, axis=1, keepdims=True) - np.log(24)
        plan = np.exp(logs)
        assert np.allclose(plan.sum(0), 1 / 4) and np.allclose(plan.sum(1), 1 / 24)
        prototypes = functional.normalize(torch.tensor(plan).T @ unit, dim=-1)
    assert T.learned_order(points, 4, 7, rounds=3).tolist() == (-logs).argsort(-1).tolist()


def test_permuted_tags_keep_their_distribution_and_lose_their_examples() -> None:
    plain, permuted = SchemaBank(num_schemas=8, tags="keyword"), SchemaBank(tags="hash", permuted_tags=True)
    hashed = SchemaBank(tags="hash")
    permuted.fit_columns(lambda texts: torch.zeros(0), TEXTS)
    ours = [permuted.tags_of({"prompt": t})[0] for t in TEXTS]
    theirs = [hashed.tags_of({"prompt": t})[0] for t in TEXTS]
    assert Counter(ours) == Counter(theirs) and ours != theirs
    assert plain.tags_of({"prompt": TEXTS[0]}) == plain.column_makers()["tags"]({"prompt": TEXTS[0]})
    with pytest.raises(DataError, match="fit_columns"):
        permuted.tags_of({"prompt": "never seen"})


def test_schedules() -> None:
    assert [T.kept_share("linear", n, 100) for n in (0, 50, 100)] == [1.0, 0.625, 0.25]
    assert [T.kept_share("steps", n, 8) for n in range(8)] == [1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert [T.kept_share([1.0, 0.0], n, 5) for n in range(5)] == [1, 1, 1, 0, 0]


def test_the_released_prefix_marks_the_kept_share_of_rows() -> None:
    method = SchemaBank(preset="released")
    router, later = method.stages(1e-4)[:2]
    assert method.row_transform(later) is None
    transform = method.row_transform(router)
    assert transform is not None
    row = {"prompt": TEXTS[0], "completion": "7"}
    a, b = method.tags_of(row)
    assert transform(row, 0, 0.0) == {**row, "prompt": f"[Schema: {a},{b}] {TEXTS[0]}"}
    assert method.tags_of(transform(row, 0, 0.0)) == [a, b]
    marked = sum(transform(row, i, 0.9)["prompt"].startswith("[Schema") for i in range(2000))
    assert abs(marked - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_prefixes_fade_over_the_time_of_training_and_not_over_the_file(tmp_path) -> None:
    """The rows that the trainer really reads, in the order in which it reads them: the kept share falls as scheduled."""
    from headgate.experiments.prepared import prepare_run
    from headgate.experiments.recipe_file import recipe_from
    from headgate.methods.stage import schedule_stages
    from headgate.training.order import StreamOrder

    recipe = recipe_from(
        {
            "output_dir": str(tmp_path),
            "model": {"name_or_path": "embedded"},
            "data": {"train": {"source": "wordmath", "limit": 300}, "validation": None, "max_length": 256},
            "training": {"max_steps": 160, "per_device_train_batch_size": 8},
            "methods": {"schema_bank": {"preset": "released", "num_schemas": 8, "tag_schedule": "steps"}},
        }
    )
    prepared = prepare_run(recipe)
    assert prepared.stages is not None
    views, start = {}, 0
    for name, rows in prepared.train.items():
        views[name] = range(start, start + len(rows))
        start += len(rows)
    scheduled = schedule_stages(prepared.stages, 160)
    first = scheduled[0]
    order = list(StreamOrder(scheduled, views, 8, recipe.seed))[: first.steps * 8]
    rows = prepared.train[first.stage.data]
    marked = [
        prepared.tokenizer.decode(rows[i - views[first.stage.data].start]["input_ids"]).startswith(
            "<bos>[Schema"
        )
        for i in order
    ]
    quarter = len(marked) // 4
    shares = [sum(marked[i * quarter : (i + 1) * quarter]) / quarter for i in range(4)]
    for share, wanted in zip(shares, (1.0, 0.75, 0.5, 0.25), strict=True):
        assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / quarter) ** 0.5 + 1e-9, shares
