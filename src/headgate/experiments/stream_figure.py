"""A stream of skills as a picture: a line for each expert, from its birth to its end, and what was decided about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headgate.experiments.records import Figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def stream_figure(stream: Figures) -> Figure:
    """Optimizer steps to the right, experts upwards; see ``methods.lora_experts.inspect.timeline``."""
    from matplotlib.figure import Figure

    lives, events = stream["lives"], stream["events"]
    row = {life["expert"]: place for place, life in enumerate(lives)}
    last = max([event["step"] for event in events], default=0)
    edge = last + max(1, last // 10)  # what is there at the end goes on beyond the last decision
    drawn = Figure(figsize=(7.2, 1.4 + 0.35 * len(row)), layout="constrained")
    axes = drawn.subplots()
    for life in lives:
        stop = edge if life["until"] is None else life["until"]
        style = "-" if life["here"] or life["until"] is not None else ":"
        axes.plot([life["from"], stop], [row[life["expert"]]] * 2, style, color="0.7", lw=3, zorder=1)
        if life["heir"] in row:
            ends = (row[life["expert"]], row[life["heir"]])
            axes.annotate(
                "", (stop, ends[1]), (stop, ends[0]), arrowprops={"arrowstyle": "->", "color": "0.5"}
            )
    for what in dict.fromkeys(event["what"] for event in events):
        points = [(e["step"], row[n]) for e in events if e["what"] == what for n in e["experts"] if n in row]
        if points:
            axes.scatter(*zip(*points, strict=True), label=what, zorder=2)
    served: dict[int, list[str]] = {}
    for skill, number in stream["served"].items():
        served.setdefault(number, []).append(skill)
    names = [f"{number}: {', '.join(served[number])}" if number in served else str(number) for number in row]
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="optimizer step", ylabel="expert: the skills it serves", title="The stream")
    if events:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return drawn
