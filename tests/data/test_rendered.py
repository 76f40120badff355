"""Rows that a chat template has written already: control tokens are tokens, ends stand once."""

import json
from dataclasses import replace

import pytest
from chat_tokenizer import chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encode import make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_kit.config.data import DataConfig
from qlora_kit.data import tokens as tokens_module
from qlora_kit.data.encode import encode, encode_rows, prompt_ids
from qlora_kit.data.outcome import EncodeRules
from qlora_kit.data.rows import Row, load_rows
from qlora_kit.data.tokens import pieces
from qlora_kit.errors import DataError

RENDERED = "<|im_start|>user\nhe<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
BOS, EOS = 0, 1


def one(tokenizer, literal=False, max_length=1000, **content):
    (encoded,) = encode(Row(content, "rows.jsonl", 1, literal), tokenizer, max_length)
    return encoded.input_ids, encoded.labels


def spelled(tokenizer, text):
    """What transformers makes of a text, no token added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("before", ["", "<s>", "<s><s>"])
@pytest.mark.parametrize("after", ["", "</s>", "</s></s>", "</s>\n"])
def test_a_rendered_text_is_its_tokens_with_one_start_and_one_end(before, after):
    tokenizer = chat_tokenizer()
    ids, labels = one(tokenizer, text=before + RENDERED + after)
    blank = spelled(tokenizer, "\n") if after.endswith("\n") else []
    assert ids == [BOS, *spelled(tokenizer, RENDERED), EOS, *blank]
    assert labels == [-100, *ids[1:]]


@pytest.mark.parametrize("before", ["", "<s>"])
@pytest.mark.parametrize("after", ["", "</s>"])
def test_a_rendered_pair_is_its_tokens_and_only_the_completion_is_trained_on(before, after):
    tokenizer = chat_tokenizer()
    prompt, completion = RENDERED.split("hello")[0], "hello<|im_end|>"
    ids, labels = one(tokenizer, prompt=before + prompt, completion=completion + after)
    head = [BOS, *spelled(tokenizer, prompt)]
    tail = [*spelled(tokenizer, completion), EOS]
    assert (ids, labels) == (head + tail, [-100] * len(head) + tail)
    # What generation is handed is what training put there.
    assert prompt_ids(before + prompt, tokenizer) == head


def test_without_a_tokenizer_that_adds_one_a_start_is_what_the_row_spells():
    tokenizer = chat_tokenizer(adds_bos=False)
    for before, count in (("", 0), ("<s>", 1), ("<s><s>", 1)):
        ids, _ = one(tokenizer, text=before + RENDERED)
        assert ids == [*[BOS] * count, *spelled(tokenizer, RENDERED), EOS]


def test_asked_for_characters_every_control_token_is_characters():
    tokenizer = chat_tokenizer()
    control = set(tokenizer.all_special_ids)
    text = "<s>" + RENDERED + "</s>"
    for content in ({"text": text}, {"prompt": text, "completion": text}):
        ids, _ = one(tokenizer, literal=True, **content)
        assert (ids[0], ids[-1]) == (BOS, EOS)
        assert not control & set(ids[1:-1])
        assert tokenizer.decode(ids[1:-1]) == text * len(content)


def test_the_text_of_chats_and_of_instructions_stays_text(tmp_path):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "spell </s>", "output": "it is </s>"}))
    (row,) = load_rows(DataConfig(data=str(path), eval_fraction=0), 0).train
    (encoded,) = encode(row, tokenizer, 1000)
    # The one at the end is ours: eos_token is <|im_end|>.
    assert encoded.input_ids.count(EOS) == 0
    assert tokenizer.decode(encoded.input_ids).endswith("it is </s><|im_end|>")
    path.write_text(json.dumps({"text": "spell </s> and"}))
    for options, count in (({}, 1), ({"literal_control_tokens": True}, 0)):
        config = DataConfig(data=str(path), eval_fraction=0, **options)
        (encoded,) = encode_rows(load_rows(config, 0).train, tokenizer, 1000, cache=tmp_path).rows
        assert encoded.input_ids.count(EOS) == count


def test_control_tokens_and_doubled_ends_are_counted():
    tokenizer = chat_tokenizer()
    rows = [Row({"text": t}, "r", n) for n, t in enumerate(["<s>he</s>", "he", RENDERED])]
    found = encode_rows(rows, tokenizer, 1000)
    assert (found.controls, found.doubled) == (2 + 4, 2)
    literal = [replace(row, literal=True) for row in rows]
    found = encode_rows(literal, tokenizer, 1000)
    assert (found.controls, found.doubled) == (0, 0)


def test_what_the_tokenizer_does_not_know_is_counted():
    words = {"<unk>": 0, "he": 1, "</s>": 2, "on": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    for special, count in ((words, 3), ({"</s>": 2}, 0)):
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token="</s>",
            unk_token="<unk>" if "<unk>" in special else "</s>",
        )
        rows = [
            Row({"text": "he é on 🙂"}, "r", 1),
            Row({"prompt": "ü", "completion": "he"}, "r", 2),
        ]
        found = encode_rows(rows, made, 100)
        assert found.tokens == 5 + 3
        # Where the same token also ends a text it says nothing about what is unknown.
        assert found.unknown_tokens == count
        assert found.controls == 0
        note = [one for one in found.notes() if "<unk>" in one]
        assert len(note) == bool(count)
        assert not count or "3 tokens of rows (37.50%)" in note[0]


# --- long rows ----------------------------------------------------------------------------------


def rows_of(*lengths):
    return [Row({"prompt": "q" * n, "completion": "on"}, "rows.jsonl", n) for n in lengths]


def test_long_rows_are_truncated_dropped_or_an_error():
    tokenizer = make_tokenizer(adds_bos=False)
    rows = rows_of(1, 3, 4, 2)  # one token a letter, one for "on", one for the end
    found = encode_rows(rows, tokenizer, 5)
    assert found.cut == (("the beginning of the prompt", 1, 1),)
    assert found.skipped == {}
    found = encode_rows(rows, tokenizer, 5, EncodeRules(long_rows="drop"))
    assert (len(found.rows), found.skipped, found.cut) == (3, {"longer than max_length": 1}, ())
    with pytest.raises(DataError, match=r"rows.jsonl:4: the row has 6 tokens or more.*--long_rows"):
        encode_rows(rows, tokenizer, 5, EncodeRules(long_rows="error"))
    assert encode_rows(rows, tokenizer, 6, EncodeRules(long_rows="error")).skipped == {}


def test_dropped_rows_may_be_the_most_where_that_was_asked_for():
    tokenizer = make_tokenizer(adds_bos=False)
    with pytest.raises(DataError, match=r"3 of 4 rows.*--long_rows drop") as caught:
        encode_rows(rows_of(9, 9, 9, 1), tokenizer, 5)
    assert "--allow_longer_context" in caught.value.remedy
    # The remedy works.
    found = encode_rows(rows_of(9, 9, 9, 1), tokenizer, 5, EncodeRules(long_rows="drop"))
    assert (len(found.rows), found.skipped) == (1, {"longer than max_length": 3})
    # It is not named where it would not: what is left is cut, or nothing is left.
    for lengths in ((9, 9, 9, 4), (9, 9)):
        with pytest.raises(DataError) as caught:
            encode_rows(rows_of(*lengths), tokenizer, 5)
        assert "drop" not in caught.value.remedy
    with pytest.raises(DataError, match="longer than max_length: 2") as caught:
        encode_rows(rows_of(9, 9), tokenizer, 5, EncodeRules(long_rows="drop"))
    assert "truncate" in caught.value.remedy


# --- one long row ---------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.text(st.sampled_from("ab \n"), max_size=60), st.integers(4, 12))
def test_pieces_are_the_text(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "PIECE", size)
        parts = list(pieces(text))
    assert "".join(parts) == text
    assert all(len(part) <= size for part in parts)


def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch):
    tokenizer = chat_tokenizer()
    text = "".join(f"he {n} hello: on\n\n" if n % 7 else f"hello {n}\n" for n in range(300))
    whole = one(tokenizer, max_length=10**6, text=text)
    monkeypatch.setattr(tokens_module, "PIECE", 500)
    monkeypatch.setattr("qlora_kit.data.encode.PIECE", 500)
    monkeypatch.setattr("qlora_kit.data.labels.PIECE", 500)
    assert one(tokenizer, max_length=10**6, text=text) == whole
    assert one(tokenizer, max_length=10**6, prompt=text, completion=text)[0][-1] == EOS
