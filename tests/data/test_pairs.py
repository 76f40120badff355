"""Laws of pairs of answers: their shapes, their tokens, and what is lost of both."""

from __future__ import annotations

import json

import numpy as np
import pytest
from families import save_checkpoint
from transformers import AutoTokenizer

from qlora_kit.data.chat_template import use_template
from qlora_kit.data.encode import EMPTY, SAME, encode_rows
from qlora_kit.data.rows import read_rows
from qlora_kit.errors import DataError

SAID = [{"role": "user", "content": "w3 w4"}]
CHOSEN, REJECTED = ([{"role": "assistant", "content": text}] for text in ("w5 w6", "w7"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    place = tmp_path_factory.mktemp("pairs")
    save_checkpoint(place)
    return AutoTokenizer.from_pretrained(place)


@pytest.fixture
def encoded(tmp_path, tokenizer):
    """Encodes rows that a file has, each a dict."""

    def encode(*rows, length=64, chat=False, refuse=False):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if chat:
            use_template(tokenizer, "plain")
        is_pair = {"chosen", "rejected"} & rows[0].keys()
        read = read_rows(path, "preference" if is_pair else "auto")
        return encode_rows(read, tokenizer, length, refuse=refuse)

    return encode


def text_pair(prompt="w3 w4", chosen=" w5 w6", rejected=" w7"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_each_answer_is_a_row_as_a_completion_is(encoded):
    pairs = encoded(text_pair(), text_pair("w8"))
    singles = encoded(
        *(
            {"prompt": row["prompt"], "completion": row[side]}
            for row in (text_pair(), text_pair("w8"))
            for side in ("chosen", "rejected")
        )
    )
    assert pairs.pairs == 2
    assert singles.pairs == 0
    assert list(pairs.rows) == list(singles.rows)
    assert (pairs.tokens, pairs.supervised_tokens) == (singles.tokens, singles.supervised_tokens)


def test_chats_in_every_spelling_are_the_same_pair(encoded):
    explicit = {"prompt": SAID, "chosen": CHOSEN, "rejected": REJECTED}
    whole = {"chosen": [*SAID, *CHOSEN], "rejected": [*SAID, *REJECTED]}
    found = encoded(explicit, whole, {**whole, "prompt": "w3 w4"}, chat=True)
    rows = list(found.rows)
    assert found.pairs == 3
    assert rows[0:2] == rows[2:4] == rows[4:6]
    assert found.duplicates == 2  # pairs, not rows
    (single,) = encoded({"messages": [*SAID, *CHOSEN]}, chat=True).rows
    assert rows[0] == single


def test_earlier_answers_of_a_pair_are_not_trained_on(encoded):
    before = [*SAID, *CHOSEN, *SAID]
    found = encoded({"chosen": [*before, *CHOSEN], "rejected": [*before, *REJECTED]}, chat=True)
    alone = encoded({"prompt": SAID, "chosen": CHOSEN, "rejected": REJECTED}, chat=True)
    assert found.supervised_tokens == alone.supervised_tokens


def test_both_answers_lose_as_much_of_their_prompt(encoded):
    whole = encoded(text_pair())
    length = len(whole.rows[0].input_ids) - 2
    found = encoded(text_pair(), length=length)
    chosen, rejected = found.rows
    lengths = [sum(label == -100 for label in row.labels) for row in (chosen, rejected)]
    assert lengths[0] == lengths[1]
    assert chosen.input_ids[: lengths[0]] == rejected.input_ids[: lengths[0]]
    assert len(chosen.input_ids) == length
    assert chosen.labels[lengths[0] :] == whole.rows[0].labels[lengths[0] + 2 :]
    assert (found.truncated, found.cut_tokens) == (1, 4)


def test_what_is_no_pair_is_skipped_with_its_reason(encoded):
    long = " ".join(f"w{n}" for n in range(10, 40))
    found = encoded(
        text_pair(),
        text_pair(rejected=" w5 w6"),
        text_pair(rejected=""),
        text_pair(long, long, " w5"),
        length=24,
    )
    assert found.pairs == 1
    assert found.skipped[SAME] == 1
    assert found.skipped[EMPTY] == 1
    assert sum(found.skipped.values()) == 3
    many = [{"role": "assistant", "content": long}]
    chats = encoded({"prompt": SAID, "chosen": CHOSEN, "rejected": many}, length=24, chat=True)
    assert chats.pairs == 0
    assert chats.refusal is not None


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "w3", "chosen": " w4"}, 'no field "rejected"'),
        ({"chosen": " w4", "rejected": " w5"}, 'no field "prompt"'),
        ({"prompt": SAID, "chosen": " w4", "rejected": " w5"}, "a list of messages"),
        ({"prompt": "w3", "chosen": CHOSEN, "rejected": " w5"}, "is text"),
        ({"chosen": CHOSEN, "rejected": REJECTED}, "do not begin with the same message"),
        (
            {"prompt": "w9", "chosen": [*SAID, *CHOSEN], "rejected": [*SAID, *REJECTED]},
            "none of the messages",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_refused_with_its_place(encoded, row, problem):
    with pytest.raises(DataError, match=problem) as caught:
        encoded(row)
    assert "rows.jsonl:1" in str(caught.value)


def test_pairs_are_known_again_in_both_parts(encoded):
    one, other = encoded(text_pair(), text_pair("w8")), encoded(text_pair("w8"))
    assert other.shared_with(one) == 1
    turned = encoded(text_pair("w8", " w7", " w5 w6"))
    assert turned.shared_with(one) == 0
    assert np.array_equal(np.sort(turned.rows.digests), np.sort(other.rows.digests))
