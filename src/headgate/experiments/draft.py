"""A first recipe from a data file and a model's name: columns looked at, lengths counted, every choice explained.

What is drafted is a recipe as a user would write it: it goes through the same checks, and can be edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from headgate.data.checks import empty_answers, first_rows
from headgate.data.config import SourceConfig
from headgate.data.files import find_files
from headgate.data.formats import read_files
from headgate.data.identity import hub_like
from headgate.data.readers.base import RawRow, Row
from headgate.data.rendering import PLAIN_CHAT
from headgate.data.tokenizers import tokenizer_of
from headgate.errors import DataError, ModelError
from headgate.experiments.draft_columns import columns_of
from headgate.experiments.draft_text import commented
from headgate.experiments.records import Content
from headgate.methods.names import METHODS
from headgate.methods.registry import method_class

LOOKED_AT = 200
"""Rows whose columns and lengths are looked at."""
COUNTED = 200_000
"""Rows that are counted before "at least" is said."""
FEWEST = 20
"""Rows below which no part can be held out for validation."""
LENGTHS = (64, 128, 256, 512, 1024, 2048)
CHARACTERS_A_TOKEN = 3.5
"""English under a large vocabulary, rounded down: where the tokenizer is not on this machine."""


@dataclass(frozen=True)
class Draft:
    """A recipe's content, its text with comments, and what was seen on the way."""

    content: Content
    text: str
    notes: list[str] = field(default_factory=list)

    def as_one_run(self, methods: Sequence[str]) -> Draft:
        """All ``methods`` together in one run, and nothing compared; one that brings its own adapter replaces LoRA."""
        content = {key: value for key, value in self.content.items() if key != "compare"}
        if any(method_class(name).is_adapter for name in methods):
            content["lora"] = None
        return Draft({**content, "methods": {name: {} for name in methods}}, self.text, self.notes)


def draft(data: str, model: str = "embedded", methods: Sequence[str] = (), name: str | None = None) -> Draft:
    """A recipe that compares LoRA with ``methods`` (Headgate's own four, if none is named) on ``data``.

    Raises DataError where the file cannot be read, its columns cannot be told apart or it has too few rows, and
    ConfigError for an unknown method, each with the cure.
    """
    for wanted in methods:
        method_class(wanted)  # an unknown one is said before anything is read
    seen = _look(data)
    template = _chat_template(seen, model)
    if template is not None:
        seen.notes.append(NO_CHAT)
    length, lengths_note = _max_length(seen, model)
    whole_text = (
        "text" in seen.rows[0] and seen.rows[0].get("prompt") is None and "messages" not in seen.rows[0]
    )
    source: Content = {
        "source": "auto",
        "path": data,
        **({"columns": seen.columns} if seen.columns else {}),
    }
    content: Content = {
        "name": name or _name_of(data),
        "model": {"name_or_path": model},
        "lora": {"r": 8, "alpha": 16},
        "data": {
            "train": source,
            "validation": {
                **source,
                **({"split": "validation"} if seen.has_validation else {}),
                "limit": 500,
            },
            "max_length": length,
            "loss_on": "all" if whole_text else "completion",
            "long_prompts": "drop",
            **({"chat_template": template} if template is not None else {}),
        },
        "training": {
            **({"max_steps": 500} if seen.count is None or seen.count > 4000 else {"epochs": 3}),
            "per_device_train_batch_size": 8,
            "learning_rate": 5.0e-3 if model == "embedded" else 2.0e-4,
        },
        "compare": {
            "seeds": [42, 123, 456],
            "baseline": "lora",
            "metric": HELD_OUT,
            "arms": {"base": {"training": {"max_steps": 0}}, "lora": {}, **_arms(methods)},
        },
    }
    if not seen.has_validation and seen.count is not None and seen.count < 400:
        for part in ("train", "validation"):
            content["data"][part] = {**content["data"][part], "options": {"validation_share": 0.2}}
    content["evaluation"] = [_held_out(content["data"], seen)]
    return Draft(
        content,
        commented(content, seen.notes, seen.has_validation, lengths_note),
        [*seen.notes, lengths_note],
    )


HELD_OUT = "held_out"
NO_CHAT = "the model has no chat template, a plain one is written"


def _held_out(data: Content, seen: _Seen) -> dict[str, object]:
    """The loss on the held-out rows as an evaluation, which a model that is not trained has too."""
    share = data["validation"].get("options", {}).get("validation_share", 0.05)
    return {
        "task": "perplexity",
        "label": HELD_OUT,
        **data["validation"],
        "split": "validation",
        "lengths": [data["max_length"]],
        **({} if seen.has_validation else {"options": {"validation_share": share}}),
    }


@dataclass
class _Seen:
    """What a look at the file told."""

    rows: list[Row]
    """The first rows as training would read them."""
    columns: dict[str, str]
    count: int | None
    """Rows; None where there are more than ``COUNTED``, or they are on the hub."""
    has_validation: bool
    notes: list[str]


def _look(data: str) -> _Seen:
    if not Path(data).expanduser().exists() and hub_like(data) and "*" not in data:
        raise DataError(
            f"--data {data} is no file or folder here, and what is on the hub is not looked at: write a recipe with data: "
            f"{{train: {{source: {data}}}}} (headgate sources), or download the file"
        )
    raw = list(islice(read_files(find_files(data, "train")), LOOKED_AT))
    if not raw:
        raise DataError(f"--data {data} has no rows")
    columns, notes = columns_of(raw[0][0], data)
    source = SourceConfig(source="auto", path=data, columns=columns)
    rows = first_rows(source, f"--data {data}", LOOKED_AT)
    count = 0
    for _ in islice(read_files(find_files(data, "train")), COUNTED + 1):
        count += 1
    whole = count <= COUNTED
    document = "text" in rows[0] and count == 1
    if count < FEWEST and not document:
        raise DataError(
            f"--data {data} has {count} rows: give at least {FEWEST}, so that some can be held out for validation"
        )
    if empty := empty_answers(rows, f"--data {data}"):
        notes.append(
            f"{len(empty)} of the first {len(rows)} rows have an empty answer ({empty[0]['example_id']} is one): the "
            "model learns to say nothing there; take them out if that is not meant"
        )
    notes.append(f"{count if whole else f'more than {COUNTED}'} rows")
    if document:
        raise DataError(
            f"--data {data} is one text: a part of it cannot be held out as rows. Write a recipe with options: "
            "{chunk_characters: 2000} on data.train and data.validation, or give a file with one document a row"
        )
    return _Seen(rows, columns, count if whole else None, _has_validation(data), notes)


def _has_validation(data: str) -> bool:
    place = Path(data).expanduser()
    if not place.is_dir():
        return False
    try:
        find_files(data, "validation")
    except DataError:
        return False
    return True


def _max_length(seen: _Seen, model: str) -> tuple[int, str]:
    """Room for nearly every row, and how it was found."""
    texts = [_as_text(row) for row in seen.rows]
    try:
        tokenizer = tokenizer_of(model, local=True)
        lengths = sorted(len(tokenizer(text)["input_ids"]) for text in texts)
        how = ""
    except ModelError:
        lengths = sorted(round(len(text) / CHARACTERS_A_TOKEN) for text in texts)
        how = f", by {CHARACTERS_A_TOKEN:g} characters a token: the tokenizer is not here yet"
    typical, longest = lengths[int(0.98 * (len(lengths) - 1))], lengths[-1]
    length = min(next((length for length in LENGTHS if length >= typical), LENGTHS[-1]), _context(model))
    return (
        length,
        f"the longest of the first {len(texts)} rows has {longest} tokens, 98% have at most {typical}{how}",
    )


def _chat_template(seen: _Seen, model: str) -> str | None:
    """A plain template where the rows are conversations and the tokenizer, which is on this machine, has none."""
    if not any(row.get("messages") is not None for row in seen.rows):
        return None
    try:
        return None if tokenizer_of(model, local=True).chat_template else PLAIN_CHAT
    except ModelError:
        return None


def _context(model: str) -> int:
    """Positions that the model was made for; where its configuration is not here, the loader says what is too long."""
    from transformers import AutoConfig

    from headgate.models.places import EMBEDDED

    try:
        config = AutoConfig.from_pretrained(EMBEDDED if model == "embedded" else model, local_files_only=True)
    except (OSError, ValueError):
        return LENGTHS[-1]
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or LENGTHS[-1])


def _as_text(row: RawRow) -> str:
    if row.get("messages") is not None:
        return "\n".join(f"{turn.get('role')}:\n{turn.get('content') or ''}" for turn in row["messages"])
    return " ".join(str(row[key]) for key in ("prompt", "completion", "text") if row.get(key) is not None)


def _arms(methods: Sequence[str]) -> Content:
    arms: Content = {}
    for name in methods or _own_methods():
        arm: Content = {"methods": {name: {}}}
        if method_class(name).is_adapter:
            arm = {"lora": None, **arm}
        arms[name] = arm
    return arms


def _own_methods() -> list[str]:
    """What this project is about; controls such as EWC and installed packages are asked for by name."""
    own = ("schema_bank", "layer_routing", "lora_experts", "backward_gate")
    return [name for name in METHODS.names() if name in own]


def _name_of(data: str) -> str:
    stem = Path(data.rstrip("/")).name.split(".")[0]
    kept = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in stem).strip("-_")
    return kept or "my-run"
