"""Shared by all tests: small random models, the real data under HEADGATE_SHARED, quiet libraries."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("HEADGATE_SHARED", ROOT.parent / "shared")).resolve()
settings.register_profile("repeatable", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("repeatable")  # the same examples every time; elsewhere new ones are tried
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if (
    "HEADGATE_CACHE" not in os.environ
):  # what tests prepare is kept for this session, their processes included
    os.environ["HEADGATE_CACHE"] = tempfile.mkdtemp(prefix="headgate-tests-")
    atexit.register(shutil.rmtree, os.environ["HEADGATE_CACHE"], ignore_errors=True)
# The processes that tests start get the same number of threads: sums in another order differ in the last bit.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the shared folder its group is deselected, and the summary says how many were left out."""
    if SHARED.is_dir():
        return
    left_out = [item for item in items if item.get_closest_marker("shared")]
    items[:] = [item for item in items if not item.get_closest_marker("shared")]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)


LEFT_OUT = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter, config) -> None:  # type: ignore[no-untyped-def]
    left_out = config.stash.get(LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(f"{left_out} tests left out: {SHARED} is absent (set HEADGATE_SHARED)")


@pytest.fixture(scope="session")
def shared() -> Path:
    return SHARED
