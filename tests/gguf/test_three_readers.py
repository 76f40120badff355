"""A tokenizer that went into a GGUF reads texts as it did: in llama.cpp, and in transformers."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_reader import Reader, write_vocabulary
from texts import TEXTS
from tokenizer_kinds import ADDED, SPLITS, byte_level, sentencepiece
from tokenizers import AddedToken
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from qlora_kit.base.contents import tokenizer_files
from qlora_kit.base.source import TINY
from qlora_kit.base.tokenizer import load_tokenizer, make_tokenizer
from qlora_kit.data.answers import turn_ends
from qlora_kit.gguf.metadata import general
from qlora_kit.gguf.pre_tokenizer import KNOWN
from qlora_kit.gguf.sentencepiece import LOWEST
from qlora_kit.gguf.spaces import general_name
from qlora_kit.gguf.token_list import BYTES
from qlora_kit.gguf.vocabulary import TokenType, Vocabulary, vocabulary

DATA = Path(os.environ.get("QLORA_KIT_DATA", "absent"))
STORIES, GPT2 = DATA / "models" / "stories260K", DATA / "tokenizers" / "gpt2"
FIRST_SPACES = {"a space", "spaces before", "control strings"}


def differing(tokenizer: Any, reader: Callable[[str], list[int]]) -> set[str]:
    """The texts that a reader has other tokens for."""
    return {name for name, text in TEXTS.items() if tokenizer(text)["input_ids"] != reader(text)}


def made(tokenizer: Any, rows: int = 0) -> Vocabulary:
    ends = turn_ends(tokenizer) | {tokenizer.eos_token_id}
    return vocabulary(tokenizer, rows or len(tokenizer), ends)


def in_llama_cpp(found: Vocabulary, directory: Path, **options: Any) -> Callable[[str], list[int]]:
    write_vocabulary(found, directory / "model.gguf", **options)
    return Reader(directory / "model.gguf").tokens


def in_transformers(directory: Path) -> Callable[[str], list[int]]:
    theirs = AutoTokenizer.from_pretrained(directory, gguf_file="model.gguf")
    return lambda text: list(theirs(text)["input_ids"])


@pytest.mark.parametrize("base", ["tiny", "stories260K"])
def test_texts_are_the_same_tokens_in_three_readers(base: str, tmp_path: Path) -> None:
    directory = {"tiny": TINY, "stories260K": STORIES}[base]
    if not directory.exists():
        pytest.skip("needs the model stories260K of $QLORA_KIT_DATA")
    tokenizer = load_tokenizer(directory)
    rows = len(tokenizer) + 3
    found = made(tokenizer, rows)
    assert found.tokens[-1] == f"[PAD{rows - 1}]"
    assert found.types[-3:] == [TokenType.UNUSED] * 3
    assert found.warnings() == []
    assert differing(tokenizer, in_llama_cpp(found, tmp_path)) == set()
    # transformers puts a space before the first part of a text alone, and none before another: a
    # file of the architecture "llama" cannot tell it what the tokenizer does.
    upstream = {"tiny": set(), "stories260K": FIRST_SPACES}
    assert differing(tokenizer, in_transformers(tmp_path)) == upstream[base]


def test_scores_out_of_merges_are_in_the_order_of_sentencepieces() -> None:
    if not STORIES.exists():
        pytest.skip("needs the model stories260K of $QLORA_KIT_DATA")
    theirs = dict(pieces((STORIES / "tokenizer.model").read_bytes()))
    found = made(load_tokenizer(STORIES))
    assert found.tokens == list(theirs)
    assert found.scores is not None
    ours = dict(zip(found.tokens, found.scores, strict=True))
    merged = [text for text, score in ours.items() if score > LOWEST and text not in BYTES]
    merged = [text for text in merged if found.types[found.tokens.index(text)] == 1]
    assert len(merged) > 100
    assert sorted(merged, key=ours.__getitem__) == sorted(merged, key=theirs.__getitem__)


def pieces(content: bytes) -> Iterator[tuple[str, float]]:
    """The texts and scores of a tokenizer.model: fields 1 of a message, of fields 1 and 2."""

    def fields(data: bytes) -> Iterator[tuple[int, Any]]:
        place = 0
        while place < len(data):
            head, place = varint(data, place)
            if head & 7 == 0:
                value, place = varint(data, place)
                yield head >> 3, value
                continue
            size = 4
            if head & 7 == 2:
                size, place = varint(data, place)
            yield head >> 3, data[place : place + size]
            place += size

    def varint(data: bytes, place: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (data[place] & 127) << shift
            shift, place = shift + 7, place + 1
            if data[place - 1] < 128:
                return value, place

    for number, message in fields(content):
        if number == 1:
            said = dict(fields(message))
            yield said[1].decode(), struct.unpack("<f", said[2])[0] if 2 in said else 0.0


def test_texts_are_the_same_tokens_with_the_vocabulary_of_gpt_2(tmp_path: Path) -> None:
    if not GPT2.exists():
        pytest.skip("needs the tokenizer gpt2 of $QLORA_KIT_DATA")
    tokenizer = make_tokenizer(GPT2, tokenizer_files(GPT2), {"model_type": "gpt2"})
    found = made(tokenizer)
    assert found.pre == "gpt-2"
    assert differing(tokenizer, in_llama_cpp(found, tmp_path)) == set()


LLAMA_CPP = {
    "qwen2": {"combining"},
    "qwen35": {"combining"},
    "tekken": {"combining", "marks"},
    "gpt-4o": {"combining", "marks"},
    "metaspace": FIRST_SPACES,
}
"""Texts that llama.cpp reads otherwise whatever a file says."""
TRANSFORMERS = {
    # It takes GPT-2's split for what it does not know.
    "deepseek-v3": {
        *("code", "contractions", "combining", "digits", "marks", "cases", "other spaces")
    },
    "qwen2": {"combining"},
    "qwen35": {"combining"},
    # It does not leave words whole.
    "llama-bpe": {"a word of its own"},
    "tekken": {"a word of its own"},
    "llama-2": FIRST_SPACES,
    # It drops no spaces beside control tokens.
    "phi-3": {"control strings"},
}
"""Texts that transformers' reader of GGUF reads otherwise."""


@pytest.mark.parametrize("kind", [*SPLITS, *ADDED])
def test_texts_are_the_same_tokens_for_every_kind(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_level(kind) if kind in SPLITS else sentencepiece(kind)
    found = made(tokenizer)
    assert (found.model, found.pre) == (("gpt2", kind) if kind in SPLITS else ("llama", "default"))
    architecture = {"gemma": "gemma2", "phi-3": "phi3"}.get(kind, "llama")
    others = differing(tokenizer, in_llama_cpp(found, tmp_path))
    assert others == LLAMA_CPP.get(kind, set())
    # And that is said, of each such text and as a sentence.
    assert not any(found.reads(TEXTS[name]) for name in others)
    assert bool(others) == any("reads otherwise" in one for one in found.warnings())
    write_vocabulary(found, tmp_path / "model.gguf", architecture)
    assert differing(tokenizer, in_transformers(tmp_path)) == TRANSFORMERS.get(kind, set())


@pytest.mark.parametrize("made_by", [LlamaTokenizer, GemmaTokenizer])
def test_tokenizers_that_transformers_builds_itself(made_by: Any, tmp_path: Path) -> None:
    like = sentencepiece("gemma" if made_by is GemmaTokenizer else "llama-2")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    merges = [tuple(one) for one in backend_of(like)["model"]["merges"]]
    tokenizer = made_by(vocab=like.get_vocab(), merges=merges, add_bos_token=True, **names)
    found = made(tokenizer)
    others = differing(tokenizer, in_llama_cpp(found, tmp_path))
    assert not any(found.reads(TEXTS[name]) for name in others)
    # Both have a plain token `<|im_end|>`, which llama.cpp takes for the end of a turn.
    spaces = {"control strings"} if made_by is GemmaTokenizer else FIRST_SPACES
    assert others == spaces


def backend_of(tokenizer: Any) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def test_parts_of_a_chat_have_the_spaces_that_the_tokenizer_gives_them(tmp_path: Path) -> None:
    """A space before a text's first part alone is none in a chat, which begins with BOS."""
    tokenizer = sentencepiece("metaspace")
    tokenizer.chat_template = "{{ bos_token }}[INST]{{ messages[0].content }}"
    found = made(tokenizer)
    read = in_llama_cpp(found, tmp_path)
    for chat in ("<s>[INST]Hi</s><s>[INST] there  [INST]", "<s> a", "[INST]two parts"):
        assert found.reads(chat)
        assert read(chat) == tokenizer(chat)["input_ids"]
    assert not found.reads(TEXTS["prose"])
    assert read(TEXTS["prose"]) != tokenizer(TEXTS["prose"])["input_ids"]


@pytest.mark.parametrize("kind", ["llama-2", "gemma", "metaspace", "gpt-2"])
def test_added_tokens_are_found_in_texts(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_level(kind) if kind in SPLITS else sentencepiece(kind)
    added = [AddedToken("<tool>"), AddedToken("<raw>", normalized=False)]
    added += [AddedToken("yes", single_word=True), AddedToken("▁▁x", normalized=kind == "gemma")]
    tokenizer.add_tokens(added)
    found = made(tokenizer)
    read = in_llama_cpp(found, tmp_path)
    alike = set()
    for text in ("<tool>", "a<tool>b", "a <raw> b", "</s><raw>", "a  xb", "a   xb", "yes", "yesno"):
        if read(text) == tokenizer(text)["input_ids"]:
            alike.add(text)
        else:
            assert not found.reads(text), text
    # Of what is said to differ some is alike; what is common is.
    assert alike >= {"<tool>", "</s><raw>", "yes"}
    assert kind == "metaspace" or "a <raw> b" in alike


@pytest.mark.parametrize("name", sorted(KNOWN.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys()))
def test_splits_are_those_that_transformers_takes_for_a_name(name: str) -> None:
    assert KNOWN[name].splits == (GGUF_PRE_TOKENIZER_SPLITS[name],)


def test_spaces_beside_control_tokens_go_where_the_name_says_so(tmp_path: Path) -> None:
    text = "<|user|> \n Hi<|end|>\n<|user|> <s> a <|endoftext|> b</s> c"
    phi = sentencepiece("phi-3")
    found = made(phi)
    assert general_name("Phi-3.5-mini", found.strips) == "Phi-3.5-mini"
    assert general_name("mine", found.strips) == "mine phi-3"
    assert in_llama_cpp(found, tmp_path, name="mine")(text) == phi(text)["input_ids"]
    other = made(sentencepiece("llama-2"))
    assert general_name("my-phi3", other.strips) == "my-phi 3"
    assert ("general.name", "phi 3") in general("owner/phi-3", True, 1, "F32", other.strips)
    assert ("general.name", "phi-3") in general("owner/phi-3", True, 1, "F32", found.strips)
    tiny = load_tokenizer(TINY)
    # llama.cpp ends where a file of that name has not all of Phi-3's tokens.
    assert in_llama_cpp(made(tiny), tmp_path, name="Phi-3")(text) == tiny(text)["input_ids"]
