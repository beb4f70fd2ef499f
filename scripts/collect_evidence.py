"""Collects the verdicts of the committed comparisons.

python scripts/collect_evidence.py     # writes src/headgate/experiments/evidence.json and the table of EXPERIMENTS.md
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- verdicts: written by scripts/collect_evidence.py -->", "<!-- end of verdicts -->"

STALE: set[str] = set()
"""Comparisons that were measured before a fault was mended: kept in EXPERIMENTS.md, not shipped as evidence."""

QUESTIONS = [
    # method, question, comparison, contrast, recipe
    ("schema_bank", "does the curriculum help LoRA?", "schema_bank_controls", "bank", "schema_bank/controls"),
    ("schema_bank", "... against LoRA under the same schedule?", "schema_bank_controls", "bank - lora_same_schedule", "schema_bank/controls"),
    ("schema_bank", "... is it the trained routing?", "schema_bank_controls", "bank - frozen_random_router", "schema_bank/controls"),
    ("schema_bank", "... is it the right tags?", "schema_bank_controls", "bank - permuted_tags", "schema_bank/controls"),
    ("schema_bank", "what does taking the bank away at the end cost?", "schema_bank_removal", "abrupt", "schema_bank/removal"),
    ("schema_bank", "... does dropping it in half of the steps save some of that?", "schema_bank_removal", "dropout - abrupt", "schema_bank/removal"),
    ("schema_bank", "two stages against training all at once", "schema_bank_stages", "two - one", "schema_bank/stages"),
    ("layer_routing", "25% skip: does a token router beat random gates?", "layer_routing_25_masks", "gumbel_token", "layer_routing/controls_25"),
    ("layer_routing", "... the best of all fixed masks, each trained for itself?", "layer_routing_25_masks", "gumbel_token - static_best", "layer_routing/controls_25"),
    ("layer_routing", "... what are patches on skipped blocks worth to the router?", "layer_routing_25_masks", "gumbel_token_p - gumbel_token", "layer_routing/controls_25"),
    ("layer_routing", "... and what does it cost against full depth?", "layer_routing_25_masks", "gumbel_token - dense", "layer_routing/controls_25"),
    ("layer_routing", "50% skip: does a token router beat random gates?", "layer_routing_50_masks", "gumbel_token", "layer_routing/controls_50"),
    ("layer_routing", "... a fixed mask that a trained search found in its run?", "layer_routing_50_masks", "gumbel_token - static", "layer_routing/controls_50"),
    ("layer_routing", "... the best of all fixed masks, each trained for itself?", "layer_routing_50_masks", "gumbel_token - static_best", "layer_routing/controls_50"),
    ("layer_routing", "... what are patches on skipped blocks worth to the router?", "layer_routing_50_masks", "gumbel_token_p - gumbel_token", "layer_routing/controls_50"),
    ("layer_routing", "... does a router that starts at the mask, with patches, beat the mask with patches?", "layer_routing_50_masks", "gumbel_mask_p - static_p", "layer_routing/controls_50"),
    ("layer_routing", "... and what does it cost against full depth?", "layer_routing_50_masks", "gumbel_token - dense", "layer_routing/controls_50"),
    ("layer_routing", "25% skip on a real model: a token router against random gates", "layer_routing_babyllama_25_masks", "gumbel_token", "layer_routing/babyllama_25"),
    ("layer_routing", "... against the best fixed mask of a 20% skip", "layer_routing_babyllama_25_masks", "gumbel_token - static_20", "layer_routing/babyllama_25"),
    ("layer_routing", "... of a 40% skip", "layer_routing_babyllama_25_masks", "gumbel_token - static_40", "layer_routing/babyllama_25"),
    ("layer_routing", "50% skip on a real model, masks trained: a router that starts at the mask against random gates", "layer_routing_babyllama_50_masks", "gumbel_mask", "layer_routing/babyllama_50"),
    ("layer_routing", "... with patches, against its mask trained throughout (40% skipped)", "layer_routing_babyllama_50_masks", "gumbel_mask_p - static_40_p", "layer_routing/babyllama_50"),
    ("layer_routing", "... against the best mask of a 60% skip", "layer_routing_babyllama_50_masks", "gumbel_mask_p - static_60_p", "layer_routing/babyllama_50"),
    ("lora_experts", "does it forget less than one LoRA?", "lora_experts_retention_short", "lora_experts", "lora_experts/retention_short"),
    ("lora_experts", "... than 10% replay?", "lora_experts_retention_short", "lora_experts - replay_10", "lora_experts/retention_short"),
    ("lora_experts", "... than EWC?", "lora_experts_retention_short", "lora_experts - ewc", "lora_experts/retention_short"),
    ("lora_experts", "... how far is it from oracle routing?", "lora_experts_retention_short", "lora_experts - oracle", "lora_experts/retention_short"),
    ("lora_experts", "... and from joint training?", "lora_experts_retention_short", "lora_experts - joint", "lora_experts/retention_short"),
    ("lora_experts", "with `router: bayes` in place of `prototype`: how far is it from oracle routing?", "lora_experts_retention_bayes", "bayes", "lora_experts/retention_short"),
    ("lora_experts", "real stream of six texts: does it forget less than one LoRA?", "lora_experts_real_stream", "lora_experts", "lora_experts/real_stream"),
    ("lora_experts", "... than 10% replay?", "lora_experts_real_stream", "lora_experts - replay_10", "lora_experts/real_stream"),
    ("lora_experts", "... how far is it from oracle routing?", "lora_experts_real_stream", "lora_experts - oracle", "lora_experts/real_stream"),
    ("lora_experts", "four texts, from low to high loss, every arm tuned: than DER++?", "lora_experts_orders_low_to_high", "lora_experts - derpp", "lora_experts/orders"),
    ("lora_experts", "... from high to low?", "lora_experts_orders_high_to_low", "lora_experts - derpp", "lora_experts/orders"),
    ("lora_experts", "... mixed?", "lora_experts_orders_mixed", "lora_experts - derpp", "lora_experts/orders"),
    ("lora_experts", "... how far is it from oracle routing, from low to high loss?", "lora_experts_orders_low_to_high", "lora_experts - oracle", "lora_experts/orders"),
    ("lora_experts", "... how far is it from oracle routing, from high to low?", "lora_experts_orders_high_to_low", "lora_experts - oracle", "lora_experts/orders"),
    ("lora_experts", "... how far is it from oracle routing, mixed?", "lora_experts_orders_mixed", "lora_experts - oracle", "lora_experts/orders"),
    ("lora_experts", "merging two experts of each skill into one: what does it cost? (token accuracy: higher is better)", "lora_experts_merging", "merged", "lora_experts/merging"),
    ("backward_gate", "GSM8K among mastered stories: does the energy gate beat plain LoRA in the same time on the rare part?", "backward_gate_map_stories", "energy - lora_equal_time", "backward_gate/map_stories"),
    ("backward_gate", "... and a random gate?", "backward_gate_map_stories", "energy - random", "backward_gate/map_stories"),
    ("backward_gate", "... and a gate that looks at the loss alone?", "backward_gate_map_stories", "energy - loss", "backward_gate/map_stories"),
    ("backward_gate", "... what do the stories pay?", "backward_gate_map_stories_common", "energy - lora_equal_time", "backward_gate/map_stories"),
    ("backward_gate", "a new family among mastered ones: the adaptive dose against LoRA in its time", "backward_gate_map_rare_skill", "energy_adaptive - lora_adaptive_time", "backward_gate/map_rare_skill"),
    ("backward_gate", "... a gate that looks at the loss alone", "backward_gate_map_rare_skill", "loss - lora_adaptive_time", "backward_gate/map_rare_skill"),
    ("backward_gate", "40 rows repeated: the energy gate against LoRA in the same time", "backward_gate_map_exact_repeats", "energy - lora_equal_time", "backward_gate/map_exact_repeats"),
    ("backward_gate", "redundant stream: does gradient novelty beat chance?", "backward_gate_ablations_redundant", "novelty - random", "backward_gate/ablations"),
    ("backward_gate", "... and plain LoRA in the same time?", "backward_gate_ablations_redundant", "novelty - equal_time", "backward_gate/ablations"),
    ("backward_gate", "clean stream: does gradient novelty beat chance?", "backward_gate_ablations_clean", "novelty - random", "backward_gate/ablations_clean"),
    ("backward_gate", "... and plain LoRA in the same time?", "backward_gate_ablations_clean", "novelty - equal_time", "backward_gate/ablations_clean"),
]  # fmt: skip


def collected() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for method, question, name, key, recipe in QUESTIONS:
        if name in STALE:
            continue
        file = RESULTS / f"{name}.comparison.json"
        if not file.exists():
            print(f"not measured: {file.name}", file=sys.stderr)
            continue
        report = json.loads(file.read_text())
        found = report["pairs"].get(key) or report["contrasts"].get(key)
        if found is None or found["t"] is None:
            print(f"without an interval: {key} in {file.name}", file=sys.stderr)
            continue
        t = found["t"]
        rows.append(
            {
                "method": method,
                "question": question,
                "contrast": key if " - " in key else f"{key} - {report['baseline']}",
                "metric": report["metric"].removeprefix("evaluation."),
                "mean": t["mean"],
                "low": t["low"],
                "high": t["high"],
                "seeds": len(report["seeds"]),
                "model": report["model"].rsplit("/", 1)[-1],
                "verdict": found["verdict"],
                "command": f"headgate compare recipes/{recipe}.yaml",
            }
        )
    return rows


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| method | question | contrast | difference [95% t] | seeds | model | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row)
        lines.append(
            f"| `{row['method']}` | {row['question']} | {row['contrast']} | {difference} | {row['seeds']} | "
            f"{row['model']} | {row['verdict']} |"
        )
    commands = dict.fromkeys(str(row["command"]) for row in rows)
    lines += ["", "Commands, in order: " + "; ".join(f"`{command}`" for command in commands) + "."]
    return "\n".join(lines)


def main() -> None:
    rows = collected()
    target = ROOT / "src" / "headgate" / "experiments" / "evidence.json"
    target.write_text(json.dumps(rows, indent=1) + "\n")
    page = ROOT / "EXPERIMENTS.md"
    text = page.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        sys.exit(f"{page} has no place for the verdicts: put {BEGIN} and {END} there")
    page.write_text(pattern.sub(lambda _: f"{BEGIN}\n{table(rows)}\n{END}", text))
    print(f"{len(rows)} verdicts in {target} and {page}")


if __name__ == "__main__":
    main()
