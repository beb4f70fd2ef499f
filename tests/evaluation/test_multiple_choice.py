"""Multiple choice by likelihood and by generation, few-shot by field, chat templates: what the model is really asked."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from headgate.errors import ConfigError, DataError
from headgate.evaluation.checks import check_task
from headgate.evaluation.config import EvalTask
from headgate.evaluation.likelihood import option_scores
from headgate.evaluation.prompts import prompts_of, uses_chat
from headgate.evaluation.tasks import run_task

QUESTIONS = [
    {
        "question": f"Which is number {i}?",
        "choices": ["one", "two apples", "three"],
        "answer": i % 3,
        "subject": subject,
    }
    for i, subject in enumerate(["birds", "trees", "birds", "trees"])
]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture
def folder(tmp_path: Any) -> Any:
    for split in ("dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return tmp_path


@torch.no_grad()
def test_scores_are_the_sums_of_token_log_probabilities(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    asked = [("Tom has", [" two apples", " six"]), ("A longer question, which is: ", ["yes", "no"])]
    scores = option_scores(model, tokenizer, asked, batch_size=3)
    for (context, options), values in zip(asked, scores):
        for option, value in zip(options, values):
            whole = tokenizer(context + option)["input_ids"]
            start = len(tokenizer(context.rstrip(" "))["input_ids"])
            logits = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
            wanted = sum(float(logits[i - 1, whole[i]]) for i in range(start, len(whole)))
            assert math.isclose(value, wanted, rel_tol=1e-5)


def test_mmlu_by_name_in_both_modes(tiny: tuple[Any, Any], folder: Any) -> None:
    likely = run_task(*tiny, EvalTask(task="mmlu", path=str(folder)))
    assert likely.metrics["candidates"] == "letters" and set(likely.metrics["by_family"]) == {
        "birds",
        "trees",
    }
    assert [item["output"] in "ABC" for item in likely.items] == [True] * 4
    task = EvalTask(task="mmlu", path=str(folder), mode="generation", max_new_tokens=4)
    written = run_task(*tiny, task)
    assert written.metrics["scorer"] == "choice" and task.key != EvalTask(task="mmlu", path=str(folder)).key


def test_worked_examples_are_of_the_questions_own_field(tiny: tuple[Any, Any], folder: Any) -> None:
    from headgate.data.sources import load_rows

    task = EvalTask(task="mmlu", path=str(folder), few_shot=2, mode="generation")
    rows = list(load_rows(task.source_config()))
    asked, texts, chat = prompts_of(task, rows, *tiny)
    assert not chat and asked == texts
    for row, text in zip(rows, texts):
        shots = [i for i in range(4) if f"number {i}?" in text.removesuffix(row["prompt"])]
        assert shots == ([0, 2] if row["family"] == "birds" else [1, 3])
    with pytest.raises(ConfigError, match="no such column"):
        prompts_of(task.model_copy(update={"few_shot_by": "colour"}), rows, *tiny)


def test_an_instruct_model_is_asked_through_its_template(tiny: tuple[Any, Any], monkeypatch: Any) -> None:
    model, tokenizer = tiny
    rows = [{"prompt": "Two and two?", "completion": "4", "answer": "4"}]
    assert not uses_chat(EvalTask(), model, tokenizer)
    with pytest.raises(ConfigError, match="chat: on"):
        uses_chat(EvalTask(chat="on"), model, tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    asked, texts, chat = prompts_of(EvalTask(), rows, model, tokenizer)
    assert chat and texts == ["[user]Two and two?[assistant]"]
    assert asked[0] == tokenizer("[user]Two and two?[assistant]", add_special_tokens=False)["input_ids"]
    assert not prompts_of(EvalTask(chat="off"), rows, model, tokenizer)[2]
    monkeypatch.setattr(model, "peft_config", {}, raising=False)
    assert not uses_chat(EvalTask(), model, tokenizer), "what was trained here is asked as it was trained"


def test_pass_at_k_of_sampled_answers(tiny: tuple[Any, Any], tmp_path: Any) -> None:
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"prompt": "Two?", "completion": "Yes", "answers": ["Yes", "No"]})
    )
    task = EvalTask(
        task="exact_match", source="auto", path=str(tmp_path), do_sample=True, samples_per_item=4, k=[1, 4], max_new_tokens=3
    )  # fmt: skip
    result = run_task(*tiny, task)
    assert {"pass@1", "pass@4"} <= set(result.metrics) and len(result.items[0]["outputs"]) == 4
    assert result.items[0]["golds"] == ["Yes", "No"] and result.metrics["scorer"] == "text"


def test_golds_are_checked_before_a_model_is_loaded(tmp_path: Any) -> None:
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"prompt": "a", "completion": "#### 1", "answer": "Rome"})
    )
    with pytest.raises(DataError, match=r"cannot match the gold answer 'Rome'.*scorer: text"):
        check_task(EvalTask(task="exact_match", source="auto", path=str(tmp_path), scorer="flexible"))
    with pytest.raises(DataError, match="needs rows with choices"):
        check_task(EvalTask(task="exact_match", source="auto", path=str(tmp_path), mode="likelihood"))
    with pytest.raises(ConfigError, match="did you mean 'math500'"):
        check_task(EvalTask(task="math50"))
    with pytest.raises(ValueError, match="would cut documents"):
        EvalTask(task="perplexity", source="text", options={"chunk_characters": 100})
