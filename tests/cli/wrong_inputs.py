"""What a new user gets wrong: inputs that must end in one line with the cure, before any long work (docs/wrong_inputs.md)."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path
from typing import NamedTuple


class Wrong(NamedTuple):
    """``arguments`` of ``headgate``, in a folder that ``prepare`` filled."""

    arguments: tuple[str, ...]

    @property
    def shown(self) -> str:
        return " ".join(
            f"'{word}'" if any(sign in word for sign in " {[*") else word for word in self.arguments
        )


RECIPE = """\
name: mine
model: {name_or_path: embedded}
lora: {r: 8, alpha: 16}
data:
  train: {source: jsonl, path: rows.jsonl}
  validation: {source: jsonl, path: held.jsonl}
training: {max_steps: 4, per_device_train_batch_size: 2}
"""
COMPARED = (
    RECIPE
    + "compare: {seeds: [1, 2], baseline: lora, arms: {lora: {}, gate: {methods: {backward_gate: {}}}}}\n"
)

FILES: dict[str, str | bytes] = {
    "r.yaml": RECIPE,
    "c.yaml": COMPARED,
    "sweep.yaml": RECIPE + "sweep: {grid: {training.learning_rate: [1.0e-3, 3.0e-3]}}\n",
    "rows.jsonl": "".join(
        json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) + "\n" for n in range(40)
    ),
    "held.jsonl": "".join(
        json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) + "\n" for n in range(90, 99)
    ),
    "empty.yaml": "",
    "list.yaml": "- 1\n- 2\n",
    "torn.yaml": "model: {name_or_path: embedded\ntraining: [",
    "tab.yaml": "model:\n\tname_or_path: embedded\n",
    "twice.yaml": RECIPE + "training: {max_steps: 8}\n",
    "latin.yaml": "name: caf\xe9\n".encode("latin-1"),
    "empty.jsonl": "",
    "torn.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl\n',
    "numbers.jsonl": "1\n2\n",
    "table.jsonl": "prompt,completion\na,b\n",
    "other.jsonl": '{"q": "1 + 1", "a": "2"}\n',
    "none.jsonl": '{"prompt": "1 + 1", "completion": ""}\n',
    "null.jsonl": '{"prompt": null, "completion": "2"}\n',
    "latin.jsonl": b'{"prompt": "caf\xe9", "completion": "2"}\n',
    "rows.parquet": b"PAR1 and nothing else",
    "rows.xyz": "a\n",
    "half/config.json": '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"',
    "bert/config.json": '{"architectures": ["BertModel"], "model_type": "bert"}',
    "runs/torn/recipe.yaml": RECIPE,
    "runs/torn/result.json": '{"metrics": {"eval_loss": 1.',
}


def prepare(folder: Path) -> None:
    """Write the files that the inputs name."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _set(*changes: str, verb: str = "validate", recipe: str = "r.yaml") -> Wrong:
    return Wrong((verb, recipe, *(part for change in changes for part in ("--set", change))))


COMMANDS = [
    "trian r.yaml",
    "train",
    "train nope.yaml",
    "train r.yml",
    "train r.yaml --recsume",
    "train r.yaml --nproc 0",
    "train r.yaml --resume",
    "train --data rows.jsonl --methods layer_rooting",
    "train --data nope.jsonl",
    "train r.yaml --data rows.jsonl",
    "train r.yaml --set training",
    "train r.yaml --set training.max_step=4",
    "train r.yaml --set =4",
    "compare r.yaml",
    "compare c.yaml --executor kubernetes",
    "compare c.yaml --workers -1",
    "compare c.yaml --option partition",
    "compare --methods layer_routing",
    "sweep r.yaml",
    "sweep sweep.yaml --executor slrum",
    "validate empty.yaml",
    "validate list.yaml",
    "validate torn.yaml",
    "validate tab.yaml",
    "validate twice.yaml",
    "validate latin.yaml",
    "validate rows.jsonl",
    "validate half",
    "eval runs/nope",
    "eval runs/torn",
    "generate runs/nope",
    "generate runs/torn --prompt hello",
    "export runs/nope --to peft",
    "export runs/torn --to gguf",
    "verify runs/nope",
    "report nope",
    "report runs/torn",
    "inspect runs/nope",
    "diff runs/torn runs/nope",
    "cite runs/nope",
    "push runs/nope me/it",
    "bench routin",
    "recipes show nope",
    "init --data nope.jsonl",
    "init --data numbers.jsonl",
    "init --data table.jsonl",
    "init --data empty.jsonl",
    "equations nope",
    "probe nope.yaml",
    "data nope.yaml",
]
SETTINGS = [
    "seed=-1",
    "seed=abc",
    "nmae=mine",
    "name=a/b",
    "output_dir=/proc/nowhere",
    "report_to=[wandb]",
    "report_to=[wanbd]",
    "model.name_or_path=embeded",
    "model.name_or_path=./nope",
    "model.name_or_path=half",
    "model.name_or_path=bert",
    "model.name_or_path=null",
    "model.dtype=fp23",
    "model.device=cuda",
    "model.device=gpu",
    "model.attn_implementation=flash_attention_2",
    "model.load_in_4bit=true",
    "model.compile=induktor",
    "model.parallel={fspd: 2}",
    "lora.r=0",
    "lora.r=100000",
    "lora.r=eight",
    "lora.alpha=-1",
    "lora.dropout=1.5",
    "lora.target_modules=[qproj]",
    "lora=16",
    "data.train.path=nope.jsonl",
    "data.train.path=empty.jsonl",
    "data.train.path=torn.jsonl",
    "data.train.path=numbers.jsonl",
    "data.train.path=table.jsonl",
    "data.train.path=other.jsonl",
    "data.train.path=none.jsonl",
    "data.train.path=null.jsonl",
    "data.train.path=latin.jsonl",
    "data.train.path=rows.parquet",
    "data.train.path=rows.xyz",
    "data.train.path=nope/*.jsonl",
    "data.train.columns={prompt: question}",
    "data.train.limit=0",
    "data.train.source=gsm8kk",
    "data.train.options={chunk_character: 200}",
    "data.train.filter={kind: hard}",
    "data.max_length=999999999",
    "data.max_length=0",
    "data.max_length=4",
    "data.loss_on=completions",
    "data.packing=yes please",
    "data.stream=[]",
    "training.learning_rate=.inf",
    "training.learning_rate=-1.0e-3",
    "training.learning_rate=1e-3x",
    "training.max_steps=1.5",
    "training.epochs=0",
    "training.lr_scheduler=cosin",
    "training.per_device_train_batch_size=0",
    "training.eval_every=0",
    "training.save_every=-3",
    "training.warmup_ratio=3",
    "training.max_grad_norm=-1",
    "training.optimizer=adamm",
    "training.precision=fp8",
    "training.early_stopping={patience: 2, metric: eval_los}",
    "training.early_stopping={patience: 0}",
    "training.gradient_checkpointing=maybe",
    "evaluation=[{task: perplexty}]",
    "evaluation=[{task: exact_match, source: jsonl, path: nope.jsonl}]",
    "evaluation=[{task: exact_match, source: jsonl, path: held.jsonl, max_new_tokens: 0}]",
    "methods=layer_routing",
    "methods.layer_rooting={}",
    "methods.layer_routing={target_utilisation: 0.5}",
    "methods.layer_routing={target_utilization: 1.5}",
    "methods.layer_routing={policy: gumble}",
    "methods.layer_routing={policy: static, skip: [99]}",
    "methods.layer_routing={keep: 20}",
    "methods.backward_gate={target_acceptance: 0}",
    "methods.backward_gate={score: noveltee}",
    "methods.backward_gate={score_layer: 40}",
    "methods.lora_experts={experts: 0}",
    "methods.lora_experts={top_k: 0}",
    "methods.lora_experts={router: prototyp}",
    "methods.schema_bank={tags: keywords}",
    "methods.schema_bank={num_schemas: 0}",
]  # fmt: skip
COMPARISONS = [
    "compare.metric=perplexty",
    "compare.baseline=loar",
    "compare.seeds=[]",
    "compare.seeds=[1, 1]",
    "compare.arms={}",
    "compare.arms.gate={method: {}}",
    "compare.arms.gate={equal_time: nobody}",
    "compare.contrasts=[[gate, nobody]]",
    "compare.tune={values: []}",
    "compare.tune={values: [1.0e-3], key: training.learning_rat}",
    "compare.tune={values: [1.0e-3], metric: eval_los}",
    "compare.arms.gate={entry: nomodule:train}",
]
WRONG = [
    *(Wrong(tuple(line.split())) for line in COMMANDS),
    *(_set(change) for change in SETTINGS),
    *(_set(change, recipe="c.yaml") for change in COMPARISONS),
    _set("training.early_stopping={patience: 2}", "data.validation=null"),
    _set("lora=null", "model.load_in_4bit=true"),
]


def said(wrong: Wrong) -> tuple[int, str]:
    """Exit code and standard error of one command, run in this process and folder."""
    from headgate.cli.main import main

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = ["headgate", *wrong.arguments], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception:
        return 1, traceback.format_exc()
    finally:
        sys.argv = argv
    return code, err.getvalue()


def last_line(text: str) -> str:
    """The line that says it: where a file's own lines are shown too, the first; a usage error of typer is in a box."""
    lines = text.splitlines()
    box = [n for n, line in enumerate(lines) if line.startswith("╭")]
    if box:
        return " ".join(line.strip(" │") for line in lines[box[-1] + 1 :] if line.startswith("│"))
    told = [line for line in lines if line.startswith("error: ")] or lines[-1:]
    return told[0] if told else ""
