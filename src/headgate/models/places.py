"""Where the files of the package's own model are."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"
