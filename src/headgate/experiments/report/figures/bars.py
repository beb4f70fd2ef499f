"""One figure of every arm as bars: the mean over seeds and each seed's own value."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from headgate.experiments.report.content import Panel
from headgate.experiments.report.study import Study
from headgate.experiments.report.style import INK, WIDTH, bars, colours, new_panel


def bar_panel(
    study: Study, values: Mapping[str, Sequence[float]], key: str, title: str, *, form: str = ".4f"
) -> Panel | None:
    """``values`` by arm; arms without any are left out. None where all are."""
    means = {name: statistics.fmean(found) for name, found in values.items() if found}
    if not means:
        return None
    drawing, axes = new_panel((WIDTH, 0.6 + 0.3 * len(means)))
    colour = colours([arm.name for arm in study.arms], study.baseline)
    texts = {name: format(mean, form) for name, mean in means.items()}
    bars(axes, means, colour, texts)
    for row, name in enumerate(means):
        axes.plot(values[name], [row] * len(values[name]), "|", color=INK, markersize=6, markeredgewidth=0.8)
    axes.set_title(title)
    return Panel(key, drawing, f"{title}: {'; '.join(f'{name} {text}' for name, text in texts.items())}.")
