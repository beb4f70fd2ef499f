"""Any task of lm-evaluation-harness on the live model, methods attached, in Headgate's result schema.

Names of the harness (``arc_challenge``, ``mmlu``), or a local task: a YAML file, or a folder with one, whose data
files are looked for beside it. Every forward gets an attention mask, so that padding reaches no router.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from headgate.data.readers.base import RawRow
from headgate.errors import ConfigError
from headgate.evaluation.config import EvalTask
from headgate.evaluation.generation import context_length, generate
from headgate.evaluation.lm_eval_files import check_task_files
from headgate.evaluation.predictions import Figures, Item, prompt_hash
from headgate.models.aside import look_aside

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PRIMARY = ("exact_match", "acc", "acc_norm", "f1", "bleu", "word_perplexity")
DEFAULT_NEW_TOKENS = 256
MAX_LENGTH = 32_768  # for a model that declares no context of its own


@cache
def bridge_class() -> Callable[..., TemplateLM]:
    """The harness is an extra, and slow to import: the class is made when it is first needed."""
    try:
        from lm_eval import utils
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise ConfigError(
            "tasks of lm-evaluation-harness need it installed: pip install 'headgate[lm-eval]'"
        ) from None

    class LiveModel(TemplateLM):
        """A loaded model, its methods attached, as the harness wants one."""

        def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: EvalTask) -> None:
            super().__init__()
            self.model, self.tokenizer, self.task = model, tokenizer, task
            self.max_length = min(context_length(model), MAX_LENGTH)

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            bos = self.tokenizer.bos_token_id
            return int(self.eot_token_id if bos is None else bos)

        @property
        def tokenizer_name(self) -> str:
            return str(self.tokenizer.name_or_path).replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
            prefix = str(self.tokenizer.decode(self.prefix_token_id))
            special = add_special_tokens if add_special_tokens is not None else not string.startswith(prefix)
            return list(self.tokenizer.encode(string, add_special_tokens=special))

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
        ) -> list[tuple[float, bool]]:
            rows = []
            for _text, context, continuation in requests:
                kept = (list(context) + list(continuation))[-(self.max_length + 1) :]
                rows.append((kept, min(len(continuation), len(kept) - 1)))
            return continuation_scores(self.model, rows, self.tokenizer.pad_token_id, self.task.batch_size)

        def loglikelihood_rolling(
            self, requests: Sequence[Instance], disable_tqdm: bool = False
        ) -> list[float]:
            totals = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
                totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
            return totals

        def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
            outputs: list[str] = [""] * len(requests)
            groups: dict[str, list[int]] = {}
            for index, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
            for indices in groups.values():
                options = dict(requests[indices[0]].args[1])
                until = options.get("until") or []
                new = int(options.get("max_gen_toks") or DEFAULT_NEW_TOKENS)
                if new >= self.max_length:
                    raise ConfigError(
                        f"the task asks for {new} new tokens and the model's context is {self.max_length}: "
                        "lower max_gen_toks in the task's generation_kwargs"
                    )
                found = generate(
                    self.model,
                    self.tokenizer,
                    [self.tok_encode(requests[i].args[0])[-(self.max_length - new) :] for i in indices],
                    max_new_tokens=new,
                    batch_size=self.task.batch_size,
                    do_sample=bool(options.get("do_sample")) and float(options.get("temperature") or 0) > 0,
                    temperature=float(options.get("temperature") or 1.0),
                    top_p=float(options.get("top_p") or 1.0),
                    seed=self.task.seed,
                    stop=[until] if isinstance(until, str) else list(until),
                )
                for index, result in zip(indices, found, strict=True):
                    outputs[index] = result.text
            return outputs

    return LiveModel


def continuation_scores(
    model: nn.Module, rows: Sequence[tuple[list[int], int]], pad: int, batch_size: int
) -> list[tuple[float, bool]]:
    """(log-probability, is it the greedy one) of the last ``n`` tokens of each row given those before."""
    device = next(model.parameters()).device
    results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    with look_aside(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            width = max(len(rows[i][0]) for i in indices) - 1
            ids = torch.full((len(indices), width), pad)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(indices):
                tokens = rows[index][0][:-1]
                ids[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            for row, index in enumerate(indices):
                tokens, n = rows[index]
                mine = logits[row, len(tokens) - 1 - n : len(tokens) - 1].float().log_softmax(-1)
                targets = torch.tensor(tokens[len(tokens) - n :], device=device)
                picked = mine.gather(-1, targets[:, None]).sum()
                results[index] = (float(picked), bool((mine.argmax(-1) == targets).all()))
    return results


def harness_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: EvalTask,
    *,
    known: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Figures, list[Item]]:
    """Metrics and items of one task, group or local task file. Raises ConfigError for one that does not exist."""
    local = Path(task.task)
    is_local = local.suffix in (".yaml", ".yml") or local.is_dir()
    if not is_local and importable() is False:
        close = difflib.get_close_matches(task.task, list(known), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"unknown task {task.task!r}: {hint}Known are {', '.join(known)}, and with "
            "pip install 'headgate[lm-eval]' the tasks of lm-evaluation-harness"
        )
    close = difflib.get_close_matches(task.task, list(known), n=1, cutoff=0.85)
    if close and not is_local:  # the harness takes seconds to list its tasks: a slip of the pen need not wait
        raise ConfigError(f"unknown task {task.task!r}: did you mean {close[0]!r}?")
    kind = bridge_class()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if is_local:
        names, folder = check_task_files(local), local if local.is_dir() else local.parent
        manager = TaskManager(include_path=str(folder.resolve()), include_defaults=False)
    else:
        manager = TaskManager()
        names, folder = [task.task], Path()
        if task.task not in manager.all_tasks:
            close = difflib.get_close_matches(task.task, [*known, *manager.all_tasks], n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see `lm_eval ls tasks`"
            raise ConfigError(f"unknown task {task.task!r}: {hint}")
    with _beside(folder):
        try:
            found = simple_evaluate(
                kind(model, tokenizer, task),
                tasks=names,
                num_fewshot=task.few_shot or None,
                limit=task.limit,
                bootstrap_iters=0,
                task_manager=manager,
                random_seed=task.seed,
                log_samples=True,
            )
        except (FileNotFoundError, ConnectionError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"task {task.task!r} cannot be run: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
    assert found is not None
    metrics = {
        f"{name}/{key}": value
        for name, values in found["results"].items()
        for key, value in values.items()
        if isinstance(value, (int, float)) and "stderr" not in key
    }
    items = [item for name, samples in found["samples"].items() for item in _items(name, samples)]
    if progress is not None:
        progress(len(items), len(items))
    return {"items": len(items), "harness": metrics}, items


def _items(name: str, samples: Sequence[RawRow]) -> Iterator[dict[str, object]]:
    """One per document: the first filter's verdict is ``correct``, every filter's metrics stand beside it."""
    by_document: dict[object, dict[str, object]] = {}
    every: dict[object, dict[str, object]] = {}
    for sample in samples:
        scores = {metric: sample[metric] for metric in sample.get("metrics", []) if metric in sample}
        key = sample["doc_id"]
        if key not in by_document:
            main = next((m for m in (*PRIMARY, *scores) if m in scores), None)
            value = scores[main] if main is not None else None
            prompt = str(sample["arguments"][0][0]) if sample.get("arguments") else str(sample["doc"])
            by_document[key] = {
                "id": f"{name}:{key}",
                "task": name,
                "prompt_hash": prompt_hash(prompt),
                "document_hash": sample.get("doc_hash"),
                "prompt": prompt,
                "gold": str(sample.get("target")),
                "output": str(sample.get("filtered_resps")),
                "correct": bool(value) if value in (0, 1, True, False) else value,
                "scores": every.setdefault(key, {}),
            }
        every[key][sample.get("filter", "none")] = scores
    yield from by_document.values()


def importable() -> bool:
    """Whether the harness is installed."""
    from importlib.util import find_spec

    return find_spec("lm_eval") is not None


@contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Relative data files of a local task are looked for beside it."""
    before = os.getcwd()
    if folder != Path():
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
