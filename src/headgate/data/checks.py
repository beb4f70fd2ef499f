"""What can be known of a run's data in a second: sources, files, columns, first rows, the chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from headgate.errors import ConfigError, DataError, ModelError

from .config import DataConfig, SourceConfig
from .identity import hub_like, hub_place
from .reading import check_source, divided, iterate
from .rendering import NO_TEMPLATE
from .tokenizers import tokenizer_of

FIRST = 100


def check_data(config: DataConfig, model: str, revision: str | None = None) -> list[str]:
    """One line for every source. Raises DataError or ConfigError naming the key, the file and the row.

    The first rows of every local source are read as training would read them. Hub data is not fetched. Rows of
    messages need a chat template: the tokenizer of ``model`` is asked where it is local.
    """
    lines = []
    conversations = False
    for key, source in sources_of(config):
        rows = first_rows(source, key)
        empty_answers(rows, key)
        conversations = conversations or any("messages" in row for row in rows)
        lines.append(f"{key}: {summary(source, rows)}")
    if conversations and config.chat_template is None:
        check_template(model, revision)
    return lines


def sources_of(config: DataConfig) -> Iterator[tuple[str, SourceConfig]]:
    """Every source that a run reads, under the key that names it."""
    if config.stream:
        for number, skill in enumerate(config.stream):
            yield (
                f"data.stream.{number}",
                SourceConfig(**{k: getattr(skill, k) for k in SourceConfig.model_fields}),
            )
            if skill.validation is not None:
                yield f"data.stream.{number}.validation", skill.validation
        for name, source in config.watch.items():
            yield f"data.watch.{name}", source
        return
    train, validation = divided(config.train, config.validation)
    if train.mix:
        yield from ((f"data.train.{number}", part) for number, part in enumerate(train.mix))
    else:
        yield "data.train", train
    if validation is not None:
        yield "data.validation", validation


def first_rows(source: SourceConfig, key: str, count: int = FIRST) -> list[dict[str, object]]:
    """The first normalised rows; none of hub data. Errors begin with the key of the source."""
    try:
        check_source(source)
        if not local(source):
            return []
        rows = list(
            islice(iterate(source.model_copy(update={"limit": min(source.limit or count, count)})), count)
        )
        if not rows:
            raise DataError(f"split '{source.split}' of '{source.path or source.source}' is empty: check split, filter and options")  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    return rows


def empty_answers(rows: Sequence[Mapping[str, object]], place: str) -> list[Mapping[str, object]]:
    """Rows with a prompt and an empty completion. Raises DataError, beginning with ``place``, where all are."""
    empty = [
        row for row in rows if row.get("prompt") is not None and not str(row.get("completion") or "").strip()
    ]
    if empty and len(empty) == len(rows):
        raise DataError(
            f"{place}: the answers of the first {len(rows)} rows are all empty, and nothing can be learned of them: "
            "check columns.completion"
        )
    return empty


def local(source: SourceConfig) -> bool:
    """Whether a source is read from this machine (or generated)."""
    if source.path is not None:
        return Path(source.path).expanduser().exists() or not hub_like(source.path)
    return hub_place(source) is None


def summary(source: SourceConfig, rows: list[dict[str, object]]) -> str:
    """A source and what its first rows hold."""
    place = source.path or source.source
    if not rows:
        repository, name = hub_place(source) or (place, None)
        return f"{repository}{f' ({name})' if name else ''} on the hub, read when the run starts"
    columns = sorted(
        {name for row in rows for name, value in row.items() if value is not None} - {"example_id"}
    )
    return f"{place}, {source.split}: {', '.join(c for c in columns if not c.startswith('meta_'))}"


def check_template(model: str, revision: str | None) -> None:
    """Raise DataError where the model's tokenizer is here and has no chat template."""
    try:
        tokenizer = tokenizer_of(model, revision, local=True)
    except ModelError:  # it is not here: what is wrong with it is said when it is loaded
        return
    if not tokenizer.chat_template:
        raise DataError(NO_TEMPLATE)
