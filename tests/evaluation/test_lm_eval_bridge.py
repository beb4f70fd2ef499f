"""The bridge agrees with the harness's own model class, and a wrong task file is named with its field."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from headgate.errors import ConfigError
from headgate.evaluation.config import EvalTask
from headgate.evaluation.lm_eval_bridge import bridge_class, continuation_scores
from headgate.evaluation.lm_eval_files import check_task_files
from headgate.evaluation.tasks import run_task

GENERATIVE = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}} =",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOICE = {
    **{k: GENERATIVE[k] for k in ("dataset_path", "dataset_kwargs", "test_split")},
    "task": "pick",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} =",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    **{k: GENERATIVE[k] for k in ("dataset_path", "dataset_kwargs", "test_split")},
    "task": "likelihood",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{story}}",
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {
            "question": f"{i} plus {i % 4}",
            "answer": str(i + i % 4),
            "choices": [str(i + d) for d in range(4)],
            "label": i % 4,
            "story": f"Tom has {i} apples. " * (i % 5 + 1),
        }
        for i in range(24)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in (GENERATIVE, CHOICE, ROLLING):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return folder


def harness(model: Any, folder: Path, names: list[str], **options: Any) -> Any:
    """The harness with its own model class, from the folder of the tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    before = os.getcwd()
    os.chdir(folder)
    try:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        return simple_evaluate(
            HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=4),
            tasks=names,
            task_manager=manager,
            bootstrap_iters=0,
            **options,
        )
    finally:
        os.chdir(before)


def test_equal_to_the_harness_on_the_merged_export_of_a_live_run(tmp_path: Path, tasks: Path) -> None:
    """A trained run through the bridge, its merged export through HFLM: the same scores, item by item."""
    import headgate as hg
    from headgate.experiments.export import export
    from headgate.experiments.recipe import Recipe
    from headgate.experiments.run import run

    recipe = Recipe(
        name="bridge",
        output_dir=str(tmp_path / "runs"),
        model={"name_or_path": "random:llama", "device": "cpu"},
        lora={"r": 4, "dropout": 0.0},
        data={"train": {"source": "wordmath", "limit": 24}, "validation": None, "max_length": 256},
        training={"max_steps": 6, "learning_rate": 0.01},
    )
    directory = run(recipe)
    export(directory.path, tmp_path / "merged", "merged")
    model, tokenizer = hg.load(directory.path, device="cpu")
    found = harness(tmp_path / "merged", tasks, ["sums", "pick", "likelihood"])
    for name in ("sums", "pick", "likelihood"):
        ours = run_task(model, tokenizer, EvalTask(task=str(tasks / f"{name}.yaml"), batch_size=5))
        theirs = {
            k: v for k, v in found["results"][name].items() if isinstance(v, float) and "stderr" not in k
        }
        assert theirs
        for key, value in theirs.items():
            assert ours.metrics["harness"][f"{name}/{key}"] == pytest.approx(value, rel=1e-5), key
        samples = {sample["doc_id"]: sample for sample in found["samples"][name]}
        assert len(ours.items) == len(samples) == 24
        for item in ours.items:
            sample = samples[int(item["id"].split(":")[1])]
            assert item["document_hash"] == sample["doc_hash"]
            if name == "sums":
                assert item["output"] == str(sample["filtered_resps"])


def test_padding_and_batches_do_not_reach_the_scores(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    rows = [([5 + i, 9, 11, *range(20, 22 + 3 * i)], 2 + i) for i in range(5)]
    one = continuation_scores(model, rows, tokenizer.pad_token_id, 1)
    all_ = continuation_scores(model, rows, tokenizer.pad_token_id, 5)
    for a, b in zip(one, all_):
        assert a[0] == pytest.approx(b[0], rel=1e-5) and a[1] == b[1]


def test_bridge_result_has_the_common_schema(tiny: tuple[Any, Any], tasks: Path) -> None:
    result = run_task(*tiny, EvalTask(task=str(tasks / "pick.yaml"), limit=5))
    assert result.metrics["items"] == 5 and 0 <= result.metrics["low"] <= result.metrics["accuracy"]
    assert all(
        {"id", "prompt_hash", "prompt", "gold", "output", "correct"} <= item.keys() for item in result.items
    )
    assert len({item["prompt_hash"] for item in result.items}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_to_txt": "x"}, "unknown field 'doc_to_txt': did you mean 'doc_to_text'"),
        ({"metric_lst": []}, "did you mean 'metric_list'"),
        ({"doc_to_text": None}, "the field 'doc_to_text' is missing"),
        ({"task": None}, "the field 'task' (its name) is missing"),
        ({"dataset_path": None}, "the field 'dataset_path' is missing"),
    ],
)
def test_wrong_fields_are_named(tasks: Path, change: dict[str, Any], message: str) -> None:
    content = {k: v for k, v in {**GENERATIVE, **change}.items() if v is not None}
    file = tasks / "sums.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        check_task_files(file)
    assert message in str(caught.value) and "sums.yaml" in str(caught.value)


def test_missing_and_broken_files(tasks: Path, tiny: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        check_task_files(tasks / "none.yaml")
    (tasks / "bad.yaml").write_text("task: [")
    with pytest.raises(ConfigError, match="no YAML"):
        check_task_files(tasks / "bad.yaml")
    (tasks / "bad.yaml").unlink()
    (tasks / "items.jsonl").unlink()
    with pytest.raises(ConfigError, match="cannot be run"):
        run_task(*tiny, EvalTask(task=str(tasks / "sums.yaml")))


def test_a_generation_that_leaves_no_room_for_a_prompt_is_refused(tiny: tuple[Any, Any], tasks: Path) -> None:
    content = {**GENERATIVE, "generation_kwargs": {"until": ["\n"], "max_gen_toks": 100_000}}
    (tasks / "sums.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="lower max_gen_toks"):
        run_task(*tiny, EvalTask(task=str(tasks / "sums.yaml")))


def test_the_class_is_made_once() -> None:
    assert bridge_class() is bridge_class()
