"""Small tokenizers of the families that models have, trained on the spot, and the bytes that each token stands for.

``walk`` does not look at offsets: it spells the text out token by token, so it is what the masks are held against.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


@cache
def corpus() -> list[str]:
    from headgate.data import wordmath

    problems = [f"{row['question']}\n{row['answer']}" for row in wordmath.generate("train", 150)]
    body = "    total = 0\n    for x in range({i}):\n        if x % 2 == 0:\n            total += x\n\n    return total\n"
    code = [f"def f{i}(a, b={i}):\n" + body.format(i=i) + "\n\n# end\n[1,  2]\tpass\n" for i in range(60)]
    words = (
        "Write it. def f(x): if x: return [1, 2] pass # end class A: g(y): y x z ends with lines and begins with "
        "them no space but at the start Add 2 and 3 The answer is: 5 without a prompt trailing"
    )
    return [*problems, *code, words, *["naïve café — ünïcode 🙂 \u4e2d\u6587 \tx  y   z"] * 5]


def _post(bos: bool, eos: bool) -> Any:
    single = " ".join((["<s>"] if bos else []) + ["$A"] + (["</s>"] if eos else []))
    return processors.TemplateProcessing(
        single=single, pair=single + " $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


def _byte_level(
    *, trim: bool, prefix: bool = False, regex: bool = True, bos: bool = False, eos: bool = False
) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=700, show_progress=False, special_tokens=SPECIAL, initial_alphabet=alphabet
        ),
    )
    trimmed = processors.ByteLevel(trim_offsets=trim, add_prefix_space=prefix)
    inner.post_processor = processors.Sequence([trimmed, _post(bos, eos)]) if bos or eos else trimmed
    return inner


def _qwen_like() -> Tokenizer:
    inner = _byte_level(trim=False)
    pattern = (
        r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return inner


def _sentencepiece(*, prepend: bool = True, bos: bool = True, eos: bool = False) -> Tokenizer:
    """Llama's: no pre-tokenizer, spaces replaced by a normalizer, unknown characters as bytes."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = ([normalizers.Prepend("▁")] if prepend else []) + [normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence(steps)
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # training in words; taken away below
    plain = [text for text in corpus() if text.isascii()]
    inner.train_from_iterator(
        plain, trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=SPECIAL + BYTES)
    )
    inner.pre_tokenizer = None  # type: ignore[assignment]
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prepend else []),
        ]
    )
    inner.post_processor = _post(bos, eos)
    return inner


def _metaspace(scheme: str) -> Tokenizer:
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    inner.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=SPECIAL)
    )
    inner.post_processor = _post(False, True)
    return inner


def _unigram() -> Tokenizer:
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.train_from_iterator(
        corpus(),
        trainers.UnigramTrainer(
            vocab_size=600, show_progress=False, special_tokens=SPECIAL, unk_token="<unk>"
        ),
    )
    inner.post_processor = _post(False, True)
    return inner


def _wordpiece() -> Tokenizer:
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=900, show_progress=False, special_tokens=SPECIAL)
    )
    inner.post_processor = _post(True, True)
    return inner


def _characters() -> Tokenizer:
    letters = sorted({letter for text in corpus() for letter in text})
    words = {word: i for i, word in enumerate([*SPECIAL, *letters])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return inner


def _words() -> Tokenizer:
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(
        corpus(), trainers.WordLevelTrainer(vocab_size=3000, show_progress=False, special_tokens=SPECIAL)
    )
    return inner


FAMILIES = {
    "gpt2": lambda: _byte_level(trim=False),
    "gpt-neox (trimmed)": lambda: _byte_level(trim=True),
    "olmo (trimmed, eos)": lambda: _byte_level(trim=True, eos=True),
    "roberta (trimmed, prefix space, bos, eos)": lambda: _byte_level(
        trim=True, prefix=True, bos=True, eos=True
    ),
    "byte-level without words (trimmed)": lambda: _byte_level(trim=True, regex=False),
    "qwen2": _qwen_like,
    "llama3 (bos)": lambda: _byte_level(trim=False, bos=True),
    "llama (byte fallback, bos)": _sentencepiece,
    "gemma (byte fallback, no prefix)": lambda: _sentencepiece(prepend=False),
    "llama (bos, eos)": lambda: _sentencepiece(eos=True),
    "metaspace always": lambda: _metaspace("always"),
    "metaspace never": lambda: _metaspace("never"),
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "characters": _characters,
    "words": _words,
}


@cache
def family(name: str) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=FAMILIES[name](), unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def _letters() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


LETTERS = _letters()


def walk(tokenizer: Any, ids: list[int], text: str) -> list[tuple[int, int] | None]:
    """(first byte, byte after the last) of ``text`` that every token stands for; None for one that is not text."""
    inner = tokenizer.backend_tokenizer
    whole, at, ranges = text.encode(), 0, []
    kind = type(inner.model).__name__
    byte_level = "ByteLevel" in str(inner.decoder)
    metaspace = "▁" in str(inner.decoder) or "Metaspace" in str(inner.decoder)
    first = True
    for token in ids:
        piece = inner.id_to_token(token)
        if kind == "WordPiece" and piece in SPECIAL:
            at += len(whole[at:]) - len(whole[at:].lstrip())
        if piece in SPECIAL and piece != "<unk>" and not whole.startswith(piece.encode(), at):
            ranges.append(None)
            first = True
            continue
        if piece in SPECIAL and piece != "<unk>":
            surface = piece.encode()
        elif byte_level:
            surface = bytes(LETTERS[letter] for letter in piece)
        elif metaspace and piece in BYTES:
            surface = bytes([int(piece[3:5], 16)])
        elif metaspace:
            surface = piece.replace("▁", " ").encode()
        elif kind == "WordPiece":
            surface = piece.removeprefix("##").encode()
        else:
            surface = piece.encode()
        if first and surface[:1] == b" " and not whole.startswith(surface, at):
            surface = surface[1:]  # the space that was put before the text
        first = piece in SPECIAL and piece != "<unk>"  # a text that follows a special token begins anew
        if piece == "<unk>" or kind in ("WordPiece", "WordLevel"):
            ranges.append(_search(whole, at, piece, surface, kind))
        else:
            assert whole.startswith(surface, at), (piece, whole[at : at + 20])
            ranges.append((at, at + len(surface)))
        at = ranges[-1][1]
    return ranges


def _search(whole: bytes, at: int, piece: str, surface: bytes, kind: str) -> tuple[int, int]:
    """Where a token stands that names its text only loosely: white space is skipped, letters are folded."""
    rest = whole[at:].decode(errors="strict")
    if kind == "WordPiece" or (kind == "WordLevel" and surface != b"<unk>" and not surface.isspace()):
        skipped = len(rest) - len(rest.lstrip())
        if surface in (b" ", b"\n"):
            skipped = 0
    else:
        skipped = 0
    start = at + len(rest[:skipped].encode())
    rest = rest[skipped:]
    if piece == "<unk>":
        return start, start  # of unknown length: the caller leaves such rows out
    return start, start + len(rest[: len(surface.decode())].encode())
