"""The report of a comparison, a run, or a folder of runs: one self-contained page, figures, tables.

``reading`` makes a ``study`` of the folder, ``words`` says what was found, ``figures`` and ``sections`` draw, ``page`` renders.
A page shows what the runs hold: no statistics are computed here that a comparison has not written, and no point
is drawn that was not measured.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headgate.experiments.report.overview import write_overview as write_overview
    from headgate.experiments.report.page import write_figures as write_figures
    from headgate.experiments.report.page import write_report as write_report

__all__ = ["write_figures", "write_overview", "write_report"]


def __getattr__(name: str) -> object:
    """The writers when they are asked for: an address is served before matplotlib and scipy are there."""
    if name == "write_overview":
        from headgate.experiments.report.overview import write_overview

        return write_overview
    if name in __all__:
        from headgate.experiments.report import page

        return getattr(page, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
