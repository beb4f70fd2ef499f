"""Continual learning in numbers: what a model knows of every skill after every segment of a stream.

``R[t][i]`` is the loss (or accuracy) on skill i after segment t of T, ``R[0]`` before any training. With g = +1 for
an accuracy and -1 for a loss, s(i) the first segment that trained skill i and l(i) the last:

    average             mean_i  R[T][i]
    backward transfer   mean_i  g (R[T][i] - R[l(i)][i])              over skills with l(i) < T; above 0: improved since
    forgetting          mean_i  g (best_{s(i)<=t<T} R[t][i] - R[T][i])    over the same skills; 0 or less: nothing lost
    forward transfer    mean_i  g (R[s(i)-1][i] - R[0][i])            over skills with s(i) > 1; above 0: known beforehand
    TRACE's backward    mean_i  g (R[T][i] - R[l(i)][i])              over all skills, those trained last (0) too
    general change      mean_j  g (G[T][j] - G[0][j])                 of what is watched and never trained

TRACE: Wang et al. 2023, section 3.3 (its delta R^G is the general change). Lopez-Paz & Ranzato (GEM, 2017), section 2; forgetting: Chaudhry et al. 2018. Deviations: skills may recur, so
backward transfer counts from the last time a skill was trained; the baseline of forward transfer is the model before
the stream (an adapter starts as the identity), not a random initialisation.
"""

from __future__ import annotations

from collections.abc import Sequence

from headgate.errors import ConfigError
from headgate.evaluation.predictions import Figures

FIGURES = (
    "average",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "trace_backward_transfer",
    "general_change",
)
QUANTITIES = {"loss": False, "accuracy": True}
"""What a matrix may hold, and whether more of it is better."""


def higher_is_better(figure: str, quantity: str = "loss") -> bool:
    """Whether a larger value of one of ``FIGURES`` is better."""
    return {"average": QUANTITIES[quantity], "forgetting": False}.get(figure, True)


def continual_metrics(
    before: Sequence[float],
    matrix: Sequence[Sequence[float]],
    skills: Sequence[str],
    segments: Sequence[str],
    *,
    higher: bool = False,
) -> dict[str, float | None]:
    """The figures of a matrix. None where no skill qualifies (one segment; every skill trained last).

    Args:
        before: ``[skills]``, R[0]. matrix: ``[segments][skills]``, R[1] to R[T].
        skills: names of the columns. segments: the skill that each segment trained.

    Raises ConfigError where the shapes disagree or a segment trained a skill that is no column.
    """
    if len(matrix) != len(segments) or any(len(row) != len(skills) for row in [before, *matrix]):
        raise ConfigError(
            f"a matrix of {len(segments)} segments x {len(skills)} skills is needed, got rows of "
            f"{[len(row) for row in [before, *matrix]]}"
        )
    unknown = [name for name in segments if name not in skills]
    if unknown:
        raise ConfigError(f"segment {unknown[0]!r} trains a skill that is not evaluated: {', '.join(skills)}")
    sign, last = (1 if higher else -1), len(segments)
    rows = [list(before), *[list(row) for row in matrix]]
    backward, forgotten, forward, ended = [], [], [], 0
    for column, skill in enumerate(skills):
        trained = [t for t, name in enumerate(segments, start=1) if name == skill]
        if not trained:
            continue
        values = [sign * row[column] for row in rows]
        ended += trained[-1] == last
        if trained[-1] < last:
            backward.append(values[last] - values[trained[-1]])
            forgotten.append(max(values[trained[0] : last]) - values[last])
        if trained[0] > 1:
            forward.append(values[trained[0] - 1] - values[0])
    return {
        "average": _mean(rows[last]),
        "backward_transfer": _mean(backward),
        "forgetting": _mean(forgotten),
        "forward_transfer": _mean(forward),
        "trace_backward_transfer": sum(backward) / (len(backward) + ended) if backward else None,
    }


def continual_result(
    history: Sequence[Figures],
    skills: Sequence[str],
    segments: Sequence[tuple[str, int]],
    *,
    joint: bool = False,
    watched: Sequence[str] = (),
) -> dict[str, object]:
    """The matrices and figures of a run from its evaluations.

    Args:
        history: log rows with ``step`` and ``eval_<skill>_loss`` / ``eval_<skill>_accuracy``; later rows of a
            step win. segments: (skill, optimizer step at its end) in order.
        joint: all segments were trained at once: the matrix is read at the same steps, but only the average has
            a meaning, and the transfers are None. watched: data that is validated beside the skills and never trained
            (``data.watch``): its change from the first row to the last is the general one.

    The loss stands at the top level, the accuracy of the same evaluations under ``accuracy``.
    """
    found: Figures = {
        "skills": list(skills),
        "segments": [skill for skill, _ in segments],
        "steps": [step for _, step in segments],
    }
    for quantity, higher in QUANTITIES.items():
        rows = [_row(history, skills, quantity, step) for step in (0, *found["steps"])]
        figures = continual_metrics(rows[0], rows[1:], skills, found["segments"], higher=higher)
        if joint:
            figures = {name: value if name == "average" else None for name, value in figures.items()}
        ends = [_row(history, watched, quantity, step) for step in (0, found["steps"][-1])]
        sign = 1 if higher else -1
        changes = [sign * (after - before) for before, after in zip(*ends, strict=True)]
        figures["general_change"] = _mean(changes)
        directions = {name: "higher" if higher_is_better(name, quantity) else "lower" for name in FIGURES}
        own = {"before": rows[0], "matrix": rows[1:], **figures, "better": directions}
        found |= own if quantity == "loss" else {quantity: own}
    return found


def _row(history: Sequence[Figures], skills: Sequence[str], quantity: str, step: int) -> list[float]:
    values: dict[str, float] = {}
    for logged in history:
        if logged["step"] == step:
            values.update({s: logged[k] for s in skills if (k := f"eval_{s}_{quantity}") in logged})
    missing = [skill for skill in skills if skill not in values]
    if missing:
        raise ConfigError(
            f"skill {missing[0]!r} was not evaluated at step {step}: the matrix would have a hole"
        )
    return [values[skill] for skill in skills]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
