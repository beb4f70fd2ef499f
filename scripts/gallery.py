"""The gallery of the documentation site: a page for every comparison whose table is kept in ``benchmarks/results``.

The pages are the reports that ``headgate report FILE.comparison.json`` writes; nothing of them is committed. Drawn once: until the
table or the report's own code changes, ``build/gallery`` has them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / "build" / "gallery"
CODE = ROOT / "src" / "headgate" / "experiments" / "report"
METHODS = ("schema_bank", "layer_routing", "lora_experts", "backward_gate")
ENDING = ".comparison.json"


def pages() -> dict[str, str]:
    """Path below ``docs/`` -> content: the list in Markdown, and every report in HTML."""
    found = {file.name.removesuffix(ENDING): file for file in sorted(RESULTS.glob(f"*{ENDING}"))}
    return {
        "gallery/index.md": index({name: json.loads(file.read_text()) for name, file in found.items()}),
        **{f"gallery/{name}.html": drawn(file) for name, file in found.items()},
    }


def index(tables: dict[str, dict[str, Any]]) -> str:
    """What was compared, on what, and how many arms were told from their baseline, under the method it is about."""
    lines = [
        "# Gallery",
        "",
        "The report of every comparison in the [evidence](../evidence.md), negative ones included. Each is drawn from its `comparison.json`, which is",
        "in the repository (`benchmarks/results`), as `headgate report FILE.comparison.json` draws it: verdicts, seeds, intervals and costs. The runs",
        "themselves are too large to keep, so curves and items are not here; [the report](../report.md) shows a whole page.",
    ]
    for method in METHODS:
        lines += [
            "",
            f"## {method}",
            "",
            "| comparison | model | seeds | helps | hurts | cannot be told |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for name, table in tables.items():
            if not name.startswith(method):
                continue
            verdicts = [contrast["verdict"].split()[0] for contrast in table["contrasts"].values()]
            helps, hurts = verdicts.count("helps"), verdicts.count("hurts")
            cells = [len(table["seeds"]), helps, hurts, len(verdicts) - helps - hurts]
            metric = table["metric"].removeprefix("evaluation.").replace("_", " ")
            where = f"[{name.removeprefix(method).strip('_').replace('_', ' ')}]({name}.html), {metric}, against {table['baseline']}"
            lines.append(f"| {where} | {Path(table['model']).name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def drawn(file: Path) -> str:
    """The report of a table as one page of HTML."""
    kept = CACHE / f"{_digest(file)}.html"
    if not kept.exists():
        from headgate.experiments.report import write_report

        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copy(file, folder))
            page = write_report(copy).page.read_text()
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(page)
    return kept.read_text()


def _digest(file: Path) -> str:
    content = hashlib.sha256(file.read_bytes())
    for source in sorted(path for path in CODE.rglob("*") if path.suffix in (".py", ".html", ".css")):
        content.update(source.read_bytes())
    return content.hexdigest()[:16]


if __name__ == "__main__":
    for path, text in pages().items():
        print(f"{path}: {len(text):,} characters")
