"""The page: its sections in order, rendered as one HTML file and one Markdown file, with figures and CSV beside."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

import headgate
from headgate.errors import ConfigError
from headgate.experiments.report import words
from headgate.experiments.report.content import Block, Section, Text, Verbatim
from headgate.experiments.report.figures.cost import cost_bars
from headgate.experiments.report.figures.curves import learning_curves, training_curves
from headgate.experiments.report.figures.paired import paired
from headgate.experiments.report.figures.pareto import pareto
from headgate.experiments.report.flips import flip_blocks
from headgate.experiments.report.progress import progress_table
from headgate.experiments.report.reading import read_study
from headgate.experiments.report.sections import SECTIONS, figures_of
from headgate.experiments.report.sections.abilities import abilities
from headgate.experiments.report.sections.continual import continual
from headgate.experiments.report.sections.evidence import shipped_evidence
from headgate.experiments.report.sections.map import comparison_map
from headgate.experiments.report.sections.varied import varied
from headgate.experiments.report.study import Study
from headgate.experiments.report.style import house_style, inline, save, shade
from headgate.experiments.report.tables import arms_table, write_csv
from headgate.files import write_atomically


@dataclass(frozen=True)
class Written:
    """Where a report lies."""

    page: Path
    markdown: Path
    figures: Sequence[Path]
    tables: Sequence[Path]


def write_report(folder: str | Path, refresh: int | None = None) -> Written:
    """Write ``folder/report/``: index.html, report.md, figures/ (PNG and SVG), arms.csv, metrics.csv.

    Of a ``comparison.json`` without its runs, a page of what the table holds, in a folder of the file's name.

    ``refresh``: the page asks for itself again after so many seconds, for runs that still go on.
    Raises CheckpointError where ``folder`` holds nothing to report.
    """
    folder = Path(folder)
    study = read_study(folder)
    out = study.folder / "report"
    out.mkdir(parents=True, exist_ok=True)
    with house_style():
        sections = build(study)
        figures = _save_figures(sections, out / "figures")
        tables = write_csv(study, out)
        for template, name in (("page.html", "index.html"), ("page.md", "report.md")):
            write_atomically(out / name, _render(template, study, sections, out, refresh))
    return Written(out / "index.html", out / "report.md", figures, tables)


def write_figures(folder: str | Path, method: str) -> list[Path]:
    """Only the figures of one method, from whatever runs ``folder`` holds, into ``folder/report/figures``.

    Raises ConfigError for a method without figures, or where no run has anything of it to draw.
    """
    draw = figures_of(method)
    study = read_study(Path(folder))
    if not study.using(method):
        raise ConfigError(
            f"no run in {folder} used {method} (found: {', '.join(study.methods) or 'no method'}): nothing to draw"
        )
    with house_style():
        section = Section(method, method, draw(study))
        if not section.figures:
            raise ConfigError(f"the runs of {method} in {folder} have logged nothing yet: nothing to draw")
        return _save_figures([section], Path(folder) / "report" / "figures")


def build(study: Study) -> list[Section]:
    """Sections in reading order; one without content is left out."""
    blocks: list[tuple[str, str, list[Block | None]]] = [
        ("progress", "How far it is", [progress_table(study)]),
        (
            "arms",
            {"comparison": "Arms", "runs": "Settings", "run": "Result", "map": "Arms"}[study.kind],
            [arms_table(study) if study.arms else None],
        ),
        ("map", "The map", list(comparison_map(study))),
        ("evidence", "What more seeds found", list(shipped_evidence(study))),
        ("varied", "What was varied", list(varied(study))),
        ("paired", "Seed by seed", [paired(study)]),
        ("curves", "Learning", [learning_curves(study), training_curves(study)]),
        ("continual", "Skill by skill", list(continual(study))),
        ("abilities", "What was forgotten", list(abilities(study))),
        ("pareto", "Quality against compute", [pareto(study)]),
        ("cost", "Cost", [cost_bars(study)]),
        ("flips", "What changed, item by item", list(flip_blocks(study))),
    ]
    blocks += [
        (name, f"Method: {name}", list(SECTIONS.get(name)(study)))
        for name in study.methods
        if name in SECTIONS
    ]
    blocks.append(("record", "Recipes and environment", list(_record(study))))
    made = [Section(key, title, [b for b in found if b is not None]) for key, title, found in blocks]
    return [section for section in made if section.blocks]


def _record(study: Study) -> list[Block]:
    """The resolved recipe of each arm at its first seed, and where it ran."""
    if not any(run.on_disk for run in study.runs) and not study.cells:
        return []
    blocks: list[Block] = [Text(f"Folder: {study.folder}")]
    for arm in study.arms:
        for run in [run for run in arm.distinct if run.on_disk][:1]:
            recipe = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
            blocks.append(Verbatim(f"Recipe of {arm.name} ({run.directory.path.name})", recipe))
    for run in [run for run in study.runs if run.on_disk][:1]:
        blocks.append(Verbatim("Environment of the first run", json.dumps(run.environment, indent=1)))
    return blocks


def _save_figures(sections: Sequence[Section], folder: Path) -> list[Path]:
    panels = [panel for section in sections for figure in section.figures for panel in figure.panels]
    return [path for panel in panels for path in save(panel.drawing, folder, panel.key)]


def environment() -> Environment:
    """What the templates of all pages have in common: escaping, strict names, code in backticks."""
    made = Environment(
        loader=PackageLoader("headgate.experiments.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["shade"] = shade
    made.filters["code"] = lambda text: Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
    return made


def _render(template: str, study: Study, sections: Sequence[Section], out: Path, refresh: int | None) -> str:
    templates = environment()
    templates.filters["svg"] = lambda panel: Markup(
        inline((out / "figures" / f"{panel.key}.svg").read_text(), panel.key)
    )
    return templates.get_template(template).render(
        study=study,
        sections=sections,
        headline=words.headline(study),
        verdicts=words.verdicts(study),
        scale=_scale(study),
        ticks=_ticks(study),
        warnings=words.warnings(study, live=refresh is not None),
        refresh=refresh,
        metric=words.metric_name(study.metric),
        seeds=words.seeds_phrase(study),
        facts=_facts(study),
        version=headgate.__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _scale(study: Study) -> Callable[[float], float]:
    """Differences as positions on the verdicts' common 200-unit axis around zero."""
    reach = _reach(study)
    return lambda x: round(100 + 92 * x / reach, 1)


def _ticks(study: Study) -> list[tuple[float, str]]:
    """Where the axis is labelled, and with what: its ends and zero."""
    scale, reach = _scale(study), _reach(study)
    return [
        (scale(x), words.number(study.metric, x, signed=True) if x else "0") for x in (-reach, 0.0, reach)
    ]


def _reach(study: Study) -> float:
    """How far the axis goes. An arm without training does not set it: doing nothing may lie far off."""
    found = {v.arm: v.interval for v in words.verdicts(study) if v.interval is not None}
    spans = [span for name, span in found.items() if study.arm(name).trained] or list(found.values())
    return max((max(abs(low), abs(high)) for low, _, high in spans), default=0.0) or 1.0


def _facts(study: Study) -> dict[str, object]:
    """The byline: model, metric, seeds, runs."""
    facts = {"Model": study.model or "–", "Metric": words.metric_name(study.metric)}
    if study.seeds:
        facts["Seeds"] = ", ".join(map(str, study.seeds))
    if study.cells:
        return {**facts, "Comparisons": str(len(study.cells))}
    complete = sum(run.result is not None for run in study.runs)
    return {**facts, "Runs": f"{complete} complete of {len(study.runs) + len(study.missing)}"}
