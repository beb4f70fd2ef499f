"""The label mask: exactly the completion and its end, whatever the tokenizer."""

import pytest
from transformers import PreTrainedTokenizer

from headgate.data.templates import IGNORED, encode, prompt_ids
from headgate.errors import DataError

ROWS = [
    ("{q}\nThe answer is: ", "She buys 3 hats.\n#### 3"),
    ("Add 2 and 3\nThe answer is: ", "5"),
    ("### Response:\n", "def f(x):\n    return x"),
    ("naïve café — ", "emoji 🙂 and ünïcode"),
    ("no space at the end", " but at the start"),
]


def trained(encoded):
    return [label for label in encoded["labels"] if label != IGNORED]


@pytest.mark.shared
@pytest.mark.parametrize(("prompt", "completion"), ROWS)
def test_labels_decode_to_completion_and_eos(shared_tokenizer, prompt, completion):
    encoded = encode({"prompt": prompt, "completion": completion}, shared_tokenizer)
    labels = trained(encoded)
    assert labels[-1] == shared_tokenizer.eos_token_id
    assert shared_tokenizer.decode(labels[:-1]).strip() == completion.strip()
    first = encoded["prompt_length"]
    assert all(label == IGNORED for label in encoded["labels"][:first])
    assert encoded["labels"][first:] == encoded["input_ids"][first:]


@pytest.mark.shared
@pytest.mark.parametrize(("prompt", "completion"), ROWS)
def test_generation_starts_from_the_tokens_training_used(shared_tokenizer, prompt, completion):
    row = {"prompt": prompt, "completion": completion}
    encoded = encode(row, shared_tokenizer)
    assert encoded["input_ids"][: encoded["prompt_length"]] == prompt_ids(row, shared_tokenizer)


@pytest.mark.shared
def test_the_text_is_tokenised_as_a_whole(shared_tokenizer):
    prompt, completion = ROWS[0]
    encoded = encode({"prompt": prompt, "completion": completion}, shared_tokenizer)
    assert encoded["input_ids"][:-1] == shared_tokenizer(prompt + completion)["input_ids"]


@pytest.mark.shared
def test_loss_on_all_trains_the_prompt_too(shared_tokenizer):
    row = {"prompt": "one two ", "completion": "three"}
    encoded = encode(row, shared_tokenizer, loss_on="all")
    assert shared_tokenizer.decode(trained(encoded)[:-1]).strip() == "one two three"


CHAT = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven."},
]


@pytest.fixture
def chat_tokenizer(shared_tokenizer, monkeypatch):
    monkeypatch.setattr(shared_tokenizer, "chat_template", CHAT)
    return shared_tokenizer


@pytest.mark.shared
@pytest.mark.parametrize(
    ("loss_on", "expected"), [("assistant", "Four.<|end|>Seven.<|end|>"), ("completion", "Seven.<|end|>")]
)
def test_conversations_train_assistant_turns_only(chat_tokenizer, loss_on, expected):
    encoded = encode({"messages": TURNS}, chat_tokenizer, loss_on=loss_on)
    decoded = chat_tokenizer.decode(trained(encoded)).replace("\n", "").replace("<unk>", "")
    assert decoded.replace(" ", "") == expected


@pytest.mark.shared
def test_a_template_that_rewrites_earlier_turns_is_refused(chat_tokenizer, monkeypatch):
    rewriting = "{{ messages|length }} turns. " + CHAT
    monkeypatch.setattr(chat_tokenizer, "chat_template", rewriting)
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode({"messages": TURNS, "example_id": "x"}, chat_tokenizer)


def test_conversations_without_a_template_are_refused(word_tokenizer):
    with pytest.raises(DataError, match="no chat template"):
        encode({"messages": TURNS}, word_tokenizer)


def test_truncation_is_reported_and_a_full_prompt_is_an_error(word_tokenizer):
    row = {"prompt": "w1 w2 w3 ", "completion": "w4 w5 w6", "example_id": "row-17"}
    assert encode(row, word_tokenizer, 7)["truncated"] is False
    cut = encode(row, word_tokenizer, 5)
    assert cut["truncated"] is True and cut["length"] == 5 and len(trained(cut)) == 2
    with pytest.raises(DataError, match=r"row-17.*3 tokens.*max_length is 3"):
        encode(row, word_tokenizer, 3)


def test_tokenizers_without_offsets_are_refused_by_name():
    class Slow(PreTrainedTokenizer):
        vocab_size = 3

        def get_vocab(self):
            return {"a": 0, "b": 1, "<eos>": 2}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return 0

        def _convert_id_to_token(self, index):
            return "a"

    with pytest.raises(DataError, match="Slow"):
        encode({"prompt": "a", "completion": "b"}, Slow(eos_token="<eos>"))


def test_rows_without_anything_to_learn_are_refused(word_tokenizer):
    with pytest.raises(DataError, match="neither prompt"):
        encode({"example_id": "x", "question": "?"}, word_tokenizer)
    with pytest.raises(DataError, match="assistant"):
        encode({"messages": TURNS[:2]}, word_tokenizer)
