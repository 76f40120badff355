"""A tokenizer that went into a GGUF reads texts as it did: in llama.cpp, and in transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from gguf_reader import Reader, write_vocabulary
from texts import TEXTS
from transformers import AutoTokenizer

from qlora_kit.base.source import TINY
from qlora_kit.base.tokenizer import load_tokenizer
from qlora_kit.gguf.vocabulary import TokenType, vocabulary

STORIES = Path(os.environ.get("QLORA_KIT_DATA", "absent")) / "models" / "stories260K"


def differing(tokenizer: Any, reader: Any) -> dict[str, Any]:
    """The texts that a reader has other tokens for."""
    found = {name: (tokenizer(text)["input_ids"], reader(text)) for name, text in TEXTS.items()}
    return {name: both for name, both in found.items() if both[0] != both[1]}


@pytest.mark.parametrize("base", ["tiny", "stories260K"])
def test_texts_are_the_same_tokens_in_three_readers(base: str, tmp_path: Path) -> None:
    directory = {"tiny": TINY, "stories260K": STORIES}[base]
    if not directory.exists():
        pytest.skip("needs the model stories260K of $QLORA_KIT_DATA")
    tokenizer = load_tokenizer(directory)
    rows = len(tokenizer) + 3
    found = vocabulary(tokenizer, rows, [tokenizer.eos_token_id])
    assert found.tokens[-1] == f"[PAD{rows - 1}]"
    assert found.types[-3:] == [TokenType.UNUSED] * 3
    write_vocabulary(found, tmp_path / "model.gguf")
    assert differing(tokenizer, Reader(tmp_path / "model.gguf").tokens) == {}
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    # transformers puts a space before the first part of a text alone, and none before another: a
    # file of the architecture "llama" cannot tell it what the tokenizer does.
    upstream = {"tiny": set(), "stories260K": {"a space", "spaces before", "control strings"}}
    assert differing(tokenizer, lambda text: theirs(text)["input_ids"]).keys() == upstream[base]
