"""The report of a comparison, a run, or a folder of runs: one self-contained page, figures, tables.

``reading`` makes a ``study`` of the folder, ``words`` says what was found, ``figures`` and ``sections`` draw, ``page`` renders.
A page shows what the runs hold: no statistics are computed here that a comparison has not written, and no point
is drawn that was not measured.
"""

from headgate.experiments.report.overview import write_overview
from headgate.experiments.report.page import write_figures, write_report

__all__ = ["write_figures", "write_overview", "write_report"]
