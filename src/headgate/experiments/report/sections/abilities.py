"""General abilities before and after training, beside the metric that training was for."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from headgate.experiments.records import Figures
from headgate.experiments.report.content import Block, Table, Text
from headgate.experiments.report.study import Arm, Study
from headgate.experiments.report.words import metric_name, number


def abilities(study: Study) -> list[Block]:
    """Empty where no run measured the suite before and after."""
    rows = []
    for arm in study.arms:
        results = list(_results(arm))
        if not results:
            continue
        learned = list(arm.values(study.metric).values()) if study.metric is not None else []
        fields = {
            **_means([result["delta"]["by_family"] for result in results]),
            **{k: -v for k, v in _means([r["delta"]["loss_by_register"] for r in results]).items()},
        }
        worst = sorted((change, name) for name, change in fields.items() if change < 0)[:3]
        rows.append(
            [
                arm.name,
                number(study.metric, fmean(learned)) if learned and study.metric is not None else "-",
                f"{fmean(r['before']['accuracy'] for r in results):.1%}",
                f"{fmean(r['delta']['accuracy'] for r in results):+.1%}",
                f"{fmean(r['before']['loss'] for r in results):.3f}",
                f"{fmean(r['delta']['loss'] for r in results):+.3f}",
                ", ".join(name for _, name in worst) or "nothing",
            ]
        )
    if not rows:
        return []
    learned_name = metric_name(study.metric) if study.metric is not None else "-"
    columns = ["arm", learned_name, "accuracy before", "change", "loss before", "change", "worst changes"]
    return [
        Text(
            "A fixed suite of 48 questions and six short texts, measured on the base model and on the trained one: what "
            "was forgotten beside what was learned. Means over seeds."
        ),
        Table("General abilities", columns, rows, (1, 2, 3, 4, 5)),
    ]


def _results(arm: Arm) -> Iterable[Figures]:
    for run in arm.distinct:
        for metrics in ((run.result or {}).get("evaluation") or {}).values():
            if isinstance(metrics, dict) and "delta" in metrics and "loss_by_register" in metrics["delta"]:
                yield metrics


def _means(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(part[name] for part in parts) for name in parts[0]}
