"""The tokenizer of a model, without the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headgate.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(model: str, revision: str | None = None, *, local: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that ``model.name_or_path`` is loaded with, with a pad token.

    Raises ModelError where it cannot be loaded; ``local`` looks on this machine only.
    """
    from transformers import AutoTokenizer

    from headgate.models.places import EMBEDDED

    path = str(EMBEDDED) if model == "embedded" or model.startswith("random:") else model
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, local_files_only=local)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of model.name_or_path={model!r} cannot be loaded: {str(error).splitlines()[0]}") from error  # fmt: skip
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
