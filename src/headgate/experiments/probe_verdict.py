"""What the probe's measurements say, in numbers and in words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headgate.experiments.probe import Measured
from headgate.experiments.records import Figures
from headgate.methods.backward_gate.payoff import Form, Verdict, auroc, learns, repeats_worth, verdicts
from headgate.ops.payoff import break_even, relative_cost, required_worth

BOUND_AT = (0.1, 0.3)


def verdict(found: Measured) -> Figures:
    """JSON: ``pays``, ``rho``, ``w``, ``why``, and what they rest on."""
    rows = (found.gains[0], found.gains[1])
    batches = (_of_batches(found, rows[0]), _of_batches(found, rows[1]))
    mean = (rows[0] + rows[1]) / 2
    share, w = repeats_worth(mean)
    rare = (
        mean >= mean.sort(descending=True).values[max(0, round(share * len(mean)) - 1)]
        if share
        else mean > math.inf
    )
    forms = {
        Form("batch"): (found.batch_scores["late"], batches),
        Form("batch, early", found.depth): (found.batch_scores["early"], batches),
        Form("rows", again=True): (found.row_scores["late"], rows),
        Form("rows, early", found.depth, again=True): (found.row_scores["early"], rows),
    }
    ranked = verdicts({f: s for f, (s, _) in forms.items()}, {f: g for f, (_, g) in forms.items()}, found.rho)
    oracle = next(v for v in ranked if v.score == "oracle")
    gate = next(v for v in ranked if v.score != "oracle")
    anything = learns(rows)
    pays = anything and gate.pays
    return {
        "pays": pays,
        "why": _why(anything, oracle, gate, share, w),
        "rho": round(found.rho, 3),
        "rho_flops": round(found.rho_flops, 3),
        "w": round(w, 3),
        "rare_share": round(share, 3),
        "separability": {
            kind: {name: _number(auroc(score, rare)) for name, score in scores.items()}
            for kind, scores in found.row_scores.items()
        },
        "bound": {
            f"{a:g}": {
                "worth_needed": round(required_worth(a, relative_cost(a, found.rho)), 3),
                "w_needed": round(break_even(a, relative_cost(a, found.rho)), 3),
                "w_needed_early": round(break_even(a, relative_cost(a, found.rho, found.depth)), 3),
            }
            for a in BOUND_AT
        },
        "form": _settings(gate, found) if pays else None,
        "best": [_as_dict(v) for v in ranked],
        "measured": {
            "rows": len(mean),
            "batches": len(batches[0]),
            "warm_up": found.warm_up,
            "continued": found.continued,
            "seconds": round(found.seconds, 1),
            "mean_loss": round(float(found.losses.mean()), 4),
            "mean_gain": round(float(mean.mean()), 4),
        },
    }


def _of_batches(found: Measured, gain_N: Tensor) -> Tensor:
    """Gain of every batch of the pool per token, ``[M]``."""
    count = int(found.batch.max()) + 1
    zero = torch.zeros(count, dtype=torch.float64)
    tokens = zero.index_add(0, found.batch, found.tokens)
    return zero.index_add(0, found.batch, gain_N * found.tokens) / tokens.clamp(min=1)


def _why(anything: bool, oracle: Verdict, gate: Verdict, share: float, w: float) -> str:
    kinds = (
        f"{share:.0%} of the rows stand out, and the others are worth {w:.2f} of them"
        if share
        else "no rows stand out of the others in what they teach"
    )
    if not anything:
        return "training on lowers the loss of no part of the data: there is nothing to gate, and little reason to train"
    if not oracle.pays:
        return (
            f"not even an oracle wins: {kinds}; at its best ({oracle.form}, acceptance {oracle.acceptance:g}) what it "
            f"accepts is worth {oracle.worth:.2f} average ones and has to be worth {oracle.needed:.2f}"
        )
    if not gate.pays:
        return (
            f"an oracle would win ({oracle.advantage:.2f} times as fast, {oracle.form}), but no score finds what it knows: "
            f"{kinds}; by {gate.score} ({gate.form}, acceptance {gate.acceptance:g}) an accepted unit is worth "
            f"{gate.worth:.2f} and has to be worth {gate.needed:.2f}"
        )
    return (
        f"{kinds}; chosen by {gate.score} ({gate.form}, acceptance {gate.acceptance:g}) an accepted unit is worth "
        f"{gate.worth:.2f} average ones and has to be worth {gate.needed:.2f}: about {gate.advantage:.2f} times as fast"
    )


def _settings(gate: Verdict, found: Measured) -> Figures:
    """The ``methods.backward_gate`` block of the form that pays."""
    settings: Figures = {
        "score": gate.score,
        "rule": "quantile",
        "target_acceptance": gate.acceptance,
        "window": 64,
    }
    if gate.form.startswith("rows"):
        settings["granularity"] = "sequence"
    if gate.form.endswith("early"):
        settings["score_layer"] = found.quarter
    return settings


def _as_dict(v: Verdict) -> Figures:
    return {key: round(x, 3) if isinstance(x, float) else x for key, x in vars(v).items()} | {"pays": v.pays}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)
