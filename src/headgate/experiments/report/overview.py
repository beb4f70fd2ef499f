"""One page over several comparisons: question, verdict and interval of each, one picture, and the way to its own page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from markupsafe import Markup

import headgate
from headgate.errors import ConfigError
from headgate.experiments.report import words
from headgate.experiments.report.figures.overview import overview
from headgate.experiments.report.page import environment, write_report
from headgate.experiments.report.reading import read_study
from headgate.experiments.report.study import Study
from headgate.experiments.report.style import house_style, inline, save
from headgate.files import write_atomically


@dataclass(frozen=True)
class Entry:
    """One comparison as the page lists it: ``place`` is its own page, relative to this one."""

    title: str
    question: str
    study: Study
    place: str

    @property
    def headline(self) -> str:
        return words.headline(self.study)

    @property
    def verdicts(self) -> Sequence[words.Verdict]:
        return words.verdicts(self.study)

    @property
    def contrasts(self) -> Sequence[str]:
        """The other pairs that the recipe asked for, in words."""
        pairs: Mapping[str, Mapping[str, object]] = (
            {} if self.study.summary is None else self.study.summary["pairs"]
        )
        return [f"{name}: {pair['verdict']}" for name, pair in pairs.items()]


def write_overview(
    title: str, lede: str, folders: Mapping[str, Path], out: Path, questions: Mapping[str, str]
) -> Path:
    """``out/index.html`` and ``out/overview.png``, ``.svg``; each folder's own report is written too.

    Args:
        folders: name -> the folder of a comparison. questions: name -> what it asks, where that is known.

    Raises ConfigError without folders, CheckpointError for one that holds no comparison.
    """
    if not folders:
        raise ConfigError("an overview needs at least one comparison")
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, folder in folders.items():
        own = write_report(folder).page
        study = read_study(folder)
        entries.append(Entry(name, questions.get(name, ""), study, os.path.relpath(own, out)))
    with house_style():
        panel = overview([entry.study for entry in entries])
        picture = None
        if panel is not None:
            svg = save(panel.drawing, out, panel.key)[0]
            picture = Markup(inline(svg.read_text(), panel.key))
    page = (
        environment()
        .get_template("overview.html")
        .render(
            title=title,
            lede=lede,
            entries=entries,
            picture=picture,
            alt="" if panel is None else panel.alt,
            version=headgate.__version__,
            written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    write_atomically(out / "index.html", page)
    return out / "index.html"
