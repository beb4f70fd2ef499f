"""``python scripts/lower_bound.py NAME``: the oldest version of a dependency that pyproject.toml allows."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def lower_bound(name: str) -> str:
    """Raises SystemExit where the dependency is absent or has no lower bound."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    found = re.search(rf'"{re.escape(name)}(?:\[[^]]*\])?>=([0-9][0-9.]*)', text)
    if found is None:
        raise SystemExit(f"pyproject.toml names no lower bound of {name!r}")
    return found.group(1)


if __name__ == "__main__":
    print(lower_bound(sys.argv[1]))
