"""One entry of a recipe's ``evaluation`` list."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from headgate.config import FileName
from headgate.data.config import SourceConfig
from headgate.evaluation.sandbox import REFUSAL

CODE_TASKS = ("mbpp", "humaneval")
ABILITIES = "abilities"
NAMED: dict[str, dict[str, object]] = {
    "gsm8k": {"source": "gsm8k"},
    "math500": {"source": "math500", "scorer": "math", "max_new_tokens": 1024},
    "arc_challenge": {"source": "arc_challenge", "mode": "likelihood"},
    "arc_easy": {"source": "arc_easy", "mode": "likelihood"},
    "mmlu": {"source": "mmlu", "mode": "likelihood", "few_shot_by": "family"},
    "mbpp": {"source": "mbpp"},
    "humaneval": {"source": "humaneval"},
}
"""Tasks by name, and what they set where a recipe does not."""
Scorer = Literal[
    "strict",
    "flexible",
    "first_number",
    "last_integer",
    "number",
    "boxed",
    "math",
    "math_verify",
    "choice",
    "text",
]


class EvalTask(SourceConfig):
    """A task and the data it is measured on.

    ``task``: exact_match, gsm8k, math500, arc_challenge, arc_easy, mmlu, perplexity, mbpp, humaneval, abilities, or the
    name of an lm-evaluation-harness task (``lm_eval:mmlu`` where Headgate has a task of that name).
    """

    task: str = "exact_match"
    split: str = "test"
    max_new_tokens: int = Field(default=256, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lengths: list[int] = Field(default_factory=lambda: [512])
    few_shot: int = Field(default=0, ge=0)
    few_shot_by: str | None = None
    """Worked examples of the question's own field: those whose column of this name (``family``) is equal."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Prompts through the chat template. auto: where there is one and the model was not trained here."""
    mode: Literal["generation", "likelihood"] = "generation"
    """Of multiple choice: the letter that the model writes, or the option that it finds likeliest."""
    candidates: Literal["auto", "letters", "texts"] = "auto"
    """Of likelihood: compare the options' letters (auto for mmlu) or their texts."""
    scorer: Scorer | None = None
    """The one that ``accuracy`` reports. By default what reads the gold answers: choice, strict or flexible for
    numbers, math for LaTeX, text for the rest."""
    do_sample: bool = False
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    samples_per_item: int = Field(default=1, ge=1)
    k: list[int] = Field(default_factory=lambda: [1])
    """pass@k for these k; each needs ``samples_per_item`` of at least k."""
    allow_code_execution: bool = False
    """Programs that a model wrote are only run when this says so."""
    code_seconds: float = Field(default=5.0, gt=0)
    windows: Literal["rows", "disjoint", "sliding"] = "rows"
    """Perplexity over rows cut at each length, or over the joined text in windows of that length."""
    stride: int | None = Field(default=None, ge=1)
    """Of sliding windows; default: half the length."""
    routing: str | None = None
    label: FileName | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        named = dict(NAMED.get(str(given.get("task")), {}))
        if given.get("source") not in (None, named.get("source")):
            named = {}  # of other data: the task's own settings may not fit
        return {
            **named,
            **{key: value for key, value in given.items() if key != "source" or value is not None},
        }

    @model_validator(mode="after")
    def _whole_documents(self) -> EvalTask:
        if self.task == "perplexity" and "chunk_characters" in self.options:
            raise ValueError(
                "options.chunk_characters would cut documents, and their perplexity with them: leave it out, windows and "
                "lengths say how much context there is"
            )
        return self

    @model_validator(mode="after")
    def _possible(self) -> EvalTask:
        if self.task in CODE_TASKS and not self.allow_code_execution:
            raise ValueError(REFUSAL)
        if any(not 1 <= k <= self.samples_per_item for k in self.k):
            raise ValueError(
                f"k={self.k} needs samples_per_item of at least {max(self.k)}, it is {self.samples_per_item}: raise it"
            )
        if self.samples_per_item > 1 and not self.do_sample:
            raise ValueError(
                f"samples_per_item={self.samples_per_item} greedy samples would all be equal: set do_sample: true"
            )
        if any(length < 2 for length in self.lengths):
            raise ValueError(f"lengths={self.lengths}: a window needs at least two tokens")
        return self

    @property
    def key(self) -> str:
        """What its results are stored under: the label, or the task and its source."""
        if self.label:
            return self.label
        named = self.task in NAMED and self.task != "gsm8k" and NAMED[self.task]["source"] == self.source
        if self.task in CODE_TASKS or self.task == ABILITIES:
            return self.task
        suffix = f"_{self.mode}" if self.mode != NAMED.get(self.task, {}).get("mode", "generation") else ""
        return ((self.task if named else f"{self.task}_{self.source}") + suffix).replace("/", "_")

    def source_config(self) -> SourceConfig:
        """The data part alone."""
        return SourceConfig.model_validate({name: getattr(self, name) for name in SourceConfig.model_fields})
