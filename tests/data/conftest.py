"""Tokenizers of three kinds: byte-level BPE without BOS (gpt2, qwen2) and sentencepiece-like with BOS (stories)."""

import os
from functools import cache
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("HEADGATE_SHARED", Path(__file__).parents[2] / "../shared")).resolve()
TOKENIZERS = {"gpt2": "tokenizers/gpt2", "qwen2": "tokenizers/qwen2", "stories": "models/stories260K"}


@cache
def load_tokenizer(name):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / TOKENIZERS[name])


@pytest.fixture(params=list(TOKENIZERS))
def shared_tokenizer(request):
    return load_tokenizer(request.param)


@pytest.fixture
def shared():
    return SHARED


@pytest.fixture(scope="session")
def word_tokenizer():
    """A whitespace tokenizer with offsets, made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(200))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )
