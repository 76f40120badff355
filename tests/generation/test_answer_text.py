"""The text of an answer, pushed token by token, is what decoding all tokens again gives."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import TEXTS
from tokenizer_kinds import byte_level, sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_kit.generation.text import (
    CONTEXT,
    CUT_EVERY,
    FROM_PROMPT,
    AnswerText,
    added_text,
    stop_at,
)


def word_pieces() -> PreTrainedTokenizerFast:
    """BERT's kind: spaces are what the decoder puts between words, but not before the first."""
    words = ["[UNK]", "[SEP]", "the", "fox", "##es", "##y", "jump", "'", "s", ".", ","]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]")


KINDS = {
    **{name: functools.partial(byte_level, name) for name in ("llama-bpe", "gpt-2")},
    **{name: functools.partial(sentencepiece, name) for name in ("llama-2", "gemma", "phi-3")},
    "bert": word_pieces,
}
BYTE = re.compile(r"<0x..>")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def whole_text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def final_at_each(tokenizer: Any, ids: Sequence[int], after: Sequence[int]) -> Iterator[str]:
    """What is final with each token where all that there is is decoded again with it."""
    seen, text = list(after), whole_text(tokenizer, after)
    given = text.rstrip("\ufffd")
    for token in ids:
        seen.append(token)
        before, text = text, whole_text(tokenizer, seen)
        final = text.rstrip("\ufffd")
        waits = text == before or BYTE.fullmatch(tokenizer.convert_ids_to_tokens(token))
        if waits or not final.startswith(given):
            yield ""
        else:
            yield final[len(given) :]
            given = final


def any_ids(tokenizer: Any, seed: int) -> list[int]:
    """Texts of all kinds one after another, some tokens replaced by any others."""
    drawn = random.Random(seed)
    texts = list(TEXTS.values())
    text = "".join(drawn.sample(texts, 9)) if seed % 3 else " the quick fox, jumps. " * 6
    ids = tokenizer.encode(text, add_special_tokens=False)
    for _ in range(seed * len(ids) // 40):
        ids[drawn.randrange(len(ids))] = drawn.randrange(len(tokenizer))
    return ids


@pytest.mark.parametrize("seed", range(10))
def test_pieces_are_those_of_decoding_all_again(tokenizer: Any, seed: int) -> None:
    ids = any_ids(tokenizer, seed)
    drawn = random.Random(seed)
    for cut in (0, drawn.randrange(len(ids)), drawn.randrange(len(ids))):
        text = AnswerText(tokenizer, after=ids[:cut])
        pieces = [text.push(token) for token in ids[cut:]]
        assert pieces == list(final_at_each(tokenizer, ids[cut:], ids[:cut]))
        assert "".join(pieces) + text.finish() == added_text(tokenizer, ids[cut:], ids[:cut])


def test_a_token_of_a_long_text_costs_what_one_of_a_short_text_costs(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode(" the quick fox, jumps. " * 60, add_special_tokens=False)
    text = AnswerText(tokenizer, after=ids * 4)
    counts = []
    real = type(tokenizer).decode

    def counted(self: Any, ids: Sequence[int], **options: Any) -> str:
        counts.append(len(ids))
        return real(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    for token in ids:
        text.push(token)
    assert len(ids) > 300
    assert max(counts) <= 3 * (CONTEXT + CUT_EVERY)
    assert len(counts) <= 2 * len(ids)


@pytest.mark.parametrize("end", ["special", "blanks", "characters of bytes"])
def test_a_prompt_costs_the_same_whatever_it_ends_in(
    tokenizer: Any, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing at its end is a place to begin at."""
    coded = functools.partial(tokenizer.encode, add_special_tokens=False)
    special = tokenizer.eos_token_id
    ends = {"special": [special], "blanks": coded(" \n \t"), "characters of bytes": coded("🦊🐴")}
    prompt = coded("the fox") + ends[end] * 400
    answer = coded("🐴🦊 jumps, the fox.")
    expected = list(final_at_each(tokenizer, answer, prompt))
    counts, real = [], type(tokenizer).decode

    def counted(self: Any, ids: Sequence[int], **options: Any) -> str:
        counts.append(len(ids))
        return real(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    text = AnswerText(tokenizer, after=prompt)
    assert len(counts) <= 2 * FROM_PROMPT
    pieces = [text.push(token) for token in answer]
    assert max(counts) <= FROM_PROMPT + len(answer)
    assert "".join(pieces) + text.finish() == added_text(tokenizer, answer, prompt)
    assert pieces == expected


@pytest.mark.parametrize("stops", [["fox,"], ["\n", "x,", " th"], ["never"], ["quick fox"]])
def test_nothing_of_a_stop_is_given_and_what_comes_after_it_is_not(
    tokenizer: Any, stops: list[str]
) -> None:
    prompt, *_ = ids = tokenizer.encode("the quick fox, jumps.", add_special_tokens=False)
    whole = added_text(tokenizer, ids[1:], [prompt])
    text = AnswerText(tokenizer, after=[prompt], stops=stops)
    pieces = []
    for token in ids[1:]:
        was_stopped = text.stopped
        pieces.append(text.push(token))
        assert not (was_stopped and pieces[-1])
    assert text.stopped == (stop_at(whole, stops) is not None)
    assert "".join(pieces) + text.finish() == whole[: stop_at(whole, stops)]


PIECES = ["".join(letters) for size in range(1, 5) for letters in product("ab", repeat=size)]


@functools.cache
def of_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are all pieces of up to four of two letters."""
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@given(st.lists(st.sampled_from(PIECES), max_size=8), st.lists(st.text("ab", min_size=1)))
def test_an_answer_ends_before_the_first_stop_whatever_its_pieces(
    pieces: list[str], stops: list[str]
) -> None:
    whole = "".join(pieces)
    # Letter by letter: the first place where the text ends with a stop.
    ends = (whole[:n] for n in range(len(whole) + 1) if whole[:n].endswith(tuple(stops)))
    first = next(ends, None) if stops else None
    if first is None:
        expected = whole
    else:
        expected = first[: -max(len(stop) for stop in stops if first.endswith(stop))]
    text = AnswerText(of_pieces(), stops=stops)
    given_pieces = [text.push(PIECES.index(piece)) for piece in pieces]
    assert "".join(given_pieces) + text.finish() == expected
