"""The mask law: over the families of tokenizers, exactly the tokens that reach into the completion are trained."""

from __future__ import annotations

import json

import pytest

from headgate.data.long_text import joined
from headgate.data.mask_check import check_masks, mask_difference
from headgate.data.rendering import render
from headgate.data.spans import encoder
from headgate.data.templates import IGNORED, EncodedRow, encode, encode_rows, prompt_ids
from headgate.errors import DataError

from .tokenizer_families import FAMILIES, corpus, family, walk

CODE = "def f(x):\n    if x:\n        return   [1,  2]\n\tpass\n\n    # end\n"
ROWS = [
    {"prompt": "Add 2 and 3\nThe answer is: ", "completion": "5"},
    {"prompt": "Write it.\n", "completion": CODE},
    {"prompt": "class A:\n", "completion": "    " + CODE.replace("\n", "\n    ")},
    {"prompt": "def g(y):\n    ", "completion": "    return y\n"},
    {"prompt": "x  ", "completion": "   y   z"},
    {"prompt": "no space", "completion": " but at the start"},
    {"prompt": "boundary in a wo", "completion": "rd and on"},
    {"prompt": "naïve café — ", "completion": "emoji 🙂 and ünïcode \u4e2d\u6587"},
    {"prompt": "", "completion": "without a prompt"},
    {"prompt": "ends with lines\n\n", "completion": "\n\nand begins with them\n"},
    {"text": CODE + "  trailing  "},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
TURNS = [
    {"role": "system", "content": "Be  brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "    Four.\n  So."},
    {"role": "user", "content": "And code?"},
    {"role": "assistant", "content": CODE.strip("\n")},
]
CHATS = [
    (CHATML, "all"),
    (MARKED, "all"),
    (CHATML, "assistant"),
    (CHATML, "completion"),
    (MARKED, "assistant"),
    (MARKED, "completion"),
]


def tokens_off(tokenizer, row, loss_on="completion"):
    """(tokens that are trained or left out wrongly, tokens), or None for a row that this tokenizer cannot spell."""
    text, spans, chat = render(row, tokenizer, loss_on)
    encoded = encode(row, tokenizer, None, loss_on)
    ids = encoded["input_ids"]
    places = walk(tokenizer, ids, text)
    if any(tokenizer.convert_ids_to_tokens(token) == "<unk>" for token in ids):
        return None
    bounds = [(len(text[:low].encode()), len(text[:high].encode())) for low, high in spans]
    wanted = [
        place is not None
        and any((low < place[1] or low == place[1] == 0) and place[0] < high for low, high in bounds)
        for place in places
    ]
    if not chat:
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
        wanted[-1] = True
    trained = [label != IGNORED for label in encoded["labels"]]
    assert all(label in (IGNORED, token) for label, token in zip(encoded["labels"], ids))
    return sum(a != b for a, b in zip(wanted, trained)), len(ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_token_is_off(name):
    tokenizer = family(name)
    spelled = [found for row in ROWS if (found := tokens_off(tokenizer, row)) is not None]
    assert len(spelled) >= 5 and sum(off for off, _ in spelled) == 0
    assert check_masks(ROWS, encode_rows(ROWS, tokenizer, "completion"), tokenizer, "completion") == len(ROWS)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("template", "loss_on"), CHATS)
def test_no_token_of_a_conversation_is_off(name, template, loss_on, monkeypatch):
    tokenizer = family(name)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    row = {"messages": TURNS}
    found = tokens_off(tokenizer, row, loss_on)
    assert found is None or found[0] == 0
    assert mask_difference(row, encode_rows([row], tokenizer, loss_on)[0], tokenizer, loss_on) is None


@pytest.mark.parametrize("name", [name for name in FAMILIES if "without words" not in name])
def test_generation_starts_from_the_tokens_training_used(name):
    tokenizer = family(name)
    for row in ROWS[:2]:
        encoded = encode(row, tokenizer)
        assert encoded["input_ids"][: encoded["prompt_length"]] == prompt_ids(row, tokenizer)


@pytest.mark.shared
@pytest.mark.parametrize("where", ["tokenizers/gpt2", "tokenizers/qwen2", "models/stories260K"])
def test_no_token_of_real_code_is_off(shared, where):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / where)
    lines = (shared / "data/mbpp/mbpp.jsonl").read_text().splitlines()[:200]
    rows = [
        {"prompt": row["text"] + "\n", "completion": row["code"].replace("\r\n", "\n")}
        for row in map(json.loads, lines)
    ]
    encoded = encode_rows(rows, tokenizer, "completion")
    for row, one in zip(rows, encoded):
        assert mask_difference(row, one, tokenizer, "completion") is None


def test_trimmed_offsets_do_not_change_the_tokenizer_that_is_saved():
    tokenizer = family("gpt-neox (trimmed)")
    before = tokenizer.backend_tokenizer.to_str()
    encode(ROWS[1], tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before and '"trim_offsets":true' in before.replace(" ", "")


def test_a_mask_that_is_off_stops_the_run():
    tokenizer = family("gpt2")
    rows = [{**ROWS[1], "example_id": f"r{i}"} for i in range(40)]
    encoded = encode_rows(rows, tokenizer, "completion")
    start, stop = encoded[0].ranges[0]
    encoded[0] = EncodedRow(encoded[0].ids, [(start + 1, stop)])
    with pytest.raises(DataError, match=r"row 'r0'.*trained tokens read.*the source"):
        check_masks(rows, encoded, tokenizer, "completion")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_long_text_in_pieces_has_the_tokens_of_one_pass(name):
    backend = encoder(family(name))
    text = "\n".join(corpus()) * 2
    pieces = [token for part in joined(text, backend, 3000, 600) for token in part]
    assert pieces == backend.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_without_an_end_trains_the_completion_alone():
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=family("gpt2").backend_tokenizer)
    encoded = encode(ROWS[0], bare)
    assert bare.decode([label for label in encoded["labels"] if label != IGNORED]).strip() == "5"


def law_table() -> str:
    """Tokenizer x template: rows compared, tokens, tokens off. ``python -m tests.data.test_mask_law`` prints it."""
    lines = ["| tokenizer | template | rows | tokens | off |", "|---|---|---|---|---|"]
    for name in FAMILIES:
        tokenizer = family(name)
        cases = [("none", None, "completion", ROWS)]
        cases += [
            (label, template, loss_on, [{"messages": TURNS}])
            for label, template in (("ChatML", CHATML), ("marked", MARKED))
            for loss_on in ("assistant", "completion")
        ]
        for label, template, loss_on, rows in cases:
            tokenizer.chat_template = template
            found = [f for row in rows if (f := tokens_off(tokenizer, row, loss_on)) is not None]
            tokens, off = sum(count for _, count in found), sum(wrong for wrong, _ in found)
            lines.append(f"| {name} | {label}, {loss_on} | {len(found)} | {tokens} | {off} |")
        tokenizer.chat_template = None
    return "\n".join(lines)


if __name__ == "__main__":
    print(law_table())
