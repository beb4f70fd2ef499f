"""Tagger: the tags of a run's texts, fitted where their source looks at all of them, and the released text prefix."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from headgate.errors import DataError
from headgate.methods.schema_bank.config import SchemaBankConfig
from headgate.methods.schema_bank.tags import TEXT_SOURCES, fitted_tags, kept_share, permute_tags, text_tags
from headgate.ops.randomness import derive_seed

PREFIX = re.compile(r"^\[Schema: [\d,]+\] ")
"""The released code's text prefix: an example's tags are those of its text without it."""


class Tagger:
    """Owns what was fitted on the training texts; a source that looks at one text alone needs nothing."""

    def __init__(self, config: SchemaBankConfig) -> None:
        self.config = config
        self._fitted: dict[str, list[int]] = {}

    def fit(self, embed: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> None:
        """Fit the tag sources that look at the whole training set (embeddings, permutation)."""
        config = self.config
        if config.tags == "none" or (config.tags in TEXT_SOURCES and not config.permuted_tags):
            return
        if config.tags in TEXT_SOURCES:
            tags = [self._of_text(text) for text in texts]
        else:
            tags = fitted_tags(
                config.tags, embed(texts), config.num_schemas, config.tags_per_example, config.tag_seed
            )
        if config.permuted_tags:
            tags = permute_tags(tags, config.tag_seed)
        self._fitted = dict(zip(texts, tags, strict=True))

    def _of_text(self, text: str) -> list[int]:
        c = self.config
        return text_tags(c.tags, text, c.num_schemas, c.tags_per_example, c.tag_seed)

    def tags_of(self, row: Mapping[str, object]) -> list[int]:
        """The tags of a normalised data row. Raises DataError for a text that a fitted source has not seen."""
        text = PREFIX.sub("", str(row.get("prompt") or row.get("text") or row.get("messages")))
        if self.config.tags in TEXT_SOURCES and not self.config.permuted_tags:
            return self._of_text(text)
        if text not in self._fitted:
            raise DataError(
                f"tags: {self.config.tags} were not fitted on the text {text[:60]!r}: call "
                "fit_columns(embed, texts) with every training text first, or use tags: hash or keyword"
            )
        return self._fitted[text]

    def prefixed(self, row: Mapping[str, object], index: int, share: float, seed: int) -> dict[str, object]:
        """The row with ``[Schema: a,b] `` before its text, where it keeps its tag at ``share`` of the stage."""
        kept = kept_share(self.config.tag_schedule, int(share * 10_000), 10_000)
        if derive_seed(seed, "schema_bank.prefix", index) >= kept * 2**63:
            return dict(row)
        field = "prompt" if row.get("prompt") else "text"
        return {**row, field: f"[Schema: {','.join(map(str, self.tags_of(row)))}] {row[field]}"}
