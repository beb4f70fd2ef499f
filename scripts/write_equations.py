"""Write the table of equations of every method's page, between its markers. ``--check``: exit code 1 where one is stale."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from headgate.experiments.equations import equations, markdown

PAGES = Path(__file__).parent.parent / "docs" / "methods"
MARKERS = re.compile(r"(<!-- equations: (\w+) -->\n).*?(<!-- end of equations -->)", re.DOTALL)


def written(text: str) -> str:
    """The page with its table as the docstrings have it now."""
    return MARKERS.sub(lambda m: f"{m[1]}{markdown(equations(m[2]))}\n{m[3]}", text)


def main() -> int:
    stale = [page for page in sorted(PAGES.glob("*.md")) if written(page.read_text()) != page.read_text()]
    for page in stale:
        if "--check" in sys.argv:
            print(f"{page}: the table of equations is stale: run python scripts/write_equations.py")
        else:
            page.write_text(written(page.read_text()))
            print(f"wrote {page}")
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
