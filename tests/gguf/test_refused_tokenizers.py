"""What llama.cpp would read otherwise is refused by name: a wrong file loads without a word."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizer_kinds import byte_level, sentencepiece, with_word
from tokenizers import Regex, Tokenizer, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qlora_kit.errors import TokenizerError
from qlora_kit.gguf.sentencepiece import scores_of
from qlora_kit.gguf.vocabulary import vocabulary

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,4}|\s+"
BYTES = pre.ByteLevel(add_prefix_space=False, use_regex=False)


def refused(tokenizer: Any, rows: int = 0) -> str:
    with pytest.raises(TokenizerError) as caught:
        vocabulary(tokenizer, rows or len(tokenizer), [tokenizer.eos_token_id])
    assert "--format hf" in caught.value.remedy or rows
    return caught.value.problem


def wrapped(backend: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("model", "trainer"),
    [
        (models.Unigram(), trainers.UnigramTrainer(special_tokens=["<s>", "</s>"], unk_token="?")),
        (
            models.WordPiece(unk_token="?"),
            trainers.WordPieceTrainer(special_tokens=["<s>", "</s>"]),
        ),
        (
            models.WordLevel(unk_token="?"),
            trainers.WordLevelTrainer(special_tokens=["<s>", "</s>"]),
        ),
    ],
)
def test_other_models_are_refused_by_name(model: Any, trainer: Any) -> None:
    backend = Tokenizer(model)
    backend.train_from_iterator(["some words and a few more words"], trainer)
    assert f"is a {type(model).__name__} model, not BPE" in refused(wrapped(backend))


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([pre.Split(Regex(LLAMA_3), "isolated"), BYTES], r"splits texts by (?i:"),
        ([pre.Split(Regex(r"\s+"), "removed"), BYTES], "has the pre-tokenizer Split"),
        ([pre.Whitespace(), BYTES], "has the pre-tokenizer Whitespace"),
        (
            [pre.Digits(individual_digits=False), pre.ByteLevel(False)],
            r"splits texts by \p{N}+ then",
        ),
        ([pre.ByteLevel(add_prefix_space=True)], "has the pre-tokenizer ByteLevel"),
        ([BYTES], "splits texts by nothing"),
        ([pre.ByteLevel(False), pre.Digits(individual_digits=True)], r"|\s+ then \p{N}"),
    ],
)
def test_unknown_splits_are_refused_with_what_was_found(steps: list[Any], found: str) -> None:
    tokenizer = byte_level("gpt-2")
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(steps)
    assert found in refused(tokenizer)


def test_splits_that_are_written_otherwise_are_the_same() -> None:
    tokenizer = byte_level("dbrx")
    regex = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]
    written = regex["pattern"]["Regex"].replace(r"\r", "\r").replace(r"\n", "\n")
    written = written.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Sequence([pre.Split(Regex(written), "removed", invert=True)]), BYTES]
    )
    assert vocabulary(tokenizer, len(tokenizer), [1]).pre == "dbrx"


def test_whole_words_matter_where_no_merges_lead_to_them() -> None:
    """llama.cpp leaves words whole under some names; elsewhere that must make no difference."""
    tokenizer = byte_level("qwen2")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["ignore_merges"] = True
    backend = Tokenizer.from_str(json.dumps(described))
    assert vocabulary(wrapped(backend), len(tokenizer), [1]).pre == "qwen2"
    assert "no merges lead to 'Ġunmergeable'" in refused(
        wrapped(with_word(backend, "Ġunmergeable"))
    )


@pytest.mark.parametrize(
    ("normalizer", "found"),
    [
        (normalizers.Lowercase(), "has the normalizer Lowercase, which llama.cpp does not know"),
        (normalizers.Strip(), "has the normalizer Strip {'strip_left': True"),
        (normalizers.Replace("a", "b"), "has the normalizer Replace {'pattern': {'String': 'a'}"),
    ],
)
@pytest.mark.parametrize("kind", ["gpt-2", "gemma"])
def test_what_changes_texts_is_refused(kind: str, normalizer: Any, found: str) -> None:
    tokenizer = byte_level(kind) if kind == "gpt-2" else sentencepiece(kind)
    before = tokenizer.backend_tokenizer.normalizer
    steps = [normalizer] if before is None else [normalizer, before]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    assert found in refused(tokenizer)


def test_sentencepieces_that_split_words_or_leave_spaces_are_refused() -> None:
    tokenizer = sentencepiece("metaspace")
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Metaspace(split=True)
    assert "has the pre-tokenizer Metaspace" in refused(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Whitespace()
    assert "has the pre-tokenizer Whitespace" in refused(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence([])
    assert "leaves spaces as they are" in refused(tokenizer)


def test_merges_that_sentencepiece_could_not_have_are_refused() -> None:
    letters = ["a", "b", "c", "d"]
    assert scores_of([*letters, "ab", "abc"], [("a", "b"), ("ab", "c")]) == {"ab": 0, "abc": -1}
    for words, merges, said in (
        (["ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("ab", "c")], "'a' + 'bc' is a token"),
        (["ab"], [], "'a' + 'b' is a token, but no merge (1 such pairs)"),
        (
            ["ab", "abc", "bc", "cd"],
            [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "d"), ("a", "bc")],
            "those of 'abc' and 'cd' are mixed",
        ),
    ):
        with pytest.raises(TokenizerError) as caught:
            scores_of([*letters, *words], merges)
        assert said in caught.value.problem
    # Runs of one character may have one score, whose order is not to be had.
    runs = ["aa", "aaa", "aaaa"]
    merges = [("a", "a"), ("a", "aa"), ("a", "aaa"), ("aa", "a"), ("aa", "aa"), ("aaa", "a")]
    assert scores_of(["a", *runs], merges) == {"aa": 0, "aaa": -1, "aaaa": -2}


def test_rows_ends_and_what_is_around_a_text() -> None:
    tokenizer = byte_level("gpt-2")
    last = len(tokenizer) - 1
    assert f"has the token {last}, the embedding {last} rows" in refused(tokenizer, last)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_end|> $A",
        pair="$A $B",
        special_tokens=[("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))],
    )
    assert "puts ['<|im_end|>'] around a text" in refused(tokenizer)


def test_without_bos_llama_cpp_gets_another_token_than_its_own() -> None:
    tokenizer = byte_level("qwen2")
    tokenizer.bos_token = None
    rows = len(tokenizer)
    assert vocabulary(tokenizer, rows, [1], 5).ids["bos_token_id"] == 5
    for absent in (None, rows):
        ids = vocabulary(tokenizer, rows, [1], absent).ids
        assert ids["bos_token_id"] == ids["eos_token_id"] == tokenizer.eos_token_id
